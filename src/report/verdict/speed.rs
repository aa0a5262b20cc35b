//! The fastest precision at decoding, by how much, and what these runs leave open: every record that is ok is named.

use super::memory::{least_memory, saving};
use super::{names, why};
use crate::record::{Record, Summary};
use crate::report::case;

/// A ratio whose whole interval lies this close to 1 is called no difference; a wider one that spans 1 decides nothing.
const NO_DIFFERENCE: f64 = 0.05;

/// Of one run. `ok` holds its records with a sound result.
pub fn claim(ok: &[&Record]) -> String {
    let (measured, silent): (Vec<&Record>, Vec<&Record>) = ok.iter().partition(|record| decode_tps(record).is_some());
    let fp16 = measured.iter().copied().find(|record| record.is_fp16());
    let text = match (measured.as_slice(), fp16) {
        ([], _) => return without_decode(ok),
        ([only], _) => alone(only),
        (measured, Some(fp16)) if measured.iter().any(|record| record.ratio_to_fp16.is_some()) => {
            against_fp16(fp16, measured)
        }
        (measured, _) => among(measured),
    };
    match silent.is_empty() {
        true => text,
        false => format!("{text}; no decode speed was measured for {}", names(&silent)),
    }
}

/// Rows that time a prompt, or prompt and generation in one, and runs of one token.
fn without_decode(ok: &[&Record]) -> String {
    let with = |key: &str, unit: &str| {
        let one =
            |record: &&Record| Some(format!("{} {}", case::precision(record), speed(record.metrics.get(key)?, unit)?));
        let known: Vec<String> = ok.iter().filter_map(one).collect();
        (known.len() == ok.len()).then(|| known.join(", "))
    };
    if ok[0].workload.n_gen == 1 {
        return format!("1 new token takes no decode step, so there is no decode speed{}", least_memory(ok));
    }
    if let Some(speeds) = with("output_tps", "tokens/s") {
        return format!("generated tokens over all of the time, prompt included: {speeds}");
    }
    match with("prefill_tps", "tokens/s") {
        Some(speeds) => format!("the prompt is processed at: {speeds}"),
        None => "no decode speed was measured".into(),
    }
}

fn alone(record: &Record) -> String {
    // Of what lies in the cache the share means little.
    let in_cache = record.bandwidth.bound.as_deref().is_some_and(|bound| bound.starts_with("cache"));
    let share = record.bandwidth.mbu.filter(|_| !in_cache);
    let share = share.map(|mbu| format!(", at {:.0} % of the read bandwidth", 100.0 * mbu)).unwrap_or_default();
    format!("{} decodes {}{share}", case::precision(record), tokens_per_s(record))
}

/// What a paired ratio says about a precision against fp16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    Faster,
    Slower,
    NoDifference,
    CannotTell,
    /// There is no interval.
    TooFew,
    /// There is no ratio.
    NotCompared,
}

use Finding::{CannotTell, Faster, NoDifference, NotCompared, Slower, TooFew};

fn finding(record: &Record) -> Finding {
    match (record.ratio_to_fp16, ratio_interval(record)) {
        (None, _) => NotCompared,
        (_, None) => TooFew,
        (_, Some((low, _))) if low > 1.0 => Faster,
        (_, Some((_, high))) if high < 1.0 => Slower,
        (_, Some((low, high))) if low >= 1.0 - NO_DIFFERENCE && high <= 1.0 + NO_DIFFERENCE => NoDifference,
        _ => CannotTell,
    }
}

fn against_fp16(fp16: &Record, measured: &[&Record]) -> String {
    let others: Vec<&Record> = measured.iter().copied().filter(|record| !record.is_fp16()).collect();
    let best =
        others.iter().copied().filter(|record| finding(record) == Faster).max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
    let is_tied = |record: &&Record| {
        finding(record) == Faster && best.is_some_and(|best| overlap(ratio_interval(record), ratio_interval(best)))
    };
    let (tied, rest): (Vec<&Record>, Vec<&Record>) = others.iter().copied().partition(is_tied);
    let (lead, rest) = match tied.as_slice() {
        [] if rest.iter().all(|record| finding(record) == Slower) => {
            let ratios: Vec<_> =
                rest.iter().map(|record| format!("{} {}", record.precision, speed_up(record))).collect();
            (Some(format!("fp16 decodes fastest: {}", ratios.join(", "))), Vec::new())
        }
        [] => (None, rest),
        [best] => {
            // One that may be as fast as the best, for all that is known, leaves it no first place.
            let may_rival = |record: &&Record| {
                !matches!(finding(record), Faster | Slower) && overlap(ratio_interval(record), ratio_interval(best))
            };
            let claim = if rest.iter().any(may_rival) { "decodes faster than fp16" } else { "decodes fastest" };
            (Some(format!("{} {claim}: {}{}", best.precision, speed_up(best), why(best))), rest)
        }
        tied => {
            let ratios: Vec<_> =
                tied.iter().map(|record| format!("{} {}", record.precision, speed_up(record))).collect();
            let which = if tied.len() == 2 { "which of the two" } else { "which of them" };
            let tied =
                format!("{} decode faster than fp16, can't tell {which} is faster: {}", names(tied), ratios.join(", "));
            (Some(tied), rest)
        }
    };
    let saved = if tied.is_empty() { least_memory(measured) } else { saving(fp16, &tied) };
    let parts: Vec<String> = lead.into_iter().chain(rest.iter().map(|record| remark(record))).collect();
    parts.join("; ") + &saved
}

