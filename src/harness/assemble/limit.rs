//! Memory bandwidth that decoding reaches, and what limits decoding as far as that was measured.

use crate::engine::Alone;
use crate::harness::run_context::RunContext;
use crate::harness::schedule::VariantOutcome;
use crate::record::{Bandwidth, Bound, Record};
use crate::stats;

/// The bandwidth of a record, from its metrics and the bytes that the session counted.
pub fn bandwidth(context: &RunContext, record: &Record, outcome: &VariantOutcome) -> Bandwidth {
    let footprint = outcome.finished.as_ref().map(|finished| &finished.footprint);
    let batch = record.workload.batch_size.max(1);
    let kv_bytes_per_token = footprint.map(|f| batch * f.kv_bytes_per_step(context.n_before, record.workload.n_gen));
    let weight_bytes_per_token = footprint.map(|footprint| footprint.weight_bytes_per_token);
    let decode_tps = record.metrics.get("decode_tps").and_then(|summary| summary.median);
    let bytes = weight_bytes_per_token.zip(kv_bytes_per_token).map(|(weights, kv)| weights + kv);
    let steps_s = decode_tps.map(|tps| tps / batch as f64);
    let achieved_gb_s = bytes.zip(steps_s).map(|(bytes, steps)| bytes as f64 * steps / 1e9);
    // Of another engine it is not known which products it computes.
    let is_own = record.engine.name == context.engine.name;
    let flops_per_step = Some(context.flops_per_step).filter(|flops| is_own && *flops > 0);
    let achieved_gflop_s = flops_per_step.zip(steps_s).map(|(flops, steps)| flops as f64 * steps / 1e9);
    let mbu = achieved_gb_s.zip(context.read_gb_s).map(|(achieved, read)| achieved / read);
    let alone = outcome.finished.as_ref().and_then(|finished| Shares::of(finished.alone.as_ref()?));
    let seen = LimitInputs {
        is_own,
        is_cached: bytes.is_some_and(|bytes| is_cached(context, bytes, mbu)),
        on_cpu: context.device.kind == "cpu",
        mbu,
        device_share: device_share(record),
        alone,
    };
    Bandwidth {
        weight_bytes_per_token,
        kv_bytes_per_token,
        read_gb_s: context.read_gb_s,
        copy_gb_s: context.copy_gb_s,
        since: context.bandwidth_since.clone(),
        achieved_gb_s,
        mbu,
        flops_per_step,
        achieved_gflop_s,
        matmul_gflop_s: context.matmul_gflop_s,
        mfu: achieved_gflop_s.zip(context.matmul_gflop_s).map(|(achieved, most)| achieved / most),
        theoretical_gb_s: context.theoretical_gb_s.as_ref().ok().copied(),
        theoretical_unknown: context.theoretical_gb_s.as_ref().err().cloned(),
        device_share: seen.device_share,
        memory_alone_share: alone.map(|alone| alone.memory),
        arithmetic_alone_share: alone.map(|alone| alone.arithmetic),
        bound: decode_tps.map(|_| bound(&seen).name().to_owned()),
    }
}

/// Bytes that one decode step reads.
pub fn step_bytes(record: &Record) -> Option<u64> {
    Some(record.bandwidth.weight_bytes_per_token? + record.bandwidth.kv_bytes_per_token?)
}

/// True where part of what a step reads never leaves the last-level cache.
pub fn is_cached(context: &RunContext, step_bytes: u64, mbu: Option<f64>) -> bool {
    mbu.is_some_and(|mbu| mbu > 1.0) || step_bytes < 2 * context.cache_bytes.unwrap_or(0)
}

/// Time of all decode steps by the device's clock over that by the host's.
fn device_share(record: &Record) -> Option<f64> {
    let sum = |steps: &[Vec<u64>]| steps.iter().flatten().sum::<u64>() as f64;
    let (device, host) = (sum(&record.samples.device_step_ns), sum(&record.samples.decode_step_ns));
    (device > 0.0 && host > 0.0).then(|| device / host)
}

/// A part of a step that takes this share of it alone explains it.
const EXPLAINS: f64 = 0.85;

/// Two parts that both explain a step must differ by this share of it: medians of few rounds differ by some hundredths.
const DIFFERS: f64 = 0.05;

/// A device that works for less than this share of a step waits for the host.
const DEVICE_WORKS: f64 = 0.9;

/// Time of the memory reads alone and of the arithmetic alone, over the real step. They overlap in a real step, so that they
/// need not add up to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shares {
    memory: f64,
    arithmetic: f64,
}

impl Shares {
    /// Shares of the medians.
    fn of(alone: &Alone) -> Option<Self> {
        let median = |ns: &[u64]| stats::median(&ns.iter().map(|&ns| ns as f64).collect::<Vec<_>>());
        let step = median(&alone.step_ns).filter(|step| *step > 0.0)?;
        Some(Self { memory: median(&alone.memory_ns)? / step, arithmetic: median(&alone.arithmetic_ns)? / step })
    }
}

