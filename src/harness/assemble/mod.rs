//! From outcomes to records: metrics, ratios, bandwidth, validity and warnings.

mod limit;
mod memory;
mod monitor;
mod tell;

pub use tell::SLOW_READ;

use std::collections::BTreeMap;

use super::protocol::{Failure, Sample};
use super::schedule::{Order, Outcome};
use super::validity::invalid_reason;
use super::warnings::Warning;
use super::watch::energy::Counter;
use super::{Case, Protocol, Row};
use crate::engine::{self, Engine};
use crate::quant::{FormatId, FormatOptions};
use crate::record::{self, Bandwidth, Record, Samples, Status, metrics};
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
    /// When both were measured, where that was in an earlier run.
    pub bandwidth_since: Option<String>,
    /// What the memory can give by its data sheet, or why that is unknown.
    pub theoretical_gb_s: Result<f64, String>,
    pub cache_bytes: Option<u64>,
    /// Where energy is counted.
    pub counter: Option<Counter>,
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
    let rows = case.rows();
    let mut records: Vec<Record> =
        rows.iter().zip(outcomes).map(|(row, outcome)| base(facts, row, outcome, decode)).collect();
    instruction_set_of_all(&rows, &mut records);
    let fp16 = case.baseline();
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
    for (at, (record, outcome)) in records.iter_mut().zip(outcomes).enumerate() {
        let mut warnings = facts.warnings.clone();
        let alone = |index: usize| outcomes[index].alone;
        if let Some(baseline) = baseline.as_ref().filter(|_| fp16 != Some(at)) {
            let unpaired = alone(at) || fp16.is_some_and(alone);
            compare(record, baseline, if unpaired { Order::InTurn } else { facts.order }, &mut warnings);
        }
        let who = [Some(at), fp16].into_iter().flatten().find(|&index| alone(index) && record.status == Status::Ok);
        warnings.extend(who.map(|index| Warning::RanAlone { label: rows[index].label() }));
        if record.status != Status::Oom && outcome.failure.is_none() {
            warnings.extend(tell::of_repeats(facts, record, outcome));
            warnings.extend(tell::of_machine(outcome));
            warnings.extend(tell::of_memory(facts, record, outcome));
        }
        record.tainted = warnings.iter().any(Warning::taints);
        record.warnings = warnings.iter().map(Warning::to_string).collect();
    }
    records
}

