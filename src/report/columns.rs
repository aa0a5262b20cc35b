//! The columns of the readable tables, as data: a new one is a row of [`COLUMNS`].

use super::case::{self, Case, GIB, OWN, Run};
use super::compare;
use super::grid::decimals;
use crate::record::{Bound, Record, Status, Summary};

/// What one record shows in one column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cell {
    Unknown,
    Number(f64),
    Percent(f64),
    /// A number and the two ends of its 95 % interval.
    Interval(f64, f64, f64),
    /// A median of too few repeats for an interval, the least and the greatest of them.
    Range(f64, f64, f64),
    /// The two ends of a 95 % interval.
    Between(f64, f64),
    Word(&'static str),
}

pub struct Column {
    pub name: &'static str,
    pub unit: &'static str,
    pub shown: Shown,
    /// Fixed where values span orders of magnitude; `None`: about four digits of the largest.
    pub decimals: Option<usize>,
    pub cell: fn(&Record) -> Cell,
}

/// When a column is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// Wherever speed was measured, so that tables of runs look alike.
    Always,
    /// Where some record has a value.
    Known,
    /// As [`Shown::Known`], in the wide table alone.
    Wide,
    /// Beside engines that are no code of ours.
    BesideOthers,
}

const fn narrow(name: &'static str, unit: &'static str, cell: fn(&Record) -> Cell) -> Column {
    Column { name, unit, shown: Shown::Always, decimals: None, cell }
}

const fn wide(name: &'static str, unit: &'static str, cell: fn(&Record) -> Cell) -> Column {
    Column { name, unit, shown: Shown::Wide, decimals: None, cell }
}

const fn beside_others(name: &'static str, unit: &'static str, cell: fn(&Record) -> Cell) -> Column {
    Column { name, unit, shown: Shown::BesideOthers, decimals: None, cell }
}

const fn known(name: &'static str, unit: &'static str, cell: fn(&Record) -> Cell) -> Column {
    Column { name, unit, shown: Shown::Known, decimals: None, cell }
}

/// A tenth of the divergence below which fp16 cannot be distinguished from fp32.
const DIVERGENCE_DECIMALS: usize = 5;

/// From left to right, after the precision.
pub static COLUMNS: &[Column] = &[
    narrow("decode", "tokens/s", |r| interval(r, "decode_tps")),
    known("per sequence", "tokens/s", |r| of_batch(r, median(r, "decode_tps_per_sequence"))),
    narrow("speed-up", "x fp16", speed_up),
    narrow("bytes ratio", "fp16 / this", bytes_ratio),
    narrow("of read bandwidth", "%", percent_of_bandwidth),
    known("of matrix products", "%", |r| of_batch(r, share(r.bandwidth.mfu))),
    known("bound by", "", bound),
    narrow("peak", "GiB", |r| gib(r.memory.peak_bytes)),
    beside_others("growth", "GiB", |r| gib(r.memory.growth_bytes)),
    narrow("weights", "GiB", |r| gib(r.memory.weights_bytes)),
    narrow("TTFT", "ms", |r| median(r, "ttft_ms")),
    known("prefill", "tokens/s", |r| shown_by_nothing_else(r, "prefill_tps", "ttft_ms")),
    known("output", "tokens/s", |r| shown_by_nothing_else(r, "output_tps", "decode_tps")),
    Column { decimals: Some(DIVERGENCE_DECIMALS), ..known("KL", "nats/token", kl) },
    known("throughput", "one cold run", |r| of_cold_run(r, "output_tps")),
    known("latency", "s, cold", |r| of_cold_run(r, "latency_s")),
    known("per token", "ms, cold", |r| of_cold_run(r, "latency_per_token_ms")),
    known("top-1", "%", |r| r.quality.as_ref().map_or(Cell::Unknown, |q| Cell::Percent(100.0 * q.top1_agreement))),
    known("perplexity", "x fp16", perplexity_ratio),
    wide("memory alone", "% of step", |r| share(r.bandwidth.memory_alone_share)),
    wide("arithmetic alone", "% of step", |r| share(r.bandwidth.arithmetic_alone_share)),
    wide("speed-up", "95 % interval", speed_up_interval),
    wide("end to end", "ms/token", |r| median(r, "latency_per_token_ms")),
    wide("decode", "waiting/token", |r| median(r, "decode_synced_tps")),
    wide("energy", "J/token", |r| median(r, "joules_per_token")),
    wide("start", "GiB", |r| gib(r.memory.start_bytes)),
    wide("end", "GiB", |r| gib(r.memory.end_bytes)),
    wide("ITL p50", "ms", |r| percentile(r, |s| s.p50)),
    wide("ITL p95", "ms", |r| percentile(r, |s| s.p95)),
    wide("ITL p99", "ms", |r| percentile(r, |s| s.p99)),
    wide("load", "s", |r| median(r, "load_s")),
    wide("prefill speed", "tokens/s", |r| unless_shown(r, "prefill_tps", "ttft_ms")),
    wide("output speed", "tokens/s", |r| unless_shown(r, "output_tps", "decode_tps")),
    wide("outliers", "columns/call", |r| number(r.int8.as_ref().and_then(|int8| int8.outlier_columns_mean))),
    wide("cold run", "s", |r| number(r.samples.cold_ns.map(|ns| ns as f64 / 1e9))),
    wide("perplexity", "", |r| number(r.quality.as_ref().map(|q| q.perplexity))),
    Column {
        decimals: Some(DIVERGENCE_DECIMALS),
        ..wide("KL p50", "nats/token", |r| number(r.quality.as_ref().map(|q| q.kl_median)))
    },
    Column {
        decimals: Some(DIVERGENCE_DECIMALS),
        ..wide("KL p99", "nats/token", |r| number(r.quality.as_ref().map(|q| q.kl_p99)))
    },
    wide("logit error", "largest", |r| number(r.quality.as_ref().map(|q| q.logit_error_max))),
    wide("host", "ms/token", |r| number(r.other_engine.as_ref().and_then(|engine| engine.host_ms_per_token))),
    Column {
        decimals: Some(DIVERGENCE_DECIMALS),
        ..wide("KL to quantbench", "nats/token", |r| number(r.agreement.as_ref().map(|a| a.kl_mean)))
    },
    wide("top-1 of quantbench", "%", |r| share(r.agreement.as_ref().map(|a| a.top1_agreement))),
];

