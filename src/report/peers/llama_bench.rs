//! llama-bench's JSON lines: a test of the prompt (`pp`) and one of the decode steps (`tg`) for each record.
//!
//! llama-bench times decode steps alone, from a depth. A record's decode begins behind its prompt and leaves the first token out, so
//! that its `tg` has `n_gen` less 1 tokens at a depth of `n_depth` and the prompt.

use anyhow::Result;
use serde_json::{Value, json};

use crate::record::import::llama_bench::OWN_KEY;
use crate::record::{Document, Record, Status};
use crate::report::{Options, Writer, case};
use crate::stats;

pub const WRITER: Writer = Writer {
    name: "llama-bench",
    extensions: &[],
    doc: "llama-bench's JSON lines: a prompt test and a generation test for each record that is ok",
    write,
};

/// What llama-bench says of layers on a GPU when it puts all of them there.
const ALL_LAYERS: u64 = 99;

fn write(document: &Document, _: &Options) -> Result<String> {
    let ok = document.records.iter().filter(|record| record.status == Status::Ok);
    Ok(ok.flat_map(tests).map(|test| format!("{test}\n")).collect())
}

fn tests(record: &Record) -> Vec<Value> {
    let (samples, workload) = (&record.samples, &record.workload);
    let decode_ns: Vec<u64> = samples
        .end_to_end_ns
        .iter()
        .zip(&samples.prefill_ns)
        .map(|(end, prefill)| end.saturating_sub(*prefill))
        .collect();
    let n_prompt = workload.n_prompt + workload.n_image;
    let prompt = test(record, (n_prompt, 0, workload.n_depth), &samples.prefill_ns);
    let steps = workload.n_gen.saturating_sub(1);
    let generation = test(record, (0, steps, workload.n_depth + n_prompt), &decode_ns);
    let tests = [(n_prompt, &samples.prefill_ns, prompt), (steps, &decode_ns, generation)];
    let timed = tests.into_iter().filter(|(tokens, ns, _)| *tokens > 0 && !ns.is_empty());
    timed.map(|(.., test)| test).collect()
}

fn test(record: &Record, (n_prompt, n_gen, n_depth): (u64, u64, u64), ns: &[u64]) -> Value {
    let times: Vec<f64> = ns.iter().map(|&ns| ns as f64).collect();
    let tokens_per_s: Vec<f64> = times.iter().map(|ns| (n_prompt + n_gen) as f64 * 1e9 / ns).collect();
    let rounded = |x: Option<f64>| x.unwrap_or(0.0).round() as u64;
    let is_cuda = record.device.kind == "cuda";
    json!({
        "build_commit": record.engine.commit,
        "build_number": 0,
        "cpu_info": record.environment.cpu,
        "gpu_info": record.environment.gpu.clone().unwrap_or_default(),
        "backends": if is_cuda { "CUDA" } else { "CPU" },
        "model_filename": record.model.id,
        "model_type": format!("{} {}", record.model.architecture, case::name(record)),
        "model_size": record.memory.weights_bytes,
        "model_n_params": record.model.parameters,
        "n_batch": n_prompt.max(1),
        "n_ubatch": n_prompt.max(1),
        "n_threads": record.environment.threads,
        "type_k": record.dtypes.kv_cache,
        "type_v": record.dtypes.kv_cache,
        "n_gpu_layers": if is_cuda { ALL_LAYERS } else { 0 },
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "test_time": record.timestamp,
        "avg_ns": rounded(stats::mean(&times)),
        "stddev_ns": rounded(stats::stdev(&times)),
        "avg_ts": stats::mean(&tokens_per_s),
        "stddev_ts": stats::stdev(&tokens_per_s).unwrap_or(0.0),
        "samples_ns": ns,
        "samples_ts": tokens_per_s,
        // What llama-bench has no key for: its readers pass over it, and `quantbench import` gives the row back whole.
        OWN_KEY: {
            "engine": record.engine.name,
            "version": record.engine.version,
            "precision": record.precision,
            "architecture": record.model.architecture,
            "weights": record.weights.source,
            "device_kind": record.device.kind,
            "device_name": record.device.name,
            "isa": record.environment.isa,
            "n_image": workload_image(record, n_prompt),
            "tainted": record.tainted,
        },
    })
}

/// Image tokens among the tokens of a prompt test.
fn workload_image(record: &Record, n_prompt: u64) -> u64 {
    if n_prompt > 0 { record.workload.n_image } else { 0 }
}
