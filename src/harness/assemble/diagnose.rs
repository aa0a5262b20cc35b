//! Diagnoses one record: warnings that follow from its repeats, the machine and its sizes.

use super::limit;
use crate::harness::bandwidth_cache::SLOW_READ;
use crate::harness::measured::WarmupEnd;
use crate::harness::run_context::RunContext;
use crate::harness::schedule::VariantOutcome;
use crate::harness::stopping::RepeatsEnd;
use crate::harness::warnings::Warning;
use crate::harness::watch::Watched;
use crate::os::cpu_usage::CpuUsage;
use crate::record::{Record, metrics};
use crate::stats;

/// Host times with and without a synchronisation for each token that differ by more than this are both reported.
const SYNC_DIFFERS: f64 = 0.03;

/// Warnings that follow from the repeats themselves.
pub fn repeat_warnings(context: &RunContext, record: &Record, outcome: &VariantOutcome) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let (n, protocol) = (outcome.samples.len(), &context.protocol);
    if n < protocol.min_repeats && outcome.ended != Some(RepeatsEnd::Count) {
        warnings.push(Warning::FewRepeats { n, min_repeats: protocol.min_repeats });
    }
    let n_launches = outcome.launches.len();
    if (2..stats::MIN_LAUNCHES).contains(&n_launches) {
        warnings.push(Warning::FewLaunches { n: n_launches, min_launches: stats::MIN_LAUNCHES });
    }
    let times: Vec<f64> = outcome.samples.iter().map(|sample| sample.end_to_end_ns as f64).collect();
    let metric = if record.workload.n_gen > 1 { "tpot_ms" } else { "ttft_ms" };
    let width = stats::relative_half_width(&metrics::repeats(record, metric), &record.samples.launches);
    if let Some(rel_ci) = width.filter(|width| *width > protocol.rel_ci) {
        warnings.push(Warning::WideInterval { metric, rel_ci, wanted: protocol.rel_ci });
    }
    let outliers = stats::outliers(&times).len();
    if outliers > 0 {
        warnings.push(Warning::Outliers { n: outliers, of: n });
    }
    if let Some(warmed) = &outcome.warmed {
        if matches!(warmed.ended, WarmupEnd::Cap | WarmupEnd::MaxTime) {
            warnings.push(Warning::WarmupNotFlat { n: warmed.runs_ns.len() });
        }
        let asked = context.workload.n_gen as usize;
        if warmed.n_gen < asked {
            warnings.push(Warning::EndOfText { n_gen: warmed.n_gen, asked });
        }
    }
    if let Some(at) = outcome.samples.iter().position(|sample| sample.ids != outcome.samples[0].ids) {
        warnings.push(Warning::TokensDiffer { repeat: at + 1 });
    }
    let load = CpuUsage::sum(outcome.samples.iter().filter_map(|sample| sample.load));
    if load.disturbs(context.environment.threads) {
        let others_cpus = load.others_cpus().unwrap_or(0.0);
        warnings.push(Warning::BusyCpus { others_cpus, n_cpus: load.n_cpus });
    }
    warnings.extend(sync_differs(record));
    let logits_problem = outcome.finished.as_ref().and_then(|finished| finished.logits_problem.clone());
    warnings.extend(logits_problem.map(|problem| Warning::LogitsNotSaved { problem }));
    warnings
}

fn sync_differs(record: &Record) -> Option<Warning> {
    let median = |key: &str| record.metrics.get(key)?.median;
    let (tps, synced_tps) = (median("decode_tps")?, median("decode_synced_tps")?);
    let differs = (tps - synced_tps).abs() > SYNC_DIFFERS * tps;
    differs.then_some(Warning::SyncDiffers { tps, synced_tps })
}

/// Warnings that follow from readings of the machine during the repeats.
pub fn machine_warnings(outcome: &VariantOutcome) -> Vec<Warning> {
    let watched = &outcome.watched;
    let mut warnings = Vec::new();
    let throttled: Vec<_> = watched.iter().map(Watched::throttled_by).filter(|reasons| !reasons.is_empty()).collect();
    if !throttled.is_empty() {
        let n = throttled.len();
        let mut reasons: Vec<_> = throttled.concat();
        reasons.sort_unstable();
        reasons.dedup();
        warnings.push(Warning::GpuThrottled { reasons, n, of: watched.len() });
    }
    let count = watched.iter().map(Watched::cpu_throttles).sum();
    if count > 0 {
        warnings.push(Warning::CpuThrottled { count });
    }
    let slow: Vec<_> = watched.iter().filter_map(Watched::slow_clock).collect();
    if let Some((mhz, default_mhz)) = slow.iter().copied().min_by(|a, b| a.0.total_cmp(&b.0)) {
        warnings.push(Warning::LowClock { mhz, default_mhz, n: slow.len(), of: watched.len() });
    }
    if outcome.n_discarded > 0 {
        warnings.push(Warning::Discarded { n: outcome.n_discarded });
    }
    let n_others = watched.iter().map(Watched::n_others).max().unwrap_or(0);
    if n_others > 0 {
        warnings.push(Warning::GpuShared { n: n_others });
    }
    warnings
}

/// Warnings that follow from sizes and bandwidth.
pub fn memory_warnings(context: &RunContext, record: &Record, outcome: &VariantOutcome) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mbu = record.bandwidth.mbu;
    if let Some(step_bytes) = limit::step_bytes(record).filter(|bytes| limit::is_cached(context, *bytes, mbu)) {
        warnings.push(Warning::CacheResident { step_bytes, cache_bytes: context.cache_bytes.unwrap_or(0), mbu });
    }
    let theoretical = context.theoretical_gb_s.as_ref().ok().copied();
    if let Some((read_gb_s, theoretical_gb_s)) = context.read_gb_s.zip(theoretical)
        && read_gb_s < SLOW_READ * theoretical_gb_s
    {
        warnings.push(Warning::SlowRead { read_gb_s, theoretical_gb_s });
    }
    let peak_is_exact = outcome.finished.as_ref().is_none_or(|finished| finished.peak_is_exact);
    if context.device.kind == "cpu" && !peak_is_exact && record.memory.peak_bytes.is_some() {
        warnings.push(Warning::PeakNotExact);
    }
    if record.weights.fp16_overflow > 0 {
        let tensors = record.weights.fp16_overflow_by_tensor.clone();
        warnings.push(Warning::Fp16Overflow { count: record.weights.fp16_overflow, tensors });
    }
    warnings
}
