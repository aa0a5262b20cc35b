//! How the times of single decode steps spread: one hill for each precision, on one axis.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::draw::{self, GRID, INK, MUTED};
use super::{Chart, Precisions};
use crate::record::Record;
use crate::report::grid::decimals;
use crate::stats;

const WIDTH: u32 = 340;
const BINS: usize = 60;

/// Height of a hill against the distance between base lines.
const HILL: f64 = 0.82;

/// The axis leaves out this share of the slowest steps, which the table has: one long step would flatten all hills.
const SHOWN: f64 = 0.98;

struct Steps<'a> {
    precision: &'a str,
    /// Ascending.
    ms: Vec<f64>,
}

pub fn step_latency(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let all: Vec<Steps> = records.iter().map(|record| steps(record)).filter(|steps| steps.ms.len() >= 2).collect();
    let quantile = |steps: &Steps, q: f64| stats::percentile(&steps.ms, q).unwrap_or(0.0);
    let most = all.iter().map(|steps| quantile(steps, SHOWN)).fold(0.0, f64::max) * 1.04;
    let least = all.iter().filter_map(|steps| steps.ms.first()).copied().fold(f64::INFINITY, f64::min) * 0.96;
    if all.is_empty() || most <= least || !most.is_finite() {
        return Ok(None);
    }
    let digits = decimals(most);
    let n = all.len() as f64;
    let svg = draw::svg(WIDTH, 54 + 56 * all.len() as u32, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(6)
            .margin_right(14)
            .x_label_area_size(44)
            .y_label_area_size(draw::names_width(all.iter().map(|steps| steps.precision)))
            .build_cartesian_2d(least..most, 0.0..n)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(5)
            .max_light_lines(0)
            .bold_line_style(GRID.stroke_width(1))
            .axis_style(GRID.stroke_width(1))
            .label_style(("sans-serif", draw::TEXT).into_font().color(&MUTED))
            .x_label_formatter(&|x| format!("{x:.digits$}"))
            .x_desc("time of a decode step, ms")
            .axis_desc_style(("sans-serif", draw::TEXT).into_font().color(&INK))
            .draw()?;
        for (index, steps) in all.iter().enumerate() {
            let base = n - 1.0 - index as f64;
            let color = precisions.color(steps.precision);
            chart.draw_series([Polygon::new(hill(&steps.ms, (least, most), base), color.filled())])?;
            let at = (least, base + 0.25);
            chart.draw_series([EmptyElement::at(at)
                + Text::new(steps.precision.to_owned(), (-10, 0), draw::text_style(INK, HPos::Right))])?;
        }
        Ok(())
    })?;
    let columns = [0.5, 0.9, 0.95, 0.99];
    let row = |steps: &Steps| {
        let numbers = columns.iter().map(|&q| format!("{:.3}", quantile(steps, q)));
        let ends = [steps.ms.len().to_string(), format!("{:.3}", steps.ms[0])];
        let slowest = steps.ms.last().map(|ms| format!("{ms:.3}"));
        std::iter::once(steps.precision.to_owned()).chain(ends).chain(numbers).chain(slowest).collect()
    };
    let said: Vec<_> =
        all.iter().map(|steps| format!("{} {:.digits$}", steps.precision, quantile(steps, 0.5))).collect();
    let headers = ["precision", "steps", "least, ms", "p50, ms", "p90, ms", "p95, ms", "p99, ms", "most, ms"];
    Ok(Some(Chart {
        name: "step-latency",
        title: "Time of a decode step, ms".to_owned(),
        description: format!("Distribution of the times of single decode steps; medians in ms: {}.", said.join(", ")),
        headers: headers.map(String::from).to_vec(),
        rows: all.iter().map(row).collect(),
        svg,
    }))
}

fn steps(record: &Record) -> Steps<'_> {
    let mut ms: Vec<f64> = record.samples.decode_step_ns.iter().flatten().map(|&ns| ns as f64 / 1e6).collect();
    ms.sort_by(f64::total_cmp);
    Steps { precision: &record.precision, ms }
}

/// The outline of a histogram over `range`, its highest bin [`HILL`] above `base`.
fn hill(ascending: &[f64], (least, most): (f64, f64), base: f64) -> Vec<(f64, f64)> {
    let width = (most - least) / BINS as f64;
    let mut counts = [0u32; BINS];
    for ms in ascending.iter().filter(|ms| **ms <= most) {
        let bin = ((ms - least) / width) as usize;
        counts[bin.min(BINS - 1)] += 1;
    }
    let highest = f64::from(counts.iter().copied().max().unwrap_or(1).max(1));
    let tops = counts.iter().enumerate().flat_map(|(bin, &count)| {
        let (left, y) = (least + width * bin as f64, base + HILL * f64::from(count) / highest);
        [(left, y), (left + width, y)]
    });
    std::iter::once((least, base)).chain(tops).chain([(most, base)]).collect()
}
