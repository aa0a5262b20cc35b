//! A case over its runs: what commits and days did to the speed.

use super::axes::Axis;
use super::lines::{Curve, Point, drawn};
use super::{Chart, Precisions, headers};
use crate::record::{Record, Status};
use crate::report::case::{self, Case, Run};
use crate::report::grid::decimals;

const KEY: &str = "decode_tps";

/// Fewer make no trend: two stand beside each other in every chart.
const MIN_RUNS: usize = 3;

/// There from three runs at three times on.
pub fn trend(case: &Case, precisions: &Precisions) -> Option<Chart> {
    let mut runs: Vec<&Run> = case.runs.iter().filter(|run| run.records.iter().any(|r| speed(r).is_some())).collect();
    // RFC 3339 in UTC sorts as text.
    runs.sort_by(|a, b| a.records[0].timestamp.cmp(&b.records[0].timestamp));
    let mut times: Vec<&str> = runs.iter().map(|run| run.records[0].timestamp.as_str()).collect();
    times.dedup();
    if times.len() < MIN_RUNS {
        return None;
    }
    let names = names(&runs);
    let of = |name: &String| curve(name, &runs, precisions);
    let curves: Vec<Curve> = names.iter().filter_map(of).collect();
    let ends = curves.iter().flat_map(|curve| &curve.points).map(|p| p.interval.map_or(p.y, |(_, high)| high.max(p.y)));
    let most = ends.fold(0.0, f64::max);
    if most <= 0.0 {
        return None;
    }
    let (first, last) = (case::day(times[0]), case::day(times[times.len() - 1]));
    let rows = runs.iter().flat_map(|run| run.records.iter().filter_map(|record| cells(run, record, decimals(most))));
    Some(Chart {
        name: "trend",
        title: "Decode speed over the runs, tokens/s".to_owned(),
        note: Some(format!("{} runs in order of time, from {first} to {last}", runs.len())),
        description: format!(
            "Decode speed in tokens/s of {} in {} runs from {first} to {last}.",
            names.join(", "),
            runs.len()
        ),
        headers: headers(&["run", "precision", "tokens/s", "95 % interval"]),
        rows: rows.collect(),
        drawing: drawn(&curves, Axis::counting("run", runs.len()), Axis::from_zero("decode, tokens/s", most * 1.02, 4)),
    })
}

fn speed(record: &Record) -> Option<(f64, Option<(f64, f64)>)> {
    let summary = record.metrics.get(KEY).filter(|_| record.status == Status::Ok)?;
    Some((summary.median.filter(|median| median.is_finite())?, summary.ci95_low.zip(summary.ci95_high)))
}

/// Names of all rows, in order of first appearance.
fn names(runs: &[&Run]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in runs.iter().flat_map(|run| run.records).map(case::name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The run's row called `name`.
fn find<'a>(run: &Run<'a>, name: &str) -> Option<&'a Record> {
    run.records.iter().find(|record| case::name(record) == name)
}

fn curve(name: &String, runs: &[&Run], precisions: &Precisions) -> Option<Curve> {
    let point = |(at, run): (usize, &&Run)| {
        let record = find(run, name)?;
        let (y, interval) = speed(record)?;
        let ends = interval.map(|(low, high)| format!(" [{low:.2}, {high:.2}]")).unwrap_or_default();
        let words = format!("{name}, {}: {y:.2}{ends} tokens/s", run.label);
        Some(Point { x: (at + 1) as f64, y, interval, words: Some(words) })
    };
    let points: Vec<Point> = runs.iter().enumerate().filter_map(point).collect();
    let paint = precisions.paint(runs.iter().find_map(|run| find(run, name))?);
    (!points.is_empty()).then(|| Curve { name: name.clone(), paint, is_dashed: false, words: name.clone(), points })
}

fn cells(run: &Run, record: &Record, digits: usize) -> Option<Vec<String>> {
    let (tps, interval) = speed(record)?;
    let interval = interval.map_or_else(|| "-".to_owned(), |(low, high)| format!("[{low:.digits$}, {high:.digits$}]"));
    Some(vec![run.label.clone(), case::name(record), format!("{tps:.digits$}"), interval])
}
