//! A summary of eight columns, as simple benchmark scripts print them, with medians in place of single runs.

use anyhow::Result;

use crate::record::{Document, Record, Status};
use crate::report::case::{self, GIB, plain, status};
use crate::report::grid::{self, Line};
use crate::report::{Options, Writer, csv};

pub const WRITER: Writer = Writer {
    name: "summary",
    extensions: &[],
    doc: "total and per-token latency, tokens/s, memory at start, end and peak: one table of all records",
    write: write_table,
};

pub const CSV_WRITER: Writer =
    Writer { name: "summary-csv", extensions: &[], doc: "the same columns as CSV", write: write_csv };

/// Name as CSV has it, name and unit as the table has them, decimals, and the value.
type Column = (&'static str, &'static str, &'static str, usize, fn(&Record) -> Option<f64>);

const COLUMNS: &[Column] = &[
    ("latency_s", "latency", "s", 4, |r| median(r, "latency_s")),
    ("latency_per_token_ms", "per token", "ms", 3, |r| median(r, "latency_per_token_ms")),
    ("output_tps", "output", "tokens/s", 2, |r| median(r, "output_tps")),
    ("start_gib", "start", "GiB", 3, |r| gib(r.memory.start_bytes)),
    ("end_gib", "end", "GiB", 3, |r| gib(r.memory.end_bytes)),
    ("peak_gib", "peak", "GiB", 3, |r| gib(r.memory.peak_bytes)),
];

fn median(record: &Record, key: &str) -> Option<f64> {
    record.metrics.get(key)?.median.filter(|x| x.is_finite())
}

fn gib(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64 / GIB)
}

/// Numbers of a record without a sound result are left out: they would mislead.
fn cells(record: &Record, unknown: &str) -> Vec<String> {
    let ok = record.status == Status::Ok;
    let cell = |(_, _, _, decimals, value): &Column| match value(record).filter(|_| ok) {
        Some(x) => format!("{x:.decimals$}"),
        None => unknown.to_owned(),
    };
    COLUMNS.iter().map(cell).collect()
}

fn write_csv(document: &Document, _: &Options) -> Result<String> {
    let names = COLUMNS.iter().map(|column| column.0.to_owned());
    let mut text = csv::line(["model", "precision"].map(String::from).into_iter().chain(names));
    for record in &document.records {
        let start = [record.model.id.clone(), case::name(record)];
        text += &csv::line(start.into_iter().chain(cells(record, "")));
    }
    Ok(text)
}

fn write_table(document: &Document, _: &Options) -> Result<String> {
    let models = document.records.iter().map(|record| plain(&record.model.id).chars().count());
    let width = models.chain(["model".len()]).max().unwrap_or(0);
    // A grid aligns its first column to the left only: model and precision share it.
    let first = |model: &str, precision: &str| format!("{model:<width$}  {precision}");
    let head = |first: String, pick: fn(&Column) -> &'static str| {
        Line::Cells(std::iter::once(first).chain(COLUMNS.iter().map(|column| pick(column).to_owned())).collect())
    };
    let row = |record: &Record| {
        let name = first(&plain(&record.model.id), &case::name(record));
        match record.status {
            Status::Ok => Line::Cells(std::iter::once(name).chain(cells(record, "-")).collect()),
            _ => Line::Span(name, status(record)),
        }
    };
    let heads = [head(first("model", "precision"), |column| column.1), head(String::new(), |column| column.2)];
    Ok(grid::render(&heads.into_iter().chain(document.records.iter().map(row)).collect::<Vec<_>>()))
}
