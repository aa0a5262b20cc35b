//! Speed against memory, with the line of those that nothing beats at both.

use super::axes::{Axis, Plot};
use super::drawing::{Anchor, Drawing, Paint, fitted, text_width};
use super::{Chart, ChartRow, WIDTH, headers};
use crate::record::Record;
use crate::report::case::GIB;
use crate::report::grid::decimals;

const HEIGHT: f64 = 270.0;
pub const RADIUS: f64 = 6.0;

/// Height of a line of text.
const LINE: f64 = 14.0;

/// Greatest width of a name beside its point.
pub const NAME: f64 = 150.0;

struct Point<'a> {
    row: &'a ChartRow<'a>,
    tps: f64,
    gib: f64,
}

/// The upper left, fast and small, is where to be.
pub fn speed_against_memory(rows: &[ChartRow]) -> Option<Chart> {
    let points: Vec<Point> = rows.iter().filter_map(point).collect();
    if points.len() < 2 {
        return None;
    }
    let most = |of: fn(&Point) -> f64| points.iter().map(of).fold(0.0, f64::max);
    let (gib, tps) = (most(|point| point.gib), most(|point| point.tps));
    if gib <= 0.0 || tps <= 0.0 {
        return None;
    }
    let (x_digits, y_digits) = (decimals(gib), decimals(tps));
    let best = pareto(&points.iter().map(|point| (point.gib, point.tps)).collect::<Vec<_>>());
    let cells = |(at, point): (usize, &Point)| {
        let is_best = if best.contains(&at) { "yes" } else { "no" };
        let numbers = [format!("{:.y_digits$}", point.tps), format!("{:.x_digits$}", point.gib)];
        [vec![point.row.label.clone()], numbers.to_vec(), vec![is_best.to_owned()]].concat()
    };
    let names = |at: &[usize]| at.iter().map(|&at| points[at].row.label.as_str()).collect::<Vec<_>>().join(", ");
    let note = match best.as_slice() {
        [only] => {
            format!("fast and small is the upper left; nothing is as fast or as small as {}", points[*only].row.label)
        }
        _ => "fast and small is the upper left; nothing is faster and smaller than the dashed Pareto line".to_owned(),
    };
    Some(Chart {
        name: "trade",
        title: "Speed against memory".to_owned(),
        note: Some(note),
        description: format!(
            "Decode speed in tokens/s against peak memory in GiB for {}; the upper left is fast and small; on the Pareto line: {}.",
            names(&(0..points.len()).collect::<Vec<_>>()),
            names(&best)
        ),
        headers: headers(&["precision", "decode, tokens/s", "memory, GiB", "on the Pareto line"]),
        rows: points.iter().enumerate().map(cells).collect(),
        drawing: drawn(&points, &best, (gib, tps)),
    })
}

fn drawn(points: &[Point], best: &[usize], (gib, tps): (f64, f64)) -> Drawing {
    let x = Axis::from_zero("peak memory, GiB", gib * 1.08, 4);
    let plot = Plot::new(WIDTH, HEIGHT, x, Axis::from_zero("decode, tokens/s", tps * 1.08, 4));
    let mut drawing = Drawing::new(WIDTH, HEIGHT);
    plot.draw(&mut drawing);
    let names: Vec<String> = points.iter().map(|point| fitted(&point.row.label, NAME)).collect();
    let places: Vec<(f64, f64)> = points.iter().map(|point| plot.at((point.gib, point.tps))).collect();
    if best.len() > 1 {
        drawing.dashes(corners(&best.iter().map(|at| places[*at]).collect::<Vec<_>>()), 1.5, Paint::Muted);
    }
    let widths: Vec<f64> = names.iter().map(|name| text_width(name)).collect();
    for (at, (point, label)) in points.iter().zip(labels(&places, &widths)).enumerate() {
        let words = format!("{}: {:.2} tokens/s, {:.3} GiB", point.row.label, point.tps, point.gib);
        drawing.marked(words, |drawing| {
            drawing.circle(places[at], RADIUS, point.row.paint);
            drawing.text(label, Anchor::Middle, Paint::Ink, names[at].as_str());
        });
    }
    drawing
}

/// Finds the pairs of size and speed that no other is as small and as fast as, the smallest first.
pub fn pareto(points: &[(f64, f64)]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| points[a].0.total_cmp(&points[b].0).then(points[b].1.total_cmp(&points[a].1)));
    let mut fastest = f64::NEG_INFINITY;
    order.retain(|&at| {
        let is_faster = points[at].1 > fastest;
        fastest = fastest.max(points[at].1);
        is_faster
    });
    order
}

/// A line of steps through `places`, of which each is further to the right and further up than the one before: what lies under it is beaten.
pub fn corners(places: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let steps = places.windows(2).flat_map(|pair| [(pair[1].0, pair[0].1), pair[1]]);
    places.first().copied().into_iter().chain(steps).collect()
}

/// Middle and half extent of a place in the picture.
#[derive(Debug, Clone, Copy)]
struct Place {
    x: f64,
    y: f64,
    half_width: f64,
    half_height: f64,
}

