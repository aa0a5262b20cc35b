//! Speed against memory of all rows of all cases: what nothing beats, whichever model, precision or setting it is.

use super::axes::{Axis, Plot};
use super::drawing::{Drawing, Paint, fitted, text_width};
use super::scatter::{NAME, RADIUS, corners, free_places, pareto, speed_and_memory};
use super::{Chart, Precisions, WIDTH, headers};
use crate::record::{Record, Status};
use crate::report::case;
use crate::report::grid::decimals;

const HEIGHT: f64 = 270.0;

/// Values that lie further apart than this factor are spread by their logarithms.
const WIDE: f64 = 8.0;

/// A row of a page: what distinguishes its case from the others, its name within the case, and its record.
pub struct PageRow<'a> {
    pub case: String,
    pub label: String,
    pub record: &'a Record,
}

/// The chart, and the index of each of its dots among the rows, in the order of the chart's numbers.
pub struct AllCases {
    pub chart: Chart,
    pub rows: Vec<usize>,
}

impl AllCases {
    /// Column of the numbers that says whether a dot is on the line.
    pub const IS_BEST: usize = 4;
}

struct Dot<'a> {
    row: &'a PageRow<'a>,
    paint: Paint,
    gib: f64,
    tps: f64,
}

/// `None` where fewer than two rows have both values.
pub fn all_cases(page: &[PageRow], precisions: &Precisions) -> Option<AllCases> {
    let dot = |(at, row): (usize, &'_ PageRow)| {
        let (tps, gib) = speed_and_memory(row.record).filter(|(tps, gib)| *tps > 0.0 && *gib > 0.0)?;
        (row.record.status == Status::Ok).then_some((at, gib, tps))
    };
    let found: Vec<(usize, f64, f64)> = page.iter().enumerate().filter_map(dot).collect();
    if found.len() < 2 {
        return None;
    }
    let of = |&(at, gib, tps): &(usize, f64, f64)| Dot {
        row: &page[at],
        paint: precisions.paint(page[at].record),
        gib,
        tps,
    };
    let dots: Vec<Dot> = found.iter().map(of).collect();
    let best = pareto(&dots.iter().map(|dot| (dot.gib, dot.tps)).collect::<Vec<_>>());
    let most = |of: fn(&Dot) -> f64| dots.iter().map(of).fold(0.0, f64::max);
    let (x_digits, y_digits) = (decimals(most(|dot| dot.gib)).max(2), decimals(most(|dot| dot.tps)));
    let cells = |(at, dot): (usize, &Dot)| {
        let numbers = [format!("{:.y_digits$}", dot.tps), format!("{:.x_digits$}", dot.gib)];
        let is_best = if best.contains(&at) { "yes" } else { "no" };
        [vec![dot.row.case.clone(), dot.row.label.clone()], numbers.to_vec(), vec![is_best.to_owned()]].concat()
    };
    let name = |at: &usize| format!("{} of {}", dots[*at].row.label, dots[*at].row.case);
    let chart = Chart {
        name: "all",
        title: "Speed against memory, all cases".to_owned(),
        note: Some(note(best.len()).to_owned()),
        description: format!(
            "Decode speed in tokens/s against peak memory in GiB for {} rows of all cases; on the Pareto line: {}.",
            dots.len(),
            best.iter().map(name).collect::<Vec<_>>().join("; ")
        ),
        headers: headers(&["case", "precision", "decode, tokens/s", "memory, GiB", "on the Pareto line"]),
        rows: dots.iter().enumerate().map(cells).collect(),
        drawing: drawn(&dots, &best),
    };
    Some(AllCases { chart, rows: found.iter().map(|(at, ..)| *at).collect() })
}

fn note(n_best: usize) -> &'static str {
    match n_best {
        1 => "fast and small is the upper left; nothing is as fast or as small as the dot with a name",
        _ => "fast and small is the upper left; nothing is faster and smaller than the dashed Pareto line",
    }
}

fn drawn(dots: &[Dot], best: &[usize]) -> Drawing {
    let plot = Plot::new(
        WIDTH,
        HEIGHT,
        axis("peak memory, GiB", dots.iter().map(|dot| dot.gib)),
        axis("decode, tokens/s", dots.iter().map(|dot| dot.tps)),
    );
    let mut drawing = Drawing::new(WIDTH, HEIGHT);
    plot.draw(&mut drawing);
    let places: Vec<(f64, f64)> = dots.iter().map(|dot| plot.at((dot.gib, dot.tps))).collect();
    // There for the script too, which draws it anew for the rows that a filter leaves.
    drawing.dashes(corners(&best.iter().map(|at| places[*at]).collect::<Vec<_>>()), 1.5, Paint::Muted);
    // The others have their names under the pointer: there may be many.
    let names: Vec<String> =
        best.iter().map(|&at| fitted(&format!("{} {}", dots[at].row.label, dots[at].row.case), NAME)).collect();
    let named: Vec<(usize, f64)> = best.iter().copied().zip(names.iter().map(|name| text_width(name))).collect();
    let named = free_places(&places, &named);
    for (at, dot) in dots.iter().enumerate() {
        let words =
            format!("{}, {}: {:.2} tokens/s, {:.3} GiB", dot.row.case, case::name(dot.row.record), dot.tps, dot.gib);
        let name = best.iter().position(|other| *other == at);
        drawing.marked(words, |drawing| {
            drawing.circle(places[at], RADIUS, dot.paint);
            if let Some((name, place)) = name.and_then(|name| Some((&names[name], named[name]?))) {
                drawing.text(place, super::drawing::Anchor::Middle, Paint::Ink, name.as_str());
            }
        });
    }
    drawing
}

fn axis(name: &str, values: impl Iterator<Item = f64> + Clone) -> Axis {
    let (least, most) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(0.0, f64::max));
    match most / least > WIDE {
        true => Axis::logarithmic(name, (least / 1.3, most * 1.3)),
        false => Axis::from_zero(name, most * 1.08, 4),
    }
}
