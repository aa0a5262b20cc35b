//! Ends of warm-up and repeats, as functions of what was measured so far.

use super::measured::WarmupEnd;
use super::measurement_protocol::MeasurementProtocol;

use crate::stats;

/// Two warm-up runs that differ by no more than this are flat.
const WARMUP_AGREES: f64 = 0.05;

/// Adaptive warm-up runs at most.
const WARMUP_CAP: usize = 5;

/// Criterion that ends the warm-up after `runs_ns`, if one does; `count` is the user's own number of runs.
pub fn warm_up_ended(runs_ns: &[u64], count: Option<usize>, elapsed_s: f64, max_time_s: f64) -> Option<WarmupEnd> {
    if let Some(count) = count {
        return (runs_ns.len() >= count).then_some(WarmupEnd::Count);
    }
    let agrees = |a: u64, b: u64| a.abs_diff(b) as f64 <= WARMUP_AGREES * a.max(b) as f64;
    match runs_ns {
        [] => None,
        [.., a, b] if agrees(*a, *b) => Some(WarmupEnd::Agreed),
        runs if runs.len() >= WARMUP_CAP => Some(WarmupEnd::Cap),
        _ if elapsed_s >= max_time_s => Some(WarmupEnd::MaxTime),
        _ => None,
    }
}

/// Counted repeats at most, unless the user gives their number: more would narrow no interval that matters, and all of them
/// are kept.
const REPEATS_CAP: usize = 500;

/// Repeats of a run without a count of its own at least, however long they take: fewer have no spread.
pub const MIN_SPREAD_REPEATS: usize = 3;

/// The criterion that ended the repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepeatsEnd {
    /// The interval of the median is narrow enough, with enough repeats and time.
    RelCi,
    /// The user's own number of repeats.
    Count,
    /// One more repeat would exceed the time for one precision.
    MaxTime,
    /// Repeats so short that hundreds of them fit the time.
    Cap,
    /// The user wanted no more.
    Interrupted,
}

impl std::fmt::Display for RepeatsEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RepeatsEnd::RelCi => "rel_ci",
            RepeatsEnd::Count => "count",
            RepeatsEnd::MaxTime => "max_time",
            RepeatsEnd::Cap => "cap",
            RepeatsEnd::Interrupted => "interrupted",
        })
    }
}

/// One precision's counted repeats so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RepeatTally {
    /// Values that the interval is computed from, one a repeat: the decode time, or the prefill time of a run of one token.
    pub values: Vec<f64>,
    /// Measured decode time (prefill where there is no decode).
    pub decode_ns: u64,
    /// Time of the repeats, prefill included.
    pub total_ns: u64,
}

impl RepeatTally {
    pub fn add(&mut self, prefill_ns: u64, end_to_end_ns: u64) {
        let decode_ns = end_to_end_ns.saturating_sub(prefill_ns);
        let value_ns = if decode_ns == 0 { prefill_ns } else { decode_ns };
        self.values.push(value_ns as f64);
        self.decode_ns += value_ns;
        self.total_ns += end_to_end_ns;
    }
}

/// Criterion that ends the repeats of all variants that still run, if one does; they always have equal counts. A count that the
/// user gave is kept at any cost. Otherwise `max_time_s` beats the minimum of repeats, but never the first
/// [`MIN_SPREAD_REPEATS`], of which several launches make a part each.
pub fn repeats_ended(tallies: &[&RepeatTally], protocol: &MeasurementProtocol) -> Option<RepeatsEnd> {
    let n = tallies.iter().map(|tally| tally.values.len()).min()?;
    if let Some(count) = protocol.repeats {
        return (n >= count).then_some(RepeatsEnd::Count);
    }
    let enough = |tally: &RepeatTally| {
        n >= protocol.min_repeats
            && tally.decode_ns as f64 / 1e9 >= protocol.min_time_s
            && stats::relative_half_width(&tally.values, &[]).is_some_and(|width| width <= protocol.rel_ci)
    };
    // A bootstrap takes longer than a short repeat, so that with more of them it is asked at every tenth more.
    let due = n < 20 || n.is_multiple_of(n / 10);
    if due && tallies.iter().all(|tally| enough(tally)) {
        return Some(RepeatsEnd::RelCi);
    }
    if n >= REPEATS_CAP {
        return Some(RepeatsEnd::Cap);
    }
    let with_one_more_s = |tally: &RepeatTally| tally.total_ns as f64 / 1e9 * (n + 1) as f64 / n as f64;
    let exceeds = |tally: &RepeatTally| n >= at_least(protocol) && with_one_more_s(tally) > protocol.max_time_s;
    tallies.iter().any(|tally| exceeds(tally)).then_some(RepeatsEnd::MaxTime)
}

fn at_least(protocol: &MeasurementProtocol) -> usize {
    MIN_SPREAD_REPEATS.div_ceil(protocol.launches.max(1))
}

