//! Two builds measured in turn.

use std::path::Path;

use anyhow::Result;

use super::assemble::{self, Facts};
use super::parent::{Plan, into_error};
use super::process::ProcessWorker;
use super::protocol::Job;
use super::schedule::{self, Order, Stage, Worker};
use super::watch::machine::MachineWatch;
use super::{Case, checks};
use crate::error::BadInput;
use crate::events::Listener;
use crate::record::{self, Record};

/// Measures every row of `case` with this build and with another one, repeat by repeat in turn: the records of the other
/// build, then those of this one. Both speak the same worker protocol or the other's records say that they do not.
pub fn run_ab(case: &Case, other: &Path, events: &dyn Listener) -> Result<(Vec<Record>, Vec<Record>)> {
    let chosen = checks::check(case)?;
    let engine = engine_of(other)?;
    let (case, plan) = &Plan::open(case, chosen, events)?;
    let mut facts = plan.facts(case, events)?;
    let mut watch = MachineWatch::new(plan.sensors(&mut facts));
    let mut of_other = Facts { engine, ..facts.clone() };
    // How the other was built is not known.
    of_other.environment.build_profile.clear();
    of_other.environment.features.clear();
    let rows = case.rows();
    let start = |at: usize| {
        let (row, need) = (&rows[at / 2], plan.room.needs[at / 2]);
        match at % 2 {
            0 => {
                let job = Job::new(case, row, plan.share, &plan.workload);
                let worker = ProcessWorker::new(job, need.bytes(), case.protocol.deadline).of_binary(other.to_owned());
                Box::new(worker) as Box<dyn Worker>
            }
            _ => plan.worker(case, row, need),
        }
    };
    let (n_workers, order) = (2 * rows.len(), Order::Interleaved);
    let mut stage = Stage { start: &start, n_workers, order, watch: &mut watch, events };
    let outcomes = schedule::measure(&mut stage, &case.protocol).map_err(into_error)?;
    let of_side = |side: usize| outcomes.iter().skip(side).step_by(2).cloned().collect::<Vec<_>>();
    let records = |facts: &Facts, side: usize| assemble::records(facts, case, &of_side(side), &|ids| plan.text(ids));
    Ok((records(&of_other, 0), records(&facts, 1)))
}

/// Version and commit as the other build's `--version` gives them.
fn engine_of(binary: &Path) -> Result<record::Engine, BadInput> {
    let bad = |why: String| BadInput::new(format!("`--ab {}`: {why}", binary.display()));
    let output = std::process::Command::new(binary).arg("--version").output();
    let output = output.map_err(|error| bad(format!("it cannot be started: {error}")))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = said.trim().split([' ', '(', ',', ')']).filter(|word| !word.is_empty());
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("quantbench"), Some(version), Some("commit"), Some(commit)) => {
            let word = str::to_owned;
            Ok(record::Engine { name: word("quantbench"), version: word(version), commit: word(commit) })
        }
        _ => Err(bad("it is no quantbench: `--version` names no version and commit".into())),
    }
}
