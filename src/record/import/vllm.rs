//! vLLM's `bench latency --output-json`: the time of whole batches. It names no model and no lengths; the user does.

use serde_json::Value;

use super::{Given, Tool, finished, numbers, unknown};
use crate::record::Record;

pub const TOOL: Tool = Tool {
    name: "vllm",
    doc: "vLLM's `bench latency --output-json`, with `--model-id`, `--precision`, `--prompt-tokens`, `--max-new-tokens` and \
          `--batch-size`",
    fits: |value| value.get("avg_latency").is_some() && value.get("latencies").is_some(),
    read,
};

fn read(row: &Value, given: &Given) -> Result<Record, String> {
    let known = (given.n_prompt, given.n_gen, given.batch_size, &given.model_id, &given.precision);
    let (Some(n_prompt), Some(n_gen), Some(batch_size), Some(_), Some(_)) = known else {
        return Err(missing(given));
    };
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

/// All options for facts that the file lacks, in one error.
fn missing(given: &Given) -> String {
    let options = [
        ("--model-id ID", given.model_id.is_none()),
        ("--precision NAME", given.precision.is_none()),
        ("--prompt-tokens N", given.n_prompt.is_none()),
        ("--max-new-tokens N", given.n_gen.is_none()),
        // vLLM's own default is 8.
        ("--batch-size N", given.batch_size.is_none()),
    ];
    let missing: Vec<String> =
        options.iter().filter(|(_, is_missing)| *is_missing).map(|(option, _)| format!("`{option}`")).collect();
    format!("the file lacks the workload: give {}", missing.join(", "))
}
