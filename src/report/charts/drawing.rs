//! A picture as shapes, and its SVG: in the custom properties of a page, or in plain light colours for a file of its own.

use std::fmt::Write;

use crate::report::markup::escape;

/// Colour of a shape. The page has a light and a dark colour for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    Ink,
    Muted,
    Grid,
    Limit,
    /// Colour of a precision, by its place among those of the document.
    Precision(usize),
    /// Colour of a part of memory, so that no part looks like a precision.
    Part(usize),
}

/// Custom property and light colour. The same light colours stand in `style.css` with dark ones beside them; each has a contrast of at
/// least 3 to 1 to its ground, but for the grid.
type Tint = (&'static str, &'static str);

const INK: Tint = ("--ink", "#1b1f24");
const MUTED: Tint = ("--muted", "#59636e");
const GRID: Tint = ("--grid", "#d5dae0");
const LIMIT: Tint = ("--limit", "#b3261e");
const PRECISIONS: [Tint; 6] = [
    ("--s0", "#66707c"),
    ("--s1", "#b35900"),
    ("--s2", "#0b66b0"),
    ("--s3", "#00796b"),
    ("--s4", "#7b3fa0"),
    ("--s5", "#ad1457"),
];
const PARTS: [Tint; 4] = [("--p0", "#3d4b94"), ("--p1", "#8a7a1f"), ("--p2", "#a8516e"), ("--p3", "#75808b")];

impl Paint {
    /// Precisions beyond the sixth share colours; every mark has its name beside it.
    fn tint(self) -> Tint {
        match self {
            Self::Ink => INK,
            Self::Muted => MUTED,
            Self::Grid => GRID,
            Self::Limit => LIMIT,
            Self::Precision(at) => PRECISIONS[at % PRECISIONS.len()],
            Self::Part(at) => PARTS[at % PARTS.len()],
        }
    }
}

/// For whom an SVG is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Page,
    File,
}

impl Target {
    fn color(self, paint: Paint) -> String {
        let (property, light) = paint.tint();
        match self {
            Self::Page => format!("var({property})"),
            Self::File => light.to_owned(),
        }
    }
}

/// Side of a point on which its text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

type Point = (f64, f64);

enum Item {
    Rect {
        from: Point,
        to: Point,
        paint: Paint,
    },
    Line {
        points: Vec<Point>,
        width: f64,
        is_dashed: bool,
        paint: Paint,
    },
    Area {
        points: Vec<Point>,
        paint: Paint,
    },
    Circle {
        at: Point,
        radius: f64,
        paint: Paint,
    },
    Text {
        at: Point,
        anchor: Anchor,
        paint: Paint,
        text: String,
    },
    /// Items up to [`Item::Close`] show these words when a pointer is over it.
    Open(String),
    Close,
}

/// Shapes on a surface of `width` × `height` units; y grows downwards.
pub struct Drawing {
    width: f64,
    height: f64,
    items: Vec<Item>,
}

/// Height of letters in units.
const LETTERING: f64 = 12.0;

impl Drawing {
    pub fn new(width: f64, height: f64) -> Self {
        Self { width, height, items: Vec::new() }
    }

    /// At least one unit wide, so that a small value can be seen.
    pub fn rect(&mut self, (left, top): Point, (right, bottom): Point, paint: Paint) {
        self.items.push(Item::Rect { from: (left, top), to: (right.max(left + 1.0), bottom), paint });
    }

    pub fn line(&mut self, from: Point, to: Point, width: f64, paint: Paint) {
        self.path(vec![from, to], width, paint);
    }

    pub fn path(&mut self, points: Vec<Point>, width: f64, paint: Paint) {
        self.items.push(Item::Line { points, width, is_dashed: false, paint });
    }

    pub fn dashes(&mut self, points: Vec<Point>, width: f64, paint: Paint) {
        self.items.push(Item::Line { points, width, is_dashed: true, paint });
    }

    pub fn area(&mut self, points: Vec<Point>, paint: Paint) {
        self.items.push(Item::Area { points, paint });
    }

    pub fn circle(&mut self, at: Point, radius: f64, paint: Paint) {
        self.items.push(Item::Circle { at, radius, paint });
    }

    /// A line of text whose middle is at the height of `at`.
    pub fn text(&mut self, at: Point, anchor: Anchor, paint: Paint, text: impl Into<String>) {
        self.items.push(Item::Text { at, anchor, paint, text: text.into() });
    }

    /// Shapes that `draw` adds show `words` when a pointer is over it.
    pub fn marked(&mut self, words: impl Into<String>, draw: impl FnOnce(&mut Self)) {
        self.items.push(Item::Open(words.into()));
        draw(self);
        self.items.push(Item::Close);
    }

    /// From its first shape to its last, within an `svg` element that has `attributes` and begins with `head`.
    pub fn svg(&self, target: Target, attributes: &str, head: &str) -> String {
        let (width, height) = (number(self.width), number(self.height));
        let mut svg = format!("<svg{attributes} viewBox=\"0 0 {width} {height}\" font-size=\"{LETTERING}\">{head}");
        for item in &self.items {
            item.write(&mut svg, target);
        }
        svg + "</svg>\n"
    }

