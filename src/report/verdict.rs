//! One sentence from the data: which precision decodes fastest, by how much and why, what memory it saves, what quality it costs, and
//! which fits a card that was named. It claims no more than the intervals carry, and says what it is a claim about.

use super::case::{self, GIB, plain, status_word};
use crate::record::{Bound, Record, Status, Summary};

/// Of one case, never empty; the scope stands behind it in brackets. `card_bytes` is the memory that precisions shall fit.
pub fn verdict(records: &[Record], card_bytes: Option<u64>) -> String {
    let (records, others): (Vec<_>, Vec<_>) = records.iter().partition(|record| is_own(record, records));
    let ok: Vec<_> = records.iter().copied().filter(|record| record.status == Status::Ok).collect();
    let missing = baseline_missing(&records, &ok);
    if !ok.is_empty() && ok.iter().all(|record| case::has_quality_alone(record)) {
        return plain(&format!("{}{missing} (this text)", cost(&ok).trim_start_matches("; ")));
    }
    let fit = card_bytes.map(|bytes| fit(&records, bytes)).unwrap_or_default();
    let others = beside(&others);
    plain(&format!("{}{}{fit}{missing}{others} ({})", claim(&ok), cost(&ok), scope(records[0])))
}

/// Whether the verdict is about this record: of our own engine, or of the only engine there is.
fn is_own(record: &Record, records: &[Record]) -> bool {
    record.engine.name == case::OWN || records.iter().all(|record| record.engine.name != case::OWN)
}

/// Other engines of the same run against our own fp16.
fn beside(others: &[&Record]) -> String {
    let compared = others.iter().filter(|record| record.status == Status::Ok && record.ratio_to_fp16.is_some());
    compared
        .map(|record| format!("; {}'s {} decodes {}", record.engine.name, record.precision, speed_up(record)))
        .collect()
}

/// What the claims hold for, and no further.
fn scope(record: &Record) -> String {
    let weights = if record.weights.source == "random" { "random weights" } else { "these weights" };
    let engine = &record.engine.name;
    // Rows from another tool may come from anywhere.
    let machine = if engine == case::OWN { "this machine" } else { "its machine" };
    format!("{engine}, {machine}, batch {}, these lengths, {weights}", record.workload.batch_size)
}

/// Which precisions stay within `card_bytes`: by their peak, or without one by what they hold exactly. One that did not fit into less is
/// known by what it wanted.
fn fit(records: &[&Record], card_bytes: u64) -> String {
    let exact = |record: &Record| {
        let memory = &record.memory;
        Some(memory.weights_bytes? + memory.kv_cache_bytes? + memory.scratch_bytes.unwrap_or(0))
    };
    let needed = |record: &Record| match record.status {
        Status::Ok | Status::Invalid => record.memory.peak_bytes.or_else(|| exact(record)),
        _ => record.memory.wanted_bytes,
    };
    let with = |wanted: Option<bool>| {
        let held = |record: &&&Record| needed(record).map(|bytes| bytes <= card_bytes) == wanted;
        records.iter().filter(held).copied().collect::<Vec<_>>()
    };
    let says = |records: Vec<&Record>, one: &str, many: &str| match records.len() {
        0 => None,
        1 => Some(format!("{} {one}", names(&records))),
        _ => Some(format!("{} {many}", names(&records))),
    };
    let parts = [
        says(with(Some(true)), "fits", "fit"),
        says(with(Some(false)), "does not", "do not"),
        says(with(None), "is not known to", "are not known to"),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    format!("; into {:.2} GiB {}", card_bytes as f64 / GIB, parts.join(", "))
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
        Some(Bound::Mixed) => format!(", bound by no part alone{}", because(alone)),
        // Of what lies in the cache the share of the bandwidth means little.
        Some(Bound::CacheResident) => format!(", cache-resident{}", because(alone)),
        Some(Bound::Host) => {
            let works = percent(bandwidth.device_share).map(|share| format!("the device works {share} of a step"));
            format!(", host-bound{}", because(works))
        }
        Some(Bound::NotKnown) => format!("{at}, what bounds it is not known"),
    }
}

