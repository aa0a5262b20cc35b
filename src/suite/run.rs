//! Runs a suite case after case: skips cases that ended before, writes each result at once, and continues after a failure.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;

use super::case_process::{self, RowStatus};
use super::eta;
use super::plan::Planned;
use super::row::CaseInfo;
use crate::events::{Event, Listener};
use crate::harness::Case;
use crate::record::Status;

/// A planned case and its form for the harness.
#[derive(Debug, Clone)]
pub struct SuiteCase {
    pub planned: Planned,
    pub case: Case,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    GoOn,
    Stop,
}

/// A case that is over.
#[derive(Debug)]
pub struct CaseEnd<'a> {
    pub planned: &'a Planned,
    pub statuses: Vec<RowStatus>,
    pub took_s: f64,
    /// Estimated time of the cases that are left.
    pub left_s: Option<f64>,
}

/// Receives every case.
pub trait Watcher {
    fn on_case(&self, end: &CaseEnd);
}

impl CaseEnd<'_> {
    /// One line, for example `2/12 phi-2 on cpu: fp16 ok, int8 oom; 41 s, about 7 min left`.
    pub fn line(&self) -> String {
        let statuses: Vec<String> = self.statuses.iter().map(RowStatus::text).collect();
        let left = match self.left_s {
            Some(left_s) if left_s > 0.0 => format!(", about {} left", eta::duration(left_s)),
            _ => String::new(),
        };
        let Planned { index, n_cases, label, .. } = self.planned;
        format!("{index}/{n_cases} {label}: {}; {}{left}", statuses.join(", "), eta::duration(self.took_s))
    }
}

impl RowStatus {
    fn text(&self) -> String {
        let status = crate::report::status_word(self.status);
        match &self.reason {
            Some(reason) if self.status != Status::Ok => format!("{} {status} ({reason})", self.label),
            _ => format!("{} {status}", self.label),
        }
    }
}

/// Runs the tasks that are not in `ended` (by hash, whether all is well); `append` takes the rows of each as it ends. Returns whether every row is ok, the
/// earlier ones included. Fails only where rows cannot be written.
pub fn run(
    tasks: &[SuiteCase],
    ended: &BTreeMap<String, bool>,
    append: &mut dyn FnMut(&str) -> Result<()>,
    on_failure: OnFailure,
    (watcher, events): (&dyn Watcher, &dyn Listener),
) -> Result<bool> {
    let (before, open): (Vec<&SuiteCase>, Vec<&SuiteCase>) =
        tasks.iter().partition(|task| ended.contains_key(&task.planned.hash));
    let mut all_ok = before.iter().all(|task| ended[&task.planned.hash]);
    let start = Instant::now();
    for (n_ended, task) in open.iter().enumerate() {
        let n_left = open.len() - n_ended;
        let left_s = eta::left_s(start.elapsed().as_secs_f64(), n_ended, n_left);
        let began = Instant::now();
        let labelled = Labelled { label: label(&task.planned, left_s), events };
        let rows = case_process::measure(&task.case, &info(&task.planned), task.planned.limits, &labelled)?;
        append(&rows.text)?;
        let ok = rows.statuses.iter().all(|row| row.status == Status::Ok);
        all_ok &= ok;
        watcher.on_case(&CaseEnd {
            planned: &task.planned,
            statuses: rows.statuses,
            took_s: began.elapsed().as_secs_f64(),
            left_s: eta::left_s(start.elapsed().as_secs_f64(), n_ended + 1, n_left - 1),
        });
        if !ok && on_failure == OnFailure::Stop {
            break;
        }
    }
    Ok(all_ok)
}

fn info(planned: &Planned) -> CaseInfo {
    let Planned { suite, hash, index, n_cases, .. } = planned;
    CaseInfo { name: suite.clone(), case: hash.clone(), index: *index, n_cases: *n_cases, n_rows: 0 }
}

fn label(planned: &Planned, left_s: Option<f64>) -> String {
    let left = left_s.map(|left_s| format!(", about {} left", eta::duration(left_s))).unwrap_or_default();
    format!("{}/{}{left}: {}", planned.index, planned.n_cases, planned.label)
}

/// Prefixes each phase of a case with the case and the time that the suite still takes.
struct Labelled<'a> {
    label: String,
    events: &'a dyn Listener,
}

impl Listener for Labelled<'_> {
    fn on(&self, event: Event) {
        self.events.on(match event {
            Event::Begin { label, total, unit } => {
                Event::Begin { label: format!("{}: {label}", self.label), total, unit }
            }
            other => other,
        });
    }
}
