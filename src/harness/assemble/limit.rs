//! How close decoding comes to what the memory allows, and what holds it back.

use super::Facts;
use crate::harness::schedule::Outcome;
use crate::record::{Bandwidth, Record};

/// From the record's metrics, and the bytes that the session counted.
pub fn bandwidth(facts: &Facts, record: &Record, outcome: &Outcome) -> Bandwidth {
    let footprint = outcome.finished.as_ref().map(|finished| finished.footprint);
    // Step i of n_gen − 1 reads i positions after the prompt: n_gen / 2 on average.
    let doubled_depth = 2 * facts.n_before + record.workload.n_gen;
    let kv_bytes_per_token = footprint.map(|f| f.kv_bytes_per_position * doubled_depth / 2 + f.cross_kv_bytes);
    let weight_bytes_per_token = footprint.map(|footprint| footprint.weight_bytes_per_token);
    let decode_tps = record.metrics.get("decode_tps").and_then(|summary| summary.median);
    let bytes = weight_bytes_per_token.zip(kv_bytes_per_token).map(|(weights, kv)| weights + kv);
    let achieved_gb_s = bytes.zip(decode_tps).map(|(bytes, tps)| bytes as f64 * tps / 1e9);
    let mbu = achieved_gb_s.zip(facts.read_gb_s).map(|(achieved, read)| achieved / read);
    let device_share = device_share(record);
    let cached = bytes.is_some_and(|bytes| is_cached(facts, bytes, mbu));
    Bandwidth {
        weight_bytes_per_token,
        kv_bytes_per_token,
        read_gb_s: facts.read_gb_s,
        copy_gb_s: facts.copy_gb_s,
        since: facts.bandwidth_since.clone(),
        achieved_gb_s,
        mbu,
        theoretical_gb_s: facts.theoretical_gb_s.as_ref().ok().copied(),
        theoretical_unknown: facts.theoretical_gb_s.as_ref().err().cloned(),
        device_share,
        bound: mbu.and_then(|mbu| bound(mbu, cached, waiting(&facts.device.kind, device_share))).map(str::to_owned),
    }
}

/// Bytes that one decode step reads.
pub fn step_bytes(record: &Record) -> Option<u64> {
    Some(record.bandwidth.weight_bytes_per_token? + record.bandwidth.kv_bytes_per_token?)
}

/// Whether part of what a step reads never leaves the last-level cache.
pub fn is_cached(facts: &Facts, step_bytes: u64, mbu: Option<f64>) -> bool {
    mbu.is_some_and(|mbu| mbu > 1.0) || step_bytes < 2 * facts.cache_bytes.unwrap_or(0)
}

/// Time of all decode steps by the device's clock over that by the host's.
fn device_share(record: &Record) -> Option<f64> {
    let sum = |steps: &[Vec<u64>]| steps.iter().flatten().sum::<u64>() as f64;
    let (device, host) = (sum(&record.samples.device_step_ns), sum(&record.samples.decode_step_ns));
    (device > 0.0 && host > 0.0).then(|| device / host)
}

/// Share of a step in which the device has nothing to do; on a CPU host and device are one.
fn waiting(device_kind: &str, device_share: Option<f64>) -> Option<f64> {
    match device_kind {
        "cpu" => Some(0.0),
        _ => device_share.map(|share| (1.0 - share).max(0.0)),
    }
}

/// A step has three parts: reading at full bandwidth, waiting for the host, and the rest. The largest gives the name. Where
/// waiting is unknown, only a reading part of half the step or more is the largest for certain.
fn bound(reading: f64, cached: bool, waiting: Option<f64>) -> Option<&'static str> {
    let computing = waiting.map(|waiting| 1.0 - reading - waiting);
    match (waiting, computing) {
        _ if cached => Some("cache-resident"),
        (Some(waiting), Some(computing)) if reading >= waiting && reading >= computing => Some("bandwidth-bound"),
        (Some(waiting), Some(computing)) if waiting >= computing => Some("launch-bound"),
        (Some(_), _) => Some("compute-bound"),
        (None, _) => (reading >= 0.5).then_some("bandwidth-bound"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_part_of_a_step_names_it() {
        for (reading, cached, kind, device_share, expected) in [
            (0.9, false, "cpu", None, Some("bandwidth-bound")),
            (0.5, false, "cpu", None, Some("bandwidth-bound")),
            (0.4, false, "cpu", None, Some("compute-bound")),
            (0.9, true, "cpu", None, Some("cache-resident")),
            (0.8, false, "cuda", Some(0.98), Some("bandwidth-bound")),
            (0.2, false, "cuda", Some(0.4), Some("launch-bound")),
            (0.2, false, "cuda", Some(0.95), Some("compute-bound")),
            (0.4, false, "cuda", Some(0.7), Some("bandwidth-bound")),
            (0.6, false, "cuda", None, Some("bandwidth-bound")),
            (0.4, false, "cuda", None, None),
        ] {
            let found = bound(reading, cached, waiting(kind, device_share));
            assert_eq!(found, expected, "{reading} {cached} {kind} {device_share:?}");
        }
    }
}