impl Place {
    fn overlaps(&self, other: &Self) -> bool {
        (self.x - other.x).abs() < self.half_width + other.half_width
            && (self.y - other.y).abs() < self.half_height + other.half_height
    }
}

/// Places the middle of the name of each dot. Where there is no free place, names overprint rather than vanish.
pub fn labels(dots: &[(f64, f64)], widths: &[f64]) -> Vec<(f64, f64)> {
    let named: Vec<(usize, f64)> = widths.iter().copied().enumerate().collect();
    let beside = |&(at, width): &(usize, f64)| {
        let (x, y) = dots[at];
        ((x + RADIUS + 5.0 + width / 2.0).min(WIDTH - width / 2.0), y)
    };
    let found = free_places(dots, &named);
    found.into_iter().zip(&named).map(|(place, named)| place.unwrap_or_else(|| beside(named))).collect()
}

/// The middles of the names of some of the dots, each given by index and width: to the right or left of it, on its height or some lines off,
/// where it covers no dot and no name, within the picture; `None` where there is no such place.
pub fn free_places(dots: &[(f64, f64)], named: &[(usize, f64)]) -> Vec<Option<(f64, f64)>> {
    let dot = |&(x, y): &(f64, f64)| Place { x, y, half_width: RADIUS, half_height: RADIUS };
    let mut taken: Vec<Place> = dots.iter().map(dot).collect();
    let mut labels = Vec::new();
    for &(at, width) in named {
        let ((x, y), half_width) = (dots[at], width / 2.0);
        let away = RADIUS + 5.0 + half_width;
        let place = |x: f64, y: f64| Place { x, y, half_width, half_height: LINE / 2.0 };
        // 0, 1, -1, 2, -2, … lines further down.
        let lines = (1..=2 * named.len() as i32 + 1).map(|at| f64::from(if at % 2 == 0 { at / 2 } else { -(at / 2) }));
        let mut beside = lines.flat_map(|line| [place(x + away, y + LINE * line), place(x - away, y + LINE * line)]);
        let is_within = |place: &Place| {
            let sides = place.x - half_width >= 0.0 && place.x + half_width <= WIDTH;
            sides && place.y >= LINE && place.y <= HEIGHT - 3.0 * LINE
        };
        let is_free = |place: &Place| !taken.iter().any(|other| place.overlaps(other));
        let found = beside.find(|place| is_within(place) && is_free(place));
        taken.extend(found);
        labels.push(found.map(|place| (place.x, place.y)));
    }
    labels
}

fn point<'a>(row: &'a ChartRow<'a>) -> Option<Point<'a>> {
    speed_and_memory(row.record).map(|(tps, gib)| Point { row, tps, gib })
}

/// Decode speed in tokens/s, and peak memory, or that of the weights where the peak is not known, in GiB.
pub fn speed_and_memory(record: &Record) -> Option<(f64, f64)> {
    let tps = record.metrics.get("decode_tps")?.median?;
    let bytes = record.memory.peak_bytes.or(record.memory.weights_bytes)?;
    tps.is_finite().then_some((tps, bytes as f64 / GIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cover_neither_names_nor_dots() {
        // Alone; beside another dot; three in one place; at the right end.
        for dots in [
            vec![(100.0, 50.0)],
            vec![(100.0, 50.0), (130.0, 52.0)],
            vec![(100.0, 50.0), (100.0, 50.0), (100.0, 50.0)],
            vec![(330.0, 100.0), (325.0, 108.0), (60.0, 100.0)],
        ] {
            let widths = vec![60.0; dots.len()];
            let place = |&(x, y): &(f64, f64), half_width, half_height| Place { x, y, half_width, half_height };
            let labels = labels(&dots, &widths);
            let dots: Vec<Place> = dots.iter().map(|at| place(at, RADIUS, RADIUS)).collect();
            let names: Vec<Place> = labels.iter().map(|at| place(at, 30.0, LINE / 2.0)).collect();
            for (at, name) in names.iter().enumerate() {
                assert!(!names[at + 1..].iter().chain(&dots).any(|other| name.overlaps(other)), "{labels:?}");
                assert!(name.x - name.half_width >= 0.0 && name.x + name.half_width <= WIDTH, "{labels:?}");
            }
        }
        assert_eq!(labels(&[(100.0, 50.0)], &[60.0]), [(100.0 + RADIUS + 5.0 + 30.0, 50.0)]);
    }

    #[test]
    fn the_pareto_line_has_what_nothing_beats_at_both() {
        // Small and slow, larger and faster; beaten: larger and slower, and as large but slower.
        assert_eq!(pareto(&[(1.0, 10.0), (2.0, 20.0), (3.0, 15.0), (2.0, 12.0)]), [0, 1]);
        assert_eq!(pareto(&[(3.0, 40.0), (1.0, 50.0)]), [1]);
        // The same twice is one of them.
        assert_eq!(pareto(&[(1.0, 10.0), (1.0, 10.0)]), [0]);
    }
}
