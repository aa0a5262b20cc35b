//! Charts of one case as SVG: each with a title, a description and the numbers behind it.
//!
//! They are drawn in stand-in colours, which [`Chart::inline`] makes the page's own (light and dark) and [`Chart::file`] plain ones.

mod bars;
mod distribution;
mod draw;
mod scatter;
mod series;

pub use draw::escape;

use anyhow::Result;

use super::case::{self, Case};
use crate::record::{Record, Status};

/// A picture with what it says in words and numbers.
pub struct Chart {
    /// Short and unique within a case: part of ids and file names.
    pub name: &'static str,
    pub title: String,
    /// One sentence that says what a reader would see.
    pub description: String,
    /// The numbers, with units in the heads; the first column is text.
    pub headers: Vec<String>,
    pub rows: Vec<Vec<String>>,
    svg: String,
}

/// A kind of chart; `None` where the records hold nothing for it.
type Draw = fn(&[&Record], &Precisions) -> Result<Option<Chart>>;

/// From the seed's three to the finer ones.
const CHARTS: &[Draw] = &[
    bars::latency,
    bars::speed,
    bars::peak_memory,
    scatter::trade,
    distribution::step_latency,
    bars::bandwidth,
    bars::memory_parts,
    series::memory,
    series::clocks,
];

/// Precisions of a document by first appearance: each has one colour throughout.
pub struct Precisions(Vec<String>);

impl Precisions {
    pub fn of(records: &[Record]) -> Self {
        let mut names: Vec<String> = Vec::new();
        for record in records {
            let name = case::precision(record);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Self(names)
    }

    fn color(&self, precision: &str) -> draw::Color {
        // Another engine's row of a precision, and another run's, has the precision's colour; its label names engine and run.
        let is_of = |name: &String| {
            precision == name || [" by ", " · "].iter().any(|mark| precision.starts_with(&format!("{name}{mark}")))
        };
        draw::precision_color(self.0.iter().position(is_of).unwrap_or(0))
    }
}

/// All charts that the records of one case can fill. Records without a result are left out.
pub fn charts(case: &Case, precisions: &Precisions) -> Result<Vec<Chart>> {
    let ok = case.rows().filter(|(_, record)| record.status == Status::Ok);
    let labelled = ok.map(|(run, record)| Record { precision: case.label(run, record), ..record.clone() });
    let ok: Vec<Record> = labelled.collect();
    let ok: Vec<&Record> = ok.iter().collect();
    let drawn: Vec<Option<Chart>> = CHARTS.iter().map(|draw| draw(&ok, precisions)).collect::<Result<_>>()?;
    Ok(drawn.into_iter().flatten().collect())
}

impl Chart {
    /// For a page that defines the colours as custom properties. `id` is unique on the page.
    pub fn inline(&self, id: &str) -> String {
        let size = self.svg.find(" viewBox").unwrap_or(0);
        let head = format!("<svg class=\"chart\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\"");
        let body = head + &self.svg[size..];
        let (start, rest) = split_head(&body);
        // In HTML an SVG needs no namespace, and a page without any address shows that it fetches nothing.
        let start = start.split(" xmlns").next().unwrap_or(start).trim_end_matches('>');
        draw::with_properties(&format!("{start}>{}{rest}", self.words(id)))
    }

    /// A picture of its own, in light colours on white.
    pub fn file(&self) -> String {
        let (start, rest) = split_head(&self.svg);
        let start = start.replacen("<svg", "<svg role=\"img\" aria-labelledby=\"c-t c-d\"", 1);
        let background = "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>";
        draw::with_plain_colors(&format!("{start}{}{background}{rest}", self.words("c")))
    }

    fn words(&self, id: &str) -> String {
        let (title, description) = (draw::escape(&self.title), draw::escape(&self.description));
        format!("<title id=\"{id}-t\">{title}</title><desc id=\"{id}-d\">{description}</desc>")
    }
}

/// An SVG after its first tag. Every one has it: the library writes it before anything else.
fn split_head(svg: &str) -> (&str, &str) {
    svg.split_at(svg.find('>').map_or(0, |at| at + 1))
}