/// Measurements of a variant that decoded.
#[derive(Debug, Clone, Copy, PartialEq)]
struct LimitInputs {
    /// True for quantbench's own engine. How another one reads and computes was not measured.
    is_own: bool,
    is_cached: bool,
    on_cpu: bool,
    mbu: Option<f64>,
    device_share: Option<f64>,
    alone: Option<Shares>,
}

/// The limit, where one was measured.
fn bound(seen: &LimitInputs) -> Bound {
    match seen {
        LimitInputs { is_own: false, .. } => Bound::NotKnown,
        LimitInputs { is_cached: true, .. } => Bound::CacheResident,
        LimitInputs { on_cpu: true, alone, .. } => alone.map_or(Bound::NotKnown, bound_alone),
        LimitInputs { mbu: Some(mbu), .. } if *mbu >= EXPLAINS => Bound::Memory,
        LimitInputs { device_share: Some(share), .. } if *share < DEVICE_WORKS => Bound::Host,
        _ => Bound::NotKnown,
    }
}

/// The limit by the part that explains the step. Where both do, the larger one if they differ enough; else it is mixed, as it is where
/// neither does.
fn bound_alone(Shares { memory, arithmetic }: Shares) -> Bound {
    match (memory >= EXPLAINS, arithmetic >= EXPLAINS) {
        (true, false) => Bound::Memory,
        (false, true) => Bound::Compute,
        (true, true) if memory >= arithmetic + DIFFERS => Bound::Memory,
        (true, true) if arithmetic >= memory + DIFFERS => Bound::Compute,
        _ => Bound::Mixed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our own engine on a CPU, of which nothing was measured.
    const NOTHING: LimitInputs =
        LimitInputs { is_own: true, is_cached: false, on_cpu: true, mbu: None, device_share: None, alone: None };

    #[test]
    fn on_a_cpu_the_part_that_explains_the_step_names_it() {
        for (memory, arithmetic, expected) in [
            (0.85, 0.3, Bound::Memory),
            (0.99, 0.84, Bound::Memory),
            (0.3, 0.85, Bound::Compute),
            (0.84, 1.02, Bound::Compute),
            // Neither.
            (0.84, 0.84, Bound::Mixed),
            (0.5, 0.3, Bound::Mixed),
            // Both.
            (0.97, 0.9, Bound::Memory),
            (0.9, 0.97, Bound::Compute),
            (0.94, 0.9, Bound::Mixed),
            (0.9, 0.94, Bound::Mixed),
            (0.9, 0.9, Bound::Mixed),
        ] {
            let alone = Some(Shares { memory, arithmetic });
            assert_eq!(bound(&LimitInputs { alone, ..NOTHING }), expected, "{memory} {arithmetic}");
            let cached = LimitInputs { alone, is_cached: true, ..NOTHING };
            assert_eq!(bound(&cached), Bound::CacheResident, "{memory} {arithmetic}");
            assert_eq!(bound(&LimitInputs { is_own: false, ..cached }), Bound::NotKnown, "{memory} {arithmetic}");
        }
        // The bytes alone decide nothing.
        assert_eq!(bound(&LimitInputs { mbu: Some(0.95), ..NOTHING }), Bound::NotKnown);
    }

    #[test]
    fn on_a_gpu_what_was_not_measured_is_not_known() {
        for (mbu, device_share, expected) in [
            (Some(0.85), None, Bound::Memory),
            (Some(0.9), Some(0.5), Bound::Memory),
            (Some(0.84), Some(0.899), Bound::Host),
            (None, Some(0.4), Bound::Host),
            (Some(0.84), Some(0.9), Bound::NotKnown),
            (Some(0.18), Some(0.98), Bound::NotKnown),
            (Some(0.6), None, Bound::NotKnown),
            (None, None, Bound::NotKnown),
        ] {
            let seen = LimitInputs { on_cpu: false, mbu, device_share, ..NOTHING };
            assert_eq!(bound(&seen), expected, "{mbu:?} {device_share:?}");
            assert_eq!(bound(&LimitInputs { is_own: false, ..seen }), Bound::NotKnown);
            assert_eq!(bound(&LimitInputs { is_cached: true, ..seen }), Bound::CacheResident);
        }
    }

    #[test]
    fn shares_are_of_medians() {
        let alone = Alone { step_ns: vec![100, 120, 90], arithmetic_ns: vec![50, 10, 60], memory_ns: vec![95, 96, 10] };
        assert_eq!(Shares::of(&alone), Some(Shares { memory: 0.95, arithmetic: 0.5 }));
        assert_eq!(Shares::of(&Alone::default()), None);
    }
}
