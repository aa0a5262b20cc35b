//! llama-bench: `-o jsonl`, `-o json`, `-o csv` and `-o md`, a row for each test; and the rows of that shape that we write ourselves.
//!
//! `pp` tests process a prompt and sample nothing, `tg` tests decode without a prompt: each gives the speed that it times.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{Given, Tool, finished, number, numbers, text, unknown};
use crate::record::{DeviceFacts, EngineInfo, Record};

pub const TOOL: Tool = Tool {
    name: "llama-bench",
    doc: "llama-bench's `-o jsonl`, `-o json`, `-o csv` and `-o md`",
    fits: |value| {
        let has = |keys: &[&str]| keys.iter().all(|key| value.get(key).is_some());
        has(&["avg_ts", "n_prompt", "n_gen"]) || has(&["markdown"])
    },
    read: |row, given| match row.get("markdown") {
        Some(cells) => read(&of_markdown(row, cells)?, given),
        None => read(row, given),
    },
};

/// A row's key under which [`crate::report`] writes everything that llama-bench has no key for, so that such a row is read back whole.
pub const OWN_KEY: &str = "quantbench";

fn read(row: &Value, given: &Given) -> Result<Record, String> {
    let (Some(n_prompt), Some(n_gen)) = (number(row, "/n_prompt"), number(row, "/n_gen")) else {
        return Err("`n_prompt` and `n_gen` are no numbers of tokens".into());
    };
    if n_prompt + n_gen == 0 {
        return Err("it processes no token: `n_prompt` and `n_gen` are 0".into());
    }
    let mut record = unknown("llama.cpp");
    let build = row.get("build_number").and_then(Value::as_u64).map(|build| format!("b{build}"));
    record.engine =
        EngineInfo { version: build.unwrap_or_default(), commit: text(row, "/build_commit"), ..record.engine };
    record.timestamp = text(row, "/test_time");
    let model_type = text(row, "/model_type");
    // A Markdown table names no file.
    record.model.id = Some(text(row, "/model_filename")).filter(|id| !id.is_empty()).unwrap_or(model_type.clone());
    record.model.architecture = model_type.split(' ').next().unwrap_or_default().to_owned();
    record.model.parameters = number(row, "/model_n_params").unwrap_or(0);
    record.precision = precision(&model_type);
    record.device = device(row);
    record.workload.n_prompt = n_prompt;
    record.workload.n_gen = n_gen;
    record.workload.n_depth = number(row, "/n_depth").unwrap_or(0);
    record.dtypes.kv_cache = text(row, "/type_k");
    record.memory.weights_bytes = number(row, "/model_size");
    record.environment.cpu = text(row, "/cpu_info");
    record.environment.gpu = Some(text(row, "/gpu_info")).filter(|gpu| !gpu.is_empty());
    record.environment.threads = number(row, "/n_threads").unwrap_or(0);
    if let Some(own) = row.get(OWN_KEY) {
        restore(&mut record, own);
    }
    let samples = numbers(row, "/samples_ts")?;
    record.protocol.n_repeats = samples.len() as u64;
    record.samples.imported = values(row, n_prompt, n_gen, samples)?;
    if record.protocol.n_repeats == 0 {
        record.warnings.push(format!(
            "only_mean: the file holds means without the repeats behind them ({}), so there is no interval; write it with \
             `llama-bench -o jsonl`",
            mean(row)
        ));
    }
    Ok(finished(record, given))
}

/// Formats a mean as in a Markdown table.
fn mean(row: &Value) -> String {
    let of = |key: &str| row.get(key).and_then(Value::as_f64);
    match (of("avg_ts"), of("stddev_ts")) {
        (Some(mean), Some(deviation)) => format!("{mean:.2} tokens/s, standard deviation {deviation:.2}"),
        (mean, _) => format!("{:.2} tokens/s", mean.unwrap_or(f64::NAN)),
    }
}

