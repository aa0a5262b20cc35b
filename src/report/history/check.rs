//! The newest run of each series against those before it.
//!
//! Each run of a history gives one number, its median. How far such numbers lie apart from run to run is what the history itself says:
//! the spread of the earlier ones. The interval of the change is that of Student's t for one new value against n old ones, on logarithms,
//! since speeds differ by shares: t(0.975, n − 1) · s · √(1 + 1/n). With few runs it is wide, as it must be.

use super::super::compare::judge::{self, Found, Nothing, Sides};
use super::super::compare::pairs::{self, Pair};
use super::super::compare::{self, Comparison, Gate, Kind, Order, Verdict};
use crate::error::BadInput;
use crate::record::metrics::Metric;
use crate::record::{Record, SCHEMA_VERSION, Status};
use crate::report::case;
use crate::stats::{self, Interval};

/// Gates, and the most earlier runs to check against.
pub struct CheckRules {
    pub gates: Vec<Gate>,
    pub n_last: usize,
}

/// Fewer earlier runs carry no interval: two give one degree of freedom, whose t is 12.7.
const RUNS_THAT_CARRY: usize = 3;

/// Two-sided 95 % points of Student's t for 1, 2, … degrees of freedom (Abramowitz & Stegun, table 26.10); beyond the last one that one
/// is used, which is at most 4 % too wide.
const STUDENT_T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// The newest record of each series, and all others.
pub fn newest(records: Vec<Record>) -> (Vec<Record>, Vec<Record>) {
    let (mut new, mut past): (Vec<Record>, Vec<Record>) = (Vec::new(), Vec::new());
    for record in records {
        match new.iter_mut().find(|other| pairs::same_series(other, &record)) {
            // RFC 3339 in UTC sorts as text; of equal times the later line is newer.
            Some(other) if record.timestamp >= other.timestamp => past.push(std::mem::replace(other, record)),
            Some(_) => past.push(record),
            None => new.push(record),
        }
    }
    (new, past)
}

/// Each of `new` against its series in `past`. Fails with [`BadInput`] where there is nothing to check.
pub fn check(past: &[Record], new: &[Record], rules: &CheckRules) -> Result<Comparison, BadInput> {
    let Some(first) = new.first() else { return Err(BadInput::new("the history holds no record to check")) };
    let series: Vec<Series> = new.iter().map(|record| Series::of(record, past, rules.n_last)).collect();
    let (mut checks, mut not_compared, mut empty_gates) = (Vec::new(), Vec::new(), Vec::new());
    for series in series.iter().filter(|series| series.past.is_empty()) {
        not_compared.push(format!("{}: {}", pairs::name(series.new), series.why_empty()));
    }
    let known: Vec<&Series> = series.iter().filter(|series| !series.past.is_empty()).collect();
    for series in &known {
        for gate in &rules.gates {
            match judged(gate, series) {
                Ok(found) => checks.push(compare::check(gate, series.new, found)),
                Err(Nothing(Some(why))) => {
                    not_compared.push(format!("{} of {}: {why}", gate.name(), pairs::name(series.new)));
                }
                Err(Nothing(None)) => {}
            }
        }
    }
    for gate in &rules.gates {
        if !known.is_empty() && !checks.iter().any(|check| check.gate == gate.text) {
            empty_gates.push(gate.text.clone());
        }
    }
    let longest = known.iter().max_by_key(|series| series.past.len());
    let base = longest.and_then(|series| series.past.last()).map_or(first, |record| record);
    Ok(Comparison {
        schema_version: SCHEMA_VERSION,
        verdict: checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::CannotTell),
        base: compare::Side { n_runs: Some(longest.map_or(0, |series| series.past.len())), ..compare::side(base) },
        new: compare::side(first),
        checks,
        empty_gates,
        not_compared,
        notes: notes(&series),
    })
}

/// A record and the runs of the same work on the same machine before it, the oldest first.
struct Series<'a> {
    new: &'a Record,
    /// Those that nothing affected, the last of them.
    past: Vec<&'a Record>,
    n_noisy: usize,
    n_failed: usize,
    /// Number of runs of the same work on other machines.
    n_elsewhere: usize,
}

impl<'a> Series<'a> {
    fn of(new: &'a Record, all: &'a [Record], n_last: usize) -> Self {
        let is_before = |record: &&Record| record.timestamp < new.timestamp || new.timestamp.is_empty();
        let (mut same, elsewhere): (Vec<&Record>, Vec<&Record>) = all
            .iter()
            .filter(|record| pairs::same_work(record, new) && is_before(record))
            .partition(|record| pairs::same_series(record, new));
        same.sort_by(|a, b| a.timestamp.cmp(&b.timestamp));
        let count = |is_meant: fn(&Record) -> bool| same.iter().filter(|record| is_meant(record)).count();
        let (n_failed, n_noisy) = (count(|r| r.status != Status::Ok), count(|r| r.status == Status::Ok && r.tainted));
        same.retain(|record| record.status == Status::Ok && !record.tainted);
        let past = same.split_off(same.len().saturating_sub(n_last));
        Self { new, past, n_noisy, n_failed, n_elsewhere: elsewhere.len() }
    }

    fn why_empty(&self) -> String {
        let counts = [
            (self.n_noisy, "were noisy"),
            (self.n_failed, "failed"),
            (self.n_elsewhere, "ran on another machine or build profile"),
        ];
        let known = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
        match known.collect::<Vec<_>>() {
            known if known.is_empty() => "no earlier run".to_owned(),
            known => format!("no earlier run to compare with; {}", known.join(", ")),
        }
    }
}