/// Rows that failed before they could tell their instruction set ran on the same device as those that did.
fn instruction_set_of_all(rows: &[Row], records: &mut [Record]) {
    let own = |at: &usize| rows[*at].engine == Engine::Quantbench;
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
pub fn unmeasured(facts: &Facts, case: &Case) -> Vec<Record> {
    let record = |&precision: &FormatId| {
        let mut record = base(facts, &Row::own(precision), &Outcome::default(), &|_| None);
        let of_model = facts.warnings.iter().filter(|warning| matches!(warning, Warning::Model { .. }));
        record.warnings = of_model.map(Warning::to_string).collect();
        record
    };
    case.precisions.iter().map(record).collect()
}

/// All that follows from the outcome alone.
fn base(facts: &Facts, row: &Row, outcome: &Outcome, decode: &dyn Fn(&[u32]) -> Option<String>) -> Record {
    let loaded = outcome.loaded.clone().unwrap_or_default();
    let n_gen = outcome.warmed.as_ref().map_or(facts.workload.n_gen, |warmed| warmed.n_gen as u64);
    let token_ids = outcome.samples.first().map(|sample| sample.ids.clone()).unwrap_or_default();
    let text = (!token_ids.is_empty()).then(|| decode(&token_ids)).flatten();
    let isa = if loaded.isa.is_empty() { facts.environment.isa.clone() } else { loaded.isa.clone() };
    let mut record = Record {
        status: Status::Ok,
        reason: None,
        tainted: false,
        engine: engine_of(facts, row.engine),
        file: String::new(),
        command: facts.command.clone(),
        timestamp: facts.timestamp.clone(),
        model: facts.model.clone(),
        weights: record::WeightFacts { fp16_overflow: loaded.fp16_overflow, ..facts.weights.clone() },
        precision: row.precision.to_string(),
        keep_fp16: facts.keep_fp16.clone(),
        int8: int8(facts, row.precision, outcome),
        device: facts.device.clone(),
        workload: record::Workload { n_gen, ..facts.workload },
        protocol: protocol(facts, outcome),
        phases: phases(facts, outcome),
        samples: samples(outcome),
        metrics: BTreeMap::new(),
        dtypes: dtypes(facts, row),
        ratio_to_fp16: None,
        memory: memory::memory(outcome, &facts.device.kind),
        bandwidth: Bandwidth::default(),
        energy: monitor::energy(facts.counter.as_ref(), outcome),
        monitor: monitor::ranges(outcome),
        series: if facts.protocol.keep_series { monitor::series(outcome) } else { Vec::new() },
        output: record::Output { token_ids, text },
        self_check: loaded
            .self_check
            .as_ref()
            .map(|c| record::SelfCheck { matrix: c.matrix.clone(), error_share: c.error_share }),
        environment: record::Environment { isa, ..facts.environment.clone() },
        card_bytes: None,
        warnings: Vec::new(),
        quality: None,
    };
    if let Some(failure) = &outcome.failure {
        fail(&mut record, failure);
        let is_oom = record.status == Status::Oom;
        record.memory.needed_bytes = Some(outcome.needed_bytes).filter(|bytes| is_oom && *bytes > 0);
    }
    record.metrics = metrics::summaries(&record);
    record.bandwidth = limit::bandwidth(facts, &record, outcome);
    record
}

fn engine_of(facts: &Facts, engine: Engine) -> record::Engine {
    match engine {
        Engine::Quantbench => facts.engine.clone(),
        other => super::engine_facts(other),
    }
}

/// Says in a record why there is no result.
pub fn fail(record: &mut Record, failure: &Failure) {
    record.status = failure.status();
    record.reason = Some(failure.message().to_owned());
    if let Failure::OutOfMemory { wanted_bytes, free_bytes, .. } = *failure {
        let known = |bytes: u64| (bytes > 0).then_some(bytes);
        (record.memory.wanted_bytes, record.memory.free_bytes) = (known(wanted_bytes), known(free_bytes));
    }
}

fn int8(facts: &Facts, precision: FormatId, outcome: &Outcome) -> Option<record::Int8Facts> {
    let counts = outcome.finished.as_ref().map(|finished| finished.outliers).filter(|counts| counts.calls > 0);
    precision.finds_outliers.then(|| record::Int8Facts {
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
        order: if outcome.alone { Order::InTurn } else { facts.order }.name().to_owned(),
        interval: if facts.protocol.launches > 1 { "between-launches" } else { "within-run" }.to_owned(),
        method: facts.protocol.method.name().to_owned(),
        n_discarded: outcome.n_discarded as u64,
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
fn dtypes(facts: &Facts, row: &Row) -> record::Dtypes {
    let fp32 = match row.engine {
        Engine::Quantbench => facts.device.kind == "cpu",
        Engine::Candle => engine::candle::runs_in_fp32(&facts.model.architecture),
    };
    let computed = if fp32 { "fp32" } else { "fp16" }.to_owned();
    let weights = if row.engine == Engine::Candle { computed.clone() } else { row.precision.to_string() };
    record::Dtypes { weights, compute: computed.clone(), kv_cache: computed.clone(), logits: computed }
}

/// Sets the ratio to fp16 where both ran, are valid and generated equally many tokens.
fn compare(record: &mut Record, fp16: &Record, order: Order, warnings: &mut Vec<Warning>) {
    if record.status != Status::Ok || fp16.status != Status::Ok {
        return;
    }
    let (n_gen, fp16_n_gen) = (record.workload.n_gen, fp16.workload.n_gen);
    if n_gen != fp16_n_gen {
        warnings.push(Warning::UnequalLengths { n_gen, fp16_n_gen });
        return;
    }
    let tps = |record: &Record| metrics::repeats(record, "decode_tps");
    let paired = order == Order::Interleaved;
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