/// What each precision changes of the predictions, where it was measured. A perplexity that the interval cannot tell from
/// fp16's is called so.
fn cost(ok: &[&Record]) -> String {
    let one = |record: &&Record| {
        let quality = record.quality.as_ref()?;
        let ratio = (quality.perplexity_ratio, quality.perplexity_ratio_ci95_low, quality.perplexity_ratio_ci95_high);
        let against = match ratio {
            _ if record.precision == "fp16" && ok.len() > 1 => return None,
            (Some(ratio), Some(low), Some(high)) if low > 1.0 || high < 1.0 => {
                format!(" and has {ratio:.3}× fp16's perplexity (95 % interval {low:.3} to {high:.3})")
            }
            (Some(_), Some(_), Some(_)) if record.precision != "fp16" => {
                ", with no measurable difference in perplexity from fp16".to_owned()
            }
            _ => String::new(),
        };
        let agreement = 100.0 * quality.top1_agreement;
        Some(format!("; {} agrees with the reference on {agreement:.1} % of next tokens{against}", record.precision))
    };
    ok.iter().filter_map(one).collect()
}

fn claim(ok: &[&Record]) -> String {
    let measured: Vec<_> = ok.iter().copied().filter(|record| decode_tps(record).is_some()).collect();
    match (ok, measured.as_slice()) {
        ([], _) => "no precision gave a result".into(),
        ([first, ..], []) if first.workload.n_gen == 1 => {
            format!("1 new token takes no decode step, so there is no decode speed{}", least_memory(ok))
        }
        (_, []) => "no decode speed was measured".into(),
        (_, [only]) => alone(only),
        (_, measured) => match measured.iter().find(|record| record.precision == "fp16") {
            Some(fp16) => against_fp16(fp16, measured),
            None => among(measured),
        },
    }
}

fn baseline_missing(records: &[&Record], ok: &[&Record]) -> String {
    match records.iter().find(|record| record.precision == "fp16") {
        _ if ok.is_empty() => String::new(),
        Some(fp16) if fp16.status != Status::Ok => format!("; fp16 gave no result ({})", status_word(fp16.status)),
        None if records.len() > 1 => "; fp16 was not run".into(),
        _ => String::new(),
    }
}

fn alone(record: &Record) -> String {
    let limit = record.bandwidth.mbu.map(|mbu| format!(", {:.0} % of what the read bandwidth allows", 100.0 * mbu));
    let tokens_per_s = decode_tps(record).unwrap_or_default();
    format!("{} decodes {tokens_per_s:.1} tokens/s{}", record.precision, limit.unwrap_or_default())
}

/// What a paired ratio says about a precision against fp16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    Faster,
    Slower,
    NoDifference,
    /// Without an interval nothing is said.
    Unknown,
}

fn finding(record: &Record) -> Finding {
    match record.ratio_to_fp16.map(|ratio| (ratio.ci95_low, ratio.ci95_high)) {
        Some((Some(low), Some(high))) => match () {
            _ if low > 1.0 => Finding::Faster,
            _ if high < 1.0 => Finding::Slower,
            _ => Finding::NoDifference,
        },
        _ => Finding::Unknown,
    }
}

fn against_fp16(fp16: &Record, measured: &[&Record]) -> String {
    let others: Vec<_> = measured.iter().copied().filter(|record| record.precision != "fp16").collect();
    let with = |wanted| others.iter().copied().filter(|record| finding(record) == wanted).collect::<Vec<_>>();
    let (faster, unknown) = (with(Finding::Faster), with(Finding::Unknown));
    let best = faster.iter().copied().max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
    let Some(best) = best else {
        return not_faster(measured, &others);
    };
    let tied: Vec<_> =
        faster.iter().copied().filter(|record| overlap(ratio_interval(record), ratio_interval(best))).collect();
    // One that is not told from fp16 may yet be as fast as the best, if its interval is wide.
    let may_rival = |record: &&Record| {
        finding(record) == Finding::NoDifference && overlap(ratio_interval(record), ratio_interval(best))
    };
    let is_alone = unknown.is_empty() && !others.iter().any(may_rival);
    let speed = match tied.as_slice() {
        [_] if is_alone => format!("{} decodes fastest: {}{}", best.precision, speed_up(best), why(best)),
        [_] => format!("{} decodes faster than fp16: {}{}", best.precision, speed_up(best), why(best)),
        tied => format!(
            "{} decode faster than fp16, with no measurable difference between them: {}",
            names(tied),
            tied.iter().map(|record| speed_up(record)).collect::<Vec<_>>().join(", ")
        ),
    };
    speed + &saving(fp16, &tied)
}

