//! Quality against size, with the line of those that nothing beats at both.

use super::axes::{Axis, Plot};
use super::drawing::{Anchor, Drawing, Paint, fitted, text_width};
use super::scatter::{NAME, RADIUS, corners, labels, pareto};
use super::{Chart, ChartRow, WIDTH, headers};
use crate::report::case::GIB;
use crate::report::grid::decimals;

const HEIGHT: f64 = 270.0;

/// The precision whose divergence is the noise of rounding 16-bit weights: a smaller one says little.
const NOISE: &str = "bf16";

struct Point<'a> {
    row: &'a ChartRow<'a>,
    gib: f64,
    kl: f64,
    half_width: Option<f64>,
    tps: Option<f64>,
}

/// The lower left, small and near the reference, is where to be.
pub fn divergence_by_size(rows: &[ChartRow]) -> Option<Chart> {
    let points: Vec<Point> = rows.iter().filter_map(point).collect();
    if points.len() < 2 {
        return None;
    }
    // Less divergence is more.
    let best = pareto(&points.iter().map(|point| (point.gib, -point.kl)).collect::<Vec<_>>());
    let x_digits = decimals(points.iter().map(|point| point.gib).fold(0.0, f64::max));
    let cells = |(at, point): (usize, &Point)| {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        vec![
            point.row.label.clone(),
            format!("{:.x_digits$}", point.gib),
            format!("{:.5}", point.kl),
            or_none(point.half_width.map(|half| format!("{half:.5}"))),
            or_none(point.tps.map(|tps| format!("{:.*}", decimals(tps), tps))),
            (if best.contains(&at) { "yes" } else { "no" }).to_owned(),
        ]
    };
    let names = |at: &[usize]| at.iter().map(|&at| points[at].row.label.as_str()).collect::<Vec<_>>().join(", ");
    let noise = points.iter().find(|point| point.row.record.precision == NOISE).map(|point| point.kl);
    let dotted = if noise.is_some() { "; the dotted level is what rounding weights to bf16 costs" } else { "" };
    Some(Chart {
        name: "divergence-by-size",
        title: "Divergence against size".to_owned(),
        note: Some(format!(
            "small and near the reference is the lower left; nothing is smaller and nearer than the dashed Pareto line{dotted}"
        )),
        description: format!(
            "KL divergence in nats a token against the weights' GiB for {}; the lower left is small and near the reference; on the Pareto line: {}.",
            names(&(0..points.len()).collect::<Vec<_>>()),
            names(&best)
        ),
        headers: headers(&[
            "precision",
            "weights, GiB",
            "KL divergence",
            "± (95 %)",
            "decode, tokens/s",
            "on the Pareto line",
        ]),
        rows: points.iter().enumerate().map(cells).collect(),
        drawing: drawn(&points, &best, noise),
    })
}

