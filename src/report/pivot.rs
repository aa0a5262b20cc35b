//! Many cases at a glance: a row for each, a column for each precision.

use super::Terminal;
use super::case::{self, Case, OWN, plain};
use super::grid::{self, Line};
use super::table::TextStyle;
use crate::record::{Record, Status};

/// The decode speed of every case and precision, and its speed-up; `None` where there are not several cases with a speed.
pub fn table(cases: &[Case], terminal: &Terminal) -> Option<String> {
    let rows: Vec<(&Case, &super::case::Run)> =
        cases.iter().flat_map(|case| case.runs.iter().map(move |run| (case, run))).collect();
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
    let models = differs(cases, |record| plain(&record.model.id));
    let devices = differs(cases, |record| plain(&record.device.name));
    let has_runs = cases.iter().any(|case| case.runs.len() > 1);
    let head = |record: &Record, run: &str| {
        let (model, device) = (plain(&record.model.id), plain(&record.device.name));
        let parts =
            [(models, model), (devices, device), (true, case::lengths(&record.workload)), (has_runs, run.to_owned())];
        parts.into_iter().filter(|(shown, _)| *shown).map(|(_, text)| text).collect::<Vec<_>>().join(", ")
    };
    let header = std::iter::once("decode tokens/s".to_owned()).chain(names.iter().cloned()).collect();
    let row = |(_, run): &(&Case, &super::case::Run)| {
        let cell =
            |name: &String| run.records.iter().find(|record| case::name(record) == *name).map_or("-".to_owned(), cell);
        let first = head(&run.records[0], &run.short);
        Line::Cells(std::iter::once(first).chain(names.iter().map(cell)).collect())
    };
    let lines: Vec<Line> = std::iter::once(Line::Cells(header)).chain(rows.iter().map(row)).collect();
    let painted =
        |(index, text): (usize, String)| (if index == 0 { terminal.paint(TextStyle::Dim, &text) } else { text }) + "\n";
    let blocks = grid::fold(&lines, terminal.columns, 1).into_iter();
    let text = blocks.map(|block| block.into_iter().map(painted).collect::<String>()).collect::<Vec<_>>().join("\n");
    Some(text)
}

fn differs(cases: &[Case], of: fn(&Record) -> String) -> bool {
    let first = of(&cases[0].records[0]);
    cases.iter().flat_map(|case| case.records).any(|record| of(record) != first)
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
