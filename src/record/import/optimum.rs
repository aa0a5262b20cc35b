//! optimum-benchmark's `benchmark.json`: its prefill and decode are ours by definition, taken in one generation each, of a whole batch.

use serde_json::Value;

use super::{Given, Tool, finished, number, numbers, text, unknown};
use crate::record::{DeviceFacts, Record, Samples};

pub const TOOL: Tool = Tool {
    name: "optimum-benchmark",
    doc: "optimum-benchmark's `benchmark.json` of a text generation",
    fits: |value| value.pointer("/config/backend").is_some() && value.get("report").is_some(),
    read,
};

/// Its megabytes.
const MB: f64 = 1e6;

fn read(row: &Value, given: &Given) -> Result<Record, String> {
    let mut record = unknown("optimum-benchmark");
    record.engine.version = text(row, "/config/environment/optimum_benchmark_version");
    record.engine.commit = text(row, "/config/environment/optimum_benchmark_commit");
    record.model.id = text(row, "/config/backend/model");
    record.model.architecture = text(row, "/config/backend/model_type");
    record.precision = precision(row);
    record.device = device(row);
    record.environment.cpu = text(row, "/config/environment/cpu");
    record.environment.os = text(row, "/config/environment/platform");
    record.environment.gpu =
        Some(record.device.name.clone()).filter(|name| record.device.kind == "cuda" && !name.is_empty());
    let shapes = |key: &str| number(row, &format!("/config/scenario/input_shapes/{key}"));
    let generate = |key: &str| number(row, &format!("/config/scenario/generate_kwargs/{key}"));
    let n_gen = given
        .n_gen
        .or(generate("max_new_tokens"))
        .ok_or("it names no number of new tokens: give `--max-new-tokens N`")?;
    record.workload.n_prompt =
        given.n_prompt.or(shapes("sequence_length")).ok_or("it names no prompt: give `--prompt-tokens N`")?;
    record.workload.n_gen = n_gen;
    // Sequences that each prompt is continued to are computed together.
    let n_sequences = shapes("batch_size").map(|n| n * generate("num_return_sequences").unwrap_or(1).max(1));
    record.workload.batch_size = given.batch_size.or(n_sequences).unwrap_or(1);
    record.samples = samples(row, n_gen)?;
    record.protocol.n_repeats = record.samples.end_to_end_ns.len() as u64;
    record.protocol.n_warmup = number(row, "/config/scenario/warmup_runs").unwrap_or(0);
    if let Some(load_s) = row.pointer("/report/load_model/latency/mean").and_then(Value::as_f64) {
        record.phases.insert("load".to_owned(), load_s);
    }
    record.memory.peak_bytes = peak_bytes(row, &record.device.kind);
    if let Some(n_beams) = generate("num_beams").filter(|n| *n > 1) {
        record.warnings.push(format!(
            "beam_search: of {n_beams} beams one is kept, and its tokens are counted; optimum-benchmark's own throughput counts all"
        ));
    }
    Ok(finished(record, given))
}

/// Repeats with prefill and decode each; the steps of single tokens where they are as many as the repeats need.
fn samples(row: &Value, n_gen: u64) -> Result<Samples, String> {
    for phase in ["prefill", "decode", "per_token"] {
        let unit = text(row, &format!("/report/{phase}/latency/unit"));
        if !["", "s"].contains(&unit.as_str()) {
            return Err(format!("its {phase} is in `{unit}`, not in seconds"));
        }
    }
    let ns = |seconds: &f64| (seconds * 1e9).round() as u64;
    let (prefill, decode) =
        (numbers(row, "/report/prefill/latency/values")?, numbers(row, "/report/decode/latency/values")?);
    if prefill.is_empty() {
        return Err("it times no prefill: of optimum-benchmark the text generations are read".into());
    }
    // One new token takes no decode step.
    let decode = if n_gen == 1 && decode.is_empty() { vec![0.0; prefill.len()] } else { decode };
    if prefill.len() != decode.len() {
        return Err(format!("{} prefills and {} decodes are no pairs", prefill.len(), decode.len()));
    }
    let steps: Vec<u64> = numbers(row, "/report/per_token/latency/values")?.iter().map(ns).collect();
    let per_repeat = n_gen.saturating_sub(1) as usize;
    let is_whole = per_repeat > 0 && steps.len() == per_repeat * decode.len();
    Ok(Samples {
        end_to_end_ns: prefill.iter().zip(&decode).map(|(prefill, decode)| ns(&(prefill + decode))).collect(),
        prefill_ns: prefill.iter().map(ns).collect(),
        decode_step_ns: if is_whole { steps.chunks(per_repeat).map(<[u64]>::to_vec).collect() } else { Vec::new() },
        ..Samples::default()
    })
}

/// On a GPU what torch allocated, on a CPU the resident set.
fn peak_bytes(row: &Value, device: &str) -> Option<u64> {
    let key = if device == "cuda" { "max_allocated" } else { "max_ram" };
    let of = |phase: &str| row.pointer(&format!("/report/{phase}/memory/{key}"))?.as_f64();
    let most = ["prefill", "decode"].into_iter().filter_map(of).reduce(f64::max)?;
    Some((most * MB).round() as u64)
}

/// bitsandbytes' precisions by the names that they have here, others by their scheme.
fn precision(row: &Value) -> String {
    let config = |key: &str| row.pointer(&format!("/config/backend/quantization_config/{key}"));
    let is_true = |key: &str| config(key).and_then(Value::as_bool).unwrap_or(false);
    let scheme = text(row, "/config/backend/quantization_scheme");
    let dtype = [text(row, "/config/backend/torch_dtype"), text(row, "/config/backend/dtype")].concat();
    match (scheme.as_str(), dtype.as_str()) {
        ("", "float16") => "fp16".to_owned(),
        ("", "bfloat16") => "bf16".to_owned(),
        ("", "float32") => "fp32".to_owned(),
        ("", dtype) => dtype.to_owned(),
        ("bnb" | "bitsandbytes", _) if is_true("load_in_8bit") => "int8".to_owned(),
        ("bnb" | "bitsandbytes", _) if is_true("load_in_4bit") => {
            let kind = config("bnb_4bit_quant_type").and_then(Value::as_str).unwrap_or("fp4");
            if is_true("bnb_4bit_use_double_quant") { kind.to_owned() } else { format!("{kind}-nodq") }
        }
        (scheme, _) => match config("quant_type").and_then(Value::as_str) {
            Some(kind) => format!("{scheme}-{kind}"),
            None => scheme.to_owned(),
        },
    }
}

/// The card is named only where all are of one kind: the file does not say which of several ran.
fn device(row: &Value) -> DeviceFacts {
    let kind = text(row, "/config/backend/device");
    let gpus: Vec<&str> = match row.pointer("/config/environment/gpu") {
        Some(Value::Array(gpus)) => gpus.iter().filter_map(Value::as_str).collect(),
        Some(Value::String(gpu)) => vec![gpu],
        _ => Vec::new(),
    };
    let name = match (kind.as_str(), gpus.as_slice()) {
        ("cpu", _) => text(row, "/config/environment/cpu"),
        (_, [first, rest @ ..]) if rest.iter().all(|gpu| gpu == first) => first.to_string(),
        _ => String::new(),
    };
    DeviceFacts { kind, name }
}
