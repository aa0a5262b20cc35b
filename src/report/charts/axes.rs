//! Scales and axes of a plot with two of them.

use super::drawing::{Anchor, Drawing, Paint, text_width};

/// Gap between two units of text.
const GAP: f64 = 6.0;

/// Room above a plot for the name of its vertical axis, which stands level so that nobody has to tilt the head.
const TITLE: f64 = 22.0;

/// Room below for numbers and the name of the horizontal axis.
const FOOT: f64 = 38.0;

/// Room to the right, for half of the last number.
const MARGIN: f64 = 16.0;

/// One axis: its range, its marks and their decimals.
pub struct Axis {
    pub name: String,
    low: f64,
    high: f64,
    step: f64,
    decimals: usize,
    /// Equal factors are equally far apart.
    is_logarithmic: bool,
}

impl Axis {
    /// From `low` to `high`, which are finite and apart, with about `marks` marks at round numbers.
    pub fn new(name: impl Into<String>, (low, high): (f64, f64), marks: usize) -> Self {
        let step = round_step((high - low) / marks as f64);
        // As many decimals as the step has: that of 0.25 has two.
        let decimals = (0..9).find(|&d| (step * 10f64.powi(d) - (step * 10f64.powi(d)).round()).abs() < 1e-6);
        Self { name: name.into(), low, high, step, decimals: decimals.unwrap_or(9) as usize, is_logarithmic: false }
    }

    /// From `low` to `high`, which are above 0 and apart, with marks at 1, 2 and 5 times a power of ten, or at the powers alone where these
    /// are many.
    pub fn logarithmic(name: impl Into<String>, (low, high): (f64, f64)) -> Self {
        Self { name: name.into(), low, high, step: 0.0, decimals: 0, is_logarithmic: true }
    }

    /// From the first to the `n`-th of things that are counted: no mark stands between two of them.
    pub fn counting(name: impl Into<String>, n: usize) -> Self {
        let axis = Self::new(name, (1.0, n as f64), 5);
        Self { step: axis.step.max(1.0), decimals: 0, ..axis }
    }

    /// From 0 to a mark at or above `high`.
    pub fn from_zero(name: impl Into<String>, high: f64, marks: usize) -> Self {
        let mut axis = Self::new(name, (0.0, high), marks);
        axis.high = (high / axis.step - 1e-9).ceil() * axis.step;
        axis
    }

    fn marks(&self) -> Vec<(f64, String)> {
        if self.is_logarithmic { self.logarithmic_marks() } else { self.linear_marks().collect() }
    }

    fn logarithmic_marks(&self) -> Vec<(f64, String)> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let within = |value: &f64| *value >= self.low && *value <= self.high;
        let mark = |power: i32, factor: f64| {
            let decimals = usize::try_from(-power).unwrap_or(0);
            let value = factor * 10f64.powi(power);
            within(&value).then(|| (value, format!("{value:.decimals$}")))
        };
        let marks = |(factors, every): (&[f64], i32)| -> Vec<(f64, String)> {
            let powers = (first..=last).filter(|power| power % every == 0);
            powers.flat_map(|power| factors.iter().filter_map(move |factor| mark(power, *factor))).collect()
        };
        let ways = [(&[1.0, 2.0, 5.0][..], 1), (&[1.0, 3.0], 1), (&[1.0], 1), (&[1.0], 2), (&[1.0], 4), (&[1.0], 8)];
        ways.into_iter().map(marks).find(|marks| marks.len() <= 6).unwrap_or_default()
    }

    fn linear_marks(&self) -> impl Iterator<Item = (f64, String)> {
        let first = (self.low / self.step - 1e-9).ceil() as i64;
        let values = (first..).map(|at| at as f64 * self.step);
        values.take_while(|value| *value <= self.high + 1e-9 * self.step).map(|value| {
            let decimals = self.decimals;
            (value, format!("{value:.decimals$}"))
        })
    }

    fn share(&self, value: f64) -> f64 {
        if self.is_logarithmic {
            return (value / self.low).ln() / (self.high / self.low).ln();
        }
        (value - self.low) / (self.high - self.low)
    }
}

/// The next of 1, 2, 5, 10, … at or above `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let mantissa = [1.0, 2.0, 5.0, 10.0].into_iter().find(|mantissa| mantissa * power >= step * (1.0 - 1e-9));
    mantissa.unwrap_or(10.0) * power
}

