//! Cases that differ in their batch alone: total speed against the batch, and against the speed of each sequence.

use super::axes::Axis;
use super::lines::{Curve, Point, drawn};
use super::{Chart, Precisions, headers};
use crate::record::{Record, Status, Workload};
use crate::report::case::{self, Case};
use crate::report::grid::decimals;

/// A precision at a batch.
struct Spot {
    batch: f64,
    /// Tokens/s of all sequences.
    total: f64,
    interval: Option<(f64, f64)>,
    /// Tokens/s of each sequence.
    each: f64,
}

/// A precision at each batch, in ascending order.
struct Line<'a> {
    name: String,
    record: &'a Record,
    spots: Vec<Spot>,
}

/// The charts of each line of cases, with the index of its case of the largest batch.
pub fn batches(cases: &[Case], precisions: &Precisions) -> Vec<(usize, Chart)> {
    let mut charts = Vec::new();
    for (at, case) in cases.iter().enumerate() {
        let first = &case.records[0];
        let is_on_line = |other: &&Case| is_on_line(first, &other.records[0]);
        let line: Vec<&Case> = cases.iter().filter(is_on_line).collect();
        let largest = line.iter().map(|case| case.records[0].workload.batch_size).max();
        if line.len() < 2 || largest != Some(first.workload.batch_size) {
            continue;
        }
        let lines = lines(&line);
        charts.extend(by_batch(&lines, precisions).map(|chart| (at, chart)));
        charts.extend(operating_curve(&lines, precisions).map(|chart| (at, chart)));
    }
    charts
}

fn is_on_line(a: &Record, b: &Record) -> bool {
    Workload { batch_size: a.workload.batch_size, ..b.workload } == a.workload
        && (&a.model, &a.weights.source, &a.device) == (&b.model, &b.weights.source, &b.device)
        && (&a.keep_fp16, a.environment.threads) == (&b.keep_fp16, b.environment.threads)
}

fn lines<'a>(cases: &[&'a Case<'a>]) -> Vec<Line<'a>> {
    let mut cases: Vec<&&Case> = cases.iter().collect();
    cases.sort_by_key(|case| case.records[0].workload.batch_size);
    let mut lines: Vec<Line> = Vec::new();
    for record in cases.iter().flat_map(|case| case.newest_run().records) {
        let Some(spot) = spot(record) else { continue };
        let name = case::name(record);
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.spots.push(spot),
            None => lines.push(Line { name, record, spots: vec![spot] }),
        }
    }
    lines.retain(|line| line.spots.len() > 1);
    lines
}

fn spot(record: &Record) -> Option<Spot> {
    let summary = record.metrics.get("decode_tps").filter(|_| record.status == Status::Ok)?;
    let batch = record.workload.batch_size.max(1) as f64;
    let total = summary.median.filter(|median| median.is_finite() && *median > 0.0)?;
    Some(Spot { batch, total, interval: summary.ci95_low.zip(summary.ci95_high), each: total / batch })
}

/// Total tokens/s against the batch.
fn by_batch(lines: &[Line], precisions: &Precisions) -> Option<Chart> {
    let (most, largest) = (most(lines, |spot| spot.total), most(lines, |spot| spot.batch));
    let least = lines.iter().flat_map(|line| &line.spots).map(|spot| spot.batch).fold(f64::INFINITY, f64::min);
    let digits = decimals(most);
    let curve = |line: &Line| {
        let of = |&Spot { batch, total, interval, each }: &Spot| {
            let words = format!("{}, batch {batch}: {total:.digits$} tokens/s, {each:.1} a sequence", line.name);
            Point { x: batch, y: total, interval, words: Some(words) }
        };
        curve_of(line, precisions, line.spots.iter().map(of).collect())
    };
    (!lines.is_empty()).then(|| Chart {
        name: "by-batch",
        title: "Total decode speed by batch, tokens/s".to_owned(),
        note: Some("where two lines cross, the narrower format stops paying".to_owned()),
        description: format!(
            "Decode speed of all sequences in tokens/s from batch {least} to {largest}: {}.",
            said(lines)
        ),
        headers: headers(&["precision", "batch", "tokens/s", "tokens/s a sequence"]),
        rows: rows(lines, digits),
        drawing: drawn(
            &lines.iter().map(curve).collect::<Vec<_>>(),
            Axis::logarithmic("batch", (least / 1.1, largest * 1.1)),
            Axis::from_zero("decode, tokens/s", most * 1.05, 4),
        ),
    })
}

/// Total tokens/s against those of each sequence.
fn operating_curve(lines: &[Line], precisions: &Precisions) -> Option<Chart> {
    let (most, most_each) = (most(lines, |spot| spot.total), most(lines, |spot| spot.each));
    let digits = decimals(most);
    let curve = |line: &Line| {
        let mut points: Vec<Point> = line
            .spots
            .iter()
            .map(|&Spot { batch, total, each, interval: _ }| {
                let words =
                    format!("{}, batch {batch}: {each:.1} tokens/s a sequence, {total:.digits$} in all", line.name);
                Point { words: Some(words), ..Point::plain(each, total) }
            })
            .collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        curve_of(line, precisions, points)
    };
    (!lines.is_empty()).then(|| Chart {
        name: "operating-curve",
        title: "Total against each sequence's speed, tokens/s".to_owned(),
        note: Some("what is up and to the right serves more, and each faster".to_owned()),
        description: format!("Decode speed of all sequences against that of each, by batch: {}.", said(lines)),
        headers: headers(&["precision", "batch", "tokens/s", "tokens/s a sequence"]),
        rows: rows(lines, digits),
        drawing: drawn(
            &lines.iter().map(curve).collect::<Vec<_>>(),
            Axis::from_zero("tokens/s a sequence", most_each * 1.05, 5),
            Axis::from_zero("decode, tokens/s", most * 1.05, 4),
        ),
    })
}

fn most(lines: &[Line], of: impl Fn(&Spot) -> f64) -> f64 {
    lines.iter().flat_map(|line| &line.spots).map(of).fold(0.0, f64::max)
}

fn curve_of(line: &Line, precisions: &Precisions, points: Vec<Point>) -> Curve {
    let (name, paint) = (line.name.clone(), precisions.paint(line.record));
    Curve { words: name.clone(), name, paint, is_dashed: false, points }
}

fn rows(lines: &[Line], digits: usize) -> Vec<Vec<String>> {
    let row = |line: &Line, spot: &Spot| {
        let Spot { batch, total, each, interval: _ } = spot;
        vec![line.name.clone(), batch.to_string(), format!("{total:.digits$}"), format!("{each:.2}")]
    };
    lines.iter().flat_map(|line| line.spots.iter().map(move |spot| row(line, spot))).collect()
}

/// `fp16 100 to 300, nf4 200 to 300`.
fn said(lines: &[Line]) -> String {
    let one = |line: &Line| {
        let ends = line.spots.first().zip(line.spots.last());
        let ends = ends.map(|(first, last)| format!("{:.0} to {:.0}", first.total, last.total));
        format!("{} {}", line.name, ends.unwrap_or_default())
    };
    lines.iter().map(one).collect::<Vec<_>>().join(", ")
}
