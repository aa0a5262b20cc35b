//! Memory and clocks over the repeats, where a run kept its readings.

use std::collections::BTreeMap;

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::draw::{self, GRID, INK, MUTED};
use super::{Chart, Precisions};
use crate::record::{Record, Series};
use crate::report::case::GIB;
use crate::report::grid::decimals;
use crate::stats;

const WIDTH: u32 = 340;
const HEIGHT: u32 = 200;

/// More points than the picture is wide show nothing more.
const MAX_POINTS: usize = 240;

/// What is drawn: the first of `channels` that a record has, and by how much it is divided.
struct Kind {
    name: &'static str,
    title: &'static str,
    channels: &'static [&'static str],
    divisor: f64,
}

pub fn memory(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let channels = &["device_process_bytes", "device_used_bytes", "rss_bytes"];
    over_time(
        &Kind { name: "memory-over-time", title: "Memory over time, GiB", channels, divisor: GIB },
        records,
        precisions,
    )
}

pub fn clocks(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let channels = &["sm_mhz", "cpu_mhz"];
    over_time(
        &Kind { name: "clocks-over-time", title: "Clock over time, MHz", channels, divisor: 1.0 },
        records,
        precisions,
    )
}

/// A precision's readings: seconds of measured time, and values.
struct Curve {
    precision: String,
    points: Vec<(f64, f64)>,
}

fn over_time(kind: &Kind, records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let curve = |record: &&Record| {
        let points = points(&record.series, kind);
        (points.len() >= 2).then(|| Curve { precision: record.precision.clone(), points })
    };
    drawn(kind, &records.iter().filter_map(curve).collect::<Vec<_>>(), precisions)
}

fn drawn(kind: &Kind, curves: &[Curve], precisions: &Precisions) -> Result<Option<Chart>> {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let (seconds, most) = all().fold((0.0, 0.0), |(x, y): (f64, f64), point| (x.max(point.0), y.max(point.1)));
    if seconds <= 0.0 || most <= 0.0 {
        return Ok(None);
    }
    let digits = decimals(most);
    let svg = draw::svg(WIDTH, HEIGHT + 18 * curves.len() as u32, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(8)
            .margin_right(14)
            .margin_bottom(18 * curves.len() as i32)
            .x_label_area_size(40)
            .y_label_area_size(48)
            .build_cartesian_2d(0.0..seconds, 0.0..most * 1.1)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(5)
            .y_labels(4)
            .max_light_lines(0)
            .bold_line_style(GRID.stroke_width(1))
            .axis_style(GRID.stroke_width(1))
            .label_style(("sans-serif", draw::TEXT).into_font().color(&MUTED))
            .y_label_formatter(&|y| format!("{y:.digits$}"))
            .x_desc("seconds of repeats")
            .axis_desc_style(("sans-serif", draw::TEXT).into_font().color(&INK))
            .draw()?;
        for (index, curve) in curves.iter().enumerate() {
            let color = precisions.color(&curve.precision);
            chart.draw_series([PathElement::new(curve.points.clone(), color.stroke_width(2))])?;
            let y = HEIGHT as i32 + 18 * index as i32 + 9;
            draw::line(area, (48, y), (70, y), color.stroke_width(2))?;
            draw::label(area, &curve.precision, (78, y), HPos::Left, INK)?;
        }
        Ok(())
    })?;
    let row = |curve: &Curve| {
        let values: Vec<f64> = curve.points.iter().map(|point| point.1).collect();
        let of = |q: f64| stats::percentile(&values, q).map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"));
        vec![curve.precision.clone(), curve.points.len().to_string(), of(0.0), of(0.5), of(1.0)]
    };
    let rows: Vec<Vec<String>> = curves.iter().map(row).collect();
    let said: Vec<_> = rows.iter().map(|row| format!("{} {} to {}", row[0], row[2], row[4])).collect();
    Ok(Some(Chart {
        name: kind.name,
        title: kind.title.to_owned(),
        description: format!("{} during the repeats: {}.", kind.title, said.join(", ")),
        headers: ["precision", "readings", "least", "median", "most"].map(String::from).to_vec(),
        rows,
        svg,
    }))
}

/// The readings of all repeats end to end, thinned to what a picture can show.
fn points(series: &[Series], kind: &Kind) -> Vec<(f64, f64)> {
    let (mut points, mut began_ms) = (Vec::new(), 0.0);
    for Series { at_ms, values } in series {
        let values = kind.channels.iter().find_map(|channel| readings(values, channel)).unwrap_or_default();
        let known = at_ms.iter().zip(values).filter_map(|(at, value)| Some((at, value?)));
        points.extend(known.map(|(at, value)| ((began_ms + at) / 1e3, value / kind.divisor)));
        began_ms += at_ms.iter().copied().fold(0.0, f64::max);
    }
    let step = points.len().div_ceil(MAX_POINTS).max(1);
    points.into_iter().step_by(step).collect()
}

/// One value a reading; of a channel with a number behind a dot, the mean over the numbers.
fn readings(values: &BTreeMap<String, Vec<Option<f64>>>, channel: &str) -> Option<Vec<Option<f64>>> {
    let numbered = format!("{channel}.");
    let is_of = |name: &str| name == channel || name.starts_with(&numbered);
    let columns: Vec<&Vec<Option<f64>>> =
        values.iter().filter(|(name, _)| is_of(name)).map(|(_, values)| values).collect();
    let n = columns.iter().map(|column| column.len()).max()?;
    let mean = |at: usize| {
        let known: Vec<f64> = columns.iter().filter_map(|column| *column.get(at)?).collect();
        stats::mean(&known)
    };
    Some((0..n).map(mean).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn repeats_stand_end_to_end() {
        let kind = Kind { name: "m", title: "Memory", channels: &["device_used_bytes", "rss_bytes"], divisor: 2.0 };
        let repeat: Series = serde_json::from_value(
            json!({"at_ms": [0.0, 500.0, 1000.0], "values": {"rss_bytes": [2.0, null, 6.0], "cpu_mhz.0": [1.0, 2.0, 3.0]}}),
        )
        .unwrap();
        let points = points(&[repeat.clone(), repeat], &kind);
        assert_eq!(points, [(0.0, 1.0), (1.0, 3.0), (1.0, 1.0), (2.0, 3.0)]);

        let precisions = Precisions(vec!["fp16".into(), "nf4".into()]);
        let curves = ["fp16", "nf4"].map(|name| Curve { precision: name.into(), points: points.clone() });
        let chart = drawn(&kind, &curves, &precisions).unwrap().expect("a chart");
        assert_eq!(chart.rows[1], ["nf4", "4", "1.00", "2.00", "3.00"]);
        assert!(chart.file().contains("polyline") && drawn(&kind, &[], &precisions).unwrap().is_none());
    }

    #[test]
    fn numbered_channels_are_averaged() {
        let values = json!({"cpu_mhz.0": [1000.0, 2000.0], "cpu_mhz.1": [3000.0, null], "rss_bytes": [7.0, 8.0]});
        let values = serde_json::from_value(values).unwrap();
        assert_eq!(readings(&values, "cpu_mhz"), Some(vec![Some(2000.0), Some(2000.0)]));
        assert_eq!(readings(&values, "rss_bytes"), Some(vec![Some(7.0), Some(8.0)]));
        assert_eq!(readings(&values, "sm_mhz"), None);
    }
}
