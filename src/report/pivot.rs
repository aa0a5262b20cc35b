//! Many cases at a glance: a row for each, a column for each precision.

use super::Terminal;
use super::case::{self, Case, OWN, Run, plain};
use super::grid::{self, Line};
use super::table::TextStyle;
use crate::record::{Record, Status};

/// The decode speed of every case and precision, and its speed-up; `None` where there are not several cases with a speed.
pub fn table(cases: &[Case], terminal: &Terminal) -> Option<String> {
    let rows: Vec<&Run> = cases.iter().flat_map(|case| &case.runs).collect();
    let has_speed = |case: &&Case| case.records.iter().any(|record| speed(record).is_some());
    if cases.len() < 2 || cases.iter().filter(has_speed).count() < 2 {
        return None;
    }
    let mut names: Vec<String> = Vec::new();
    for record in cases.iter().flat_map(|case| case.records) {
        let name = case::name(record);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let telling = Telling::of(&cases.iter().collect::<Vec<_>>());
    let header = std::iter::once("decode tokens/s".to_owned()).chain(names.iter().cloned()).collect();
    let row = |run: &&Run| {
        let cell =
            |name: &String| run.records.iter().find(|record| case::name(record) == *name).map_or("-".to_owned(), cell);
        let first = telling.name(run);
        Line::Cells(std::iter::once(first).chain(names.iter().map(cell)).collect())
    };
    let lines: Vec<Line> = std::iter::once(Line::Cells(header)).chain(rows.iter().map(row)).collect();
    let painted =
        |(index, text): (usize, String)| (if index == 0 { terminal.paint(TextStyle::Dim, &text) } else { text }) + "\n";
    let blocks = grid::fold(&lines, terminal.columns, 1).into_iter();
    let text = blocks.map(|block| block.into_iter().map(painted).collect::<String>()).collect::<Vec<_>>().join("\n");
    Some(text)
}

/// What distinguishes the cases of a document from each other.
pub struct Telling {
    models: bool,
    devices: bool,
    /// The cases differ in their batch.
    batches: bool,
    runs: bool,
}

impl Telling {
    /// `cases` is not empty.
    pub fn of(cases: &[&Case]) -> Self {
        let differs = |of: fn(&Record) -> &str| {
            let first = of(&cases[0].records[0]);
            cases.iter().flat_map(|case| case.records).any(|record| of(record) != first)
        };
        Self {
            models: differs(|record| &record.model.id),
            devices: differs(|record| &record.device.name),
            batches: cases.iter().any(|case| batch(&case.records[0]) != batch(&cases[0].records[0])),
            runs: cases.iter().any(|case| case.runs.len() > 1),
        }
    }

    /// The same for rows that stand for all batches.
    pub fn without_batches(self) -> Self {
        Self { batches: false, ..self }
    }

    /// Lengths, and before them model and device, behind them batch and run, where these differ.
    pub fn name(&self, run: &Run) -> String {
        let record = &run.records[0];
        let (model, device) = (plain(&record.model.id), plain(&record.device.name));
        let lengths = case::lengths(&record.workload);
        let batch = format!("batch {}", batch(record));
        let parts = [
            (self.models, model),
            (self.devices, device),
            (true, lengths),
            (self.batches, batch),
            (self.runs, run.short.clone()),
        ];
        parts.into_iter().filter(|(shown, _)| *shown).map(|(_, text)| text).collect::<Vec<_>>().join(", ")
    }
}

fn batch(record: &Record) -> u64 {
    record.workload.batch_size
}

fn speed(record: &Record) -> Option<f64> {
    record.metrics.get("decode_tps").and_then(|summary| summary.median).filter(|_| record.status == Status::Ok)
}

/// `214.2 (3.04x)`, or how it failed.
fn cell(record: &Record) -> String {
    let Some(tps) = speed(record) else {
        return if record.status == Status::Ok { "-".to_owned() } else { case::status_word(record.status).to_owned() };
    };
    let decimals = grid::decimals(tps).min(2);
    let is_base = record.precision == "fp16" && record.engine.name == OWN;
    let ratio = record.ratio_to_fp16.filter(|_| !is_base).map(|ratio| format!(" ({:.2}x)", ratio.median));
    let mark = if record.tainted { "*" } else { "" };
    format!("{tps:.decimals$}{mark}{}", ratio.unwrap_or_default())
}