fn not_faster(measured: &[&Record], others: &[&Record]) -> String {
    let with = |wanted| others.iter().copied().filter(|record| finding(record) == wanted).collect::<Vec<_>>();
    let (same, slower, unknown) = (with(Finding::NoDifference), with(Finding::Slower), with(Finding::Unknown));
    let mut parts = Vec::new();
    if !same.is_empty() {
        parts.push(format!("no measurable difference in decode speed from fp16 for {}", names(&same)));
    }
    if !slower.is_empty() {
        let ratios: Vec<_> = slower.iter().map(|record| format!("{} {}", record.precision, speed_up(record))).collect();
        let fastest = if same.is_empty() && unknown.is_empty() { "fp16 decodes fastest" } else { "slower" };
        parts.push(format!("{fastest}: {}", ratios.join(", ")));
    }
    if !unknown.is_empty() {
        parts.push(format!("too few repeats to compare fp16 with {}", names(&unknown)));
    }
    parts.join("; ") + &least_memory(measured)
}

/// Without fp16 there are no paired ratios: the intervals of the speeds themselves decide.
fn among(measured: &[&Record]) -> String {
    let intervals: Option<Vec<_>> = measured.iter().map(|record| tps_interval(record)).collect();
    let best = measured
        .iter()
        .copied()
        .max_by(|a, b| decode_tps(a).partial_cmp(&decode_tps(b)).unwrap_or(std::cmp::Ordering::Equal));
    let (Some(_), Some(best)) = (intervals, best) else {
        return format!("too few repeats to compare {}", names(measured));
    };
    let tied: Vec<_> =
        measured.iter().copied().filter(|record| overlap(tps_interval(record), tps_interval(best))).collect();
    match tied.as_slice() {
        [_] => format!("{} decodes fastest: {:.1} tokens/s", best.precision, decode_tps(best).unwrap_or_default()),
        tied => format!("no measurable difference in decode speed between {}", names(tied)),
    }
}

/// What the precision with the lowest peak saves, where speed names none.
fn least_memory(records: &[&Record]) -> String {
    let fp16 = records.iter().find(|record| record.precision == "fp16");
    let known =
        records.iter().copied().filter(|record| record.precision != "fp16" && record.memory.peak_bytes.is_some());
    match (fp16, known.min_by_key(|record| record.memory.peak_bytes)) {
        (Some(fp16), Some(least)) => saving(fp16, &[least]),
        _ => String::new(),
    }
}

/// Peak memory of each record below fp16's; differences that two decimals of a GiB do not show are not told.
fn saving(fp16: &Record, records: &[&Record]) -> String {
    let one = |record: &&Record| {
        let (peak, of) = (record.memory.peak_bytes? as f64 / GIB, fp16.memory.peak_bytes? as f64 / GIB);
        match of - peak {
            saved if saved >= 0.005 => {
                Some(format!("{} saves {saved:.2} of {of:.2} GiB peak memory", record.precision))
            }
            saved if saved <= -0.005 => {
                Some(format!("{} takes {:.2} GiB more peak memory than fp16's {of:.2}", record.precision, -saved))
            }
            _ => None,
        }
    };
    records.iter().filter_map(one).map(|text| format!("; {text}")).collect()
}

/// For example `2.00× fp16 (95 % interval 1.98 to 2.02)`.
fn speed_up(record: &Record) -> String {
    let paired = record.ratio_to_fp16.is_none_or(|ratio| ratio.paired);
    let unpaired = if paired { "" } else { ", runs not paired" };
    let interval =
        ratio_interval(record).map(|(low, high)| format!(" (95 % interval {low:.2} to {high:.2}{unpaired})"));
    format!("{:.2}× fp16{}", ratio(record), interval.unwrap_or_default())
}

