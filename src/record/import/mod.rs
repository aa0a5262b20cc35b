//! Rows that other tools measured, as records with their engine's name. Facts that a tool does not report stay unknown.
//!
//! Numbers that a tool defines as quantbench does become raw samples, and the metrics follow. For others, each repeat's value
//! stands under the key of the metric that it is, in [`Samples::imported`](super::Samples::imported).

pub mod llama_bench;
mod optimum;
mod rows;
mod vllm;

pub use rows::decode;

use serde_json::Value;

use super::{EngineInfo, Record, metrics};
use crate::error::BadInput;

/// A row of [`TOOLS`].
pub struct Tool {
    /// Spelling for `--from`.
    pub name: &'static str,
    /// One sentence for help and README.
    pub doc: &'static str,
    /// True where a JSON value looks like this tool's output.
    fits: fn(&Value) -> bool,
    read: fn(&Value, &Given) -> Result<Record, String>,
}

/// Every tool whose files are read.
pub static TOOLS: &[Tool] = &[llama_bench::TOOL, vllm::TOOL, optimum::TOOL];

/// The user's facts about rows, where their file lacks them or is overruled.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given {
    pub model_id: Option<String>,
    pub precision: Option<String>,
    pub n_prompt: Option<u64>,
    pub n_gen: Option<u64>,
    pub batch_size: Option<u64>,
}

/// Records of a file, and what its reader must know of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    pub records: Vec<Record>,
    /// Sentences on lines that hold no row, and on rows that are lost.
    pub notes: Vec<String>,
}

/// The records of a file's text: a JSON value, a list of them, or one a line, and llama-bench's CSV and Markdown; other lines before, between
/// and after the rows are skipped. `from` names the tool, which is found by content otherwise.
pub fn import(text: &str, from: Option<&str>, given: &Given) -> Result<Imported, BadInput> {
    let found = rows::find(text).map_err(BadInput::new)?;
    if found.values.is_empty() {
        return Err(BadInput::new("there is no row in it"));
    }
    let read = |(at, value): (usize, &Value)| {
        let record = tool(value, from).and_then(|tool| (tool.read)(value, given));
        record.map_err(|why| BadInput::new(format!("row {}: {why}", at + 1)))
    };
    let mut records: Vec<Record> = found.values.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    let mut notes = Vec::new();
    if !found.passed_over.is_empty() {
        notes.push(format!("lines without a row were passed over: {}", ranges(&found.passed_over)));
    }
    if let Some(cut) = found.cut {
        // Whoever reads the record later must know that its file had more.
        records.iter_mut().for_each(|record| record.warnings.push(format!("incomplete_file: {cut}")));
        notes.push(cut);
    }
    Ok(Imported { records, notes })
}

/// Ascending numbers, for example `1 to 3, 7`.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first} to {last}"),
        run => run.iter().map(usize::to_string).collect(),
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// A file that is often given and not read: words that identify it, its description, and what to do.
type Foreign = (&'static [&'static str], &'static str);

const FOREIGN: &[Foreign] = &[
    (
        &["requests_per_second", "elapsed_time"],
        "this is what `vllm bench throughput` writes; of vLLM `vllm bench latency` is read",
    ),
    (&["request_throughput"], "this is what `vllm bench serve` writes; of vLLM `vllm bench latency` is read"),
    (&["n_kv_max", "speed_tg"], "this is what llama-batched-bench writes; of llama.cpp llama-bench is read"),
    (&["schema_version"], "this is quantbench's own: give it to `quantbench report` or `quantbench compare` as it is"),
];

fn tool(value: &Value, from: Option<&str>) -> Result<&'static Tool, String> {
    let fits = |tool: &&Tool| (tool.fits)(value);
    let found = match from {
        Some(name) => TOOLS.iter().find(|tool| tool.name == name).filter(fits),
        None => TOOLS.iter().find(fits),
    };
    let names: Vec<&str> = TOOLS.iter().map(|tool| tool.name).collect();
    let foreign = FOREIGN.iter().find(|(keys, _)| keys.iter().all(|key| value.get(key).is_some()));
    let known = foreign.map(|(_, what)| format!(": {what}")).unwrap_or_default();
    found.ok_or_else(|| match from {
        Some(name) => format!("this is not what {name} writes{known}"),
        None => format!("no known tool writes this{known}; known are {}", names.join(", ")),
    })
}

/// A record that knows nothing but its engine.
fn unknown(engine: &str) -> Record {
    Record::unknown(EngineInfo { name: engine.to_owned(), version: String::new(), commit: String::new() })
}

/// Sets the user's facts, and the metrics that follow.
fn finished(mut record: Record, given: &Given) -> Record {
    if let Some(id) = &given.model_id {
        record.model.id = id.clone();
    }
    if let Some(precision) = &given.precision {
        record.precision = precision.clone();
    }
    record.model.id = shareable(&record.model.id);
    record.metrics = metrics::summaries(&record);
    record
}

/// A hub id as it is; the last component of a path, so that a record does not identify the machine.
fn shareable(id: &str) -> String {
    let slash = ['/', '\\'];
    let is_hub_id = id.matches(slash).count() <= 1 && !id.starts_with(['/', '\\', '.', '~']) && !id.ends_with(".gguf");
    let id = id.trim_end_matches(slash);
    if is_hub_id { id.to_owned() } else { id.rsplit(slash).next().unwrap_or(id).to_owned() }
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().trim().to_owned()
}

fn number(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer)?.as_u64()
}

/// Numbers that are times or speeds: finite and above 0.
fn numbers(value: &Value, pointer: &str) -> Result<Vec<f64>, String> {
    let Some(values) = value.pointer(pointer).and_then(Value::as_array) else { return Ok(Vec::new()) };
    let sound = |value: &Value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
    values.iter().map(|x| sound(x).ok_or_else(|| format!("`{x}` in {pointer} is no positive number"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shareable() {
        for (id, expected) in [
            ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
            ("models/Qwen2.5-7B-Q4_K_M.gguf", "Qwen2.5-7B-Q4_K_M.gguf"),
            ("C:\\m\\a.gguf", "a.gguf"),
            ("/srv/ann/phi/", "phi"),
            ("./phi", "phi"),
        ] {
            assert_eq!(shareable(id), expected);
        }
    }

    #[test]
    fn what_no_tool_writes_is_refused() {
        for (text, why) in [
            ("", "there is no row"),
            ("x", "neither JSON"),
            ("{}\nx", "row 1: no known tool"),
            ("{\"a\":\nx}", "line 2"),
            (r#"{"schema_version": 1, "records": []}"#, "`quantbench report`"),
            (r#"{"request_throughput": 1}"#, "vllm bench serve"),
            (r#"[{"avg_ts": 0, "n_prompt": 1, "n_gen": 0}]"#, "no speed"),
            ("{}", "row 1: no known tool"),
            ("[1]", "row 1: no known tool"),
            (r#"[{"avg_ts": 1, "n_prompt": 1, "n_gen": 0, "samples_ts": [-1]}]"#, "no positive number"),
        ] {
            let error = import(text, None, &Given::default()).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let error = import("{}", Some("vllm"), &Given::default()).unwrap_err().to_string();
        assert!(error.contains("not what vllm writes"), "{error}");
    }
}
