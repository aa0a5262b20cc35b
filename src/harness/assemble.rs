//! From outcomes to records: metrics, ratios, bandwidth, validity and warnings.

use std::collections::BTreeMap;

use super::load::LoadSpan;
use super::protocol::{Failure, Sample, WarmupEnd};
use super::schedule::{Order, Outcome};
use super::stopping::RepeatsEnd;
use super::validity::invalid_reason;
use super::warnings::Warning;
use super::{Case, Protocol};
use crate::quant::FormatOptions;
use crate::record::{self, Bandwidth, Memory, Record, Samples, Status, metrics};
use crate::stats;

/// What is the same for all precisions of a run.
#[derive(Debug, Clone)]
pub struct Facts {
    pub engine: record::Engine,
    pub command: String,
    pub timestamp: String,
    pub model: record::ModelFacts,
    /// `fp16_overflow` is each precision's own.
    pub weights: record::WeightFacts,
    pub device: record::DeviceFacts,
    /// `n_gen` is what was asked.
    pub workload: record::Workload,
    /// Positions of the decoder's cache before the first decode step.
    pub n_before: u64,
    pub environment: record::Environment,
    pub format_options: FormatOptions,
    /// As in [`Case`].
    pub keep_fp16: Vec<String>,
    pub protocol: Protocol,
    pub order: Order,
    pub resolve_s: f64,
    pub read_gb_s: Option<f64>,
    pub copy_gb_s: Option<f64>,
    pub cache_bytes: Option<u64>,
    /// Of the machine and the run, for every record.
    pub warnings: Vec<Warning>,
}

/// One record for each precision, in the order of `case`. `decode` turns ids into text where there is a tokenizer.
pub fn records(
    facts: &Facts,
    case: &Case,
    outcomes: &[Outcome],
    decode: &dyn Fn(&[u32]) -> Option<String>,
) -> Vec<Record> {
    let named = || case.precisions.iter().zip(outcomes);
    let mut records: Vec<Record> =
        named().map(|(precision, outcome)| base(facts, precision, outcome, decode)).collect();
    let fp16 = named().position(|(precision, _)| precision == "fp16");
    let real = facts.weights.source != "random";
    for (record, outcome) in records.iter_mut().zip(outcomes) {
        let fp16_samples = fp16.filter(|_| real).map(|at| outcomes[at].samples.as_slice());
        let n_gen = record.workload.n_gen as usize;
        if record.status == Status::Ok
            && let Some(reason) = invalid_reason(&outcome.samples, n_gen, fp16_samples)
        {
            (record.status, record.reason) = (Status::Invalid, Some(reason));
        }
    }
    let baseline = fp16.map(|at| records[at].clone());
    for (record, outcome) in records.iter_mut().zip(outcomes) {
        let mut warnings = facts.warnings.clone();
        if let Some(baseline) = &baseline {
            compare(record, baseline, facts.order, &mut warnings);
        }
        if record.status != Status::Oom && outcome.failure.is_none() {
            warnings.extend(of_repeats(facts, record, outcome));
            warnings.extend(of_memory(facts, record, outcome));
        }
        record.tainted = warnings.iter().any(Warning::taints);
        record.warnings = warnings.iter().map(Warning::to_string).collect();
    }
    records
}

/// One record for each precision of a case whose speed is not measured.
pub fn unmeasured(facts: &Facts, case: &Case) -> Vec<Record> {
    let record = |precision: &String| base(facts, precision, &Outcome::default(), &|_| None);
    case.precisions.iter().map(record).collect()
}

