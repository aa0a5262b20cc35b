//! Charts of one case as SVG: each with a title, a description and the numbers behind it.

mod all_cases;
mod axes;
mod bars;
mod batches;
mod by_size;
mod distribution;
mod drawing;
mod lines;
mod over_repeats;
mod parts;
mod scatter;
mod series;
mod trend;

pub use all_cases::{AllCases, PageRow, all_cases};
pub use batches::batches;

use super::case::{self, Case};
use super::markup::escape;
use crate::record::{Record, Status};
use drawing::{Drawing, Paint, Target};

/// Units that every chart is wide; a page scales it to its column.
const WIDTH: f64 = 340.0;

/// A picture with what it says in words and numbers.
pub struct Chart {
    /// Short and unique within a case: part of ids and file names.
    pub name: &'static str,
    pub title: String,
    /// A hint for reading it, if it needs one.
    pub note: Option<String>,
    /// One sentence that says what a reader would see.
    pub description: String,
    /// The numbers, with units in the heads; the first column is text.
    pub headers: Vec<String>,
    pub rows: Vec<Vec<String>>,
    drawing: Drawing,
}

/// A record that ran, as charts name and paint it.
pub struct ChartRow<'a> {
    /// Unique within the case.
    pub label: String,
    paint: Paint,
    /// Lines of a run that is not the first are dashed: their colours are those of the first.
    is_dashed: bool,
    pub record: &'a Record,
}

/// A kind of chart; `None` where the records hold nothing for it.
type Draw = fn(&[ChartRow]) -> Option<Chart>;

/// Speed and its price first, what explains it behind.
const CHARTS: &[Draw] = &[
    bars::speed,
    scatter::speed_against_memory,
    bars::first_token,
    bars::prompt_speed,
    bars::latency,
    bars::energy,
    bars::divergence,
    by_size::divergence_by_size,
    parts::memory_parts,
    bars::peak_memory,
    over_repeats::latency_per_token,
    distribution::step_latency,
    bars::bandwidth,
    series::memory,
    series::clocks,
];

/// So many runs of a case stand beside each other in every chart; of more, charts show the newest, and the trend all.
pub const MAX_RUNS: usize = 3;

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

    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// Another engine's row of a precision, and another run's, has the precision's colour; its label names engine and run.
    fn paint(&self, record: &Record) -> Paint {
        let name = case::precision(record);
        Paint::Precision(self.0.iter().position(|other| *other == name).unwrap_or(0))
    }
}

/// All charts that the records of one case can fill. Records without a result are left out.
pub fn charts(case: &Case, precisions: &Precisions) -> Vec<Chart> {
    let shown = if case.runs.len() > MAX_RUNS { vec![case.newest_run()] } else { case.runs.iter().collect() };
    let row = |(at, run, record)| ChartRow {
        label: if shown.len() > 1 { case.label(run, record) } else { case::label(record, case.records) },
        paint: precisions.paint(record),
        is_dashed: at > 0,
        record,
    };
    let records = shown.iter().enumerate().flat_map(|(at, run)| run.records.iter().map(move |r| (at, *run, r)));
    let rows: Vec<ChartRow> = records.filter(|(.., record)| record.status == Status::Ok).map(row).collect();
    let drawn = trend::trend(case, precisions).into_iter().chain(CHARTS.iter().filter_map(|draw| draw(&rows)));
    let mut charts: Vec<Chart> = drawn.collect();
    // What the parts of memory sum up to stands there already.
    if charts.iter().any(|chart| chart.name == parts::NAME) {
        charts.retain(|chart| chart.name != bars::PEAK_MEMORY);
    }
    charts
}

impl Chart {
    /// For a page that defines the colours as custom properties. `id` is unique on the page. In HTML an SVG needs no namespace, and a page
    /// without any address shows that it fetches nothing.
    pub fn inline(&self, id: &str) -> String {
        let attributes = format!(" class=\"chart\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\"");
        self.drawing.svg(Target::Page, &attributes, &self.words(id))
    }

    /// A picture of its own, in light colours on white.
    pub fn file(&self) -> String {
        let (width, height) = (2.0 * self.drawing.width(), 2.0 * self.drawing.height());
        let attributes = format!(
            " xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" role=\"img\" \
             aria-labelledby=\"c-t c-d\" font-family=\"sans-serif\""
        );
        let background = "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>";
        self.drawing.svg(Target::File, &attributes, &format!("{}{background}", self.words("c")))
    }

    fn words(&self, id: &str) -> String {
        let (title, description) = (escape(&self.title), escape(&self.description));
        format!("<title id=\"{id}-t\">{title}</title><desc id=\"{id}-d\">{description}</desc>")
    }
}

/// Heads of the numbers behind a chart.
fn headers(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