/// Restores the keys that quantbench's own writer put beside llama-bench's.
fn restore(record: &mut Record, own: &Value) {
    let known = |key: &str| Some(text(own, key)).filter(|text| !text.is_empty());
    let set = |field: &mut String, key: &str| *field = known(key).unwrap_or_default();
    set(&mut record.engine.name, "/engine");
    set(&mut record.engine.version, "/version");
    set(&mut record.precision, "/precision");
    set(&mut record.model.architecture, "/architecture");
    set(&mut record.weights.source, "/weights");
    set(&mut record.device.kind, "/device_kind");
    set(&mut record.device.name, "/device_name");
    set(&mut record.environment.isa, "/isa");
    record.tainted = own.get("tainted").and_then(Value::as_bool).unwrap_or(false);
    record.workload.n_image = number(own, "/n_image").filter(|_| record.workload.n_prompt > 0).unwrap_or(0);
    record.workload.n_prompt = record.workload.n_prompt.saturating_sub(record.workload.n_image);
}

/// One value a repeat, by the metric that it is; the mean where the file has no repeats.
fn values(row: &Value, n_prompt: u64, n_gen: u64, samples: Vec<f64>) -> Result<BTreeMap<String, Vec<f64>>, String> {
    let one = |key: &str| numbers(&json!([row.get(key)]), "").unwrap_or_default();
    let tokens_per_s = if samples.is_empty() { one("avg_ts") } else { samples };
    let ns = match numbers(row, "/samples_ns")? {
        ns if !ns.is_empty() => ns,
        _ if !one("avg_ns").is_empty() => one("avg_ns"),
        _ => tokens_per_s.iter().map(|ts| (n_prompt + n_gen) as f64 * 1e9 / ts).collect(),
    };
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
    if values.iter().all(|(_, values)| values.is_empty()) {
        return Err("it has no speed: neither `samples_ts` nor `avg_ts` is above 0".into());
    }
    Ok(values
        .into_iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(key, values)| (key.to_owned(), values))
        .collect())
}

/// The cells of a Markdown table under the keys of a JSON row. Sizes are left out: the table rounds them.
fn of_markdown(row: &Value, cells: &Value) -> Result<Value, String> {
    let cell = |name: &str| cells.get(name).and_then(Value::as_str).unwrap_or_default();
    let (n_prompt, n_gen, n_depth) = test(cell("test"))
        .ok_or_else(|| format!("`{}` is no test such as pp512, tg128 or pp512+tg128", cell("test")))?;
    // `2368.80 ± 93.24`, whatever became of the sign in between.
    let speeds: Vec<f64> = cell("t/s").split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let Some(avg_ts) = speeds.first() else { return Err(format!("`{}` is no speed", cell("t/s"))) };
    let count = |name: &str| cell(name).parse::<i64>().ok();
    Ok(json!({
        "build_commit": row.get("build_commit"), "build_number": row.get("build_number"),
        "model_type": cell("model"), "backends": cell("backend"),
        "n_gpu_layers": count("ngl"), "n_threads": count("threads"), "type_k": cell("type_k"),
        "devices": cells.get("dev"),
        "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth,
        "avg_ts": avg_ts, "stddev_ts": speeds.get(1),
    }))
}

/// Prompt, generated tokens and depth of a test: `pp512`, `tg 128`, `pp512+tg128`, `tg128 @ d4096`.
fn test(name: &str) -> Option<(u64, u64, u64)> {
    let name: String = name.chars().filter(|c| !c.is_whitespace()).collect();
    let (test, depth) = name.split_once('@').unwrap_or((&name, "d0"));
    let (mut n_prompt, mut n_gen) = (0, 0);
    for part in test.split('+') {
        match part.split_at_checked(2)? {
            ("pp", n) => n_prompt = n.parse().ok()?,
            ("tg", n) => n_gen = n.parse().ok()?,
            _ => return None,
        }
    }
    Some((n_prompt, n_gen, depth.strip_prefix('d')?.parse().ok()?))
}

/// From a type such as `qwen2 7B Q4_K - Medium`: the word that names a format, with the size after it.
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

/// Backends that compute nothing on a device of their own, by llama.cpp's names.
const HOST_BACKENDS: &[&str] = &["cpu", "blas", ""];