/// A case as texts.
pub struct Sheet {
    /// Name and unit, the precision first, then the run where there are several.
    pub headers: Vec<(&'static str, &'static str)>,
    pub rows: Vec<Row>,
    /// What a reader must know of the columns, a sentence each without its full stop.
    pub notes: Vec<String>,
}

pub struct Row {
    /// With an asterisk where the machine disturbed the measurement.
    pub precision: String,
    /// Where the case has several.
    pub run: Option<String>,
    /// The same where the label stands elsewhere: `#2`.
    pub short_run: String,
    /// One text a column, or status and reason of a record that is not ok: its numbers would mislead.
    pub values: Result<Vec<String>, String>,
}

/// How a disturbed row is marked.
pub const TAINTED: &str = "*";

/// Of the column that says what a later run changes.
const CHANGE: (&str, &str) = ("change", "of decode");

/// Further columns of a sheet.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Every column that some record has a value for.
    pub wide: bool,
    /// Changes by later runs; a page has a table of its own for them.
    pub changes: bool,
}

/// Lays out one case.
pub fn sheet(case: &Case, extent: Extent) -> Sheet {
    let ok: Vec<_> = case.records.iter().filter(|record| record.status == Status::Ok).collect();
    let known = |column: &Column| ok.iter().any(|record| (column.cell)(record) != Cell::Unknown);
    let only_quality = !ok.is_empty() && ok.iter().all(|record| case::has_quality_alone(record));
    let has_others = ok.iter().any(|record| record.other_engine.is_some());
    let shows = |column: &Column| match column.shown {
        Shown::Always => !only_quality || known(column),
        Shown::Known => known(column),
        Shown::Wide => extent.wide && known(column),
        Shown::BesideOthers => has_others && known(column),
    };
    let columns: Vec<_> = COLUMNS.iter().filter(|column| shows(column)).collect();
    let decimals: Vec<_> = columns.iter().map(|column| column_decimals(column, &ok)).collect();
    let change = |(run, record)| if extent.changes { change(case, run, record) } else { None };
    let changes: Vec<Option<String>> = case.rows().map(change).collect();
    let compares = changes.iter().any(Option::is_some);

    let row = |((run, record), change): ((&Run, &Record), &Option<String>)| Row {
        precision: case::label(record, case.records) + if record.tainted { TAINTED } else { "" },
        run: (case.runs.len() > 1).then(|| run.label.clone()),
        short_run: run.short.clone(),
        values: match record.status {
            Status::Ok => {
                let values = columns.iter().zip(&decimals).map(|(c, &d)| (c.cell)(record).text(d));
                let change = compares.then(|| change.clone().unwrap_or_else(|| "-".to_owned()));
                Ok(values.chain(change).collect())
            }
            _ => Err(case::status(record)),
        },
    };
    let rows: Vec<Row> = case.rows().zip(&changes).map(row).collect();
    let run = (case.runs.len() > 1).then_some(("run", ""));
    let headers = std::iter::once(("precision", "")).chain(run).chain(columns.iter().map(|c| (c.name, c.unit)));
    let headers: Vec<_> = headers.chain(compares.then_some(CHANGE)).collect();
    let notes = notes(case, &rows, compares);
    Sheet { headers, rows, notes }
}