/// How many more repeats of each precision [`repeats_ended`] will probably let pass: for people, who want to know how long it takes.
pub fn repeats_left(tallies: &[&RepeatTally], protocol: &MeasurementProtocol) -> usize {
    let Some(n) = tallies.iter().map(|tally| tally.values.len()).min() else { return 0 };
    if let Some(count) = protocol.repeats {
        return count.saturating_sub(n);
    }
    if n == 0 {
        return protocol.min_repeats;
    }
    let of_time = |ns: u64, seconds: f64| (seconds * 1e9 * n as f64 / ns.max(1) as f64).ceil();
    let wanted = |tally: &&RepeatTally| {
        let width = stats::relative_half_width(&tally.values, &[]).unwrap_or(0.0);
        // An interval narrows with the root of the count.
        let narrow = if protocol.rel_ci > 0.0 { n as f64 * (width / protocol.rel_ci).powi(2) } else { f64::INFINITY };
        of_time(tally.decode_ns, protocol.min_time_s).max(narrow).max(protocol.min_repeats as f64)
    };
    let affordable = |tally: &&RepeatTally| of_time(tally.total_ns, protocol.max_time_s).max(at_least(protocol) as f64);
    let wanted = tallies.iter().map(wanted).fold(0.0, f64::max);
    let affordable = tallies.iter().map(affordable).fold(REPEATS_CAP as f64, f64::min);
    (wanted.min(affordable) as usize).saturating_sub(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_ends_when_flat_at_the_cap_or_in_time() {
        let cases: [(&[u64], Option<usize>, f64, Option<WarmupEnd>); 9] = [
            (&[], None, 0.0, None),
            (&[100], None, 0.0, None),
            (&[200, 100], None, 0.0, None),
            (&[200, 100, 96], None, 0.0, Some(WarmupEnd::Agreed)),
            (&[200, 150, 110, 80, 60], None, 0.0, Some(WarmupEnd::Cap)),
            (&[100], None, 20.0, Some(WarmupEnd::MaxTime)),
            (&[], Some(0), 0.0, Some(WarmupEnd::Count)),
            (&[100, 100], Some(3), 99.0, None),
            (&[300, 200, 100], Some(3), 0.0, Some(WarmupEnd::Count)),
        ];
        for (runs, count, elapsed_s, expected) in cases {
            assert_eq!(warm_up_ended(runs, count, elapsed_s, 20.0), expected, "{runs:?} {count:?}");
        }
    }

    const PREFILL_NS: u64 = 10_000_000;

    fn tally(n: usize, decode_s: impl Fn(usize) -> f64) -> RepeatTally {
        let mut tally = RepeatTally::default();
        for i in 0..n {
            tally.add(PREFILL_NS, PREFILL_NS + (decode_s(i) * 1e9) as u64);
        }
        tally
    }

    #[test]
    fn repeats_end_by_one_named_criterion() {
        let protocol = MeasurementProtocol::default();
        let noisy = |i: usize| 0.5 + 0.1 * (i % 3) as f64;
        let cases = [
            ("nothing yet", tally(0, |_| 0.5), None),
            ("too few", tally(5, |_| 0.6), None),
            ("too short", tally(6, |_| 0.4), None),
            ("flat, enough, long", tally(6, |_| 0.5), Some(RepeatsEnd::RelCi)),
            ("noisy", tally(10, noisy), None),
            // 32 repeats of 0.01 + 0.6 s on average are 19.5 s; one more would exceed 20 s.
            ("noisy for long", tally(32, noisy), Some(RepeatsEnd::MaxTime)),
            ("short for ever", tally(500, |_| 0.0001), Some(RepeatsEnd::Cap)),
            ("one slow repeat", tally(1, |_| 15.0), None),
            ("two slow repeats", tally(2, |_| 15.0), None),
            ("three slow repeats have a spread", tally(3, |_| 15.0), Some(RepeatsEnd::MaxTime)),
        ];
        for (name, tally, expected) in &cases {
            assert_eq!(repeats_ended(&[tally], &protocol), *expected, "{name}");
        }
        let (flat, noisy) = (tally(10, |_| 0.5), tally(10, noisy));
        assert_eq!(repeats_ended(&[&flat, &noisy], &protocol), None, "all must be narrow");
    }

    #[test]
    fn launches_share_the_repeats_that_are_always_made() {
        let protocol = MeasurementProtocol { launches: 2, ..MeasurementProtocol::default() };
        assert_eq!(repeats_ended(&[&tally(1, |_| 15.0)], &protocol), None);
        assert_eq!(repeats_ended(&[&tally(2, |_| 15.0)], &protocol), Some(RepeatsEnd::MaxTime));
    }

    #[test]
    fn what_is_left_follows_the_criteria() {
        let protocol = MeasurementProtocol::default();
        let noisy = |i: usize| 0.5 + 0.1 * (i % 3) as f64;
        for (name, tally, least, most) in [
            ("nothing yet", tally(0, |_| 0.5), 6, 6),
            ("the minimum", tally(2, |_| 0.6), 4, 4),
            ("the least time: 3 s of 0.1 s each", tally(10, |_| 0.1), 20, 20),
            ("a noisy one goes on as long as the time allows: 20 s of 0.6 s each", tally(10, noisy), 24, 24),
            ("as long as the time allows: 20 s of 4.01 s each", tally(1, |_| 4.0), 4, 4),
            ("three at least", tally(1, |_| 60.0), 2, 2),
            ("done", tally(8, |_| 0.5), 0, 0),
        ] {
            let left = repeats_left(&[&tally], &protocol);
            assert!((least..=most).contains(&left), "{name}: {left}");
        }
        let counted = MeasurementProtocol { repeats: Some(3), ..protocol };
        assert_eq!(repeats_left(&[&tally(2, |_| 60.0)], &counted), 1);
    }

    #[test]
    fn the_users_count_is_kept() {
        let protocol = MeasurementProtocol { repeats: Some(3), ..MeasurementProtocol::default() };
        assert_eq!(repeats_ended(&[&tally(2, |_| 60.0)], &protocol), None);
        assert_eq!(repeats_ended(&[&tally(3, |_| 60.0)], &protocol), Some(RepeatsEnd::Count));
    }
}