fn ratio(record: &Record) -> f64 {
    record.ratio_to_fp16.map_or(f64::NAN, |ratio| ratio.median)
}

fn ratio_interval(record: &Record) -> Option<(f64, f64)> {
    let ratio = record.ratio_to_fp16?;
    Some((ratio.ci95_low?, ratio.ci95_high?))
}

fn tps(record: &Record) -> Option<&Summary> {
    record.metrics.get("decode_tps")
}

fn decode_tps(record: &Record) -> Option<f64> {
    tps(record)?.median
}

fn tps_interval(record: &Record) -> Option<(f64, f64)> {
    let summary = tps(record)?;
    Some((summary.ci95_low?, summary.ci95_high?))
}

fn overlap(a: Option<(f64, f64)>, b: Option<(f64, f64)>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.0 <= b.1 && b.0 <= a.1,
        _ => true,
    }
}

/// `a`, `a and b`, `a, b and c`.
fn names(records: &[&Record]) -> String {
    let names: Vec<_> = records.iter().map(|record| record.precision.as_str()).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Document, Ratio};

    const SCOPE: &str = " (quantbench, this machine, batch 1, these lengths, random weights)";

    type Interval = Option<(f64, f64)>;

    /// fp16 at 20 tokens/s with int8 and nf4, whose ratios to fp16 have these intervals and no memory is known.
    fn records(int8: Interval, nf4: Interval) -> Vec<Record> {
        let text = include_str!("../../tests/golden/records/three_precisions.json");
        let mut records = serde_json::from_str::<Document>(text).expect("an example record").records;
        for (record, interval) in records[1..].iter_mut().zip([int8, nf4]) {
            record.ratio_to_fp16 = Some(Ratio {
                median: interval.map_or(2.0, |(low, high)| (low + high) / 2.0),
                ci95_low: interval.map(|i| i.0),
                ci95_high: interval.map(|i| i.1),
                paired: true,
                by_bytes: 2.0,
            });
        }
        records.iter_mut().for_each(|record| record.memory.peak_bytes = None);
        records
    }

    #[test]
    fn a_claim_goes_as_far_as_the_intervals() {
        let cases: &[(Interval, Interval, &str)] = &[
            (Some((1.5, 1.7)), Some((1.9, 2.1)), "nf4 decodes fastest: 2.00× fp16 (95 % interval 1.90 to 2.10)"),
            (
                Some((1.5, 1.9)),
                Some((1.8, 2.0)),
                "int8 and nf4 decode faster than fp16, with no measurable difference between them: \
                 1.70× fp16 (95 % interval 1.50 to 1.90), 1.90× fp16 (95 % interval 1.80 to 2.00)",
            ),
            // As fast as nf4 or as slow as fp16: nobody knows.
            (
                Some((0.9, 2.5)),
                Some((1.8, 2.0)),
                "nf4 decodes faster than fp16: 1.90× fp16 (95 % interval 1.80 to 2.00)",
            ),
            (None, Some((1.8, 2.0)), "nf4 decodes faster than fp16: 1.90× fp16 (95 % interval 1.80 to 2.00)"),
            (Some((0.9, 1.1)), Some((0.8, 1.0)), "no measurable difference in decode speed from fp16 for int8 and nf4"),
            (
                Some((0.2, 0.4)),
                Some((0.5, 0.7)),
                "fp16 decodes fastest: int8 0.30× fp16 (95 % interval 0.20 to 0.40), \
                 nf4 0.60× fp16 (95 % interval 0.50 to 0.70)",
            ),
            (
                Some((0.2, 0.4)),
                None,
                "slower: int8 0.30× fp16 (95 % interval 0.20 to 0.40); too few repeats to compare fp16 with nf4",
            ),
            (None, None, "too few repeats to compare fp16 with int8 and nf4"),
        ];
        for (int8, nf4, expected) in cases {
            assert_eq!(verdict(&records(*int8, *nf4), None), format!("{expected}{SCOPE}"));
        }
    }

    #[test]
    fn a_reason_comes_with_its_measurement() {
        let mut records = records(Some((1.5, 1.7)), Some((1.9, 2.1)));
        let cases: [(&str, Option<f64>, &str); 8] = [
            (
                "memory",
                Some(0.99),
                ", memory-bound at 62 % of the read bandwidth (reading alone takes 99 % of a step, arithmetic alone 30 %)",
            ),
            ("memory", None, ", memory-bound at 62 % of the read bandwidth"),
            ("compute", Some(0.4), ", compute-bound (reading alone takes 40 % of a step, arithmetic alone 30 %)"),
            (
                "mixed",
                Some(0.4),
                ", bound by no part alone (reading alone takes 40 % of a step, arithmetic alone 30 %)",
            ),
            (
                "cache-resident",
                Some(0.4),
                ", cache-resident (reading alone takes 40 % of a step, arithmetic alone 30 %)",
            ),
            ("host", None, ", host-bound (the device works 71 % of a step)"),
            ("not known", None, " at 62 % of the read bandwidth, what bounds it is not known"),
            // Of an earlier version, which had not measured it.
            ("compute-bound", None, ""),
        ];
        for (bound, memory_alone_share, expected) in cases {
            let bandwidth = &mut records[2].bandwidth;
            bandwidth.bound = Some(bound.to_owned());
            (bandwidth.mbu, bandwidth.device_share) = (Some(0.62), Some(0.71));
            bandwidth.memory_alone_share = memory_alone_share;
            bandwidth.arithmetic_alone_share = memory_alone_share.map(|_| 0.3);
            let speed = "nf4 decodes fastest: 2.00× fp16 (95 % interval 1.90 to 2.10)";
            assert_eq!(verdict(&records, None), format!("{speed}{expected}{SCOPE}"), "{bound}");
        }
    }

    #[test]
    fn memory_is_told_both_ways() {
        let mut records = records(Some((1.5, 1.7)), Some((1.9, 2.1)));
        let speed = "nf4 decodes fastest: 2.00× fp16 (95 % interval 1.90 to 2.10)";
        records[0].memory.peak_bytes = Some(2 << 30);
        let cases = [
            (1 << 30, "; nf4 saves 1.00 of 2.00 GiB peak memory"),
            (3 << 30, "; nf4 takes 1.00 GiB more peak memory than fp16's 2.00"),
            ((2 << 30) + 1000, ""),
        ];
        for (peak_bytes, expected) in cases {
            records[2].memory.peak_bytes = Some(peak_bytes);
            assert_eq!(verdict(&records, None), format!("{speed}{expected}{SCOPE}"));
        }
    }

    #[test]
    fn a_card_is_filled_or_not() {
        let mut records = records(None, None);
        let peaks = [Some(3u64 << 30), Some(2 << 30), None];
        records.iter_mut().zip(peaks).for_each(|(record, peak)| record.memory.peak_bytes = peak);
        (records[2].memory.weights_bytes, records[2].memory.kv_cache_bytes) = (Some(1 << 30), Some(1 << 20));
        assert_eq!(
            fit(&records.iter().collect::<Vec<_>>(), 2 << 30),
            "; into 2.00 GiB int8 and nf4 fit, fp16 does not"
        );
        (records[0].status, records[2].memory.weights_bytes) = (Status::Oom, None);
        assert_eq!(
            fit(&records.iter().collect::<Vec<_>>(), 2 << 30),
            "; into 2.00 GiB int8 fits, fp16 and nf4 are not known to"
        );
        records[0].memory.wanted_bytes = Some(3 << 30);
        assert_eq!(
            fit(&records.iter().collect::<Vec<_>>(), 2 << 30),
            "; into 2.00 GiB int8 fits, fp16 does not, nf4 is not known to"
        );
        assert!(verdict(&records, Some(2 << 30)).contains("into 2.00 GiB"));
    }

    #[test]
    fn nothing_ran() {
        let mut records = records(None, None);
        records.iter_mut().for_each(|record| record.status = Status::Oom);
        assert_eq!(verdict(&records, None), format!("no precision gave a result{SCOPE}"));
    }
}
