//! The batch from which a precision decodes no faster than fp16: the number that people plan a server with.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Ratio, Record, Status};

/// The batch from which a precision decodes no faster than the 16-bit format of its engine, over the batches of otherwise equal cases. Between
/// two measured batches ratios lie on a straight line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BreakEven {
    pub finding: BreakEvenFinding,
    /// Batches with an interval of the ratio, ascending.
    pub batches: Vec<u64>,
    /// Where the lower end of the ratio's 95 % interval reaches 1: from here on the precision may be no faster.
    pub low: Option<f64>,
    /// Where the median reaches 1; `null` if it stays above.
    pub batch: Option<f64>,
    /// Where the upper end reaches 1, from which on 16 bits are as fast or faster; `null` if it stays above.
    pub high: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BreakEvenFinding {
    /// It is faster at the smallest batch, and not from `low` on.
    Within,
    /// It is faster at every batch.
    NotUpToLargest,
    /// It is slower at the smallest batch already.
    BelowAlready,
    /// Intervals leave open where it stops being faster.
    CannotTell,
}

/// Fills in the break-even of every record whose case was measured with several batches, and clears it elsewhere.
pub fn fill(records: &mut [Record]) {
    let found: Vec<Option<BreakEven>> = records.iter().map(|record| of_record(record, records)).collect();
    records.iter_mut().zip(found).for_each(|(record, found)| record.break_even = found);
}

fn of_record(record: &Record, records: &[Record]) -> Option<BreakEven> {
    record.ratio_to_fp16?;
    // Of two measurements of one batch the newer: RFC 3339 in UTC sorts as text.
    let mut line: Vec<&Record> = records.iter().filter(|other| is_on_line(record, other)).collect();
    line.sort_by(|a, b| (a.workload.batch_size, &a.timestamp).cmp(&(b.workload.batch_size, &b.timestamp)));
    let mut points: Vec<(u64, Ratio)> = Vec::new();
    for (batch, ratio) in line.into_iter().filter_map(|other| Some((other.workload.batch_size, other.ratio_to_fp16?))) {
        points.pop_if(|(known, _)| *known == batch);
        points.push((batch, ratio));
    }
    (points.len() > 1).then(|| judge(&points))
}

/// Whether two records differ in their batch alone.
fn is_on_line(a: &Record, b: &Record) -> bool {
    let workload = super::Workload { batch_size: a.workload.batch_size, ..b.workload };
    b.status == Status::Ok
        && workload == a.workload
        && (&a.precision, &a.engine, &a.file) == (&b.precision, &b.engine, &b.file)
        && (&a.model, &a.weights.source, &a.device) == (&b.model, &b.weights.source, &b.device)
        && (&a.keep_fp16, &a.protocol.method) == (&b.keep_fp16, &b.protocol.method)
        && (a.environment.threads, &a.environment.isa) == (b.environment.threads, &b.environment.isa)
}

/// A batch, and the ratio at it.
struct Point {
    batch: f64,
    low: f64,
    median: f64,
    high: f64,
}

/// By batches in ascending order.
fn judge(points: &[(u64, Ratio)]) -> BreakEven {
    let known: Vec<(u64, Point)> = points
        .iter()
        .filter_map(|&(batch, ratio)| {
            let (low, high) = (ratio.ci95_low?, ratio.ci95_high?);
            Some((batch, Point { batch: batch as f64, low, median: ratio.median, high }))
        })
        .collect();
    let (batches, points): (Vec<u64>, Vec<Point>) = known.into_iter().unzip();
    let only = |finding| BreakEven { finding, batches: batches.clone(), low: None, batch: None, high: None };
    if points.len() < 2 {
        return only(BreakEvenFinding::CannotTell);
    }
    let Some(first) = points.iter().position(|point| point.low <= 1.0) else {
        return only(BreakEvenFinding::NotUpToLargest);
    };
    match (first, &points[0]) {
        // It pays again behind a batch at which it may not.
        _ if points[first..].iter().any(|point| point.low > 1.0) => only(BreakEvenFinding::CannotTell),
        (0, smallest) if smallest.high < 1.0 => only(BreakEvenFinding::BelowAlready),
        (0, _) => only(BreakEvenFinding::CannotTell),
        _ => BreakEven {
            finding: BreakEvenFinding::Within,
            low: crossing(&points, |point| point.low),
            batch: crossing(&points, |point| point.median),
            high: crossing(&points, |point| point.high),
            batches,
        },
    }
}

