//! Speed against memory, with the quality that each precision keeps.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::draw::{self, GRID, INK, MUTED};
use super::{Chart, Precisions};
use crate::record::Record;
use crate::report::case::GIB;
use crate::report::grid::decimals;

const WIDTH: u32 = 340;
const HEIGHT: u32 = 270;

/// Height of a line of text.
const LINE: i32 = 14;

/// A precision as a point.
struct Point<'a> {
    precision: &'a str,
    tps: f64,
    gib: f64,
    kl: Option<f64>,
}

/// The upper left, fast and small, is where to be. Area grows with the divergence where quality was measured.
pub fn trade(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let points: Vec<Point> = records.iter().filter_map(|record| point(record)).collect();
    if points.len() < 2 {
        return Ok(None);
    }
    let most = |of: fn(&Point) -> f64| points.iter().map(of).fold(0.0, f64::max);
    let (gib, tps) = (most(|point| point.gib), most(|point| point.tps));
    let most_kl = points.iter().filter_map(|point| point.kl).fold(0.0, f64::max);
    let svg = draw::svg(WIDTH, HEIGHT, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(10)
            .margin_right(14)
            .x_label_area_size(44)
            .y_label_area_size(66)
            .build_cartesian_2d(0.0..gib * 1.2, 0.0..tps * 1.15)?;
        let (x_digits, y_digits) = (decimals(gib), decimals(tps).min(1));
        chart
            .configure_mesh()
            .x_labels(5)
            .y_labels(5)
            .max_light_lines(0)
            .bold_line_style(GRID.stroke_width(1))
            .axis_style(GRID.stroke_width(1))
            .label_style(("sans-serif", draw::TEXT).into_font().color(&MUTED))
            .x_label_formatter(&|x| format!("{x:.x_digits$}"))
            .y_label_formatter(&|y| format!("{y:.y_digits$}"))
            .x_desc("peak memory, GiB")
            .y_desc("decode, tokens/s")
            .axis_desc_style(("sans-serif", draw::TEXT).into_font().color(&INK))
            .draw()?;
        let radius = |point: &Point| {
            let share = point.kl.filter(|_| most_kl > 0.0).map_or(0.0, |kl| kl / most_kl);
            (6.0 + 8.0 * share.sqrt()).round() as i32
        };
        // Names stand towards the middle, where there is room.
        let is_right = |point: &Point| point.gib > 0.6 * gib;
        let anchors: Vec<(bool, i32)> =
            points.iter().map(|point| (is_right(point), chart.backend_coord(&(point.gib, point.tps)).1)).collect();
        let shifts = shifts(&anchors);
        chart.draw_series(points.iter().zip(shifts).map(|(point, shift)| {
            let radius = radius(point);
            let color = precisions.color(point.precision);
            let (at, side) = if is_right(point) { (-radius - 6, HPos::Right) } else { (radius + 6, HPos::Left) };
            EmptyElement::at((point.gib, point.tps))
                + Circle::new((0, 0), radius, color.filled())
                + Text::new(name(point), (at, shift), draw::text_style(INK, side))
        }))?;
        Ok(())
    })?;
    let (x_digits, y_digits) = (decimals(gib), decimals(tps));
    let row = |point: &Point| {
        let kl = point.kl.map_or_else(|| "-".to_owned(), |kl| format!("{kl:.5}"));
        vec![point.precision.to_owned(), format!("{:.y_digits$}", point.tps), format!("{:.x_digits$}", point.gib), kl]
    };
    let (title, quality) = match most_kl > 0.0 {
        true => (
            "Speed, memory and quality: a larger point departs more from the reference",
            "a larger point departs more from the reference",
        ),
        false => ("Speed and memory", "quality was not measured"),
    };
    Ok(Some(Chart {
        name: "trade",
        title: title.to_owned(),
        description: format!(
            "Decode speed in tokens/s against peak memory in GiB for {}; the upper left is fast and small; {quality}.",
            points.iter().map(|point| point.precision).collect::<Vec<_>>().join(", ")
        ),
        headers: ["precision", "decode, tokens/s", "memory, GiB", "KL, nats/token"].map(String::from).to_vec(),
        rows: points.iter().map(row).collect(),
        svg,
    }))
}

/// By how many units each name moves down, so that no two on one side overprint: `anchors` has side and height of each.
fn shifts(anchors: &[(bool, i32)]) -> Vec<i32> {
    let mut order: Vec<usize> = (0..anchors.len()).collect();
    order.sort_by_key(|&at| anchors[at]);
    let mut shifts = vec![0; anchors.len()];
    for pair in order.windows(2) {
        let (above, below) = (pair[0], pair[1]);
        if anchors[above].0 == anchors[below].0 {
            let lowest = anchors[above].1 + shifts[above] + LINE;
            shifts[below] = (lowest - anchors[below].1).max(0);
        }
    }
    shifts
}

fn point(record: &Record) -> Option<Point<'_>> {
    let tps = record.metrics.get("decode_tps")?.median?;
    let bytes = record.memory.peak_bytes.or(record.memory.weights_bytes)?;
    let kl = record.quality.as_ref().map(|quality| quality.kl_mean.max(0.0));
    tps.is_finite().then_some(Point { precision: &record.precision, tps, gib: bytes as f64 / GIB, kl })
}

fn name(point: &Point) -> String {
    match point.kl {
        Some(kl) => format!("{} · KL {kl:.5}", point.precision),
        None => point.precision.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_overprint() {
        assert_eq!(shifts(&[(true, 50), (true, 52), (false, 51), (true, 100)]), [0, 12, 0, 0]);
        assert_eq!(shifts(&[(true, 50), (true, 50), (true, 50)]), [0, 14, 28]);
    }
}
