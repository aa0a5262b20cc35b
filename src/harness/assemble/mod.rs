//! From outcomes to records: metrics, ratios, bandwidth, validity and warnings.

mod diagnose;
mod limit;
mod memory;
mod monitor;
mod others;

use std::collections::BTreeMap;

use super::case::{Case, Variant};
use super::environment::engine_info;
use super::load::LoadReport;
use super::measured::Sample;
use super::run_context::RunContext;
use super::schedule::{RunOrder, VariantOutcome};
use super::validity::invalid_reason;
use super::warnings::Warning;
use crate::engine::{self, Engine};
use crate::ipc::status_of;
use crate::protocol::Failure;
use crate::quant::{self, FormatId};
use crate::record::{self, Bandwidth, Record, Samples, Status, metrics};
use crate::stats;

/// One record for each precision, in the order of `case`. `decode` turns ids into text where there is a tokenizer.
pub fn records(
    context: &RunContext,
    case: &Case,
    outcomes: &[VariantOutcome],
    decode: &dyn Fn(&[u32]) -> Option<String>,
) -> Vec<Record> {
    let variants = case.variants();
    let mut records: Vec<Record> =
        variants.iter().zip(outcomes).map(|(variant, outcome)| base(context, variant, outcome, decode)).collect();
    instruction_set_of_all(&variants, &mut records);
    let real = context.weights.source != "random";
    for (at, (record, outcome)) in records.iter_mut().zip(outcomes).enumerate() {
        let fp16 = case.baseline_of(at);
        let fp16_samples = fp16.filter(|_| real).map(|at| outcomes[at].samples.as_slice());
        let tokens = (record.workload.n_gen as usize, record.workload.batch_size as usize);
        if record.status == Status::Ok
            && let Some(reason) = invalid_reason(&outcome.samples, tokens, fp16_samples).or(others::not_finite(outcome))
        {
            (record.status, record.reason) = (Status::Invalid, Some(reason));
        }
    }
    let plain = records.clone();
    for (at, (record, outcome)) in records.iter_mut().zip(outcomes).enumerate() {
        let mut warnings = context.warnings.clone();
        let alone = |index: usize| outcomes[index].alone;
        let fp16 = case.baseline_of(at);
        others::add(record, (case, at), (&plain, outcomes), context.order, &mut warnings);
        if let Some(baseline) = fp16.map(|of| &plain[of]).filter(|_| fp16 != Some(at)) {
            let unpaired = alone(at) || fp16.is_some_and(alone);
            compare(record, baseline, if unpaired { RunOrder::InTurn } else { context.order }, &mut warnings);
        }
        let who = [Some(at), fp16].into_iter().flatten().find(|&index| alone(index) && record.status == Status::Ok);
        warnings.extend(who.map(|index| Warning::RanAlone { label: variants[index].label() }));
        if record.status != Status::Oom && outcome.failure.is_none() {
            warnings.extend(diagnose::repeat_warnings(context, record, outcome));
            warnings.extend(diagnose::machine_warnings(outcome));
            warnings.extend(diagnose::memory_warnings(context, record, outcome));
        }
        record.tainted = warnings.iter().any(Warning::taints);
        record.warnings = warnings.iter().map(Warning::to_string).collect();
    }
    records
}

/// Fills in the instruction set of variants that failed before they reported it: all ran on one device.
fn instruction_set_of_all(variants: &[Variant], records: &mut [Record]) {
    let own = |at: &usize| variants[*at].own_engine() == Some(Engine::Quantbench);
    let isas = (0..records.len()).filter(own).map(|at| records[at].environment.isa.clone());
    let Some(isa) = isas.into_iter().find(|isa| !isa.is_empty()) else { return };
    for at in (0..records.len()).filter(own) {
        let known = &mut records[at].environment.isa;
        if known.is_empty() {
            known.clone_from(&isa);
        }
    }
}

/// One record for each precision of a case whose speed is not measured.
pub fn unmeasured(context: &RunContext, case: &Case) -> Vec<Record> {
    let record = |&precision: &FormatId| {
        let mut record = base(context, &Variant::own(precision), &VariantOutcome::default(), &|_| None);
        let of_model = context.warnings.iter().filter(|warning| matches!(warning, Warning::Model { .. }));
        record.warnings = of_model.map(Warning::to_string).collect();
        record
    };
    case.precisions.iter().map(record).collect()
}

