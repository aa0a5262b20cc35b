//! vLLM's `bench latency --output-json`: the time of whole batches. It names no model and no lengths; the user does.

use serde_json::Value;

use super::{Given, Tool, finished, numbers, unknown};
use crate::record::Record;

pub const TOOL: Tool = Tool {
    name: "vllm",
    doc: "vLLM's `bench latency --output-json`, with `--model-id`, `--precision`, `--prompt-tokens` and `--max-new-tokens`",
    fits: |value| value.get("avg_latency").is_some() && value.get("latencies").is_some(),
    read,
};

fn read(row: &Value, given: &Given) -> Result<Record, String> {
    let missing = |option: &str| format!("the file does not say it: give `{option}`");
    let n_prompt = given.n_prompt.ok_or_else(|| missing("--prompt-tokens N"))?;
    let n_gen = given.n_gen.ok_or_else(|| missing("--max-new-tokens N"))?;
    given.model_id.as_ref().ok_or_else(|| missing("--model-id ID"))?;
    given.precision.as_ref().ok_or_else(|| missing("--precision NAME"))?;
    let batch_size = given.batch_size.unwrap_or(1);
    let latencies = numbers(row, "/latencies")?;
    let per_token = latencies.iter().map(|s| 1e3 * s / n_gen as f64).collect();
    let tokens_per_s = latencies.iter().map(|s| (batch_size * n_gen) as f64 / s).collect();

    let mut record = unknown("vllm");
    (record.workload.n_prompt, record.workload.n_gen, record.workload.batch_size) = (n_prompt, n_gen, batch_size);
    record.protocol.n_repeats = latencies.len() as u64;
    let values = [("latency_s", latencies), ("latency_per_token_ms", per_token), ("output_tps", tokens_per_s)];
    record.samples.imported = values.into_iter().map(|(key, values)| (key.to_owned(), values)).collect();
    Ok(finished(record, given))
}
