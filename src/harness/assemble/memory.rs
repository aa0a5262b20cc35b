//! Memory of a precision by use.

use std::collections::BTreeMap;

use crate::engine::memory::PoolUse;
use crate::harness::load::LoadReport;
use crate::harness::schedule::VariantOutcome;
use crate::harness::watch::Watched;
use crate::record::{Memory, Pool, PoolPhase};

/// On the CPU the worker's resident set; on CUDA the pool's own counters, undefined where the session has no pool. Sizes of a
/// model that did not fit are with its failure.
pub fn memory(outcome: &VariantOutcome, device_kind: &str) -> Memory {
    let (loaded, warmed, finished) = (outcome.loaded.as_ref(), outcome.warmed.as_ref(), outcome.finished.as_ref());
    let footprint = finished.map(|finished| &finished.footprint);
    let marks = if device_kind == "cpu" { resident(outcome) } else { pooled(outcome) };
    let rss_peaks = [
        loaded.and_then(|loaded| loaded.load_peak_bytes),
        warmed.and_then(|warmed| warmed.warmup_peak_bytes),
        finished.and_then(|finished| finished.peak_bytes),
    ];
    let known = footprint.map(|f| f.weights_resident_bytes + f.kv_cache_bytes + f.scratch_bytes);
    let device_process_bytes = outcome.watched.iter().filter_map(Watched::process_bytes).max();
    let reserved = finished.and_then(|finished| finished.pool.get("run")).map(|run| run.reserved_high_bytes);
    let (most, before) = match device_kind {
        "cpu" => (marks.peak_bytes, loaded.and_then(|loaded| loaded.before_bytes)),
        _ => (device_process_bytes, loaded.and_then(|loaded| loaded.before_device_bytes)),
    };
    Memory {
        weights_bytes: footprint.map(|footprint| footprint.weights_bytes),
        weights_by_format: loaded.map(weights_by_format).unwrap_or_default(),
        before_load_bytes: loaded.and_then(|loaded| loaded.before_bytes),
        growth_bytes: most.zip(before).and_then(|(most, before)| most.checked_sub(before)),
        weights_resident_bytes: footprint.map(|footprint| footprint.weights_resident_bytes),
        kv_cache_bytes: footprint.map(|footprint| footprint.kv_cache_bytes),
        scratch_bytes: footprint.map(|footprint| footprint.scratch_bytes),
        other_bytes: marks.start_bytes.zip(known).and_then(|(start, known)| start.checked_sub(known)),
        context_bytes: device_process_bytes.zip(reserved).and_then(|(process, pool)| process.checked_sub(pool)),
        device_process_bytes,
        process_peak_rss_bytes: rss_peaks.into_iter().flatten().max(),
        ..marks
    }
}

/// Ours, or what another engine said.
fn weights_by_format(loaded: &LoadReport) -> BTreeMap<String, u64> {
    let own = &loaded.own.weights_by_format;
    if own.is_empty() { loaded.held.weights_by_format.clone() } else { own.clone() }
}

fn resident(outcome: &VariantOutcome) -> Memory {
    let (loaded, warmed, finished) = (outcome.loaded.as_ref(), outcome.warmed.as_ref(), outcome.finished.as_ref());
    Memory {
        load_peak_bytes: loaded.and_then(|loaded| loaded.load_peak_bytes),
        prefill_peak_bytes: warmed.and_then(|warmed| warmed.prefill_peak_bytes),
        decode_peak_bytes: warmed.and_then(|warmed| warmed.decode_peak_bytes),
        start_bytes: warmed.and_then(|warmed| warmed.start_bytes),
        peak_bytes: finished.and_then(|finished| finished.peak_bytes),
        end_bytes: finished.and_then(|finished| finished.end_bytes),
        ..Memory::default()
    }
}

fn pooled(outcome: &VariantOutcome) -> Memory {
    let Some(finished) = outcome.finished.as_ref().filter(|finished| !finished.pool.is_empty()) else {
        return Memory::default();
    };
    let phase = |name: &str| finished.pool.get(name);
    let high = |name: &str| phase(name).map(|phase| phase.used_high_bytes);
    Memory {
        load_peak_bytes: high("load"),
        prefill_peak_bytes: high("prefill"),
        decode_peak_bytes: high("decode"),
        start_bytes: phase("start").map(|start| start.used_bytes),
        peak_bytes: high("run"),
        end_bytes: phase("run").map(|run| run.used_bytes),
        pool: Some(Pool {
            release_threshold_bytes: finished.release_threshold_bytes,
            phases: finished
                .pool
                .iter()
                .map(|(name, phase)| (name.clone(), recorded(phase)))
                .collect::<BTreeMap<_, _>>(),
        }),
        ..Memory::default()
    }
}

fn recorded(phase: &PoolUse) -> PoolPhase {
    let PoolUse { used_bytes, used_high_bytes, reserved_bytes, reserved_high_bytes } = *phase;
    PoolPhase { used_bytes, used_high_bytes, reserved_bytes, reserved_high_bytes }
}
