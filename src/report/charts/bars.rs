//! Horizontal bars, one for each row: the name to the left or above, the number with its interval to the right.

use super::drawing::{Anchor, Drawing, Paint, fitted, text_width};
use super::{Chart, ChartRow, WIDTH};
use crate::report::case::GIB;
use crate::report::grid::decimals;

const ROW: f64 = 34.0;
const BAR: f64 = 18.0;

/// Height of a name that stands above its bar.
const NAME: f64 = 16.0;

/// Room for a bar below which names stand above.
const LEAST_BAR: f64 = 110.0;

/// Between a bar and its words.
const GAP: f64 = 8.0;

/// What a chart of bars is of.
struct Kind {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    /// For example `lower is better`.
    reading: &'static str,
    /// Fixed where values span orders of magnitude.
    decimals: Option<usize>,
}

const fn kind(name: &'static str, title: &'static str, unit: &'static str, reading: &'static str) -> Kind {
    Kind { name, title, unit, reading, decimals: None }
}

const HIGHER: &str = "higher is better";
const LOWER: &str = "lower is better";

/// Of the chart that the parts of memory replace.
pub const PEAK_MEMORY: &str = "peak-memory";

/// A number of a row and the ends of its 95 % interval.
type Value = (f64, Option<(f64, f64)>);

pub fn speed(rows: &[ChartRow]) -> Option<Chart> {
    of_metric(&kind("speed", "Decode speed", "tokens/s", HIGHER), rows, "decode_tps")
}

pub fn first_token(rows: &[ChartRow]) -> Option<Chart> {
    of_metric(&kind("first-token", "Time to first token", "ms", LOWER), rows, "ttft_ms")
}

pub fn prompt_speed(rows: &[ChartRow]) -> Option<Chart> {
    of_metric(&kind("prompt-speed", "Prompt speed", "tokens/s", HIGHER), rows, "prefill_tps")
}

pub fn latency(rows: &[ChartRow]) -> Option<Chart> {
    of_metric(&kind("latency", "Latency, end to end", "s", LOWER), rows, "latency_s")
}

pub fn energy(rows: &[ChartRow]) -> Option<Chart> {
    of_metric(&kind("energy", "Energy", "J/token", LOWER), rows, "joules_per_token")
}

pub fn divergence(rows: &[ChartRow]) -> Option<Chart> {
    let kind = Kind { decimals: Some(5), ..kind("divergence", "KL divergence", "nats/token", LOWER) };
    let value = |row: &ChartRow| {
        let quality = row.record.quality.as_ref()?;
        let around = |half: f64| (quality.kl_mean - half, quality.kl_mean + half);
        Some((quality.kl_mean, quality.kl_mean_half_width.map(around)))
    };
    bars(&kind, rows, value, None)
}

pub fn peak_memory(rows: &[ChartRow]) -> Option<Chart> {
    let value = |row: &ChartRow| Some((row.record.memory.peak_bytes? as f64 / GIB, None));
    bars(&kind(PEAK_MEMORY, "Peak memory", "GiB", LOWER), rows, value, None)
}

/// Bytes that decoding reads a second, against what the memory gives.
pub fn bandwidth(rows: &[ChartRow]) -> Option<Chart> {
    let reading = "the line is the read bandwidth of the memory, measured in the same run";
    let read = rows.iter().filter_map(|row| row.record.bandwidth.read_gb_s).reduce(f64::max)?;
    let value = |row: &ChartRow| Some((row.record.bandwidth.achieved_gb_s?, None));
    bars(
        &kind("bandwidth", "Bandwidth of decoding", "GB/s", reading),
        rows,
        value,
        Some(read).filter(|x| x.is_finite()),
    )
}

fn of_metric(kind: &Kind, rows: &[ChartRow], key: &str) -> Option<Chart> {
    let value = |row: &ChartRow| {
        let summary = row.record.metrics.get(key)?;
        Some((summary.median?, summary.ci95_low.zip(summary.ci95_high)))
    };
    bars(kind, rows, value, None)
}

/// One bar.
struct Bar<'a> {
    row: &'a ChartRow<'a>,
    value: f64,
    interval: Option<(f64, f64)>,
    /// The number with its interval.
    shown: String,
}

fn bars(
    kind: &Kind,
    rows: &[ChartRow],
    value: impl Fn(&ChartRow) -> Option<Value>,
    limit: Option<f64>,
) -> Option<Chart> {
    let values: Vec<(&ChartRow, Value)> = rows.iter().filter_map(|row| Some((row, value(row)?))).collect();
    let values: Vec<_> = values.into_iter().filter(|(_, (value, _))| value.is_finite()).collect();
    let largest = values.iter().map(|(_, (value, _))| value.abs()).reduce(f64::max)?;
    let digits = kind.decimals.unwrap_or_else(|| decimals(largest));
    let bar = |(row, (value, interval)): (_, Value)| {
        let ends = interval.map(|ends| format!(" {}", between(ends, digits))).unwrap_or_default();
        Bar { row, value, interval, shown: format!("{value:.digits$}{ends}") }
    };
    let bars: Vec<Bar> = values.into_iter().map(bar).collect();
    let has_intervals = bars.iter().any(|bar| bar.interval.is_some());
    let kept = if has_intervals { 3 } else { 2 };
    let cells = |bar: &Bar| {
        let interval = bar.interval.map_or_else(|| "-".to_owned(), |ends| between(ends, digits));
        vec![bar.row.label.clone(), format!("{:.digits$}", bar.value), interval]
    };
    let mut cells: Vec<Vec<String>> = bars.iter().map(cells).map(|row| row.into_iter().take(kept).collect()).collect();
    cells.extend(limit.map(|limit| vec!["read bandwidth".to_owned(), format!("{limit:.digits$}")]));
    let said: Vec<String> = bars.iter().map(|bar| format!("{} {}", bar.row.label, bar.shown)).collect();
    let headers = ["precision", kind.unit, "95 % interval"].map(str::to_owned);
    Some(Chart {
        name: kind.name,
        title: format!("{}, {}", kind.title, kind.unit),
        note: Some(kind.reading.to_owned()),
        description: format!("{} in {}: {}; {}.", kind.title, kind.unit, said.join(", "), kind.reading),
        headers: headers.into_iter().take(kept).collect(),
        rows: cells,
        drawing: drawn(kind, &bars, limit),
    })
}

