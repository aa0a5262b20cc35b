//! The cost of each precision of a case in quality, measured by worker processes of their own: nothing here touches what a run
//! measures.

mod eval_text;
mod modules;
mod precision;
mod reference;

use anyhow::Result;

pub use self::eval_text::{EvalText, check};
use self::reference::ReferenceWorker;
use super::case::Case;
use super::load::DeviceAssignment;
use crate::events::{Event, Listener, Unit};
use crate::plan::Model;
use crate::protocol::Failure;
use crate::quant;
use crate::record::{Record, Status};

/// A precision whose quality could not be measured.
pub struct Failed {
    /// Index into the case's precisions.
    pub at: usize,
    pub failure: Failure,
}

/// Fills the `quality` of every record that is ok, precision by precision, and gives those that failed.
pub fn measure(
    text: &EvalText,
    case: &Case,
    device: (DeviceAssignment, &Model),
    records: &mut [Record],
    events: &dyn Listener,
) -> Result<Vec<Failed>> {
    let mut reference = ReferenceWorker::new(text, case, device)?;
    let total = case.precisions.len() as u64;
    events.on(Event::Begin { label: "quality".to_owned(), total, unit: Unit::Runs });
    let mut outcomes = Vec::new();
    for (at, &precision) in case.precisions.iter().enumerate() {
        let runs = records.get(at).is_some_and(|record| record.status == Status::Ok);
        outcomes.push(runs.then(|| precision::score(&mut reference, precision, &case.selection())));
        events.on(Event::Progress { done: at as u64 + 1 });
    }
    events.on(Event::End);
    let fp16 = case.precisions.iter().position(|precision| *precision == quant::BASELINE);
    let fp16 = fp16.and_then(|at| outcomes[at].as_ref()?.as_ref().ok()).map(|scores| scores.costs.as_slice());
    let mut failed = Vec::new();
    for ((record, outcome), at) in records.iter_mut().zip(&outcomes).zip(0..) {
        match outcome {
            None => {}
            Some(Ok(scores)) => record.quality = precision::summary(scores, fp16, &reference),
            Some(Err(failure)) => failed.push(Failed { at, failure: failure.clone() }),
        }
    }
    if case.quality.as_ref().is_some_and(|choice| choice.by_module) {
        modules::measure(&mut reference, records, events);
    }
    Ok(failed)
}
