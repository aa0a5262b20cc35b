//! How the times of single decode steps spread: one hill for each row, on one axis.

use super::axes::{Axis, Plot};
use super::drawing::{Anchor, Drawing, Paint, fitted};
use super::{Chart, ChartRow, WIDTH, headers};
use crate::report::grid::decimals;
use crate::stats;

const BINS: usize = 60;

/// Height of a row's name and of its hill.
const NAME: f64 = 16.0;
const HILL: f64 = 36.0;
const GAP: f64 = 6.0;

/// Room for the axis.
const FOOT: f64 = 38.0;

/// The axis leaves out this share of the slowest steps, which the table has: one long step would flatten all hills.
const SHOWN: f64 = 0.98;

struct Steps<'a> {
    row: &'a ChartRow<'a>,
    /// Ascending.
    ms: Vec<f64>,
}

impl Steps<'_> {
    fn quantile(&self, q: f64) -> f64 {
        stats::percentile(&self.ms, q).unwrap_or(0.0)
    }
}

pub fn step_latency(rows: &[ChartRow]) -> Option<Chart> {
    let all: Vec<Steps> = rows.iter().map(steps).filter(|steps| steps.ms.len() >= 2).collect();
    let most = all.iter().map(|steps| steps.quantile(SHOWN)).fold(0.0, f64::max) * 1.04;
    let least = all.iter().filter_map(|steps| steps.ms.first()).copied().fold(f64::INFINITY, f64::min) * 0.96;
    if all.is_empty() || most <= least || !most.is_finite() {
        return None;
    }
    let digits = decimals(most);
    let columns = [0.5, 0.9, 0.95, 0.99];
    let cells = |steps: &Steps| {
        let numbers = columns.iter().map(|&q| format!("{:.3}", steps.quantile(q)));
        let ends = [steps.ms.len().to_string(), format!("{:.3}", steps.ms[0])];
        let slowest = steps.ms.last().map(|ms| format!("{ms:.3}"));
        std::iter::once(steps.row.label.clone()).chain(ends).chain(numbers).chain(slowest).collect()
    };
    let said: Vec<_> =
        all.iter().map(|steps| format!("{} {:.digits$}", steps.row.label, steps.quantile(0.5))).collect();
    Some(Chart {
        name: "step-latency",
        title: "Time of a decode step, ms".to_owned(),
        note: Some("how often each time was seen; the line is the median".to_owned()),
        description: format!("Distribution of the times of single decode steps; medians in ms: {}.", said.join(", ")),
        headers: headers(&["precision", "steps", "least, ms", "p50, ms", "p90, ms", "p95, ms", "p99, ms", "most, ms"]),
        rows: all.iter().map(cells).collect(),
        drawing: drawn(&all, (least, most)),
    })
}

fn drawn(all: &[Steps], (least, most): (f64, f64)) -> Drawing {
    let row = NAME + HILL + GAP;
    let height = row * all.len() as f64 + FOOT;
    let mut drawing = Drawing::new(WIDTH, height);
    let plot = Plot::level(WIDTH, height, Axis::new("time of a decode step, ms", (least, most), 5));
    plot.draw(&mut drawing);
    for (index, steps) in all.iter().enumerate() {
        let top = row * index as f64;
        let base = top + NAME + HILL;
        let median = steps.quantile(0.5);
        let words = format!(
            "{}: median {median:.3} ms, p95 {:.3}, p99 {:.3}",
            steps.row.label,
            steps.quantile(0.95),
            steps.quantile(0.99)
        );
        drawing.marked(words, |drawing| {
            let at = |(ms, share): (f64, f64)| (plot.x_at(ms), base - HILL * share);
            drawing.area(hill(&steps.ms, (least, most)).into_iter().map(at).collect(), steps.row.paint);
            let x = plot.x_at(median.clamp(least, most));
            drawing.line((x, base - HILL), (x, base), 1.0, Paint::Ink);
            let name = fitted(&steps.row.label, WIDTH - plot.left);
            drawing.text((plot.left, top + NAME / 2.0), Anchor::Start, Paint::Ink, name);
        });
    }
    drawing
}

fn steps<'a>(row: &'a ChartRow<'a>) -> Steps<'a> {
    let mut ms: Vec<f64> = row.record.samples.decode_step_ns.iter().flatten().map(|&ns| ns as f64 / 1e6).collect();
    ms.sort_by(f64::total_cmp);
    Steps { row, ms }
}

/// The outline of a histogram over `range`: values and shares of the highest bin.
fn hill(ascending: &[f64], (least, most): (f64, f64)) -> Vec<(f64, f64)> {
    let width = (most - least) / BINS as f64;
    let mut counts = [0u32; BINS];
    for ms in ascending.iter().filter(|ms| **ms <= most) {
        let bin = ((ms - least) / width) as usize;
        counts[bin.min(BINS - 1)] += 1;
    }
    let highest = f64::from(counts.iter().copied().max().unwrap_or(1).max(1));
    let tops = counts.iter().enumerate().flat_map(|(bin, &count)| {
        let (left, y) = (least + width * bin as f64, f64::from(count) / highest);
        [(left, y), (left + width, y)]
    });
    std::iter::once((least, 0.0)).chain(tops).chain([(most, 0.0)]).collect()
}
