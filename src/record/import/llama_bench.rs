//! llama-bench: `-o jsonl` or `-o json`, a row for each test.
//!
//! `pp` tests process a prompt and sample nothing, `tg` tests decode without a prompt: each gives the speed that it times.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Given, Tool, finished, number, numbers, text, unknown};
use crate::record::{DeviceFacts, Engine, Record};

pub const TOOL: Tool = Tool {
    name: "llama-bench",
    doc: "llama-bench's `-o jsonl` and `-o json`",
    fits: |value| value.get("avg_ts").is_some() && value.get("n_prompt").is_some() && value.get("n_gen").is_some(),
    read,
};

fn read(row: &Value, given: &Given) -> Result<Record, String> {
    let (Some(n_prompt), Some(n_gen)) = (number(row, "/n_prompt"), number(row, "/n_gen")) else {
        return Err("`n_prompt` and `n_gen` are no numbers of tokens".into());
    };
    let mut record = unknown("llama.cpp");
    let build = row.get("build_number").and_then(Value::as_u64).map(|build| format!("b{build}"));
    record.engine = Engine { version: build.unwrap_or_default(), commit: text(row, "/build_commit"), ..record.engine };
    record.timestamp = text(row, "/test_time");
    record.model.id = text(row, "/model_filename");
    record.model.architecture = text(row, "/model_type").split(' ').next().unwrap_or_default().to_owned();
    record.model.parameters = number(row, "/model_n_params").unwrap_or(0);
    record.precision = precision(&text(row, "/model_type"));
    record.device = device(row);
    record.workload.n_prompt = n_prompt;
    record.workload.n_gen = n_gen;
    record.workload.n_depth = number(row, "/n_depth").unwrap_or(0);
    record.dtypes.kv_cache = text(row, "/type_k");
    record.memory.weights_bytes = number(row, "/model_size");
    record.environment.cpu = text(row, "/cpu_info");
    record.environment.gpu = Some(text(row, "/gpu_info")).filter(|gpu| !gpu.is_empty());
    record.environment.threads = number(row, "/n_threads").unwrap_or(0);
    record.samples.imported = values(row, n_prompt, n_gen)?;
    record.protocol.n_repeats = record.samples.imported.values().map(Vec::len).max().unwrap_or(0) as u64;
    Ok(finished(record, given))
}

/// One value a repeat, by the metric that it is.
fn values(row: &Value, n_prompt: u64, n_gen: u64) -> Result<BTreeMap<String, Vec<f64>>, String> {
    let (tokens_per_s, ns) = (numbers(row, "/samples_ts")?, numbers(row, "/samples_ns")?);
    let per_token = |scale: f64| ns.iter().map(|ns| ns / scale / n_gen as f64).collect::<Vec<_>>();
    let values = match (n_prompt, n_gen) {
        (_, 0) => vec![("prefill_tps", tokens_per_s)],
        (0, _) => vec![("decode_tps", tokens_per_s), ("tpot_ms", per_token(1e6))],
        // A test of both: its tokens/s count the prompt, so that only its times are ours.
        _ => vec![
            ("latency_s", ns.iter().map(|ns| ns / 1e9).collect()),
            ("latency_per_token_ms", per_token(1e6)),
            ("output_tps", ns.iter().map(|ns| n_gen as f64 * 1e9 / ns).collect()),
        ],
    };
    Ok(values
        .into_iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(key, values)| (key.to_owned(), values))
        .collect())
}

/// From a type such as `qwen2 7B Q4_K - Medium`: the word that names a format, with the size behind it.
fn precision(model_type: &str) -> String {
    let is_format = |word: &&str| {
        let digits = ["Q", "IQ", "TQ", "MXFP"].iter().filter_map(|start| word.strip_prefix(start));
        matches!(*word, "F16" | "BF16" | "F32")
            || digits.into_iter().any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let word = model_type.split(' ').find(is_format).unwrap_or_default();
    let size = model_type.split_once(" - ").and_then(|(_, size)| size.chars().next().filter(char::is_ascii_alphabetic));
    match (word, size) {
        ("F16", _) => "fp16".to_owned(),
        ("BF16", _) => "bf16".to_owned(),
        ("F32", _) => "fp32".to_owned(),
        (word, Some(size)) => format!("{word}_{size}"),
        (word, None) => word.to_owned(),
    }
}

/// Nothing on the GPU is a run on the CPU, whatever the build could do.
fn device(row: &Value) -> DeviceFacts {
    let backends = text(row, "/backends").to_lowercase();
    let first = backends.split(',').next().unwrap_or_default().trim().to_owned();
    let gpu_layers = row.get("n_gpu_layers").and_then(Value::as_i64);
    match first.as_str() {
        "cpu" | "blas" => DeviceFacts { kind: "cpu".to_owned(), name: text(row, "/cpu_info") },
        _ if gpu_layers == Some(0) => DeviceFacts { kind: "cpu".to_owned(), name: text(row, "/cpu_info") },
        _ => DeviceFacts { kind: first, name: text(row, "/gpu_info") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_name_precisions() {
        for (model_type, expected) in [
            ("llama 1B F16", "fp16"),
            ("qwen2 7B Q4_K - Medium", "Q4_K_M"),
            ("llama 1B Q8_0", "Q8_0"),
            ("qwen35moe 35B.A3B IQ2_XS - 2.3125 bpw", "IQ2_XS"),
            ("qwen3", ""),
        ] {
            assert_eq!(precision(model_type), expected, "{model_type}");
        }
    }
}
