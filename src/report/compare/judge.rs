//! One gate on one pair: what is proven, and what is not.

use super::gate::{Gate, Key, Kind, Limit};
use super::pairs::Pair;
use super::{Order, Verdict};
use crate::record::metrics::{self, Better, Metric};
use crate::record::{Quality, Record, Status};
use crate::report::case;
use crate::stats::{self, Interval, RatioEstimate};

/// Two starts of one build differ by this share of a time, since memory is laid out anew. An interval within one start knows
/// nothing of it and is widened by it on both ends. Of 40 pairs of one build, interleaved on two cores, 39 lay within 2 % (docs/ci.md).
const BETWEEN_STARTS: f64 = 0.02;

/// From so many runs a side their medians are the samples: below, they carry no 95 % interval.
const RUNS_THAT_CARRY: usize = 6;

/// What a gate found at a pair.
pub struct Found {
    pub base: Option<f64>,
    pub new: Option<f64>,
    /// New over base less 1, or new less base under an absolute limit.
    pub change: Option<f64>,
    pub interval: Option<Interval>,
    pub verdict: Verdict,
    pub reason: Option<String>,
}

/// The same word as in a table: nothing to compare, with the reason where it is not plain.
pub struct Nothing(pub Option<String>);

/// A pair with the records of the same runs, where ratios find their fp16.
pub struct Sides<'a> {
    pub pair: &'a Pair<'a>,
    pub base: &'a [Record],
    pub new: &'a [Record],
    pub order: Order,
}

impl Found {
    fn of(verdict: Verdict, reason: impl Into<String>) -> Self {
        let reason = Some(reason.into());
        Self { base: None, new: None, change: None, interval: None, verdict, reason }
    }
}

/// What ran and runs no more is a regression of every gate; what did not run before has nothing to lose.
pub fn judge(gate: &Gate, sides: &Sides) -> Result<Found, Nothing> {
    let failed =
        |records: &[&Record]| records.iter().find(|record| record.status != Status::Ok).map(|r| case::status(r));
    if let Some(reason) = failed(&sides.pair.base) {
        return Err(Nothing(Some(format!("the base has no result ({reason})"))));
    }
    if let Some(reason) = failed(&sides.pair.new) {
        return Ok(Found::of(Verdict::Regressed, format!("it gives no result any more ({reason})")));
    }
    match (gate.kind(), gate.key) {
        (Kind::Ratio, _) => ratio(gate, sides),
        (Kind::Time, Key::Metric(metric)) => time(gate, metric, sides),
        (_, Key::Metric(metric)) => number(gate, metric, sides.pair.base[0], sides.pair.new[0]),
        (_, Key::WeightsHash) => hash(sides.pair.base[0], sides.pair.new[0]),
        (_, Key::TokenIds) => token_ids(sides.pair.base[0], sides.pair.new[0]),
    }
}

fn hash(base: &Record, new: &Record) -> Result<Found, Nothing> {
    match (base.weights.hash.as_str(), new.weights.hash.as_str()) {
        ("", _) | (_, "") => Err(Nothing(None)),
        (a, b) if a == b => Ok(Found::of(Verdict::Ok, "the same weights")),
        (a, b) => Ok(Found::of(Verdict::Regressed, format!("`{}` became `{}`", case::plain(a), case::plain(b)))),
    }
}

/// Two builds, or two instruction sets, sum in another order and may tip a near tie: only equal ones promise equal tokens.
fn token_ids(base: &Record, new: &Record) -> Result<Found, Nothing> {
    let (a, b) = (&base.output.token_ids, &new.output.token_ids);
    if a.is_empty() || b.is_empty() {
        return Err(Nothing(None));
    }
    if base.environment.isa != new.environment.isa || base.engine != new.engine {
        return Err(Nothing(Some("tokens are compared at the same instruction set and engine commit only".into())));
    }
    match a.iter().zip(b).position(|(a, b)| a != b) {
        None if a.len() == b.len() => Ok(Found::of(Verdict::Ok, "the same tokens")),
        departs => {
            let at = departs.unwrap_or(a.len().min(b.len())) + 1;
            Ok(Found::of(Verdict::Regressed, format!("the tokens differ from number {at} on")))
        }
    }
}

/// A number that decides by itself.
fn number(gate: &Gate, metric: &Metric, base: &Record, new: &Record) -> Result<Found, Nothing> {
    if !are_comparable(metric, base, new) {
        return Err(Nothing(Some("quality was not measured on the same text, or not on both sides".into())));
    }
    let (Some(a), Some(b)) = (metric.value(base), metric.value(new)) else { return Err(Nothing(None)) };
    let change = match gate.limit {
        Limit::Absolute(_) => b - a,
        _ if a == b => 0.0,
        _ => b / a - 1.0,
    };
    let worse = match gate.limit {
        Limit::Exact => a != b,
        Limit::Relative(limit) | Limit::Absolute(limit) => match metric.better {
            Better::Higher => change < limit,
            Better::Lower => change > limit,
        },
    };
    let verdict = if worse { Verdict::Regressed } else { Verdict::Ok };
    let change = change.is_finite().then_some(change);
    Ok(Found { base: Some(a), new: Some(b), change, interval: None, verdict, reason: None })
}

