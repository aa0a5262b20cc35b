//! Memory and clocks over the repeats, where a run kept its readings.

use std::collections::BTreeMap;

use super::axes::Axis;
use super::lines::{Curve, Point, drawn};
use super::{Chart, ChartRow, headers};
use crate::record::Series;
use crate::report::case::GIB;
use crate::report::grid::decimals;
use crate::stats;

/// More points than the picture is wide show nothing more.
const MAX_POINTS: usize = 240;

/// What is drawn: the first of `channels` that a record has, and by how much it is divided.
struct Kind {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    channels: &'static [&'static str],
    divisor: f64,
}

const MEMORY: Kind = Kind {
    name: "memory-over-time",
    title: "Memory over time",
    unit: "GiB",
    channels: &["device_process_bytes", "device_used_bytes", "rss_bytes"],
    divisor: GIB,
};

const CLOCKS: Kind = Kind {
    name: "clocks-over-time",
    title: "Clock over time",
    unit: "MHz",
    channels: &["sm_mhz", "cpu_mhz"],
    divisor: 1.0,
};

pub fn memory(rows: &[ChartRow]) -> Option<Chart> {
    over_time(&MEMORY, rows)
}

pub fn clocks(rows: &[ChartRow]) -> Option<Chart> {
    over_time(&CLOCKS, rows)
}

fn over_time(kind: &Kind, rows: &[ChartRow]) -> Option<Chart> {
    let curve = |row: &ChartRow| {
        let points = points(&row.record.series, kind);
        let points: Vec<Point> = points.into_iter().map(|(x, y)| Point::plain(x, y)).collect();
        let words = row.label.clone();
        (points.len() >= 2).then(|| Curve {
            name: row.label.clone(),
            paint: row.paint,
            is_dashed: row.is_dashed,
            words,
            points,
        })
    };
    chart(kind, rows.iter().filter_map(curve).collect())
}

fn chart(kind: &Kind, mut curves: Vec<Curve>) -> Option<Chart> {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let (seconds, most) = all().fold((0.0, 0.0), |(x, y): (f64, f64), point| (x.max(point.x), y.max(point.y)));
    if seconds <= 0.0 || most <= 0.0 {
        return None;
    }
    let digits = decimals(most);
    let cells = |curve: &Curve| {
        let values: Vec<f64> = curve.points.iter().map(|point| point.y).collect();
        let of = |q: f64| stats::percentile(&values, q).map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"));
        vec![curve.name.clone(), curve.points.len().to_string(), of(0.0), of(0.5), of(1.0)]
    };
    let rows: Vec<Vec<String>> = curves.iter().map(cells).collect();
    for (curve, row) in curves.iter_mut().zip(&rows) {
        curve.words = format!("{}: {} to {} {}, median {}", row[0], row[2], row[4], kind.unit, row[3]);
    }
    let said: Vec<_> = rows.iter().map(|row| format!("{} {} to {}", row[0], row[2], row[4])).collect();
    let title = format!("{}, {}", kind.title, kind.unit);
    let x = Axis::new("seconds of repeats", (0.0, seconds), 5);
    Some(Chart {
        name: kind.name,
        note: None,
        description: format!("{title} during the repeats: {}.", said.join(", ")),
        title,
        headers: headers(&["precision", "readings", "least", "median", "most"]),
        rows,
        drawing: drawn(&curves, x, Axis::from_zero(kind.unit, most * 1.02, 4)),
    })
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

    use super::super::drawing::Paint;
    use super::*;

    #[test]
    fn repeats_stand_end_to_end() {
        let kind = Kind { divisor: 2.0, channels: &["device_used_bytes", "rss_bytes"], ..MEMORY };
        let repeat: Series = serde_json::from_value(
            json!({"at_ms": [0.0, 500.0, 1000.0], "values": {"rss_bytes": [2.0, null, 6.0], "cpu_mhz.0": [1.0, 2.0, 3.0]}}),
        )
        .unwrap();
        let points = points(&[repeat.clone(), repeat], &kind);
        assert_eq!(points, [(0.0, 1.0), (1.0, 3.0), (1.0, 1.0), (2.0, 3.0)]);

        let curve = |name: &str| Curve {
            name: name.into(),
            paint: Paint::Precision(0),
            is_dashed: false,
            words: String::new(),
            points: points.iter().map(|&(x, y)| Point::plain(x, y)).collect(),
        };
        let drawn = chart(&kind, ["fp16", "nf4"].map(curve).into()).expect("a chart");
        assert_eq!(drawn.rows[1], ["nf4", "4", "1.00", "2.00", "3.00"]);
        assert!(drawn.file().contains("nf4: 1.00 to 3.00 GiB, median 2.00") && chart(&kind, vec![]).is_none());
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