fn drawn(points: &[Point], best: &[usize], noise: Option<f64>) -> Drawing {
    let ends = |point: &Point| {
        let half = point.half_width.unwrap_or(0.0);
        // An interval down to 0 ends a tenth below its middle: the axis has no 0.
        ((point.kl - half).max(point.kl / 10.0), point.kl + half)
    };
    let low = points.iter().map(|point| ends(point).0).fold(f64::INFINITY, f64::min) / 1.5;
    let high = points.iter().map(|point| ends(point).1).fold(0.0, f64::max) * 1.5;
    let gib = points.iter().map(|point| point.gib).fold(0.0, f64::max);
    let x = Axis::from_zero("weights, GiB", gib * 1.08, 4);
    let plot = Plot::new(WIDTH, HEIGHT, x, Axis::logarithmic("KL divergence, nats/token", (low, high)));
    let mut drawing = Drawing::new(WIDTH, HEIGHT);
    plot.draw(&mut drawing);
    if let Some(noise) = noise {
        let level = |x: f64| (x, plot.at((0.0, noise)).1);
        let dots = (plot.left as usize..plot.right as usize).step_by(6).map(|x| level(x as f64));
        dots.for_each(|at| drawing.circle(at, 0.8, Paint::Muted));
    }
    let places: Vec<(f64, f64)> = points.iter().map(|point| plot.at((point.gib, point.kl))).collect();
    if best.len() > 1 {
        drawing.dashes(corners(&best.iter().map(|at| places[*at]).collect::<Vec<_>>()), 1.5, Paint::Muted);
    }
    let names: Vec<String> = points.iter().map(|point| fitted(&point.row.label, NAME)).collect();
    let widths: Vec<f64> = names.iter().map(|name| text_width(name)).collect();
    for (at, (point, label)) in points.iter().zip(labels(&places, &widths)).enumerate() {
        let speed = point.tps.map_or(String::new(), |tps| format!(", {tps:.2} tokens/s"));
        let words = format!("{}: KL {:.5}, {:.3} GiB{speed}", point.row.label, point.kl, point.gib);
        drawing.marked(words, |drawing| {
            let (low, high) = ends(point);
            drawing.line(plot.at((point.gib, low)), plot.at((point.gib, high)), 1.5, point.row.paint);
            drawing.circle(places[at], RADIUS, point.row.paint);
            drawing.text(label, Anchor::Middle, Paint::Ink, names[at].as_str());
        });
    }
    drawing
}

fn point<'a>(row: &'a ChartRow<'a>) -> Option<Point<'a>> {
    let (quality, bytes) = (row.record.quality.as_ref()?, row.record.memory.weights_bytes?);
    let tps = row.record.metrics.get("decode_tps").and_then(|summary| summary.median);
    let point = Point {
        row,
        gib: bytes as f64 / GIB,
        kl: quality.kl_mean,
        half_width: quality.kl_mean_half_width,
        tps: tps.filter(|tps| tps.is_finite()),
    };
    // A logarithm has no place for 0.
    (point.kl.is_finite() && point.kl > 0.0 && point.gib > 0.0).then_some(point)
}

#[cfg(test)]
mod tests {
    use crate::record::{Document, Record};
    use crate::report::case;
    use crate::report::charts::{Precisions, charts};

    /// Three precisions, of which each has these bytes and this divergence.
    fn chart(of: [(&str, u64, f64); 3]) -> Option<super::Chart> {
        let text = include_str!("../../../tests/golden/records/with_quality.json");
        let mut document: Document = serde_json::from_str(text).expect("an example");
        let example: Record = document.records.iter().find(|record| record.quality.is_some()).expect("one").clone();
        document.records = Vec::from(of.map(|(precision, bytes, kl)| {
            let mut record = example.clone();
            record.precision = precision.to_owned();
            record.memory.weights_bytes = Some(bytes);
            record.quality.as_mut().expect("a quality").kl_mean = kl;
            record
        }));
        let cases = case::cases(&document);
        let found = charts(&cases[0], &Precisions::of(&document.records));
        found.into_iter().find(|chart| chart.name == "divergence-by-size")
    }

    #[test]
    fn what_is_larger_and_further_off_is_beaten() {
        let gib = 1 << 30;
        let chart = chart([("nf4", gib, 0.05), ("q4_0", 2 * gib, 0.08), ("bf16", 4 * gib, 0.0005)]).expect("a chart");
        let on_line: Vec<&str> = chart.rows.iter().map(|row| row[5].as_str()).collect();
        assert_eq!(on_line, ["yes", "no", "yes"]);
        assert_eq!(chart.rows[0][..3], ["nf4", "1.00", "0.05000"]);
        assert!(chart.note.expect("a note").contains("rounding weights to bf16"));
    }

    /// A logarithm has no place for 0.
    #[test]
    fn no_divergence_has_no_place() {
        assert!(chart([("nf4", 1 << 30, 0.05), ("q4_0", 1 << 31, 0.0), ("fp32", 1 << 32, 0.0)]).is_none());
    }
}