/// What is known of a precision that the first words do not name.
fn remark(record: &Record) -> String {
    let name = case::precision(record);
    let interval = ratio_interval(record);
    match (finding(record), interval) {
        (Faster, _) => format!("{name} decodes {}", speed_up(record)),
        (Slower, _) => format!("{name} is slower: {}", speed_up(record)),
        (NoDifference, Some((low, high))) => {
            format!("{name}: no difference within {:.0} %, {low:.2}x to {high:.2}x fp16", 100.0 * NO_DIFFERENCE)
        }
        (CannotTell, Some((low, high))) => format!("{name}: can't tell, {low:.2}x to {high:.2}x"),
        (NotCompared, _) => format!("{name} decodes {}, not compared with fp16", tokens_per_s(record)),
        _ => format!("{name}: can't tell, too few repeats ({}) for an interval", n_repeats(record)),
    }
}

/// Without paired ratios the intervals of the speeds themselves decide.
fn among(measured: &[&Record]) -> String {
    let said = |records: &[&Record]| {
        let one = |record: &&Record| format!("{} {}", case::precision(record), tokens_per_s(record));
        records.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let fastest = measured.iter().copied().filter(|record| tps_interval(record).is_some());
    let Some(best) =
        fastest.max_by(|a, b| decode_tps(a).partial_cmp(&decode_tps(b)).unwrap_or(std::cmp::Ordering::Equal))
    else {
        return format!("too few repeats to compare {}: {}", names(measured), said(measured));
    };
    let may_rival = |record: &&Record| overlap(tps_interval(record), tps_interval(best));
    let (rivals, slower): (Vec<&Record>, Vec<&Record>) = measured.iter().copied().partition(may_rival);
    let lead = match rivals.as_slice() {
        [best] => format!("{} decodes fastest: {}", case::precision(best), tokens_per_s(best)),
        rivals => format!("can't tell which decodes fastest: {}", said(rivals)),
    };
    if slower.is_empty() { lead } else { format!("{lead}; slower: {}", said(&slower)) }
}

/// For example `2.00x fp16 [1.98, 2.02]`.
pub fn speed_up(record: &Record) -> String {
    let paired = record.ratio_to_fp16.is_none_or(|ratio| ratio.paired);
    let unpaired = if paired { "" } else { ", not paired" };
    let interval = ratio_interval(record).map(|(low, high)| format!(" [{low:.2}, {high:.2}]"));
    format!("{:.2}x fp16{}{unpaired}", ratio(record), interval.unwrap_or_default())
}

fn ratio(record: &Record) -> f64 {
    record.ratio_to_fp16.map_or(f64::NAN, |ratio| ratio.median)
}

fn ratio_interval(record: &Record) -> Option<(f64, f64)> {
    let ratio = record.ratio_to_fp16?;
    Some((ratio.ci95_low?, ratio.ci95_high?))
}

fn decode(record: &Record) -> Option<&Summary> {
    record.metrics.get("decode_tps")
}

fn decode_tps(record: &Record) -> Option<f64> {
    decode(record)?.median
}

fn tps_interval(record: &Record) -> Option<(f64, f64)> {
    let summary = decode(record)?;
    Some((summary.ci95_low?, summary.ci95_high?))
}

fn n_repeats(record: &Record) -> u64 {
    decode(record).map_or(0, |summary| summary.n)
}

fn tokens_per_s(record: &Record) -> String {
    decode(record).and_then(|summary| speed(summary, "tokens/s")).unwrap_or_default()
}

/// For example `40.0 tokens/s [39.6, 40.4]`.
fn speed(summary: &Summary, unit: &str) -> Option<String> {
    let interval = summary.ci95_low.zip(summary.ci95_high);
    let interval = interval.map(|(low, high)| format!(" [{low:.1}, {high:.1}]")).unwrap_or_default();
    Some(format!("{:.1} {unit}{interval}", summary.median?))
}

/// What has no interval may lie anywhere.
fn overlap(a: Option<(f64, f64)>, b: Option<(f64, f64)>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.0 <= b.1 && b.0 <= a.1,
        _ => true,
    }
}