/// False for a number of quality that was not measured on the same text.
pub fn are_comparable(metric: &Metric, base: &Record, new: &Record) -> bool {
    !metric.path.starts_with("quality.") || same_text(base.quality.as_ref(), new.quality.as_ref())
}

fn same_text(base: Option<&Quality>, new: Option<&Quality>) -> bool {
    let text = |q: &Quality| (q.reference.clone(), q.path.clone(), q.text.clone(), q.n_tokens, q.window_tokens);
    base.zip(new).is_some_and(|(a, b)| text(a) == text(b))
}

fn time(gate: &Gate, metric: &Metric, sides: &Sides) -> Result<Found, Nothing> {
    let values = |records: &[&Record]| {
        let runs = records.iter().flat_map(|record| by_launch(record, metrics::repeats(record, metric.key)));
        runs.collect::<Vec<_>>()
    };
    decide(gate, metric.better, values(&sides.pair.base), values(&sides.pair.new), sides.order)
}

fn ratio(gate: &Gate, sides: &Sides) -> Result<Found, Nothing> {
    let speedups = |records: &[&Record], all: &[Record]| -> Result<Vec<Vec<f64>>, Nothing> {
        let runs = records.iter().map(|record| Ok(by_launch(record, paired_speedups(record, all)?)));
        Ok(runs.collect::<Result<Vec<_>, Nothing>>()?.concat())
    };
    let base = speedups(&sides.pair.base, sides.base)?;
    let new = speedups(&sides.pair.new, sides.new)?;
    decide(gate, Better::Higher, base, new, sides.order)
}

/// `decode_tps` over that of fp16 repeat by repeat, which drift of the machine and the machine's speed cancel out of.
fn paired_speedups(record: &Record, all: &[Record]) -> Result<Vec<f64>, Nothing> {
    let same_run = |other: &&Record| {
        other.is_fp16()
            && (&other.model, other.workload, &other.device, &other.timestamp)
                == (&record.model, record.workload, &record.device, &record.timestamp)
    };
    // Rows of another engine are measured against our own fp16 where it ran beside them.
    let own = all.iter().filter(same_run).find(|other| other.engine.name == case::OWN);
    let fp16 = own.or_else(|| all.iter().filter(same_run).find(|other| other.engine == record.engine));
    let (Some(ratio), Some(fp16)) = (record.ratio_to_fp16, fp16) else { return Err(Nothing(None)) };
    if !ratio.paired {
        return Err(Nothing(Some("the precisions did not run in turn, so there are no pairs".into())));
    }
    let tps = |record: &Record| metrics::repeats(record, "decode_tps");
    Ok(tps(record).iter().zip(tps(fp16)).map(|(own, fp16)| own / fp16).collect())
}

/// `values` of a record's repeats, cut where a fresh start of the worker began: each start is a run of its own.
fn by_launch(record: &Record, values: Vec<f64>) -> Vec<Vec<f64>> {
    let counts = &record.samples.launches;
    if counts.iter().sum::<u64>() != values.len() as u64 {
        return vec![values];
    }
    let mut rest = values.as_slice();
    let cut = counts.iter().map(|&n| {
        // The counts sum to the length, so each fits what is left.
        let (launch, behind) = rest.split_at(n as usize);
        rest = behind;
        launch.to_vec()
    });
    cut.filter(|launch| !launch.is_empty()).collect()
}

/// Decides on the interval of new over base. `base` and `new` hold the repeats of each run.
fn decide(
    gate: &Gate,
    better: Better,
    base: Vec<Vec<f64>>,
    new: Vec<Vec<f64>>,
    order: Order,
) -> Result<Found, Nothing> {
    let samples = Samples::of(&base, &new);
    let (Some(a), Some(b)) = (stats::median(&samples.base), stats::median(&samples.new)) else {
        return Err(Nothing(None));
    };
    let estimate = samples.estimate(order).filter(|estimate| estimate.median.is_finite());
    let Some(RatioEstimate { median, interval }) = estimate else {
        return Err(Nothing(None));
    };
    Ok(found(gate, better, (a, b), (median, interval), "fewer than 6 repeats carry no interval"))
}

/// Decides between `base` and `new` on the ratio of the two and its interval; without one, `why` says why that decides nothing.
pub fn found(
    gate: &Gate,
    better: Better,
    (base, new): (f64, f64),
    (ratio, interval): (f64, Option<Interval>),
    why: &str,
) -> Found {
    let change = |ratio: f64| match gate.limit {
        Limit::Absolute(_) => (ratio - 1.0) * base,
        _ => ratio - 1.0,
    };
    let interval = interval.map(|i| Interval { low: change(i.low), high: change(i.high) });
    let limit = match gate.limit {
        Limit::Relative(limit) | Limit::Absolute(limit) => limit,
        Limit::Exact => 0.0,
    };
    let (verdict, reason) = match interval {
        None => (Verdict::CannotTell, Some(why.to_owned())),
        Some(interval) => (against(interval, limit, better), None),
    };
    Found { base: Some(base), new: Some(new), change: Some(change(ratio)), interval, verdict, reason }
}

