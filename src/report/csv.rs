//! CSV: one flat row per record, for spreadsheets and data frames. Quoted as RFC 4180 has it; lines end in `\n`.

use anyhow::Result;
use serde_json::Value;

use super::{Options, Writer};
use crate::record::metrics::METRICS;
use crate::record::{Document, Record};

pub const WRITER: Writer = Writer {
    name: "csv",
    extensions: &["csv"],
    doc: "one flat row per record: every metric with its interval, and the facts beside them",
    write,
};

/// Facts by column name and JSON pointer into the record; the numbers that gates can name come from METRICS.
const FACTS: &[(&str, &str)] = &[
    ("status", "/status"),
    ("reason", "/reason"),
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
];

/// Facts that follow the metrics.
const CONTEXT: &[(&str, &str)] = &[
    ("speedup_paired", "/ratio_to_fp16/paired"),
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
    ("warnings", "/warnings"),
];

/// A column: its name and the JSON pointer to its value.
type Column = (String, String);

fn write(document: &Document, _: &Options) -> Result<String> {
    let columns = columns();
    let mut out = line(columns.iter().map(|(name, _)| name.clone()));
    for record in &document.records {
        out += &row(record, &columns)?;
    }
    Ok(out)
}

fn row(record: &Record, columns: &[Column]) -> Result<String> {
    let record = serde_json::to_value(record)?;
    Ok(line(columns.iter().map(|(_, pointer)| record.pointer(pointer).map(text).unwrap_or_default())))
}

/// The same for every document, so that files can be joined.
fn columns() -> Vec<Column> {
    [facts(FACTS), metric_columns(), facts(CONTEXT)].concat()
}

fn facts(list: &[(&str, &str)]) -> Vec<Column> {
    list.iter().map(|(name, pointer)| (name.to_string(), pointer.to_string())).collect()
}

/// Every row of METRICS; a median is followed by the ends of its interval.
fn metric_columns() -> Vec<Column> {
    let columns = METRICS.iter().flat_map(|metric| {
        let pointer = format!("/{}", metric.path.replace('.', "/"));
        let interval = pointer.strip_suffix("median").map(|summary| {
            ["ci95_low", "ci95_high"].map(|end| (format!("{}_{end}", metric.key), format!("{summary}{end}")))
        });
        std::iter::once((metric.key.to_owned(), pointer)).chain(interval.into_iter().flatten())
    });
    columns.collect()
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
        let mut names: Vec<_> = columns().into_iter().map(|(name, _)| name).collect();
        let n = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), n);
    }
}