/// The batch at which the lines through `value` first come down to 1. The first point lies above.
fn crossing(points: &[Point], value: impl Fn(&Point) -> f64) -> Option<f64> {
    let [before, after] = points.windows(2).map(|pair| [&pair[0], &pair[1]]).find(|[_, after]| value(after) <= 1.0)?;
    let share = (value(before) - 1.0) / (value(before) - value(after));
    Some(before.batch + share * (after.batch - before.batch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::EngineInfo;

    fn ratio((low, median, high): (f64, f64, f64)) -> Ratio {
        Ratio { median, ci95_low: Some(low), ci95_high: Some(high), paired: true, by_bytes: 3.0 }
    }

    fn of(points: &[(u64, (f64, f64, f64))]) -> BreakEven {
        judge(&points.iter().map(|&(batch, values)| (batch, ratio(values))).collect::<Vec<_>>())
    }

    #[test]
    fn a_break_even_lies_between_measured_batches() {
        let found = of(&[(1, (1.9, 2.0, 2.1)), (4, (1.25, 1.5, 1.75)), (8, (0.75, 1.0, 1.25)), (16, (0.5, 0.6, 0.75))]);
        let expected = BreakEven {
            finding: BreakEvenFinding::Within,
            batches: vec![1, 4, 8, 16],
            low: Some(6.0),
            batch: Some(8.0),
            high: Some(12.0),
        };
        assert_eq!(found, expected);
        // The upper end stays above 1, and the median as well.
        let open = of(&[(2, (1.5, 1.6, 1.7)), (4, (0.5, 1.1, 1.2))]);
        assert_eq!((open.finding, open.low, open.batch, open.high), (BreakEvenFinding::Within, Some(3.0), None, None));
    }

    #[test]
    fn a_precision_may_pay_everywhere_or_nowhere_or_leave_it_open() {
        let finding = |points: &[(u64, (f64, f64, f64))]| of(points).finding;
        assert_eq!(finding(&[(1, (1.9, 2.0, 2.1)), (64, (1.01, 1.1, 1.2))]), BreakEvenFinding::NotUpToLargest);
        assert_eq!(finding(&[(1, (0.8, 0.9, 0.99)), (64, (0.5, 0.6, 0.7))]), BreakEvenFinding::BelowAlready);
        // Which side of 1 the smallest batch lies on is open.
        assert_eq!(finding(&[(1, (0.9, 1.1, 1.2)), (64, (0.5, 0.6, 0.7))]), BreakEvenFinding::CannotTell);
        // It pays again.
        let again = [(1, (1.4, 1.5, 1.6)), (2, (0.9, 1.5, 2.0)), (4, (1.3, 1.4, 1.5))];
        assert_eq!(finding(&again), BreakEvenFinding::CannotTell);
    }

    #[test]
    fn a_batch_without_an_interval_says_nothing() {
        let none = Ratio { ci95_low: None, ci95_high: None, ..ratio((1.0, 2.0, 3.0)) };
        let found = judge(&[(1, ratio((1.9, 2.0, 2.1))), (2, none), (4, ratio((1.4, 1.5, 1.6)))]);
        assert_eq!((found.finding, found.batches), (BreakEvenFinding::NotUpToLargest, vec![1, 4]));
        let found = judge(&[(1, ratio((1.9, 2.0, 2.1))), (2, none)]);
        assert_eq!((found.finding, found.batches), (BreakEvenFinding::CannotTell, vec![1]));
    }

    #[test]
    fn records_that_differ_in_their_batch_alone_make_a_line() {
        let engine = |name: &str| EngineInfo { name: name.to_owned(), version: String::new(), commit: String::new() };
        let record = |name: &str, precision: &str, batch_size, values: Option<(f64, f64, f64)>| {
            let unknown = Record::unknown(engine(name));
            let workload = super::super::Workload { batch_size, ..unknown.workload };
            let ratio_to_fp16 = values.map(ratio);
            Record { status: Status::Ok, precision: precision.to_owned(), workload, ratio_to_fp16, ..unknown }
        };
        let mut records = vec![
            record("quantbench", "fp16", 1, None),
            record("quantbench", "nf4", 1, Some((1.9, 2.0, 2.1))),
            record("quantbench", "nf4", 4, Some((1.4, 1.5, 1.6))),
            record("transformers", "nf4", 1, Some((1.4, 1.5, 1.6))),
            record("transformers", "nf4", 3, Some((0.6, 0.7, 0.8))),
            record("quantbench", "int8", 1, Some((1.4, 1.5, 1.6))),
        ];
        fill(&mut records);
        let findings: Vec<_> = records.iter().map(|record| record.break_even.as_ref().map(|f| f.finding)).collect();
        let (never, within) = (Some(BreakEvenFinding::NotUpToLargest), Some(BreakEvenFinding::Within));
        assert_eq!(findings, [None, never, never, within, within, None]);
        // Measured again, later and slower.
        let again = Record { timestamp: "2026".to_owned(), ..record("quantbench", "nf4", 4, Some((0.4, 0.5, 0.6))) };
        records.push(again);
        fill(&mut records);
        assert_eq!(records[1].break_even.as_ref().map(|found| found.finding), within);
    }
}