fn between((low, high): (f64, f64), digits: usize) -> String {
    format!("[{low:.digits$}, {high:.digits$}]")
}

fn drawn(kind: &Kind, bars: &[Bar], limit: Option<f64>) -> Drawing {
    let names: Vec<&str> = bars.iter().map(|bar| bar.row.label.as_str()).collect();
    let numbers = bars.iter().map(|bar| text_width(&bar.shown)).fold(0.0, f64::max);
    let ends = bars.iter().map(|bar| bar.interval.map_or(bar.value, |(_, high)| high.max(bar.value)));
    let layout = BarLayout::new(&names, numbers + GAP, ends.chain(limit).fold(0.0, f64::max));
    // A limit has its words above the bars.
    let top = if limit.is_some() { 26.0 } else { 2.0 };
    let mut drawing = Drawing::new(WIDTH, top + layout.row * bars.len() as f64);
    layout.draw_base(&mut drawing, top);
    for (index, bar) in bars.iter().enumerate() {
        let words = format!("{}: {} {}", bar.row.label, bar.shown, kind.unit);
        drawing.marked(words, |drawing| {
            let middle = layout.name(drawing, &bar.row.label, top, index);
            let end = layout.at(bar.value);
            drawing.rect((layout.left, middle - BAR / 2.0), (end, middle + BAR / 2.0), bar.row.paint);
            let interval = bar.interval.map(|(low, high)| (layout.at(low), layout.at(high)));
            if let Some((low, high)) = interval {
                drawing.line((low, middle), (high, middle), 1.0, Paint::Ink);
                for x in [low, high] {
                    drawing.line((x, middle - 4.0), (x, middle + 4.0), 1.0, Paint::Ink);
                }
            }
            let end = interval.map_or(end, |(_, high)| end.max(high)).max(layout.left + 1.0);
            drawing.text((end + GAP, middle), Anchor::Start, Paint::Ink, bar.shown.as_str());
        });
    }
    if let Some(limit) = limit {
        let (x, digits) = (layout.at(limit), decimals(limit));
        let words = format!("limit {limit:.digits$} {}", kind.unit);
        drawing.line((x, top - 4.0), (x, drawing.height()), 2.0, Paint::Limit);
        // To the left of its line, unless that would begin before the picture.
        let (at, anchor) = if text_width(&words) < x { (x, Anchor::End) } else { (0.0, Anchor::Start) };
        drawing.text((at, top - 14.0), anchor, Paint::Limit, words);
    }
    drawing
}

/// How rows of bars lie: from values to units of the picture.
pub struct BarLayout {
    pub left: f64,
    right: f64,
    largest: f64,
    row: f64,
    names_above: bool,
}

impl BarLayout {
    /// For bars with these `names`, `behind` units of words behind the longest one, which is `largest` long.
    pub fn new(names: &[&str], behind: f64, largest: f64) -> Self {
        let beside = names.iter().map(|name| text_width(name)).fold(0.0, f64::max) + GAP;
        let right = WIDTH - behind;
        let names_above = right - beside < LEAST_BAR;
        let left = if names_above { 1.0 } else { beside };
        Self { left, right, largest, row: if names_above { ROW + NAME - 6.0 } else { ROW }, names_above }
    }

    pub fn at(&self, value: f64) -> f64 {
        let share = if self.largest > 0.0 { (value / self.largest).clamp(0.0, 1.0) } else { 0.0 };
        self.left + (self.right - self.left) * share
    }

    pub fn height(&self, n_rows: usize) -> f64 {
        self.row * n_rows as f64
    }

    pub fn draw_base(&self, drawing: &mut Drawing, top: f64) {
        drawing.line((self.left, top), (self.left, drawing.height()), 1.0, Paint::Grid);
    }

    /// Writes a row's name and gives the height at which its bar's middle is.
    pub fn name(&self, drawing: &mut Drawing, name: &str, top: f64, index: usize) -> f64 {
        let begin = top + self.row * index as f64;
        match self.names_above {
            true => {
                drawing.text((4.0, begin + NAME / 2.0), Anchor::Start, Paint::Ink, fitted(name, WIDTH - 4.0));
                begin + NAME + BAR / 2.0
            }
            false => {
                drawing.text((self.left - GAP, begin + ROW / 2.0), Anchor::End, Paint::Ink, name);
                begin + ROW / 2.0
            }
        }
    }
}
