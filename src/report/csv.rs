//! CSV: one flat row per record, for spreadsheets and data frames. Quoted as RFC 4180 has it; lines end in `\n`.

use anyhow::Result;
use serde_json::Value;

use super::{Options, Writer};
use crate::record::metrics::{METRICS, Metric};
use crate::record::{Document, Record};

pub const WRITER: Writer = Writer {
    name: "csv",
    extensions: &["csv"],
    doc: "one flat row per record: every metric with the interval that JSON has, warnings, and the facts beside them",
    write,
};

/// Facts by column name and JSON pointer into the record; the numbers that gates can name come from METRICS.
const FACTS: &[(&str, &str)] = &[
    ("status", "/status"),
    ("reason", "/reason"),
    ("tainted", "/tainted"),
    ("precision", "/precision"),
    ("model_id", "/model/id"),
    ("model_revision", "/model/revision"),
    ("architecture", "/model/architecture"),
    ("parameters", "/model/parameters"),
    ("weights_source", "/weights/source"),
    ("weights_dtype", "/weights/dtype"),
    ("weights_seed", "/weights/seed"),
    ("weights_hash", "/weights/hash"),
    ("fp16_overflow", "/weights/fp16_overflow"),
    ("int8_threshold", "/int8/threshold"),
    ("device_kind", "/device/kind"),
    ("device_name", "/device/name"),
    ("n_prompt", "/workload/n_prompt"),
    ("n_gen", "/workload/n_gen"),
    ("n_depth", "/workload/n_depth"),
    ("n_image", "/workload/n_image"),
    ("batch_size", "/workload/batch_size"),
    ("keep_fp16", "/keep_fp16"),
    ("n_repeats", "/protocol/n_repeats"),
    ("repeats_ended", "/protocol/ended"),
    ("order", "/protocol/order"),
    ("interval", "/protocol/interval"),
    ("method", "/protocol/method"),
];

/// Facts that follow the metrics.
const CONTEXT: &[(&str, &str)] = &[
    ("speedup_paired", "/ratio_to_fp16/paired"),
    ("break_even", "/break_even/finding"),
    ("break_even_low", "/break_even/low"),
    ("break_even_batch", "/break_even/batch"),
    ("break_even_high", "/break_even/high"),
    ("bound", "/bandwidth/bound"),
    ("quality_path", "/quality/path"),
    ("quality_text", "/quality/text"),
    ("quality_tokens", "/quality/n_tokens"),
    ("cpu", "/environment/cpu"),
    ("isa", "/environment/isa"),
    ("threads", "/environment/threads"),
    ("os", "/environment/os"),
    ("build_profile", "/environment/build_profile"),
    ("gpu", "/environment/gpu"),
    ("driver", "/environment/driver"),
    ("cuda", "/environment/cuda"),
    ("engine", "/engine/name"),
    ("engine_version", "/engine/version"),
    ("engine_commit", "/engine/commit"),
    ("timestamp", "/timestamp"),
    ("command", "/command"),
    ("card_bytes", "/card_bytes"),
    ("warnings", "/warnings"),
];

/// A column: its name and how a record's JSON gives its text.
struct Column {
    name: String,
    text: Text,
}

enum Text {
    /// At a JSON pointer.
    At(String),
    /// A number less or plus its half width: the ends of an interval that JSON has as one number.
    Around(String, String, f64),
}

/// A number, and half its interval.
const HALF_WIDTHS: &[(&str, &str)] = &[("kl_mean", "/quality/kl_mean_half_width")];

/// Metrics with one value a record, which no interval is made from.
const ONE_VALUE: &[&str] = &["load_s"];

/// Intervals that stand beside their number.
const INTERVALS: &[&str] = &["perplexity_ratio"];

fn write(document: &Document, _: &Options) -> Result<String> {
    let columns = columns();
    let mut out = line(columns.iter().map(|column| column.name.clone()));
    for record in &document.records {
        out += &row(record, &columns)?;
    }
    Ok(out)
}

fn row(record: &Record, columns: &[Column]) -> Result<String> {
    let record = serde_json::to_value(record)?;
    Ok(line(columns.iter().map(|column| column.text(&record))))
}

impl Column {
    fn at(name: impl Into<String>, pointer: impl Into<String>) -> Self {
        Self { name: name.into(), text: Text::At(pointer.into()) }
    }

    fn text(&self, record: &Value) -> String {
        let number = |pointer: &String| record.pointer(pointer).and_then(Value::as_f64);
        match &self.text {
            Text::At(pointer) => record.pointer(pointer).map(text).unwrap_or_default(),
            Text::Around(middle, half, sign) => {
                let end = number(middle).zip(number(half)).map(|(middle, half)| middle + sign * half);
                end.map(|end| text(&end.into())).unwrap_or_default()
            }
        }
    }
}

/// The same for every document, so that files can be joined.
fn columns() -> Vec<Column> {
    facts(FACTS).chain(METRICS.iter().flat_map(metric_columns)).chain(facts(CONTEXT)).collect()
}

fn facts(list: &'static [(&str, &str)]) -> impl Iterator<Item = Column> {
    list.iter().map(|(name, pointer)| Column::at(*name, *pointer))
}

/// A number, followed by the ends of its interval where JSON has one.
fn metric_columns(metric: &Metric) -> Vec<Column> {
    let pointer = format!("/{}", metric.path.replace('.', "/"));
    let name = |end: &str| format!("{}_{end}", metric.key);
    let summary = pointer.strip_suffix("/median").filter(|_| !ONE_VALUE.contains(&metric.key));
    let mut columns = vec![Column::at(metric.key, pointer.clone())];
    let beside = INTERVALS.contains(&metric.key).then(|| format!("{pointer}_"));
    if let Some(start) = summary.map(|summary| format!("{summary}/")).or(beside) {
        columns.extend(["ci95_low", "ci95_high"].map(|end| Column::at(name(end), format!("{start}{end}"))));
    }
    if let Some((_, half)) = HALF_WIDTHS.iter().find(|(key, _)| *key == metric.key) {
        let end = |end: &str, sign: f64| Column {
            name: name(end),
            text: Text::Around(pointer.clone(), half.to_string(), sign),
        };
        columns.extend([end("ci95_low", -1.0), end("ci95_high", 1.0)]);
    }
    columns
}

/// Empty for what is not defined; lists are joined by `; `.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join("; "),
        other => other.to_string(),
    }
}

/// A row, its fields quoted where they must be.
pub(super) fn line(cells: impl Iterator<Item = String>) -> String {
    cells.map(quote).collect::<Vec<_>>().join(",") + "\n"
}

/// In quotes where a reader would otherwise split or trim the field.
fn quote(cell: String) -> String {
    let plain = !cell.contains([',', '"', '\n', '\r']) && cell.trim() == cell;
    if plain { cell } else { format!("\"{}\"", cell.replace('"', "\"\"")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        let cases = [
            ("a", "a"),
            ("", ""),
            ("a,b", "\"a,b\""),
            ("say \"x\"", "\"say \"\"x\"\"\""),
            ("a\nb", "\"a\nb\""),
            (" a", "\" a\""),
        ];
        for (cell, expected) in cases {
            assert_eq!(quote(cell.into()), expected);
        }
    }

    #[test]
    fn column_names_are_unique() {
        let mut names: Vec<_> = columns().into_iter().map(|column| column.name).collect();
        let n = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), n);
    }
}