/// All that follows from the outcome alone.
fn base(facts: &Facts, precision: &str, outcome: &Outcome, decode: &dyn Fn(&[u32]) -> Option<String>) -> Record {
    let (status, reason) = status(outcome);
    let loaded = outcome.loaded.clone().unwrap_or_default();
    let n_gen = outcome.warmed.as_ref().map_or(facts.workload.n_gen, |warmed| warmed.n_gen as u64);
    let token_ids = outcome.samples.first().map(|sample| sample.ids.clone()).unwrap_or_default();
    let text = (!token_ids.is_empty()).then(|| decode(&token_ids)).flatten();
    let isa = if loaded.isa.is_empty() { facts.environment.isa.clone() } else { loaded.isa.clone() };
    let mut record = Record {
        status,
        reason,
        tainted: false,
        engine: facts.engine.clone(),
        command: facts.command.clone(),
        timestamp: facts.timestamp.clone(),
        model: facts.model.clone(),
        weights: record::WeightFacts { fp16_overflow: loaded.fp16_overflow, ..facts.weights.clone() },
        precision: precision.to_owned(),
        keep_fp16: facts.keep_fp16.clone(),
        int8: int8(facts, precision, outcome),
        device: facts.device.clone(),
        workload: record::Workload { n_gen, ..facts.workload },
        protocol: protocol(facts, outcome),
        phases: phases(facts, outcome),
        samples: samples(outcome),
        metrics: BTreeMap::new(),
        dtypes: dtypes(precision, &facts.device.kind),
        ratio_to_fp16: None,
        memory: memory(outcome, &facts.device.kind),
        bandwidth: Bandwidth::default(),
        output: record::Output { token_ids, text },
        environment: record::Environment { isa, ..facts.environment.clone() },
        warnings: Vec::new(),
        quality: None,
    };
    record.metrics = metrics::summaries(&record);
    record.bandwidth = bandwidth(facts, &record, outcome);
    record
}

fn status(outcome: &Outcome) -> (Status, Option<String>) {
    match &outcome.failure {
        None => (Status::Ok, None),
        Some(failure @ Failure::OutOfMemory { .. }) => (Status::Oom, Some(failure.message().to_owned())),
        Some(failure) => (Status::Error, Some(failure.message().to_owned())),
    }
}

fn int8(facts: &Facts, precision: &str, outcome: &Outcome) -> Option<record::Int8Facts> {
    let counts = outcome.finished.as_ref().map(|finished| finished.outliers).filter(|counts| counts.calls > 0);
    (precision == "int8").then(|| record::Int8Facts {
        threshold: f64::from(facts.format_options.int8_threshold),
        outlier_columns_mean: counts.map(|counts| counts.columns as f64 / counts.calls as f64),
    })
}

fn protocol(facts: &Facts, outcome: &Outcome) -> record::Protocol {
    let warmed = outcome.warmed.as_ref();
    record::Protocol {
        n_warmup: warmed.map_or(0, |warmed| warmed.runs_ns.len() as u64),
        warmup_ended: warmed.map(|warmed| warmed.ended.to_string()).unwrap_or_default(),
        n_repeats: outcome.samples.len() as u64,
        ended: outcome.ended.map(|ended| ended.to_string()).unwrap_or_default(),
        order: facts.order.name().to_owned(),
        interval: "within-run".to_owned(),
    }
}

fn phases(facts: &Facts, outcome: &Outcome) -> BTreeMap<String, f64> {
    let mut phases = BTreeMap::from([("resolve".to_owned(), facts.resolve_s)]);
    if let Some(loaded) = &outcome.loaded {
        phases.insert("load".to_owned(), loaded.load_s);
        phases.insert("quantize".to_owned(), loaded.quantize_s);
    }
    if let Some(warmed) = &outcome.warmed {
        phases.insert("warmup".to_owned(), warmed.duration_s);
    }
    if !outcome.samples.is_empty() {
        let total_ns: u64 = outcome.samples.iter().map(|sample| sample.end_to_end_ns).sum();
        phases.insert("measure".to_owned(), total_ns as f64 / 1e9);
        phases.extend(of_a_repeat(facts, &outcome.samples));
    }
    phases
}

/// Seconds that the parts of a repeat take where the model has an encoder: medians.
fn of_a_repeat(facts: &Facts, samples: &[Sample]) -> Vec<(String, f64)> {
    if samples.iter().all(|sample| sample.encode_ns == 0) {
        return Vec::new();
    }
    let encoder = if facts.workload.n_image > 0 { "image_encode" } else { "encoder" };
    let seconds = |part: fn(&Sample) -> u64| {
        let values: Vec<f64> = samples.iter().map(|sample| part(sample) as f64 / 1e9).collect();
        stats::median(&values)
    };
    let parts: [(&str, fn(&Sample) -> u64); 3] = [
        (encoder, |sample| sample.encode_ns),
        ("prefill", |sample| sample.prefill_ns - sample.encode_ns),
        ("decode", |sample| sample.end_to_end_ns - sample.prefill_ns),
    ];
    parts.into_iter().filter_map(|(name, part)| Some((name.to_owned(), seconds(part)?))).collect()
}