/// A place for points, between a vertical and a horizontal axis.
pub struct Plot {
    pub x: Axis,
    pub y: Option<Axis>,
    pub left: f64,
    pub right: f64,
    pub top: f64,
    pub bottom: f64,
}

impl Plot {
    /// As wide as `width` allows, `height` units high with all its words.
    pub fn new(width: f64, height: f64, x: Axis, y: Axis) -> Self {
        let numbers = y.marks().iter().map(|(_, text)| text_width(text)).fold(0.0, f64::max);
        let (left, right) = (numbers + GAP, width - MARGIN);
        Self { x, y: Some(y), left, right, top: TITLE, bottom: height - FOOT }
    }

    /// Without a vertical axis.
    pub fn level(width: f64, height: f64, x: Axis) -> Self {
        Self { x, y: None, left: MARGIN, right: width - MARGIN, top: 0.0, bottom: height - FOOT }
    }

    /// Position of a pair of values.
    pub fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let down = self.y.as_ref().map_or(0.0, |axis| axis.share(y));
        (self.x_at(x), self.bottom - (self.bottom - self.top) * down)
    }

    pub fn x_at(&self, x: f64) -> f64 {
        self.left + (self.right - self.left) * self.x.share(x)
    }

    pub fn draw(&self, drawing: &mut Drawing) {
        for (value, text) in self.y.iter().flat_map(Axis::marks) {
            let (_, y) = self.at((self.x.low, value));
            drawing.line((self.left, y), (self.right, y), 1.0, Paint::Grid);
            drawing.text((self.left - GAP, y), Anchor::End, Paint::Muted, text);
        }
        for (value, text) in self.x.marks() {
            let x = self.x_at(value);
            let top = if self.y.is_some() { self.bottom } else { self.top };
            drawing.line((x, top), (x, self.bottom + 4.0), 1.0, Paint::Grid);
            drawing.text((x, self.bottom + 13.0), Anchor::Middle, Paint::Muted, text);
        }
        drawing.line((self.left, self.bottom), (self.right, self.bottom), 1.0, Paint::Muted);
        if let Some(y) = &self.y {
            drawing.text((0.0, 7.0), Anchor::Start, Paint::Ink, &y.name);
        }
        let middle = (self.left + self.right) / 2.0;
        drawing.text((middle, self.bottom + 30.0), Anchor::Middle, Paint::Ink, &self.x.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(axis: &Axis) -> Vec<String> {
        axis.marks().into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn marks_are_round_numbers() {
        assert_eq!(marks(&Axis::from_zero("", 104.7, 5)), ["0", "50", "100", "150"]);
        assert_eq!(marks(&Axis::from_zero("", 0.27, 4)), ["0.0", "0.1", "0.2", "0.3"]);
        assert_eq!(marks(&Axis::new("", (19.2, 31.0), 5)), ["20", "25", "30"]);
        assert_eq!(marks(&Axis::counting("", 8)), ["2", "4", "6", "8"]);
        assert_eq!(marks(&Axis::counting("", 3)), ["1", "2", "3"]);
        assert_eq!(marks(&Axis::from_zero("", 0.3, 3)), ["0.0", "0.1", "0.2", "0.3"]);
        assert_eq!(marks(&Axis::logarithmic("", (0.09, 16.0))), ["0.1", "0.3", "1", "3", "10"]);
        assert_eq!(marks(&Axis::logarithmic("", (4.0, 110.0))), ["5", "10", "20", "50", "100"]);
        assert_eq!(marks(&Axis::logarithmic("", (0.9, 1e6))), ["1", "100", "10000", "1000000"]);
    }

    #[test]
    fn a_plot_puts_its_ends_at_its_edges() {
        let plot = Plot::new(300.0, 200.0, Axis::from_zero("x", 10.0, 5), Axis::from_zero("y", 4.0, 4));
        assert_eq!(plot.at((0.0, 0.0)), (plot.left, plot.bottom));
        assert_eq!(plot.at((10.0, 4.0)), (plot.right, plot.top));
        let log = Axis::logarithmic("", (0.5, 50.0));
        assert!((log.share(5.0) - 0.5).abs() < 1e-12 && log.share(0.5) == 0.0, "a factor of 10 is half of one of 100");
    }
}
