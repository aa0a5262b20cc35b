//! Horizontal bars, one for each precision: the name to the left, the number to the right.

use anyhow::Result;
use plotters::prelude::Color as _;
use plotters::style::text_anchor::HPos;

use super::draw::{self, Area, Color, GRID, INK, LIMIT, MUTED};
use super::{Chart, Precisions};
use crate::record::Record;
use crate::report::case::GIB;
use crate::report::grid::decimals;

const WIDTH: i32 = 340;
const NUMBERS: i32 = 66;
/// With the interval behind the number.
const WIDE_NUMBERS: i32 = 140;
const ROW: i32 = 34;
const BAR: i32 = 18;

/// One bar.
struct Bar<'a> {
    precision: &'a str,
    value: f64,
    interval: Option<(f64, f64)>,
}

/// What a chart of bars is of.
struct Kind {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    /// For example `lower is better`.
    reading: &'static str,
}

pub fn latency(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let kind = Kind { name: "latency", title: "Latency, end to end", unit: "s", reading: "lower is better" };
    bars(&kind, metric(records, "latency_s"), None, precisions)
}

pub fn speed(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let kind = Kind { name: "speed", title: "Decode speed", unit: "tokens/s", reading: "higher is better" };
    bars(&kind, metric(records, "decode_tps"), None, precisions)
}

pub fn peak_memory(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let kind = Kind { name: "peak-memory", title: "Peak memory", unit: "GiB", reading: "lower is better" };
    let bar = |record: &&'_ Record| Some((record.precision.clone(), record.memory.peak_bytes? as f64 / GIB));
    let peaks: Vec<_> = records.iter().filter_map(bar).collect();
    let bars = peaks.iter().map(|(precision, value)| Bar { precision, value: *value, interval: None });
    self::bars(&kind, bars.collect(), None, precisions)
}

/// What decoding reads a second, against what the memory gives.
pub fn bandwidth(records: &[&Record], precisions: &Precisions) -> Result<Option<Chart>> {
    let kind = Kind {
        name: "bandwidth",
        title: "Bandwidth of decoding",
        unit: "GB/s",
        reading: "the line is the read bandwidth of the memory, measured in the same run",
    };
    let read = records.iter().filter_map(|record| record.bandwidth.read_gb_s).reduce(f64::max);
    let Some(read) = read.filter(|read| read.is_finite()) else { return Ok(None) };
    let bar = |record: &'_ &Record| Some((record.precision.clone(), record.bandwidth.achieved_gb_s?));
    let achieved: Vec<_> = records.iter().filter_map(bar).collect();
    let bars = achieved.iter().map(|(precision, value)| Bar { precision, value: *value, interval: None });
    self::bars(&kind, bars.collect(), Some(read), precisions)
}

fn metric<'a>(records: &[&'a Record], key: &str) -> Vec<Bar<'a>> {
    let bar = |record: &&'a Record| {
        let summary = record.metrics.get(key)?;
        Some(Bar {
            precision: &record.precision,
            value: summary.median?,
            interval: summary.ci95_low.zip(summary.ci95_high),
        })
    };
    records.iter().filter_map(bar).collect()
}

