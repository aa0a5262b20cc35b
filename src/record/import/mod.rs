//! Rows that other tools measured, as records with their engine's name. What a tool does not say stays unknown.
//!
//! Where a tool's numbers are ours by definition they become raw samples, and the metrics follow. Where they are not, each repeat's value
//! stands under the key of the metric that it is, in [`Samples::imported`](super::Samples::imported).

mod llama_bench;
mod optimum;
mod vllm;

use serde_json::Value;

use super::{Engine, Record, metrics};
use crate::error::BadInput;

/// A row of [`TOOLS`].
pub struct Tool {
    /// As `--from` takes it.
    pub name: &'static str,
    /// One sentence for help and README.
    pub doc: &'static str,
    /// Whether a JSON value looks like what the tool writes.
    fits: fn(&Value) -> bool,
    read: fn(&Value, &Given) -> Result<Record, String>,
}

/// Every tool whose files are read.
pub static TOOLS: &[Tool] = &[llama_bench::TOOL, vllm::TOOL, optimum::TOOL];

/// What the user says of rows whose file does not, or over what it does.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given {
    pub model_id: Option<String>,
    pub precision: Option<String>,
    pub n_prompt: Option<u64>,
    pub n_gen: Option<u64>,
    pub batch_size: Option<u64>,
}

/// The records of a file's text: one JSON value, a list of them, or one a line. `from` names the tool, which is found by content
/// otherwise.
pub fn import(text: &str, from: Option<&str>, given: &Given) -> Result<Vec<Record>, BadInput> {
    let values = values(text).map_err(BadInput::new)?;
    if values.is_empty() {
        return Err(BadInput::new("there is no row in it"));
    }
    let read = |(at, value): (usize, &Value)| {
        let record = tool(value, from).and_then(|tool| (tool.read)(value, given));
        record.map_err(|why| BadInput::new(format!("row {}: {why}", at + 1)))
    };
    values.iter().enumerate().map(read).collect()
}

fn values(text: &str) -> Result<Vec<Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Array(values)) => Ok(values),
        Ok(value) => Ok(vec![value]),
        Err(whole) => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let parse = |(at, line): (usize, &str)| serde_json::from_str(line).map_err(|error| (at, error));
            lines.map(parse).collect::<Result<_, _>>().map_err(|(at, error)| match at {
                0 => format!("it is neither JSON ({whole}) nor JSON lines"),
                at => format!("line {}: {error}", at + 1),
            })
        }
    }
}

fn tool(value: &Value, from: Option<&str>) -> Result<&'static Tool, String> {
    let fits = |tool: &&Tool| (tool.fits)(value);
    let found = match from {
        Some(name) => TOOLS.iter().find(|tool| tool.name == name).filter(fits),
        None => TOOLS.iter().find(fits),
    };
    let names: Vec<&str> = TOOLS.iter().map(|tool| tool.name).collect();
    found.ok_or_else(|| match from {
        Some(name) => format!("this is not what {name} writes"),
        None => format!("no known tool writes this; known are {}", names.join(", ")),
    })
}

/// A record that knows nothing but whose code ran.
fn unknown(engine: &str) -> Record {
    Record::unknown(Engine { name: engine.to_owned(), version: String::new(), commit: String::new() })
}

/// Sets what the user said, and the metrics that follow.
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

/// A hub id as it is; of a path its last component, so that a record does not say whose machine it was.
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
            ("{}\nx", "line 2"),
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
