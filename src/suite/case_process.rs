//! A case in a process of its own, so that one that hangs, aborts or takes all the memory leaves the suite running.
//!
//! The suite sends one [`CaseRequest`] and gets one [`CaseReply`].

use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::plan::Limits;
use super::row::{self, CaseInfo};
use super::unmeasured;
use crate::events::{Event, Listener};
use crate::harness::{self, Case};
use crate::ipc::{self, Child, Deadline, OomScope};
use crate::record::{Record, Status};
use crate::report;

/// The hidden subcommand that runs [`case_main`].
pub const SUBCOMMAND: &str = "case";

/// At its time limit a case kills its workers and writes what they gave. One that cannot even do that is killed this share of
/// the limit later.
const GRACE: f64 = 0.1;

/// Least and most seconds of this grace: statistics of many repeats take a while.
const GRACE_S: (f64, f64) = (2.0, 30.0);

#[derive(Debug, Serialize, Deserialize)]
struct CaseRequest {
    case: Case,
    info: CaseInfo,
    limits: Limits,
}

/// Lines of the results, ready to append: numbers stay as they were written.
#[derive(Debug, Serialize, Deserialize)]
pub struct CaseReply {
    /// Whole lines.
    pub text: String,
    pub statuses: Vec<RowStatus>,
}

/// Status of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowStatus {
    /// The precision, and the engine where the case has several.
    pub label: String,
    pub status: Status,
    pub reason: Option<String>,
}

impl RowStatus {
    /// Statuses of all rows of a case.
    fn of(records: &[Record]) -> Vec<Self> {
        let of = |record: &Record| {
            let (label, status, reason) = (report::label(record, records), record.status, record.reason.clone());
            Self { label, status, reason }
        };
        records.iter().map(of).collect()
    }
}

/// Measures a case in a process of its own. Fails only where rows cannot be written as JSON.
pub fn measure(case: &Case, info: &CaseInfo, limits: Limits, events: &dyn Listener) -> Result<CaseReply> {
    let request = CaseRequest { case: case.clone(), info: info.clone(), limits };
    let role = ("process of the case", SUBCOMMAND);
    let child = Child::start(role, deadline_of_process(limits), OomScope::Phase);
    let reply = child.and_then(|mut child| child.ask(&request, events, || (0, 0)));
    events.on(Event::End);
    reply.or_else(|failure| {
        let records = unmeasured::records(case, &failure);
        rows(info, &records)
    })
}

fn rows(info: &CaseInfo, records: &[Record]) -> Result<CaseReply> {
    Ok(CaseReply { text: row::write(info, records)?, statuses: RowStatus::of(records) })
}

fn deadline_of_process(limits: Limits) -> Option<Deadline> {
    let timeout_s = limits.timeout_s?;
    let grace_s = (timeout_s * GRACE).clamp(GRACE_S.0, GRACE_S.1);
    Some(Deadline::after_s(timeout_s)?.with_grace(Duration::from_secs_f64(grace_s)))
}

/// The hidden subcommand: measures the case that it is sent.
pub fn case_main() -> Result<()> {
    ipc::serve(SUBCOMMAND, |request: CaseRequest, events| {
        let CaseRequest { mut case, info, limits } = request;
        case.protocol.deadline = limits.timeout_s.and_then(Deadline::after_s);
        case.protocol.memory_limit_bytes = limits.memory_limit_bytes;
        rows(&info, &harness::run(&case, events)?)
    })
}