/// Backend that hands the work to another process, which runs it on a backend that the row does not name.
const REMOTE_BACKEND: &str = "rpc";

/// Columns of builds before `backends`, each true or 1 where the build had it.
const FORMER_BACKENDS: &[&str] = &["cuda", "vulkan", "metal", "sycl", "kompute", "opencl", "rpc"];

/// The first backend that has a device of its own, in whatever order the build loads them. Nothing on the GPU is a run on the CPU,
/// whatever the build could do.
fn device(row: &Value) -> DeviceFacts {
    let backends = backends(row);
    let own = |name: &&String| !HOST_BACKENDS.contains(&name.as_str());
    let local = backends.iter().filter(own).find(|name| *name != REMOTE_BACKEND);
    let found = local.or_else(|| backends.iter().find(own));
    let gpu_layers = row.get("n_gpu_layers").and_then(Value::as_i64);
    let is_on_cpu = gpu_layers == Some(0) || text(row, "/devices").eq_ignore_ascii_case("none");
    match found.filter(|_| !is_on_cpu) {
        Some(kind) => DeviceFacts { kind: kind.clone(), name: text(row, "/gpu_info") },
        None => DeviceFacts { kind: "cpu".to_owned(), name: text(row, "/cpu_info") },
    }
}

/// In lower case, in the row's order.
fn backends(row: &Value) -> Vec<String> {
    let listed = text(row, "/backends");
    if !listed.is_empty() {
        return listed.split([',', '+', ';']).map(|name| name.trim().to_lowercase()).collect();
    }
    let is_set = |key: &&&str| match row.get(**key) {
        Some(Value::Bool(is_set)) => *is_set,
        Some(value) => value.as_u64() == Some(1),
        None => false,
    };
    FORMER_BACKENDS.iter().filter(is_set).map(|name| name.to_string()).collect()
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

    #[test]
    fn the_device_is_the_first_that_has_its_own() {
        for (backends, gpu_layers, kind) in [
            ("CPU", 0, "cpu"),
            ("CPU", 99, "cpu"),
            ("BLAS", 99, "cpu"),
            ("", 99, "cpu"),
            ("BLAS,MTL", 99, "mtl"),
            ("BLAS, MTL", 99, "mtl"),
            ("MTL,BLAS", -1, "mtl"),
            ("CPU,CUDA", 99, "cuda"),
            ("CUDA,RPC", 99, "cuda"),
            ("RPC,Vulkan", 99, "vulkan"),
            ("RPC", 99, "rpc"),
            ("RPC,BLAS", 99, "rpc"),
            ("Vulkan", 99, "vulkan"),
            ("CUDA", 0, "cpu"),
        ] {
            let row = json!({"backends": backends, "n_gpu_layers": gpu_layers, "cpu_info": "C", "gpu_info": "G"});
            let seen = device(&row);
            assert_eq!(seen.kind, kind, "{backends} {gpu_layers}");
            assert_eq!(seen.name, if kind == "cpu" { "C" } else { "G" }, "{backends} {gpu_layers}");
        }
        let kind = |row: Value| device(&row).kind;
        assert_eq!(kind(json!({"backends": "CUDA", "n_gpu_layers": 99, "devices": "none"})), "cpu");
        assert_eq!(kind(json!({"cuda": true, "vulkan": false, "n_gpu_layers": 99})), "cuda");
        assert_eq!(kind(json!({"cuda": 0, "metal": 1, "n_gpu_layers": 99})), "metal");
    }

    #[test]
    fn tests_are_read_from_their_names() {
        for (name, expected) in [
            ("pp512", Some((512, 0, 0))),
            ("tg 128", Some((0, 128, 0))),
            ("pp512+tg128", Some((512, 128, 0))),
            ("pp 512 + tg 128", Some((512, 128, 0))),
            ("tg128 @ d4096", Some((0, 128, 4096))),
            ("pp512+tg128 @ d64", Some((512, 128, 64))),
            ("gg512", None),
            ("pp", None),
            ("é1", None),
            ("pp512 @ 64", None),
        ] {
            assert_eq!(test(name), expected, "{name}");
        }
    }
}