    pub fn width(&self) -> f64 {
        self.width
    }

    pub fn height(&self) -> f64 {
        self.height
    }
}

impl Item {
    fn write(&self, svg: &mut String, target: Target) {
        let written = match self {
            Self::Rect { from, to, paint } => write!(
                svg,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>",
                number(from.0),
                number(from.1),
                number(to.0 - from.0),
                number(to.1 - from.1),
                target.color(*paint)
            ),
            Self::Line { points, width, is_dashed, paint } => write!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\"{}/>",
                coordinates(points),
                target.color(*paint),
                number(*width),
                if *is_dashed { " stroke-dasharray=\"5 4\"" } else { "" }
            ),
            Self::Area { points, paint } => {
                write!(svg, "<polygon points=\"{}\" fill=\"{}\"/>", coordinates(points), target.color(*paint))
            }
            Self::Circle { at, radius, paint } => write!(
                svg,
                "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{}\"/>",
                number(at.0),
                number(at.1),
                number(*radius),
                target.color(*paint)
            ),
            Self::Text { at, anchor, paint, text } => write!(
                svg,
                "<text x=\"{}\" y=\"{}\" dy=\".35em\"{} fill=\"{}\">{}</text>",
                number(at.0),
                number(at.1),
                anchor.attribute(),
                target.color(*paint),
                escape(text)
            ),
            Self::Open(words) => write!(svg, "<g class=\"mark\"><title>{}</title>", escape(words)),
            Self::Close => write!(svg, "</g>"),
        };
        // A string takes all that is written to it.
        let _ = written;
    }
}

impl Anchor {
    fn attribute(self) -> &'static str {
        match self {
            Self::Start => "",
            Self::Middle => " text-anchor=\"middle\"",
            Self::End => " text-anchor=\"end\"",
        }
    }
}

fn coordinates(points: &[Point]) -> String {
    points.iter().map(|(x, y)| format!("{},{}", number(*x), number(*y))).collect::<Vec<_>>().join(" ")
}

/// With one decimal where it has one: a tenth of a unit is finer than a pixel.
fn number(x: f64) -> String {
    let text = format!("{x:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

/// Units that `text` takes at most, in the widest of the usual sans-serif fonts (DejaVu Sans).
pub fn text_width(text: &str) -> f64 {
    let em = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ' ' | '\'' | ':' | ';' | '|' | '·' => 0.34,
        '[' | ']' | '(' | ')' | 'f' | 't' | 'r' | '-' | '/' => 0.42,
        'm' | 'w' | 'M' | 'W' | '%' | '@' | '+' | '±' | '×' | '…' | '→' => 1.0,
        'A'..='Z' => 0.79,
        c if c.is_ascii() => 0.64,
        // Of other scripts some are as wide as they are high.
        _ => 1.0,
    };
    text.chars().map(em).sum::<f64>() * LETTERING
}

/// `text` or its beginning, so that it takes at most `width` units.
pub fn fitted(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.to_owned();
    }
    let mut kept = String::new();
    for c in text.chars() {
        if text_width(&kept) + text_width(&format!("{c}…")) > width {
            break;
        }
        kept.push(c);
    }
    kept + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_properties_and_a_file_plain_colours() {
        let mut drawing = Drawing::new(100.0, 50.5);
        drawing.marked("a < b", |drawing| drawing.rect((0.0, 0.0), (0.25, 10.0), Paint::Precision(7)));
        drawing.text((5.0, 5.04), Anchor::End, Paint::Ink, "x & y");
        let (page, file) = (drawing.svg(Target::Page, "", ""), drawing.svg(Target::File, "", ""));
        let rest = "dy=\".35em\" text-anchor=\"end\"";
        assert!(page.contains("<g class=\"mark\"><title>a &lt; b</title><rect x=\"0\" y=\"0\" width=\"1\" height=\"10\" fill=\"var(--s1)\"/></g>"));
        assert!(page.contains(&format!("<text x=\"5\" y=\"5\" {rest} fill=\"var(--ink)\">x &amp; y</text>")), "{page}");
        assert!(file.contains("fill=\"#b35900\"") && !file.contains("var("), "{file}");
        assert!(page.starts_with("<svg viewBox=\"0 0 100 50.5\""), "{page}");
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(fitted("nf4", 100.0), "nf4");
        let cut = fitted("nf4 by a tool with a long name", 100.0);
        assert!(cut.ends_with('…') && text_width(&cut) <= 100.0 && cut.starts_with("nf4 by"), "{cut}");
    }

    #[test]
    fn every_tint_is_in_the_style_sheet() {
        let css = include_str!("../html/style.css");
        for (property, light) in [INK, MUTED, GRID, LIMIT].iter().chain(&PRECISIONS).chain(&PARTS) {
            assert!(css.contains(&format!("{property}: {light};")), "style.css lacks `{property}: {light};`");
            assert!(css.matches(&format!("{property}: ")).count() >= 2, "no dark {property}");
        }
    }
}