fn bars(kind: &Kind, bars: Vec<Bar>, limit: Option<f64>, precisions: &Precisions) -> Result<Option<Chart>> {
    let bars: Vec<Bar> = bars.into_iter().filter(|bar| bar.value.is_finite()).collect();
    if bars.is_empty() {
        return Ok(None);
    }
    let ends = bars.iter().map(|bar| bar.interval.map_or(bar.value, |(_, high)| high.max(bar.value)));
    let largest = ends.chain(limit).fold(0.0, f64::max);
    let left = draw::names_width(bars.iter().map(|bar| bar.precision));
    let has_intervals = bars.iter().any(|bar| bar.interval.is_some());
    let scale = Scale { left, right: WIDTH - if has_intervals { WIDE_NUMBERS } else { NUMBERS }, largest };
    let digits = decimals(bars.iter().map(|bar| bar.value).fold(0.0, f64::max));
    // A limit has its words above the bars.
    let top = if limit.is_some() { ROW - 8 } else { 2 };
    let height = top + ROW * bars.len() as i32;
    let svg = draw::svg(WIDTH as u32, height as u32, |area| {
        draw::line(area, (left, top), (left, height), GRID.stroke_width(1))?;
        for (index, bar) in bars.iter().enumerate() {
            row(area, bar, &scale, top + ROW * index as i32, digits, precisions.color(bar.precision))?;
        }
        limit.map_or(Ok(()), |limit| limit_line(area, limit, kind.unit, &scale, (top, height)))
    })?;
    let rows = bars.iter().map(|bar| vec![bar.precision.to_owned(), number(bar.value, digits), interval(bar, digits)]);
    let kept = if has_intervals { 3 } else { 2 };
    let mut rows: Vec<Vec<String>> = rows.map(|row| row.into_iter().take(kept).collect()).collect();
    rows.extend(limit.map(|limit| vec!["read bandwidth".to_owned(), number(limit, digits)]));
    let said: Vec<String> = bars.iter().map(|bar| format!("{} {}", bar.precision, shown(bar, digits))).collect();
    let headers = ["precision".to_owned(), kind.unit.to_owned(), "95 % interval".to_owned()];
    Ok(Some(Chart {
        name: kind.name,
        title: format!("{}, {}", kind.title, kind.unit),
        description: format!("{} in {}: {}; {}.", kind.title, kind.unit, said.join(", "), kind.reading),
        headers: headers.into_iter().take(kept).collect(),
        rows,
        svg,
    }))
}

/// From values to units of the picture.
struct Scale {
    left: i32,
    right: i32,
    largest: f64,
}

impl Scale {
    fn at(&self, value: f64) -> i32 {
        let share = if self.largest > 0.0 { (value / self.largest).clamp(0.0, 1.0) } else { 0.0 };
        self.left + (f64::from(self.right - self.left) * share).round() as i32
    }
}

fn row(area: &Area, bar: &Bar, scale: &Scale, top: i32, digits: usize, color: Color) -> Result<()> {
    let middle = top + ROW / 2;
    draw::label(area, bar.precision, (scale.left - 10, middle), HPos::Right, INK)?;
    draw::bar(area, (scale.left, scale.at(bar.value)), (middle - BAR / 2, middle + BAR / 2), color)?;
    let mut end = scale.at(bar.value);
    if let Some((low, high)) = bar.interval {
        draw::line(area, (scale.at(low), middle), (scale.at(high), middle), INK.stroke_width(1))?;
        for x in [scale.at(low), scale.at(high)] {
            draw::line(area, (x, middle - 4), (x, middle + 4), INK.stroke_width(1))?;
        }
        end = end.max(scale.at(high));
    }
    draw::label(area, &shown(bar, digits), (end + 8, middle), HPos::Left, INK)
}

fn limit_line(area: &Area, limit: f64, unit: &str, scale: &Scale, (top, bottom): (i32, i32)) -> Result<()> {
    let x = scale.at(limit);
    draw::line(area, (x, top - 4), (x, bottom), LIMIT.stroke_width(2))?;
    draw::label(area, &format!("limit {} {unit}", number(limit, decimals(limit))), (x, top - 14), HPos::Right, LIMIT)
}

fn number(value: f64, digits: usize) -> String {
    format!("{value:.digits$}")
}

/// For example `36.8 [31.0, 41.2]`.
fn shown(bar: &Bar, digits: usize) -> String {
    match bar.interval {
        Some(_) => format!("{} {}", number(bar.value, digits), interval(bar, digits)),
        None => number(bar.value, digits),
    }
}

fn interval(bar: &Bar, digits: usize) -> String {
    bar.interval.map_or_else(|| "-".to_owned(), |(low, high)| format!("[{low:.digits$}, {high:.digits$}]"))
}