fn samples(outcome: &Outcome) -> Samples {
    let runs_ns = outcome.warmed.as_ref().map(|warmed| warmed.runs_ns.clone()).unwrap_or_default();
    let samples = &outcome.samples;
    let encodes = samples.iter().any(|sample| sample.encode_ns > 0);
    let encode_ns = samples.iter().filter(|_| encodes).map(|sample| sample.encode_ns).collect();
    Samples {
        encode_ns,
        prefill_ns: samples.iter().map(|sample| sample.prefill_ns).collect(),
        decode_step_ns: samples.iter().map(|sample| sample.step_ns.clone()).collect(),
        end_to_end_ns: samples.iter().map(|sample| sample.end_to_end_ns).collect(),
        cold_ns: runs_ns.first().copied(),
        warmup_ns: runs_ns,
        imported: BTreeMap::new(),
    }
}

fn dtypes(precision: &str, device: &str) -> record::Dtypes {
    let computed = if device == "cpu" { "fp32" } else { "fp16" }.to_owned();
    let (compute, kv_cache, logits) = (computed.clone(), computed.clone(), computed);
    record::Dtypes { weights: precision.to_owned(), compute, kv_cache, logits }
}

/// A worker knows its resident set only: on CUDA the device's marks stay undefined rather than show the host's.
fn memory(outcome: &Outcome, device_kind: &str) -> Memory {
    let on_host = |bytes: Option<u64>| bytes.filter(|_| device_kind == "cpu");
    let (loaded, warmed, finished) = (outcome.loaded.as_ref(), outcome.warmed.as_ref(), outcome.finished.as_ref());
    let load_peak_bytes = loaded.and_then(|loaded| loaded.load_peak_bytes);
    let peak_bytes = finished.and_then(|finished| finished.peak_bytes);
    let warmup_peak_bytes = warmed.and_then(|warmed| warmed.warmup_peak_bytes);
    let known = |bytes: u64| (bytes > 0).then_some(bytes);
    let (wanted_bytes, free_bytes) = match outcome.failure {
        Some(Failure::OutOfMemory { wanted_bytes, free_bytes, .. }) => (known(wanted_bytes), known(free_bytes)),
        _ => (None, None),
    };
    Memory {
        start_bytes: on_host(warmed.and_then(|warmed| warmed.start_bytes)),
        end_bytes: on_host(finished.and_then(|finished| finished.end_bytes)),
        peak_bytes: on_host(peak_bytes),
        load_peak_bytes: on_host(load_peak_bytes),
        weights_bytes: finished.map(|finished| finished.footprint.weights_bytes),
        kv_cache_bytes: finished.map(|finished| finished.footprint.kv_cache_bytes),
        scratch_bytes: finished.map(|finished| finished.footprint.scratch_bytes),
        process_peak_rss_bytes: load_peak_bytes.max(warmup_peak_bytes).max(peak_bytes),
        wanted_bytes,
        free_bytes,
    }
}

fn bandwidth(facts: &Facts, record: &Record, outcome: &Outcome) -> Bandwidth {
    let footprint = outcome.finished.as_ref().map(|finished| finished.footprint);
    // Step i of n_gen − 1 reads i positions after the prompt: n_gen / 2 on average.
    let doubled_depth = 2 * facts.n_before + record.workload.n_gen;
    let kv_bytes_per_token = footprint.map(|f| f.kv_bytes_per_position * doubled_depth / 2 + f.cross_kv_bytes);
    let weight_bytes_per_token = footprint.map(|footprint| footprint.weight_bytes_per_token);
    let decode_tps = record.metrics.get("decode_tps").and_then(|summary| summary.median);
    let bytes = weight_bytes_per_token.zip(kv_bytes_per_token).map(|(weights, kv)| (weights + kv) as f64);
    let achieved_gb_s = bytes.zip(decode_tps).map(|(bytes, tps)| bytes * tps / 1e9);
    Bandwidth {
        weight_bytes_per_token,
        kv_bytes_per_token,
        read_gb_s: facts.read_gb_s,
        copy_gb_s: facts.copy_gb_s,
        achieved_gb_s,
        mbu: achieved_gb_s.zip(facts.read_gb_s).map(|(achieved, read)| achieved / read),
    }
}

