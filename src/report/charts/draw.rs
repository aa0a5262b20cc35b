//! Colours, lettering and the surface that charts are drawn on.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::Color as _;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub type Color = RGBColor;

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A stand-in, the property that replaces it on a page, and the light colour that replaces it in a file.
struct Tint {
    stand_in: Color,
    property: &'static str,
    light: &'static str,
}

const fn tint(blue: u8, property: &'static str, light: &'static str) -> Tint {
    Tint { stand_in: RGBColor(0, 0, blue), property, light }
}

pub const INK: Color = RGBColor(0, 0, 1);
pub const MUTED: Color = RGBColor(0, 0, 2);
pub const GRID: Color = RGBColor(0, 0, 3);
pub const LIMIT: Color = RGBColor(0, 0, 4);

/// Colours of precisions begin here.
const FIRST_SERIES: u8 = 16;

/// Those of the parts of memory begin here, so that no part looks like a precision.
const FIRST_PART: u8 = 32;

/// The same light colours stand in `style.css`, with dark ones beside them. Each has a contrast of at least 3 to 1 to its ground.
const TINTS: &[Tint] = &[
    tint(1, "--ink", "#1b1f24"),
    tint(2, "--muted", "#59636e"),
    tint(3, "--grid", "#d5dae0"),
    tint(4, "--limit", "#b3261e"),
    tint(16, "--s0", "#66707c"),
    tint(17, "--s1", "#b35900"),
    tint(18, "--s2", "#0b66b0"),
    tint(19, "--s3", "#00796b"),
    tint(20, "--s4", "#7b3fa0"),
    tint(21, "--s5", "#ad1457"),
    tint(32, "--p0", "#3d4b94"),
    tint(33, "--p1", "#8a7a1f"),
    tint(34, "--p2", "#a8516e"),
    tint(35, "--p3", "#75808b"),
];

/// How many of them are precisions' and parts'.
const N_SERIES: usize = 6;
const N_PARTS: usize = 4;

/// Precisions beyond the sixth share colours; every mark has its name beside it.
pub fn precision_color(index: usize) -> Color {
    RGBColor(0, 0, FIRST_SERIES + (index % N_SERIES) as u8)
}

pub fn part_color(index: usize) -> Color {
    RGBColor(0, 0, FIRST_PART + (index % N_PARTS) as u8)
}

/// `svg` with custom properties of the page for colours.
pub fn with_properties(svg: &str) -> String {
    replaced(svg, |tint| format!("var({})", tint.property))
}

/// `svg` with light colours.
pub fn with_plain_colors(svg: &str) -> String {
    replaced(svg, |tint| tint.light.to_owned())
}

fn replaced(svg: &str, color: impl Fn(&Tint) -> String) -> String {
    let as_written = |c: Color| format!("\"#{:02X}{:02X}{:02X}\"", c.0, c.1, c.2);
    TINTS
        .iter()
        .fold(svg.to_owned(), |svg, tint| svg.replace(&as_written(tint.stand_in), &format!("\"{}\"", color(tint))))
}

/// Text and attribute values of XML and HTML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

/// Draws on a surface of this many units and gives the SVG.
pub fn svg(width: u32, height: u32, paint: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        paint(&area)?;
        area.present()?;
    }
    Ok(svg)
}

/// Lettering: the library divides sizes by 1.24, so that 15 becomes 12 units.
pub const TEXT: f64 = 15.0;

pub fn text_style(color: Color, at: HPos) -> TextStyle<'static> {
    ("sans-serif", TEXT).into_font().color(&color).pos(Pos::new(at, VPos::Center))
}

/// Room for names to the left of an axis: that of `nf4-nodq` at least, so that charts stand in line.
pub fn names_width<'a>(names: impl Iterator<Item = &'a str>) -> i32 {
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0) as i32;
    (7 * longest + 12).clamp(66, 160)
}

/// A line of text whose middle is at `y`.
pub fn label(area: &Area, text: &str, (x, y): (i32, i32), at: HPos, color: Color) -> Result<()> {
    Ok(area.draw(&Text::new(text.to_owned(), (x, y), text_style(color, at)))?)
}

pub fn bar(area: &Area, (left, right): (i32, i32), (top, bottom): (i32, i32), color: Color) -> Result<()> {
    Ok(area.draw(&Rectangle::new([(left, top), (right.max(left + 1), bottom)], color.filled()))?)
}

pub fn line(area: &Area, from: (i32, i32), to: (i32, i32), style: ShapeStyle) -> Result<()> {
    Ok(area.draw(&PathElement::new(vec![from, to], style))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stand_in_stays() {
        let svg = svg(100, 100, |area| {
            for tint in TINTS {
                bar(area, (0, 10), (0, 10), tint.stand_in)?;
            }
            label(area, "a < b & c", (5, 5), HPos::Left, INK)
        })
        .unwrap();
        assert!(svg.contains("#000001"));
        for svg in [with_properties(&svg), with_plain_colors(&svg)] {
            assert!(!svg.contains("#0000"), "{svg}");
            assert!(svg.contains("a &lt; b &amp; c"), "{svg}");
        }
    }

    #[test]
    fn every_tint_is_in_the_style_sheet() {
        let css = include_str!("../html/style.css");
        for tint in TINTS {
            let light = format!("{}: {};", tint.property, tint.light);
            assert!(css.contains(&light), "style.css lacks `{light}`");
            assert!(css.matches(&format!("{}: ", tint.property)).count() >= 2, "no dark {}", tint.property);
        }
    }
}