/// A record of everything that follows from the outcome alone.
fn base(
    context: &RunContext,
    variant: &Variant,
    outcome: &VariantOutcome,
    decode: &dyn Fn(&[u32]) -> Option<String>,
) -> Record {
    let loaded = outcome.loaded.clone().unwrap_or_default();
    let n_gen = outcome.warmed.as_ref().map_or(context.workload.n_gen, |warmed| warmed.n_gen as u64);
    let texts = outcome.samples.first().map(|sample| sample.texts(context.workload.batch_size as usize));
    let mut texts = texts.unwrap_or_default().into_iter();
    let token_ids = texts.next().unwrap_or_default();
    let text = (!token_ids.is_empty()).then(|| decode(&token_ids)).flatten();
    let isa = if loaded.isa.is_empty() { context.environment.isa.clone() } else { loaded.isa.clone() };
    let mut record = Record {
        status: Status::Ok,
        reason: None,
        tainted: false,
        engine: engine_of(context, variant, &loaded),
        file: String::new(),
        command: context.command.clone(),
        timestamp: context.timestamp.clone(),
        model: context.model.clone(),
        weights: record::WeightFacts {
            fp16_overflow: loaded.own.fp16_overflow,
            fp16_overflow_by_tensor: loaded.own.fp16_overflow_by_tensor.clone(),
            ..context.weights.clone()
        },
        precision: variant.precision(),
        keep_fp16: context.keep_fp16.clone(),
        int8: int8(context, variant, outcome),
        device: context.device.clone(),
        workload: record::Workload { n_gen, ..context.workload },
        protocol: protocol(context, outcome),
        phases: phases(context, outcome),
        samples: samples(outcome),
        metrics: BTreeMap::new(),
        dtypes: dtypes(context, variant, &loaded),
        ratio_to_fp16: None,
        break_even: None,
        memory: record::Memory {
            largest_batch: context.largest_batch.then_some(context.workload.batch_size),
            ..memory::memory(outcome, &context.device.kind)
        },
        bandwidth: Bandwidth::default(),
        energy: monitor::energy(context.counter.as_ref(), outcome),
        monitor: monitor::ranges(outcome),
        series: if context.protocol.keep_series { monitor::series(outcome) } else { Vec::new() },
        output: record::Output { token_ids, text, further_token_ids: texts.collect() },
        self_check: loaded
            .own
            .self_check
            .as_ref()
            .map(|c| record::SelfCheck { matrix: c.matrix.clone(), error_share: c.error_share }),
        environment: record::Environment { isa, ..context.environment.clone() },
        card_bytes: None,
        warnings: Vec::new(),
        quality: None,
        other_engine: None,
        agreement: None,
    };
    if let Some(failure) = &outcome.failure {
        fail(&mut record, failure);
        let is_oom = record.status == Status::Oom;
        record.memory.needed_bytes = Some(outcome.needed_bytes).filter(|bytes| is_oom && *bytes > 0);
    }
    record.metrics = metrics::summaries(&record);
    record.bandwidth = limit::bandwidth(context, &record, outcome);
    record
}

fn engine_of(context: &RunContext, variant: &Variant, loaded: &LoadReport) -> record::EngineInfo {
    match variant {
        Variant::Own { engine: Engine::Quantbench, .. } => context.engine.clone(),
        Variant::Own { engine, .. } => engine_info(*engine),
        Variant::Other { program, .. } => {
            let (name, version, commit) = (program.name.clone(), loaded.version.clone(), String::new());
            record::EngineInfo { name, version, commit }
        }
    }
}

/// Writes the reason for a missing result into a record.
pub fn fail(record: &mut Record, failure: &Failure) {
    record.status = status_of(failure);
    record.reason = Some(failure.message().to_owned());
    if let Failure::OutOfMemory { wanted_bytes, free_bytes, .. } = *failure {
        let known = |bytes: u64| (bytes > 0).then_some(bytes);
        (record.memory.wanted_bytes, record.memory.free_bytes) = (known(wanted_bytes), known(free_bytes));
    }
}

fn int8(context: &RunContext, variant: &Variant, outcome: &VariantOutcome) -> Option<record::Int8Facts> {
    variant.own_engine()?;
    let precision = variant.format();
    let counts = outcome.finished.as_ref().map(|finished| finished.outliers).filter(|counts| counts.calls > 0);
    precision.finds_outliers.then(|| record::Int8Facts {
        threshold: f64::from(context.format_options.int8_threshold),
        outlier_columns_mean: counts.map(|counts| counts.columns as f64 / counts.calls as f64),
    })
}

fn protocol(context: &RunContext, outcome: &VariantOutcome) -> record::Protocol {
    let warmed = outcome.warmed.as_ref();
    record::Protocol {
        n_warmup: warmed.map_or(0, |warmed| warmed.runs_ns.len() as u64),
        warmup_ended: warmed.map(|warmed| warmed.ended.to_string()).unwrap_or_default(),
        n_repeats: outcome.samples.len() as u64,
        ended: outcome.ended.map(|ended| ended.to_string()).unwrap_or_default(),
        order: if outcome.alone { RunOrder::InTurn } else { context.order }.name().to_owned(),
        interval: if context.protocol.launches > 1 { "between-launches" } else { "within-run" }.to_owned(),
        method: context.protocol.method.name().to_owned(),
        n_discarded: outcome.n_discarded as u64,
    }
}