fn judged(gate: &Gate, series: &Series) -> Result<Found, Nothing> {
    let metric = match (gate.kind(), gate.metric()) {
        (Kind::Time | Kind::Ratio, Some(metric)) if series.new.status == Status::Ok => metric,
        // What decides by itself, and a run that failed, is held against the run before.
        _ => {
            let base: Vec<&Record> = series.past.last().copied().into_iter().collect();
            let pair = Pair { base, new: vec![series.new] };
            return judge::judge(gate, &Sides { pair: &pair, base: &[], new: &[], order: Order::Apart });
        }
    };
    let values: Vec<f64> = series.past.iter().filter_map(|record| positive(metric, record)).collect();
    let Some(new) = positive(metric, series.new).filter(|_| !values.is_empty()) else { return Err(Nothing(None)) };
    let (base, ratio) = against(&values, new);
    let why = format!(
        "{} earlier {} no interval, {RUNS_THAT_CARRY} are needed",
        values.len(),
        if values.len() == 1 { "run carries" } else { "runs carry" }
    );
    Ok(judge::found(gate, metric.better, (base, new), (new / base, ratio), &why))
}

/// Value of the metric where it has a logarithm.
fn positive(metric: &Metric, record: &Record) -> Option<f64> {
    metric.value(record).filter(|value| value.is_finite() && *value > 0.0)
}

/// The geometric mean of `values`, and the interval of `new` over it where there are enough of them.
fn against(values: &[f64], new: f64) -> (f64, Option<Interval>) {
    let logs: Vec<f64> = values.iter().map(|value| value.ln()).collect();
    let n = logs.len();
    let mean = stats::mean(&logs).unwrap_or(0.0);
    let interval = stats::stdev(&logs).filter(|_| n >= RUNS_THAT_CARRY).map(|spread| {
        let t = STUDENT_T[(n - 2).min(STUDENT_T.len() - 1)];
        let half = t * spread * (1.0 + 1.0 / n as f64).sqrt();
        let change = new.ln() - mean;
        Interval { low: (change - half).exp(), high: (change + half).exp() }
    });
    (mean.exp(), interval)
}

/// Notes on the runs.
fn notes(series: &[Series]) -> Vec<String> {
    let longest = series.iter().map(|series| series.past.len()).max().unwrap_or(0);
    let note = |series: &Series| {
        let fewer = (series.past.len() < longest && !series.past.is_empty())
            .then(|| format!("{} earlier {}", series.past.len(), if series.past.len() == 1 { "run" } else { "runs" }));
        let noisy = (series.n_noisy > 0).then(|| format!("{} noisy left out", series.n_noisy));
        let failed = (series.n_failed > 0).then(|| format!("{} failed left out", series.n_failed));
        let new = series.new.tainted.then(|| "the newest run was noisy; its warnings say how".to_owned());
        let parts: Vec<String> = [fewer, noisy, failed, new].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| format!("{}: {}", pairs::name(series.new), parts.join(", ")))
    };
    let of_all = (longest > 0).then(|| {
        "base is the geometric mean of the earlier runs; the interval is Student's t from their spread, for one new run".to_owned()
    });
    let title = |record: &Record| format!("{} on {}", record.model.id, record.device.name);
    let machines: Vec<String> = series.iter().map(|series| case::plain(&title(series.new))).collect();
    let is_one = machines.iter().all(|machine| *machine == machines[0]);
    let on = is_one.then(|| machines[0].clone());
    on.into_iter().chain(of_all).chain(series.iter().filter_map(note)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    #[test]
    fn an_interval_comes_from_the_spread_of_the_runs() {
        // ln 99, 100, 101: mean ln 99.9967, s = 0.010000; t(2) = 4.303, √(4/3) = 1.1547, so half = 0.049687.
        let (base, interval) = against(&[99.0, 100.0, 101.0], 90.0);
        let interval = interval.expect("three runs carry one");
        assert!((base - 99.9967).abs() < 1e-3, "{base}");
        let ratio = 90.0 / base;
        assert!((interval.low - ratio * (-0.049_687f64).exp()).abs() < 1e-4, "{interval:?}");
        assert!((interval.high - ratio * 0.049_687f64.exp()).abs() < 1e-4, "{interval:?}");
        assert_eq!(against(&[100.0, 101.0], 90.0).1, None);
    }

    #[test]
    fn intervals_cover_a_run_of_the_same_build() {
        const TRIALS: usize = 2000;
        let mut rng = SplitMix64::new(5);
        // Sums of 12 uniform numbers are close to normal, with a spread of 1: runs that differ by 3 % around 100.
        let run = |rng: &mut SplitMix64| 100.0 * (0.03 * ((0..12).map(|_| rng.unit()).sum::<f64>() - 6.0)).exp();
        for n in [3, 5, 10, 40] {
            let covered = (0..TRIALS)
                .filter(|_| {
                    let values: Vec<f64> = (0..n).map(|_| run(&mut rng)).collect();
                    let interval = against(&values, run(&mut rng)).1.expect("enough runs");
                    interval.low <= 1.0 && 1.0 <= interval.high
                })
                .count();
            // 95 % less three standard errors of the simulation, 3 · √(0.95 · 0.05 / 2000) = 1.5 points.
            let share = covered as f64 / TRIALS as f64;
            assert!(share >= 0.935, "{n} runs: {share}");
        }
    }
}
