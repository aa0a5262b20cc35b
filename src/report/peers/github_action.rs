//! What github-action-benchmark reads as `tool: customSmallerIsBetter`: a file of its has one direction, and times, bytes and
//! divergence share it.

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::record::metrics::{self, Metric};
use crate::record::{Document, Record, Status};
use crate::report::{Options, Writer, case};

pub const WRITER: Writer = Writer {
    name: "github-action-benchmark",
    extensions: &[],
    doc: "entries for github-action-benchmark's `customSmallerIsBetter`: times, bytes and divergence",
    write,
};

const KEYS: &[&str] = &["tpot_ms", "ttft_ms", "peak_bytes", "weights_bytes", "kl_mean"];

fn write(document: &Document, _: &Options) -> Result<String> {
    let ok = document.records.iter().filter(|record| record.status == Status::Ok);
    let entries: Vec<Value> =
        ok.flat_map(|record| KEYS.iter().filter_map(|key| entry(record, metrics::find(key)?))).collect();
    Ok(serde_json::to_string_pretty(&entries)? + "\n")
}

fn entry(record: &Record, metric: &Metric) -> Option<Value> {
    let value = metric.value(record)?;
    // The name is the series that the action draws: one for each precision of a case.
    let name =
        format!("{} {} {} ({})", record.model.id, case::name(record), metric.key, case::workload(&record.workload));
    let mut entry = Map::new();
    entry.insert("name".into(), json!(name));
    entry.insert("unit".into(), json!(metric.unit));
    entry.insert("value".into(), json!(value));
    let interval = record.metrics.get(metric.key).and_then(|summary| summary.ci95_low.zip(summary.ci95_high));
    if let Some((low, high)) = interval {
        // The action shows it beside the value as it stands.
        entry.insert("range".into(), json!(format!("[{low:.4}, {high:.4}]")));
    }
    entry.insert("extra".into(), json!(format!("{} on {}", record.engine.version, record.device.name)));
    Some(Value::Object(entry))
}