/// Bytes that one decode step reads.
fn step_bytes(record: &Record) -> Option<u64> {
    Some(record.bandwidth.weight_bytes_per_token? + record.bandwidth.kv_bytes_per_token?)
}

/// Sets the ratio to fp16 where both ran, are valid and generated equally many tokens.
fn compare(record: &mut Record, fp16: &Record, order: Order, warnings: &mut Vec<Warning>) {
    if record.precision == "fp16" || record.status != Status::Ok || fp16.status != Status::Ok {
        return;
    }
    let (n_gen, fp16_n_gen) = (record.workload.n_gen, fp16.workload.n_gen);
    if n_gen != fp16_n_gen {
        warnings.push(Warning::UnequalLengths { n_gen, fp16_n_gen });
        return;
    }
    let tps = |record: &Record| metrics::repeats(record, "decode_tps");
    let paired = order == Order::Interleaved;
    let ratio = if paired { stats::paired_ratio } else { stats::unpaired_ratio }(&tps(record), &tps(fp16));
    let by_bytes = step_bytes(fp16).zip(step_bytes(record)).map(|(fp16, own)| fp16 as f64 / own as f64);
    record.ratio_to_fp16 = ratio.zip(by_bytes).map(|(ratio, by_bytes)| record::Ratio {
        median: ratio.median,
        ci95_low: ratio.interval.map(|interval| interval.low),
        ci95_high: ratio.interval.map(|interval| interval.high),
        paired,
        by_bytes,
    });
}

/// What the repeats themselves tell.
fn of_repeats(facts: &Facts, record: &Record, outcome: &Outcome) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let (n, protocol) = (outcome.samples.len(), &facts.protocol);
    if n < protocol.min_repeats && outcome.ended != Some(RepeatsEnd::Count) {
        warnings.push(Warning::FewRepeats { n, min_repeats: protocol.min_repeats });
    }
    let times: Vec<f64> = outcome.samples.iter().map(|sample| sample.end_to_end_ns as f64).collect();
    let decode = metrics::repeats(record, if record.workload.n_gen > 1 { "tpot_ms" } else { "ttft_ms" });
    if let Some(rel_ci) = stats::relative_half_width(&decode).filter(|width| *width > protocol.rel_ci) {
        warnings.push(Warning::WideInterval { rel_ci, wanted: protocol.rel_ci });
    }
    let outliers = stats::outliers(&times).len();
    if outliers > 0 {
        warnings.push(Warning::Outliers { n: outliers, of: n });
    }
    if let Some(warmed) = &outcome.warmed {
        if matches!(warmed.ended, WarmupEnd::Cap | WarmupEnd::MaxTime) {
            warnings.push(Warning::WarmupNotFlat { n: warmed.runs_ns.len() });
        }
        let asked = facts.workload.n_gen as usize;
        if warmed.n_gen < asked {
            warnings.push(Warning::EndOfText { n_gen: warmed.n_gen, asked });
        }
    }
    if let Some(at) = outcome.samples.iter().position(|sample| sample.ids != outcome.samples[0].ids) {
        warnings.push(Warning::TokensDiffer { repeat: at + 1 });
    }
    let load = LoadSpan::sum(outcome.samples.iter().filter_map(|sample| sample.load));
    if load.disturbs(facts.environment.threads) {
        let others_cpus = load.others_cpus().unwrap_or(0.0);
        warnings.push(Warning::BusyCpus { others_cpus, n_cpus: load.n_cpus });
    }
    warnings
}

/// What sizes and bandwidth tell.
fn of_memory(facts: &Facts, record: &Record, outcome: &Outcome) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let fast = record.bandwidth.mbu.is_some_and(|mbu| mbu > 1.0);
    if let Some(step_bytes) = step_bytes(record) {
        let cache_bytes = facts.cache_bytes.unwrap_or(0);
        if fast || step_bytes < 2 * cache_bytes {
            warnings.push(Warning::CacheResident { step_bytes, cache_bytes, mbu: record.bandwidth.mbu });
        }
    }
    let peak_is_exact = outcome.finished.as_ref().is_none_or(|finished| finished.peak_is_exact);
    if !peak_is_exact && record.memory.peak_bytes.is_some() {
        warnings.push(Warning::PeakNotExact);
    }
    if record.weights.fp16_overflow > 0 {
        warnings.push(Warning::Fp16Overflow { count: record.weights.fp16_overflow });
    }
    warnings
}
