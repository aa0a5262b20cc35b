//! Two builds measured in turn.

use std::path::Path;

use anyhow::Result;

use super::assemble;
use super::case::Case;
use super::checks;
use super::prepare::PreparedCase;
use super::room::NeverStarted;
use super::run_context::RunContext;
use super::schedule::{self, RunOrder, ScheduleContext, WorkerHandle};
use super::watch::machine::MachineWatch;
use crate::error::BadInput;
use crate::events::Listener;
use crate::ipc;

use crate::record::{self, Record};

/// Measures every variant of `case` with this build and with another one, repeat by repeat in turn: the records of the other
/// build, then those of this one. Both speak the same engine protocol or the other's records say that they do not.
pub fn run_ab(case: &Case, other: &Path, events: &dyn Listener) -> Result<(Vec<Record>, Vec<Record>)> {
    if case.has_others() {
        let message = "`--ab` measures two builds of quantbench, and an engine that is neither was asked for";
        return Err(BadInput::new(message).hint("drop `--ab`, or the other engines of `--engine`").into());
    }
    let chosen = checks::check(case)?;
    let engine = engine_of(other)?;
    let (case, prepared) = &PreparedCase::open(case, chosen, events)?;
    let mut context = prepared.context(case, events)?;
    let mut watch = MachineWatch::new(prepared.sensors(&mut context));
    let mut of_other = RunContext { engine, ..context.clone() };
    // The other build does not report its profile and features.
    of_other.environment.build_profile.clear();
    of_other.environment.features.clear();
    let variants = case.variants();
    let start = |at: usize| {
        let (variant, needs) = (&variants[at / 2], prepared.room.needs[at / 2]);
        match at % 2 {
            0 => {
                let worker = prepared.process(case, variant, needs.bytes());
                match worker.map(|worker| worker.with_binary(other.to_owned())) {
                    Ok(worker) => Box::new(worker) as Box<dyn WorkerHandle>,
                    Err(failure) => Box::new(NeverStarted { label: variant.label(), failure }),
                }
            }
            _ => prepared.worker(case, variant, needs),
        }
    };
    let (n_workers, order) = (2 * variants.len(), RunOrder::Interleaved);
    let mut schedule_context = ScheduleContext { start: &start, n_workers, order, watch: &mut watch, events };
    let outcomes = schedule::measure(&mut schedule_context, &case.protocol).map_err(ipc::into_error)?;
    let of_side = |side: usize| outcomes.iter().skip(side).step_by(2).cloned().collect::<Vec<_>>();
    let records =
        |context: &RunContext, side: usize| assemble::records(context, case, &of_side(side), &|ids| prepared.text(ids));
    Ok((records(&of_other, 0), records(&context, 1)))
}

/// Version and commit as the other build's `--version` gives them.
fn engine_of(binary: &Path) -> Result<record::EngineInfo, BadInput> {
    let bad = |why: String| BadInput::new(format!("`--ab {}`: {why}", binary.display()));
    let output = std::process::Command::new(binary).arg("--version").output();
    let output = output.map_err(|error| bad(format!("it cannot be started: {error}")))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = said.trim().split([' ', '(', ',', ')']).filter(|word| !word.is_empty());
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("quantbench"), Some(version), Some("commit"), Some(commit)) => {
            let word = str::to_owned;
            Ok(record::EngineInfo { name: word("quantbench"), version: word(version), commit: word(commit) })
        }
        _ => Err(bad("it is no quantbench: `--version` names no version and commit".into())),
    }
}
