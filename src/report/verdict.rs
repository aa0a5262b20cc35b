//! One sentence a run from the data: which precision decodes fastest, by how much and why, what these runs leave open, what memory it
//! saves, what quality it costs, and which fits a card that was named. It claims no more than the intervals carry, and says what it is a
//! claim about.

pub mod batches;
mod engines;
mod memory;
mod quality;
mod speed;
#[cfg(test)]
mod tests;

use std::fmt;

use super::case::{self, Case, plain, status_word};
use crate::record::{Bound, Record, Status};

/// What one run says, under the run's name where a reader must know which one it is.
pub struct Verdict {
    run: Option<String>,
    text: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.run {
            Some(run) => write!(f, "{run}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// One for each run of a case. `card_bytes` is the memory that precisions shall fit, in place of what the records themselves name.
pub fn verdicts(case: &Case, card_bytes: Option<u64>) -> Vec<Verdict> {
    let verdict = |run: &case::Run| {
        let card_bytes = card_bytes.or_else(|| run.records.iter().find_map(|record| record.card_bytes));
        let label = Some(run.label.clone()).filter(|label| case.names_run && !label.is_empty());
        Verdict { run: label, text: verdict(run.records, card_bytes) }
    };
    case.runs.iter().map(verdict).collect()
}

/// Of one run, never empty; the scope stands behind it in brackets.
fn verdict(records: &[Record], card_bytes: Option<u64>) -> String {
    let (records, others): (Vec<_>, Vec<_>) = records.iter().partition(|record| is_own(record, records));
    let ok: Vec<_> = records.iter().copied().filter(|record| record.status == Status::Ok).collect();
    let missing = missing(&records, &ok);
    if !ok.is_empty() && ok.iter().all(|record| case::has_quality_alone(record)) {
        let cost = quality::cost(&ok);
        return plain(&format!("{}{missing} (this text)", cost.trim_start_matches("; ")));
    }
    let claim = if ok.is_empty() { nothing(&records) } else { speed::claim(&ok) };
    let fit = card_bytes.map(|bytes| memory::fit(&records, bytes)).unwrap_or_default();
    let (programs, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|record| record.other_engine.is_some());
    let (cost, others) = (quality::cost(&ok), beside(&others) + &list(engines::claims(&programs).into_iter()));
    let all: Vec<&Record> = ok.iter().copied().chain(programs).collect();
    let pays = list(batches::claims(&all).into_iter());
    plain(&format!("{claim}{cost}{pays}{fit}{missing}{others} ({})", scope(records[0])))
}

/// Whether the verdict is about this record: of our own engine, or of the only engine there is.
fn is_own(record: &Record, records: &[Record]) -> bool {
    record.engine.name == case::OWN || records.iter().all(|record| record.engine.name != case::OWN)
}

/// Other engines of the same run against our own fp16.
fn beside(others: &[&Record]) -> String {
    list(others.iter().map(|record| {
        let name = format!("{}'s {}", record.engine.name, case::precision(record));
        match (record.status, record.ratio_to_fp16) {
            (Status::Ok, Some(_)) => format!("{name} decodes {}", speed::speed_up(record)),
            (Status::Ok, None) => format!("{name} was not compared with fp16"),
            (status, _) => format!("{name} gave no result ({})", status_word(status)),
        }
    }))
}

/// Scope of the claims, without the machine, which the title has.
fn scope(record: &Record) -> String {
    let weights = if record.weights.source == "random" { ", random weights" } else { "" };
    // Rows from another tool may come from anywhere.
    let engine = if record.engine.name == case::OWN { String::new() } else { format!("{}, ", record.engine.name) };
    let most = if record.memory.largest_batch.is_some() { ", the most that fit" } else { "" };
    let batch = record.workload.batch_size;
    format!("{engine}batch {batch}{most}, {} tokens{weights}", case::lengths(&record.workload))
}

/// What holds the fastest back, and the measurement that says so.
fn why(record: &Record) -> String {
    let bandwidth = &record.bandwidth;
    let percent = |share: Option<f64>| share.map(|share| format!("{:.0} %", 100.0 * share));
    let at = percent(bandwidth.mbu).map(|mbu| format!(" at {mbu} of the read bandwidth")).unwrap_or_default();
    let alone = percent(bandwidth.memory_alone_share)
        .zip(percent(bandwidth.arithmetic_alone_share))
        .map(|(memory, arithmetic)| format!("reading alone takes {memory} of a step, arithmetic alone {arithmetic}"));
    let because = |reason: Option<String>| reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    match bandwidth.bound.as_deref().and_then(Bound::find) {
        None => String::new(),
        Some(Bound::Memory) => format!(", memory-bound{at}{}", because(alone)),
        Some(Bound::Compute) => format!(", compute-bound{}", because(alone)),
        Some(Bound::Mixed) => format!(", bound by neither memory nor arithmetic alone{}", because(alone)),
        // Of what lies in the cache the share of the bandwidth means little.
        Some(Bound::CacheResident) => format!(", cache-resident{}", because(alone)),
        Some(Bound::Host) => {
            let works = percent(bandwidth.device_share).map(|share| format!("the device works {share} of a step"));
            format!(", host-bound{}", because(works))
        }
        Some(Bound::NotKnown) => format!("{at}, what bounds it is not known"),
    }
}

fn nothing(records: &[&Record]) -> String {
    let one = |record: &&Record| format!("{} {}", case::precision(record), status_word(record.status));
    format!("no precision gave a result: {}", records.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// Precisions without a result, and a baseline that was never run.
fn missing(records: &[&Record], ok: &[&Record]) -> String {
    if ok.is_empty() {
        return String::new();
    }
    let failed = records.iter().filter(|record| record.status != Status::Ok);
    let failed =
        failed.map(|record| format!("{} gave no result ({})", case::precision(record), status_word(record.status)));
    let has_fp16 = records.iter().any(|record| record.is_fp16());
    let is_ours = records.iter().all(|record| record.engine.name == case::OWN);
    let absent = (!has_fp16 && is_ours && records.len() > 1).then(|| "fp16 was not run".to_owned());
    list(failed.chain(absent))
}

/// Each behind a semicolon.
fn list(parts: impl Iterator<Item = String>) -> String {
    parts.map(|part| format!("; {part}")).collect()
}

/// `a`, `a and b`, `a, b and c`.
fn names(records: &[&Record]) -> String {
    let names: Vec<_> = records.iter().map(|record| case::precision(record)).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}