/// The parts of a peak in the order that they are drawn, each a pair of name and bytes.
fn parts(record: &Record) -> Option<Vec<(&'static str, u64)>> {
    let memory = &record.memory;
    let known = [
        ("weights", memory.weights_bytes?),
        ("cache", memory.kv_cache_bytes?),
        ("scratch", memory.scratch_bytes.unwrap_or(0)),
    ];
    let sum: u64 = known.iter().map(|(_, bytes)| bytes).sum();
    let rest = memory.peak_bytes.map_or(0, |peak| peak.saturating_sub(sum));
    Some(known.into_iter().chain([("other", rest)]).collect())
}

/// What the peak consists of. `other` is what the process holds beside: code, tables, buffers of the system.
pub fn memory_parts(records: &[&Record], _: &Precisions) -> Result<Option<Chart>> {
    let stacks: Vec<_> =
        records.iter().filter_map(|record| Some((record.precision.as_str(), parts(record)?))).collect();
    let Some((_, first)) = stacks.first() else { return Ok(None) };
    let names: Vec<&str> = first.iter().map(|(name, _)| *name).collect();
    let total = |parts: &[(&str, u64)]| parts.iter().map(|(_, bytes)| *bytes).sum::<u64>() as f64;
    let largest = stacks.iter().map(|(_, parts)| total(parts)).fold(0.0, f64::max);
    let left = draw::names_width(stacks.iter().map(|(precision, _)| *precision));
    let scale = Scale { left, right: WIDTH - NUMBERS, largest };
    let height = ROW * (stacks.len() as i32 + 1);
    let digits = decimals(largest / GIB);
    let svg = draw::svg(WIDTH as u32, height as u32, |area| {
        legend(area, &names)?;
        draw::line(area, (left, ROW), (left, height), GRID.stroke_width(1))?;
        for (index, (precision, parts)) in stacks.iter().enumerate() {
            let middle = ROW * (index as i32 + 1) + ROW / 2;
            draw::label(area, precision, (left - 10, middle), HPos::Right, INK)?;
            let mut below = 0.0;
            for (part, (_, bytes)) in parts.iter().enumerate().filter(|(_, (_, bytes))| *bytes > 0) {
                let (left, right) = (scale.at(below), scale.at(below + *bytes as f64));
                draw::bar(area, (left, right), (middle - BAR / 2, middle + BAR / 2), part_color(part))?;
                below += *bytes as f64;
            }
            draw::label(area, &number(below / GIB, digits), (scale.at(below) + 8, middle), HPos::Left, INK)?;
        }
        Ok(())
    })?;
    let cells = |parts: &[(&str, u64)]| {
        parts.iter().map(|(_, bytes)| format!("{:.4}", *bytes as f64 / GIB)).collect::<Vec<_>>()
    };
    let rows = stacks.iter().map(|(precision, parts)| [vec![precision.to_string()], cells(parts)].concat());
    let said: Vec<_> =
        stacks.iter().map(|(precision, parts)| format!("{precision} {:.digits$}", total(parts) / GIB)).collect();
    Ok(Some(Chart {
        name: "memory-parts",
        title: "What the memory holds, GiB".to_owned(),
        description: format!("Memory by part ({}) in GiB: {} in all.", names.join(", "), said.join(", ")),
        headers: std::iter::once("precision".to_owned())
            .chain(names.iter().map(|name| format!("{name}, GiB")))
            .collect(),
        rows: rows.collect(),
        svg,
    }))
}

/// No precision's colours, and apart from one another in lightness too; the legend and the table name them.
fn part_color(part: usize) -> Color {
    draw::part_color(part)
}

fn legend(area: &Area, names: &[&str]) -> Result<()> {
    for (index, name) in names.iter().enumerate() {
        let left = 66 + 68 * index as i32;
        draw::bar(area, (left, left + 10), (ROW / 2 - 5, ROW / 2 + 5), part_color(index))?;
        draw::label(area, name, (left + 15, ROW / 2), HPos::Left, MUTED)?;
    }
    Ok(())
}