fn phases(context: &RunContext, outcome: &VariantOutcome) -> BTreeMap<String, f64> {
    let mut phases = BTreeMap::from([("resolve".to_owned(), context.resolve_s)]);
    if let Some(loaded) = &outcome.loaded {
        phases.insert("load".to_owned(), loaded.load_s);
        phases.insert("quantize".to_owned(), loaded.own.quantize_s);
    }
    if let Some(warmed) = &outcome.warmed {
        phases.insert("warmup".to_owned(), warmed.duration_s);
    }
    if !outcome.samples.is_empty() {
        let total_ns: u64 = outcome.samples.iter().map(|sample| sample.end_to_end_ns).sum();
        phases.insert("measure".to_owned(), total_ns as f64 / 1e9);
        phases.extend(repeat_phases(context, &outcome.samples));
    }
    phases
}

/// Seconds that the parts of a repeat take where the model has an encoder: medians.
fn repeat_phases(context: &RunContext, samples: &[Sample]) -> Vec<(String, f64)> {
    if samples.iter().all(|sample| sample.encode_ns == 0) {
        return Vec::new();
    }
    let encoder = if context.workload.n_image > 0 { "image_encode" } else { "encoder" };
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

fn samples(outcome: &VariantOutcome) -> Samples {
    let runs_ns = outcome.warmed.as_ref().map(|warmed| warmed.runs_ns.clone()).unwrap_or_default();
    let samples = &outcome.samples;
    let encodes = samples.iter().any(|sample| sample.encode_ns > 0);
    let encode_ns = samples.iter().filter(|_| encodes).map(|sample| sample.encode_ns).collect();
    let kept = |steps: fn(&Sample) -> &Vec<u64>| match samples.iter().all(|sample| steps(sample).is_empty()) {
        true => Vec::new(),
        false => samples.iter().map(|sample| steps(sample).clone()).collect(),
    };
    let windows = monitor::windows(outcome).unwrap_or_default();
    let alone = outcome.finished.as_ref().and_then(|finished| finished.alone.clone()).unwrap_or_default();
    Samples {
        encode_ns,
        launches: if outcome.launches.len() > 1 {
            outcome.launches.iter().map(|&n| n as u64).collect()
        } else {
            Vec::new()
        },
        device_step_ns: kept(|sample| &sample.device_step_ns),
        host_step_ns: kept(|sample| &sample.host_step_ns),
        synced_step_ns: kept(|sample| &sample.synced_step_ns),
        alone_step_ns: alone.step_ns,
        alone_arithmetic_ns: alone.arithmetic_ns,
        alone_memory_ns: alone.memory_ns,
        energy_j: windows.iter().map(|window| window.joules).collect(),
        energy_window_s: windows.iter().map(|window| window.seconds).collect(),
        energy_tokens: windows.iter().map(|window| window.tokens).collect(),
        prefill_ns: samples.iter().map(|sample| sample.prefill_ns).collect(),
        decode_step_ns: samples.iter().map(|sample| sample.step_ns.clone()).collect(),
        end_to_end_ns: samples.iter().map(|sample| sample.end_to_end_ns).collect(),
        cold_ns: runs_ns.first().copied(),
        warmup_ns: runs_ns,
        imported: BTreeMap::new(),
    }
}

/// candle computes in what its weights have.
fn dtypes(context: &RunContext, variant: &Variant, loaded: &LoadReport) -> record::Dtypes {
    let fp32 = match variant.own_engine() {
        None => return others::dtypes(variant, &loaded.held),
        Some(Engine::Quantbench) => context.device.kind == "cpu",
        Some(Engine::Candle) => engine::candle::runs_in_fp32(&context.model.architecture),
    };
    let computed = if fp32 { quant::EXACT } else { quant::BASELINE }.to_string();
    let is_candle = variant.own_engine() == Some(Engine::Candle);
    let weights = if is_candle { computed.clone() } else { variant.precision() };
    let kv_cache = loaded.own.kv_format.map_or(computed.clone(), |format| format.name().to_owned());
    record::Dtypes { weights, compute: computed.clone(), kv_cache, logits: computed }
}

/// Sets the ratio to fp16 where both ran, are valid and generated equally many tokens.
fn compare(record: &mut Record, fp16: &Record, order: RunOrder, warnings: &mut Vec<Warning>) {
    if record.status != Status::Ok || fp16.status != Status::Ok {
        return;
    }
    let (n_gen, fp16_n_gen) = (record.workload.n_gen, fp16.workload.n_gen);
    if n_gen != fp16_n_gen {
        warnings.push(Warning::UnequalLengths { n_gen, fp16_n_gen });
        return;
    }
    let tps = |record: &Record| metrics::repeats(record, "decode_tps");
    let paired = order == RunOrder::Interleaved;
    let estimate = if paired { stats::paired_ratio_launches } else { stats::unpaired_ratio_launches };
    let ratio = estimate(&tps(record), &tps(fp16), &record.samples.launches);
    let by_bytes = limit::step_bytes(fp16).zip(limit::step_bytes(record)).map(|(fp16, own)| fp16 as f64 / own as f64);
    record.ratio_to_fp16 = ratio.zip(by_bytes).map(|(ratio, by_bytes)| record::Ratio {
        median: ratio.median,
        ci95_low: ratio.interval.map(|interval| interval.low),
        ci95_high: ratio.interval.map(|interval| interval.high),
        paired,
        by_bytes,
    });
}