/// What both sides are compared by: the medians of their runs where there are enough of them, else all repeats.
struct Samples {
    base: Vec<f64>,
    new: Vec<f64>,
    are_runs: bool,
}

impl Samples {
    fn of(base: &[Vec<f64>], new: &[Vec<f64>]) -> Self {
        let medians = |runs: &[Vec<f64>]| runs.iter().filter_map(|run| stats::median(run)).collect::<Vec<_>>();
        let runs = Self { base: medians(base), new: medians(new), are_runs: true };
        match runs.base.len().min(runs.new.len()) >= RUNS_THAT_CARRY {
            true => runs,
            false => Self { base: base.concat(), new: new.concat(), are_runs: false },
        }
    }

    /// New over base.
    fn estimate(&self, order: Order) -> Option<RatioEstimate> {
        match order {
            _ if self.are_runs => stats::unpaired_ratio(&self.new, &self.base),
            Order::Interleaved => stats::paired_ratio(&self.new, &self.base).map(widened),
            Order::Apart => stats::unpaired_ratio(&self.new, &self.base).map(widened),
        }
    }
}

/// Of a metric that is computed from repeats: the new record over the base, as a gate on runs that lie apart sees it.
pub fn change(base: &Record, new: &Record, key: &str) -> Option<RatioEstimate> {
    let runs = |record: &Record| by_launch(record, metrics::repeats(record, key));
    Samples::of(&runs(base), &runs(new)).estimate(Order::Apart).filter(|estimate| estimate.median.is_finite())
}

fn widened(estimate: RatioEstimate) -> RatioEstimate {
    let interval = estimate
        .interval
        .map(|i| Interval { low: i.low / (1.0 + BETWEEN_STARTS), high: i.high * (1.0 + BETWEEN_STARTS) });
    RatioEstimate { interval, ..estimate }
}

/// All of the interval beyond the limit is proof; all of it within is the opposite.
fn against(interval: Interval, limit: f64, better: Better) -> Verdict {
    let (all_beyond, all_within) = match better {
        Better::Higher => (interval.high < limit, interval.low >= limit),
        Better::Lower => (interval.low > limit, interval.high <= limit),
    };
    match (all_beyond, all_within) {
        (true, _) => Verdict::Regressed,
        (_, true) => Verdict::Ok,
        _ => Verdict::CannotTell,
    }
}

#[cfg(test)]
mod tests {
    use super::super::gate::gates;
    use super::*;

    fn found(gate: &str, base: &[f64], new: &[f64]) -> Found {
        let gate = gates(gate).unwrap().remove(0);
        let better = if gate.text.contains('-') { Better::Higher } else { Better::Lower };
        decide(&gate, better, vec![base.to_vec()], vec![new.to_vec()], Order::Apart)
            .unwrap_or_else(|_| panic!("nothing"))
    }

    /// `n` values around `middle`, `spread` of it on either side.
    fn values(middle: f64, spread: f64, n: usize) -> Vec<f64> {
        (0..n).map(|i| middle * (1.0 + spread * (2.0 * i as f64 / (n - 1) as f64 - 1.0))).collect()
    }

    #[test]
    fn intervals_decide() {
        let base = values(100.0, 0.01, 12);
        for (new, verdict) in [
            (values(100.0, 0.01, 12), Verdict::Ok),
            (values(95.0, 0.01, 12), Verdict::CannotTell),
            (values(90.0, 0.01, 12), Verdict::Regressed),
            (values(110.0, 0.01, 12), Verdict::Ok),
            // Noise hides a tenth.
            (values(90.0, 0.3, 12), Verdict::CannotTell),
            // Too few.
            (values(50.0, 0.01, 5), Verdict::CannotTell),
        ] {
            assert_eq!(found("decode_tps:-5%", &base, &new).verdict, verdict, "{new:?}");
        }
        assert_eq!(found("ttft_ms:+5%", &base, &values(110.0, 0.01, 12)).verdict, Verdict::Regressed);
        assert_eq!(found("ttft_ms:+20", &base, &values(110.0, 0.01, 12)).verdict, Verdict::Ok);
    }

    #[test]
    fn an_interval_is_no_narrower_than_two_starts_differ() {
        let same = [100.0; 12];
        let interval = found("decode_tps:-5%", &same, &same).interval.expect("12 values carry one");
        assert!((interval.low + 0.0196).abs() < 1e-3 && (interval.high - 0.02).abs() < 1e-9, "{interval:?}");
    }

    #[test]
    fn runs_are_samples_where_there_are_enough() {
        let gate = gates("decode_tps:-5%").unwrap().remove(0);
        let runs = |around: f64| (0..8).map(|i| values(around + f64::from(i % 3), 0.2, 20)).collect::<Vec<_>>();
        let found =
            decide(&gate, Better::Higher, runs(100.0), runs(90.0), Order::Apart).unwrap_or_else(|_| panic!("nothing"));
        assert_eq!(found.verdict, Verdict::Regressed);
    }
}