fn notes(case: &Case, rows: &[Row], compares: bool) -> Vec<String> {
    let values = || rows.iter().flat_map(|row| row.values.iter().flatten());
    let ok = || case.records.iter().filter(|record| record.status == Status::Ok);
    let ratios = || ok().filter_map(|record| record.ratio_to_fp16);
    let mut notes = Vec::new();
    if values().any(|value| value.contains('[')) {
        notes.push("[low, high] is a 95 % interval".to_owned());
    }
    if values().any(|value| value.ends_with(')')) {
        notes.push("(least to greatest) of the repeats, which are too few for an interval".to_owned());
    }
    if ratios().any(|ratio| ratio.paired) {
        notes.push(
            "speed-ups are medians of paired repeats, so they need not equal the ratio of the medians shown".to_owned(),
        );
    }
    if ratios().any(|ratio| !ratio.paired) {
        notes.push("where precisions did not run in turn, a speed-up is the ratio of the medians".to_owned());
    }
    notes.extend(held_otherwise(case.records));
    if compares {
        notes.push(format!("change is that of the median against {}, of the same precision", case.runs[0].label));
    }
    if case.records.iter().any(|record| record.tainted) {
        notes.push(format!(
            "{TAINTED} other programs or the state of the machine affected this measurement: see the warnings"
        ));
    }
    notes
}

/// Each part that another engine holds in another format, after the rows that it holds for.
fn held_otherwise(records: &[Record]) -> Vec<String> {
    let mut lines: Vec<(&str, Vec<String>)> = Vec::new();
    for record in records.iter().filter(|record| record.status == Status::Ok) {
        for line in record.other_engine.iter().flat_map(|engine| &engine.held_otherwise) {
            let label = case::name(record);
            match lines.iter_mut().find(|(known, _)| known == line) {
                Some((_, labels)) if labels.contains(&label) => {}
                Some((_, labels)) => labels.push(label),
                None => lines.push((line, vec![label])),
            }
        }
    }
    lines.into_iter().map(|(line, labels)| case::plain(&format!("{}: {line}", labels.join(", ")))).collect()
}

/// What a later run of the case changes of the decode speed.
fn change(case: &Case, run: &Run, record: &Record) -> Option<String> {
    let first = &case.runs[0];
    if std::ptr::eq(first.records, run.records) || record.status != Status::Ok {
        return None;
    }
    let base = first.records.iter().find(|base| case::name(base) == case::name(record) && base.status == Status::Ok)?;
    let change = compare::change(base, record, "decode_tps")?;
    let percent = |ratio: f64| format!("{:+.1} %", 100.0 * (ratio - 1.0));
    let interval = change.interval.map(|i| format!(" [{}, {}]", percent(i.low), percent(i.high)));
    Some(percent(change.median) + &interval.unwrap_or_default())
}

/// The same for every row, so that the digits line up.
fn column_decimals(column: &Column, records: &[&Record]) -> usize {
    if let Some(decimals) = column.decimals {
        return decimals;
    }
    decimals(records.iter().map(|record| (column.cell)(record).magnitude()).fold(0.0, f64::max))
}

impl Cell {
    fn magnitude(&self) -> f64 {
        match *self {
            Cell::Unknown | Cell::Word(_) => 0.0,
            Cell::Number(x) | Cell::Percent(x) | Cell::Interval(x, ..) | Cell::Range(x, ..) | Cell::Between(_, x) => {
                x.abs()
            }
        }
    }

    fn text(&self, decimals: usize) -> String {
        match *self {
            Cell::Unknown => "-".into(),
            Cell::Number(x) => format!("{x:.decimals$}"),
            Cell::Percent(x) => format!("{x:.1}"),
            Cell::Interval(x, low, high) => format!("{x:.decimals$} [{low:.decimals$}, {high:.decimals$}]"),
            Cell::Range(x, least, greatest) => format!("{x:.decimals$} ({least:.decimals$} to {greatest:.decimals$})"),
            Cell::Between(low, high) => format!("[{low:.decimals$}, {high:.decimals$}]"),
            Cell::Word(word) => word.into(),
        }
    }
}

fn summary<'a>(record: &'a Record, key: &str) -> Option<&'a Summary> {
    record.metrics.get(key)
}

