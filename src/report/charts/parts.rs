//! What the peak of memory consists of: a bar for each row, cut into parts.

use super::bars::BarLayout;
use super::drawing::{Anchor, Drawing, Paint, text_width};
use super::{Chart, ChartRow, WIDTH};
use crate::record::Record;
use crate::report::case::GIB;
use crate::report::grid::decimals;

pub const NAME: &str = "memory-parts";

const BAR: f64 = 18.0;
const GAP: f64 = 8.0;

/// Height of the legend.
const LEGEND: f64 = 26.0;

/// The parts of a peak in the order that they are drawn, each a pair of name and bytes.
fn parts(record: &Record) -> Option<Vec<(&'static str, u64)>> {
    let memory = &record.memory;
    let known = [
        ("weights", memory.weights_bytes?),
        ("KV cache", memory.kv_cache_bytes?),
        ("scratch", memory.scratch_bytes.unwrap_or(0)),
    ];
    let sum: u64 = known.iter().map(|(_, bytes)| bytes).sum();
    let rest = memory.peak_bytes.map_or(0, |peak| peak.saturating_sub(sum));
    Some(known.into_iter().chain([("other", rest)]).collect())
}

/// `other` is what the process holds beside: code, tables, buffers of the system.
pub fn memory_parts(rows: &[ChartRow]) -> Option<Chart> {
    let stacks: Vec<(&ChartRow, Vec<(&str, u64)>)> =
        rows.iter().filter_map(|row| Some((row, parts(row.record)?))).collect();
    let names: Vec<&str> = stacks.first()?.1.iter().map(|(name, _)| *name).collect();
    // A row that is missing here would be missed.
    if stacks.len() < rows.len() {
        return None;
    }
    let total = |parts: &[(&str, u64)]| parts.iter().map(|(_, bytes)| *bytes).sum::<u64>() as f64 / GIB;
    let digits = decimals(stacks.iter().map(|(_, parts)| total(parts)).fold(0.0, f64::max));
    let cells = |parts: &[(&str, u64)]| {
        parts.iter().map(|(_, bytes)| format!("{:.4}", *bytes as f64 / GIB)).collect::<Vec<_>>()
    };
    let said: Vec<_> = stacks.iter().map(|(row, parts)| format!("{} {:.digits$}", row.label, total(parts))).collect();
    Some(Chart {
        name: NAME,
        title: "Peak memory by part, GiB".to_owned(),
        note: Some("lower is better".to_owned()),
        description: format!("Peak memory by part ({}) in GiB: {} in all.", names.join(", "), said.join(", ")),
        headers: std::iter::once("precision".to_owned()).chain(names.iter().map(|n| format!("{n}, GiB"))).collect(),
        rows: stacks.iter().map(|(row, parts)| [vec![row.label.clone()], cells(parts)].concat()).collect(),
        drawing: drawn(&stacks, &names, digits),
    })
}

fn drawn(stacks: &[(&ChartRow, Vec<(&str, u64)>)], names: &[&str], digits: usize) -> Drawing {
    let gib = |bytes: u64| bytes as f64 / GIB;
    let totals: Vec<f64> = stacks.iter().map(|(_, parts)| parts.iter().map(|(_, bytes)| gib(*bytes)).sum()).collect();
    let labels: Vec<&str> = stacks.iter().map(|(row, _)| row.label.as_str()).collect();
    let largest = totals.iter().copied().fold(0.0, f64::max);
    let layout = BarLayout::new(&labels, text_width(&format!("{largest:.digits$}")) + GAP, largest);
    let mut drawing = Drawing::new(WIDTH, LEGEND + layout.height(stacks.len()));
    legend(&mut drawing, names);
    layout.draw_base(&mut drawing, LEGEND);
    for (index, ((row, parts), total)) in stacks.iter().zip(&totals).enumerate() {
        let middle = layout.name(&mut drawing, &row.label, LEGEND, index);
        let mut below = 0.0;
        for (part, (name, bytes)) in parts.iter().enumerate().filter(|(_, (_, bytes))| *bytes > 0) {
            let words = format!("{}, {name}: {:.4} GiB", row.label, gib(*bytes));
            let (from, to) = (layout.at(below), layout.at(below + gib(*bytes)));
            drawing.marked(words, |drawing| {
                drawing.rect((from, middle - BAR / 2.0), (to, middle + BAR / 2.0), Paint::Part(part));
            });
            below += gib(*bytes);
        }
        let at = (layout.at(below) + GAP, middle);
        drawing.text(at, Anchor::Start, Paint::Ink, format!("{total:.digits$}"));
    }
    drawing
}

fn legend(drawing: &mut Drawing, names: &[&str]) {
    let mut left = 0.0;
    for (index, name) in names.iter().enumerate() {
        let middle = LEGEND / 2.0 - 2.0;
        drawing.rect((left, middle - 5.0), (left + 10.0, middle + 5.0), Paint::Part(index));
        drawing.text((left + 15.0, middle), Anchor::Start, Paint::Muted, *name);
        left += 15.0 + text_width(name) + 12.0;
    }
}
