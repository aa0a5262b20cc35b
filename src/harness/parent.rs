//! One case → records: check everything, measure the memory, run the workers.

use anyhow::Result;

use super::case::Case;
use super::prepare::{BandwidthSource, PreparedCase};
use super::quality::{self, EvalText, Failed};
use super::schedule::WorkerHandle;
use super::warnings::Warning;
use super::watch::machine::MachineWatch;
use super::{agreement, assemble, checks};
use crate::engines::EngineProgram;
use crate::events::{Listener, Silent};
use crate::record::Record;

/// Measures every precision of `case`. Fails on input that cannot be used; a precision that fails becomes a record.
pub fn run(case: &Case, events: &dyn Listener) -> Result<Vec<Record>> {
    let chosen = checks::check(case)?;
    let (case, prepared) = &PreparedCase::open(case, chosen, events)?;
    let text = prepared.eval_text(case)?;
    let mut context = prepared.context(case, events)?;
    let mut watch = MachineWatch::new(prepared.sensors(&mut context));
    let outcomes = prepared.outcomes(case, context.order, &mut watch, events)?;
    let decode = |ids: &[u32]| prepared.text(ids);
    let mut records = assemble::records(&context, case, &outcomes, &decode);
    if let Some(read_gb_s) = context.read_gb_s.filter(|_| exceeds_bandwidth(&records)) {
        // A kernel that reads faster than the benchmark did shows that the benchmark was disturbed, or that caches helped.
        let again = prepared.bandwidth(case, BandwidthSource::Measurement, events)?.measured.read_gb_s;
        let higher = again.filter(|again| *again > read_gb_s);
        context.bandwidth_since = context.bandwidth_since.take().filter(|_| higher.is_none());
        context.read_gb_s = Some(higher.unwrap_or(read_gb_s));
        records = assemble::records(&context, case, &outcomes, &decode);
    }
    agreement::add(&mut records, case, &outcomes, (&prepared.exports, prepared.layers()));
    add_quality(prepared, case, text.as_ref(), &mut records, events)?;
    Ok(records)
}

/// Fails where [`run`] would fail before anything is measured.
pub fn check(case: &Case) -> Result<()> {
    let chosen = checks::check(case)?;
    PreparedCase::open(case, chosen, &Silent).map(drop)
}

/// Measures the quality of every precision of `case` and no speed. Fails on input that cannot be used and on a model that
/// has no quality; a precision that fails becomes a record.
pub fn quality(case: &Case, events: &dyn Listener) -> Result<Vec<Record>> {
    let chosen = checks::check(case)?;
    let (case, prepared) = &PreparedCase::open(case, chosen, events)?;
    let Some(text) = prepared.eval_text(case)? else { return Ok(Vec::new()) };
    let mut records = assemble::unmeasured(&prepared.unmeasured_context(case), case);
    for Failed { at, failure } in measure_quality(prepared, case, &text, &mut records, events)? {
        assemble::fail(&mut records[at], &failure);
    }
    Ok(records)
}

/// Adds quality to records of speed. A precision whose quality fails keeps its speed.
fn add_quality(
    prepared: &PreparedCase,
    case: &Case,
    text: Option<&EvalText>,
    records: &mut [Record],
    events: &dyn Listener,
) -> Result<()> {
    let Some(text) = text else { return Ok(()) };
    for Failed { at, failure } in measure_quality(prepared, case, text, records, events)? {
        let reason = failure.message().to_owned();
        records[at].warnings.push(Warning::NoQuality { reason }.to_string());
    }
    Ok(())
}

fn measure_quality(
    prepared: &PreparedCase,
    case: &Case,
    text: &EvalText,
    records: &mut [Record],
    events: &dyn Listener,
) -> Result<Vec<Failed>> {
    let start_other = |program: &EngineProgram, precision: &str, text: &EvalText| {
        let mut worker = prepared.other(case, (program, precision), &text.task(), 0)?;
        worker.load(&Silent).map(|_| worker)
    };
    quality::measure(text, case, (prepared.assignment, prepared.model(), &start_other), records, events)
}

fn exceeds_bandwidth(records: &[Record]) -> bool {
    records.iter().any(|record| record.bandwidth.mbu.is_some_and(|mbu| mbu > 1.0))
}
