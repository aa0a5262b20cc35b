//! A time repeat by repeat: whether the machine drifted, warmed up or was disturbed.

use super::axes::Axis;
use super::lines::{Curve, Point, drawn};
use super::{Chart, ChartRow, headers};
use crate::record::metrics;
use crate::report::grid::decimals;
use crate::stats;

pub fn latency_per_token(rows: &[ChartRow]) -> Option<Chart> {
    let values = |row: &ChartRow| metrics::repeats(row.record, "latency_per_token_ms");
    let all: Vec<(&ChartRow, Vec<f64>)> = rows.iter().map(|row| (row, values(row))).collect();
    let all: Vec<_> = all.into_iter().filter(|(_, ms)| ms.len() >= 2).collect();
    let n = all.iter().map(|(_, ms)| ms.len()).max()?;
    let most = all.iter().flat_map(|(_, ms)| ms).copied().fold(0.0, f64::max);
    if most <= 0.0 || !most.is_finite() {
        return None;
    }
    let digits = decimals(most);
    let cells = |(row, ms): &(&ChartRow, Vec<f64>)| {
        let of = |q: f64| stats::percentile(ms, q).map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"));
        vec![row.label.clone(), ms.len().to_string(), of(0.0), of(0.5), of(1.0)]
    };
    let rows: Vec<Vec<String>> = all.iter().map(cells).collect();
    let said: Vec<String> = rows.iter().map(|row| format!("{} {} to {}", row[0], row[2], row[4])).collect();
    let curves: Vec<Curve> = all.iter().map(|(row, ms)| curve(row, ms, digits)).collect();
    Some(Chart {
        name: "latency-per-token",
        title: "Latency per token over the repeats, ms".to_owned(),
        note: Some("end to end over all generated tokens; a slope is drift, a peak something else that ran".to_owned()),
        description: format!("End-to-end time over generated tokens, in ms, of each repeat: {}.", said.join(", ")),
        headers: headers(&["precision", "repeats", "least, ms", "median, ms", "most, ms"]),
        rows,
        drawing: drawn(&curves, Axis::counting("repeat", n), Axis::from_zero("ms per token", most * 1.02, 4)),
    })
}

fn curve(row: &ChartRow, ms: &[f64], digits: usize) -> Curve {
    let point = |(at, &y): (usize, &f64)| Point {
        x: (at + 1) as f64,
        y,
        interval: None,
        words: Some(format!("{}, repeat {}: {y:.digits$} ms", row.label, at + 1)),
    };
    Curve {
        name: row.label.clone(),
        paint: row.paint,
        is_dashed: row.is_dashed,
        words: row.label.clone(),
        points: ms.iter().enumerate().map(point).collect(),
    }
}
