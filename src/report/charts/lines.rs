//! Lines over one axis, with their names below.

use super::WIDTH;
use super::axes::{Axis, Plot};
use super::drawing::{Anchor, Drawing, Paint, fitted, text_width};

const HEIGHT: f64 = 210.0;

/// Height of a line of the legend.
const LEGEND: f64 = 18.0;

/// Length of a line beside its name, and the gap behind it.
const SAMPLE: f64 = 20.0;
const GAP: f64 = 6.0;

/// One line.
pub struct Curve {
    pub name: String,
    pub paint: Paint,
    pub is_dashed: bool,
    /// Words of the line when a pointer is over it.
    pub words: String,
    /// From left to right.
    pub points: Vec<Point>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub interval: Option<(f64, f64)>,
    /// Words of the point when a pointer is over it; one without words has no dot.
    pub words: Option<String>,
}

impl Point {
    pub fn plain(x: f64, y: f64) -> Self {
        Self { x, y, interval: None, words: None }
    }
}

/// All curves between two axes.
pub fn drawn(curves: &[Curve], x: Axis, y: Axis) -> Drawing {
    let names: Vec<String> = curves.iter().map(|curve| fitted(&curve.name, WIDTH - SAMPLE - GAP)).collect();
    let places = places(&names);
    let n_lines = places.last().map_or(0, |(_, line)| line + 1);
    let mut drawing = Drawing::new(WIDTH, HEIGHT + LEGEND * n_lines as f64);
    let plot = Plot::new(WIDTH, HEIGHT, x, y);
    plot.draw(&mut drawing);
    for ((curve, name), (left, line)) in curves.iter().zip(&names).zip(places) {
        drawing.marked(curve.words.as_str(), |drawing| {
            let points = curve.points.iter().map(|point| plot.at((point.x, point.y))).collect();
            stroke(drawing, points, curve);
        });
        curve.points.iter().for_each(|point| dot(&mut drawing, &plot, curve, point));
        let middle = HEIGHT + LEGEND * line as f64 + LEGEND / 2.0;
        stroke(&mut drawing, vec![(left, middle), (left + SAMPLE, middle)], curve);
        drawing.text((left + SAMPLE + GAP, middle), Anchor::Start, Paint::Ink, name.as_str());
    }
    drawing
}

fn stroke(drawing: &mut Drawing, points: Vec<(f64, f64)>, curve: &Curve) {
    match curve.is_dashed {
        true => drawing.dashes(points, 2.0, curve.paint),
        false => drawing.path(points, 2.0, curve.paint),
    }
}

fn dot(drawing: &mut Drawing, plot: &Plot, curve: &Curve, point: &Point) {
    let Some(words) = &point.words else { return };
    drawing.marked(words.as_str(), |drawing| {
        let (x, y) = plot.at((point.x, point.y));
        if let Some((low, high)) = point.interval {
            let (_, bottom) = plot.at((point.x, low));
            let (_, top) = plot.at((point.x, high));
            drawing.line((x, bottom), (x, top), 1.0, curve.paint);
            for y in [bottom, top] {
                drawing.line((x - 3.0, y), (x + 3.0, y), 1.0, curve.paint);
            }
        }
        drawing.circle((x, y), 3.0, curve.paint);
    });
}

/// Left end and line of each name of a legend that is as wide as the picture.
fn places(names: &[String]) -> Vec<(f64, usize)> {
    let (mut left, mut line) = (0.0, 0);
    let place = |name: &String| {
        let width = SAMPLE + GAP + text_width(name);
        if left > 0.0 && left + width > WIDTH {
            (left, line) = (0.0, line + 1);
        }
        let at = (left, line);
        left += width + 2.0 * GAP;
        at
    };
    names.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_legend_folds() {
        let names = ["fp16", "int8", "nf4 by another engine, from a second file", "nf4"].map(String::from);
        let lines: Vec<usize> = places(&names).iter().map(|(_, line)| *line).collect();
        // The third name takes 290 of 340 units, and the last one with its sample and gaps 58.
        assert_eq!(lines, [0, 0, 1, 2]);
    }
}
