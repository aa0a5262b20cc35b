//! What a history holds: a row for each series.

use anyhow::Result;
use serde::Serialize;

use super::super::compare::pairs;
use crate::record::{Record, Status};
use crate::report::Terminal;
use crate::report::case::{self, plain};
use crate::report::grid::{self, Line, decimals, wrap};
use crate::stats;

/// A row of [`FORMATS`].
pub struct ListFormat {
    /// As `--format` takes it.
    pub name: &'static str,
    /// The terminal that shows it; a file has none.
    pub write: fn(&[Record], &Terminal) -> Result<String>,
}

/// The formats of a list, the default first.
pub static FORMATS: &[ListFormat] =
    &[ListFormat { name: "table", write: table }, ListFormat { name: "json", write: json }];

/// The format called `name`.
pub fn find(name: &str) -> Option<&'static ListFormat> {
    FORMATS.iter().find(|format| format.name == name)
}

/// Runs of the same work on the same machine.
#[derive(Debug, Serialize)]
struct Series {
    model: String,
    device: String,
    workload: String,
    precision: String,
    n_runs: usize,
    n_failed: usize,
    n_noisy: usize,
    first: String,
    last: String,
    commit: String,
    /// Value of the newest run that gave one.
    decode_tps: Option<f64>,
    /// Over all runs that gave one.
    decode_tps_median: Option<f64>,
    /// Standard deviation of the runs over their mean.
    spread: Option<f64>,
}

fn all(records: &[Record]) -> Vec<Series> {
    let mut groups: Vec<Vec<&Record>> = Vec::new();
    for record in records {
        match groups.iter_mut().find(|group| pairs::same_series(group[0], record)) {
            Some(group) => group.push(record),
            None => groups.push(vec![record]),
        }
    }
    groups.iter_mut().for_each(|group| group.sort_by(|a, b| a.timestamp.cmp(&b.timestamp)));
    groups.iter().map(|group| series(group)).collect()
}

/// Summarises records in the order of time, never empty.
fn series(records: &[&Record]) -> Series {
    let (first, last) = (records[0], records[records.len() - 1]);
    let values: Vec<f64> = records.iter().filter_map(|record| record.metrics.get("decode_tps")?.median).collect();
    let count = |is_meant: fn(&Record) -> bool| records.iter().filter(|record| is_meant(record)).count();
    Series {
        model: first.model.id.clone(),
        device: first.device.name.clone(),
        workload: case::workload(&first.workload),
        precision: case::name(first),
        n_runs: records.len(),
        n_failed: count(|record| record.status != Status::Ok),
        n_noisy: count(|record| record.status == Status::Ok && record.tainted),
        first: first.timestamp.clone(),
        last: last.timestamp.clone(),
        commit: last.engine.commit.clone(),
        decode_tps: values.last().copied(),
        decode_tps_median: stats::median(&values),
        spread: stats::stdev(&values).zip(stats::mean(&values)).map(|(spread, mean)| spread / mean),
    }
}

fn json(records: &[Record], _: &Terminal) -> Result<String> {
    Ok(serde_json::to_string_pretty(&all(records))? + "\n")
}

const HEADERS: [[&str; 2]; 9] = [
    ["precision", ""],
    ["runs", ""],
    ["failed", ""],
    ["noisy", ""],
    ["from", ""],
    ["to", ""],
    ["newest", "tokens/s"],
    ["median", "tokens/s"],
    ["spread", "%"],
];

fn table(records: &[Record], terminal: &Terminal) -> Result<String> {
    let series = all(records);
    let title = |series: &Series| plain(&format!("{} on {}: {}", series.model, series.device, series.workload));
    let block = |group: &[Series]| {
        let digits = decimals(group.iter().filter_map(|series| series.decode_tps).fold(0.0, f64::max));
        let heads = [0, 1].map(|line| Line::Cells(HEADERS.iter().map(|head| head[line].to_owned()).collect()));
        let lines: Vec<Line> = heads.into_iter().chain(group.iter().map(|series| row(series, digits))).collect();
        format!("{}\n\n{}", wrap(&title(&group[0]), terminal.columns, 2), grid::folded(&lines, terminal.columns, 1))
    };
    Ok(series.chunk_by(|a, b| title(a) == title(b)).map(block).collect::<Vec<_>>().join("\n"))
}

fn row(series: &Series, digits: usize) -> Line {
    let number = |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"));
    Line::Cells(vec![
        plain(&series.precision),
        series.n_runs.to_string(),
        series.n_failed.to_string(),
        series.n_noisy.to_string(),
        plain(case::day(&series.first)),
        plain(case::day(&series.last)),
        number(series.decode_tps, digits),
        number(series.decode_tps_median, digits),
        number(series.spread.map(|spread| 100.0 * spread), 1),
    ])
}