fn number(value: Option<f64>) -> Cell {
    value.filter(|x| x.is_finite()).map_or(Cell::Unknown, Cell::Number)
}

fn gib(bytes: Option<u64>) -> Cell {
    number(bytes.map(|bytes| bytes as f64 / GIB))
}

fn median(record: &Record, key: &str) -> Cell {
    number(summary(record, key).and_then(|s| s.median))
}

/// A speed that no other column of the narrow table shows: of a row from another tool, which times nothing else.
fn shown_by_nothing_else(record: &Record, key: &str, better: &str) -> Cell {
    if median(record, better) == Cell::Unknown { interval(record, key) } else { Cell::Unknown }
}

/// The others, in the wide table.
fn unless_shown(record: &Record, key: &str, better: &str) -> Cell {
    if median(record, better) == Cell::Unknown { Cell::Unknown } else { median(record, key) }
}

/// What says something new of several sequences alone.
fn of_batch(record: &Record, cell: Cell) -> Cell {
    if record.workload.batch_size > 1 { cell } else { Cell::Unknown }
}

fn percent_of_bandwidth(record: &Record) -> Cell {
    share(record.bandwidth.mbu)
}

fn share(value: Option<f64>) -> Cell {
    value.filter(|share| share.is_finite()).map_or(Cell::Unknown, |share| Cell::Percent(100.0 * share))
}

fn interval(record: &Record, key: &str) -> Cell {
    let Some(summary) = summary(record, key) else { return Cell::Unknown };
    match (summary.median, summary.ci95_low.zip(summary.ci95_high), summary.min.zip(summary.max)) {
        (Some(median), Some((low, high)), _) => Cell::Interval(median, low, high),
        (Some(median), None, Some((least, greatest))) if summary.n > 1 => Cell::Range(median, least, greatest),
        (median, ..) => number(median),
    }
}

/// What holds decoding back. Labels of earlier versions were guesses and are not shown.
fn bound(record: &Record) -> Cell {
    let bound = record.bandwidth.bound.as_deref().and_then(Bound::find);
    bound.map_or(Cell::Unknown, |bound| Cell::Word(bound.name()))
}

/// Numbers of a single cold run, under the names that scripts which time one have for them.
fn of_cold_run(record: &Record, key: &str) -> Cell {
    if record.protocol.is_cold_run() { median(record, key) } else { Cell::Unknown }
}

fn kl(record: &Record) -> Cell {
    match &record.quality {
        Some(quality) => match quality.kl_mean_half_width {
            Some(half) => Cell::Interval(quality.kl_mean, quality.kl_mean - half, quality.kl_mean + half),
            None => Cell::Number(quality.kl_mean),
        },
        None => Cell::Unknown,
    }
}

/// fp16 is its own baseline.
fn perplexity_ratio(record: &Record) -> Cell {
    let Some(quality) = record.quality.as_ref().filter(|_| !record.is_fp16()) else { return Cell::Unknown };
    match (quality.perplexity_ratio, quality.perplexity_ratio_ci95_low, quality.perplexity_ratio_ci95_high) {
        (Some(ratio), Some(low), Some(high)) => Cell::Interval(ratio, low, high),
        (ratio, ..) => number(ratio),
    }
}

fn percentile(record: &Record, pick: fn(&Summary) -> Option<f64>) -> Cell {
    number(summary(record, "itl_ms").and_then(pick))
}

fn speed_up(record: &Record) -> Cell {
    record.ratio_to_fp16.map_or_else(|| baseline(record), |ratio| number(Some(ratio.median)))
}

/// The same as a number; 1 for the baseline.
pub fn speed_up_number(record: &Record) -> Option<f64> {
    match speed_up(record) {
        Cell::Number(ratio) => Some(ratio),
        _ => None,
    }
}

fn bytes_ratio(record: &Record) -> Cell {
    record.ratio_to_fp16.map_or_else(|| baseline(record), |ratio| number(Some(ratio.by_bytes)))
}

/// Our own fp16 is what others are compared with: 1 as soon as it decoded.
fn baseline(record: &Record) -> Cell {
    let is_baseline = record.is_fp16() && record.engine.name == OWN && record.samples.imported.is_empty();
    if is_baseline && median(record, "decode_tps") != Cell::Unknown { Cell::Number(1.0) } else { Cell::Unknown }
}

fn speed_up_interval(record: &Record) -> Cell {
    match record.ratio_to_fp16.map(|ratio| (ratio.ci95_low, ratio.ci95_high)) {
        Some((Some(low), Some(high))) => Cell::Between(low, high),
        _ => Cell::Unknown,
    }
}
