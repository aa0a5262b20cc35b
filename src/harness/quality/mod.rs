//! The cost of each variant of a case in quality, measured by processes of their own: nothing here touches what a run measures. One
//! reference and one text serve all engines.

mod eval_text;
mod modules;
mod precision;
mod reference;

use anyhow::Result;

pub use self::eval_text::{EvalText, check};
use self::reference::ReferenceWorker;
use super::case::{Case, Variant};
use super::load::DeviceAssignment;
use super::worker_process::ProcessWorker;
use crate::engines::EngineProgram;
use crate::events::{Event, Listener, Unit};
use crate::plan::Model;
use crate::protocol::Failure;
use crate::quant::{self, FormatId};
use crate::record::{Record, Status};

/// A variant whose quality could not be measured.
pub struct Failed {
    /// Index into the case's variants.
    pub at: usize,
    pub failure: Failure,
}

/// Loads a program at its precision, for a text.
pub type StartOther<'a> = &'a dyn Fn(&EngineProgram, &str, &EvalText) -> Result<ProcessWorker, Failure>;

/// Fills the `quality` of every record that is ok, variant by variant, and gives those that failed.
pub fn measure(
    text: &EvalText,
    case: &Case,
    (assignment, model, start_other): (DeviceAssignment, &Model, StartOther),
    records: &mut [Record],
    events: &dyn Listener,
) -> Result<Vec<Failed>> {
    let mut reference = ReferenceWorker::new(text, case, (assignment, model))?;
    let variants = case.variants();
    events.on(Event::Begin { label: "quality".to_owned(), total: variants.len() as u64, unit: Unit::Runs });
    let mut outcomes = Vec::new();
    for (at, variant) in variants.iter().enumerate() {
        let runs = records.get(at).is_some_and(|record| record.status == Status::Ok);
        outcomes.push(runs.then(|| match variant {
            Variant::Own { engine, precision } => {
                precision::score_own(&mut reference, (*engine, *precision), &case.selection())
            }
            Variant::Other { program, precision, .. } => {
                let start = || start_other(program, precision, text);
                precision::score(&mut reference, FormatId::named(precision), &start)
            }
        }));
        events.on(Event::Progress { done: at as u64 + 1 });
    }
    events.on(Event::End);
    let scores = |at: usize| outcomes[at].as_ref()?.as_ref().ok();
    let fp16 = variants.iter().position(|variant| *variant == Variant::own(quant::BASELINE)).and_then(scores);
    let mut failed = Vec::new();
    for ((record, outcome), at) in records.iter_mut().zip(&outcomes).zip(0..) {
        match outcome {
            None => {}
            Some(Ok(own)) => {
                // Where ours did not run, an engine's own 16-bit row is what its others are compared with.
                let wide = fp16.or_else(|| case.baseline_of(at).and_then(scores));
                record.quality = precision::summary(own, wide.map(|wide| wide.costs.as_slice()), &reference);
            }
            Some(Err(failure)) => failed.push(Failed { at, failure: failure.clone() }),
        }
    }
    if case.quality.as_ref().is_some_and(|choice| choice.by_module) {
        modules::measure(&mut reference, records, events);
    }
    Ok(failed)
}
