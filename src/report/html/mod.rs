//! HTML: one page that needs nothing beside itself, for a browser, a mail or a printer. Without its script it shows all the same, and
//! cannot be filtered, sorted or saved as data.

mod article;
mod changes;
mod glossary;
mod overview;
mod texts;

use anyhow::Result;

use super::case::{self, Case};
use super::charts::{self, Chart, Precisions};
use super::{Options, Writer, markup};
use crate::record::Document;
use markup::line;

pub const WRITER: Writer = Writer {
    name: "html",
    extensions: &["html", "htm"],
    doc: "one page with charts that needs no network, light and dark",
    write,
};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// Content security policy: the page fetches nothing and sends nothing.
const POLICY: &str = include_str!("policy.txt");

/// A case with its charts, under the number that its ids and file names bear.
struct Part<'a> {
    number: usize,
    case: Case<'a>,
    charts: Vec<Chart>,
}

impl Part<'_> {
    /// Keeps the newest of more runs than can stand beside each other.
    fn newest_of_many(&self) -> Option<Case<'_>> {
        (self.case.runs.len() > charts::MAX_RUNS).then(|| self.case.newest())
    }
}

fn write(document: &Document, options: &Options) -> Result<String> {
    let precisions = Precisions::of(&document.records);
    let parts = parts(document, &precisions);
    let articles: String = parts.iter().map(|part| article::article(part, options)).collect();
    let title = title(&parts);
    let overview = overview::overview(&parts, &precisions);
    let body = format!("{overview}{articles}");
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"generator\" content=\"quantbench\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n<title>{title}</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n<p>{}</p>\n{SAVE}</header>\n<main>\n{body}</main>\n{}{FOOTER}\
         <div id=\"tip\" role=\"status\" hidden></div>\n\
         <script type=\"application/json\" id=\"data\">{}</script>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        POLICY.trim_end(),
        subtitle(document, &parts),
        glossary::glossary(&body),
        markup::json(&serde_json::to_string(document)?),
    ))
}

/// The script shows what it serves.
const SAVE: &str = "<p class=\"tools\" data-script hidden><button type=\"button\" id=\"save-json\">Save data (JSON)</button> \
                    <button type=\"button\" id=\"save-csv\">Save table (CSV)</button></p>\n";

const FOOTER: &str = "<footer>Medians with 95 % intervals; GiB are 2<sup>30</sup> bytes, GB/s are 10<sup>9</sup> bytes a second.</footer>\n";

/// Every chart of a document as a picture of its own: file name and SVG.
pub fn pictures(document: &Document) -> Vec<(String, String)> {
    let precisions = Precisions::of(&document.records);
    let parts = parts(document, &precisions);
    let all = overview::chart(&parts, &precisions).map(|chart| ("00-all-cases.svg".to_owned(), chart.file()));
    let named = |part: &Part| {
        let model = file_word(&part.case.records[0].model.id);
        let name = |chart: &Chart| (format!("{:02}-{model}-{}.svg", part.number, chart.name), chart.file());
        part.charts.iter().map(name).collect::<Vec<_>>()
    };
    all.into_iter().chain(parts.iter().flat_map(named)).collect()
}

/// Letters, digits, dots and hyphens, so that a name is one on every file system.
fn file_word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

fn parts<'a>(document: &'a Document, precisions: &Precisions) -> Vec<Part<'a>> {
    let part = |(index, case)| {
        let charts = charts::charts(&case, precisions);
        Part { number: index + 1, case, charts }
    };
    let cases = case::cases(document);
    let by_batch = charts::batches(&cases, precisions);
    let mut parts: Vec<Part> = cases.into_iter().enumerate().map(part).collect();
    // With the largest batch, which is the last of its line.
    by_batch.into_iter().for_each(|(at, chart)| parts[at].charts.push(chart));
    parts
}

fn title(parts: &[Part]) -> String {
    let mut models: Vec<&str> = parts.iter().map(|part| part.case.records[0].model.id.as_str()).collect();
    models.dedup();
    match models.as_slice() {
        [model] => format!("{}: speed, memory and quality by precision", line(model)),
        _ => "Speed, memory and quality by precision".to_owned(),
    }
}

fn subtitle(document: &Document, cases: &[Part]) -> String {
    let Some(first) = document.records.first() else { return "No record.".to_owned() };
    let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let parts = [
        count(cases.len(), "case", "cases"),
        count(document.records.len(), "row", "rows"),
        line(&format!("{} {}", first.engine.name, first.engine.version)),
        line(case::day(&first.timestamp)),
    ];
    let known = parts.into_iter().filter(|part| !part.trim().is_empty());
    known.map(|part| format!("<span>{part}</span>")).collect::<Vec<_>>().join(" · ")
}

/// A name with its unit below.
fn head_cell(name: &str, unit: &str) -> String {
    let class = if name == "run" { " class=\"name\"" } else { "" };
    format!("<th scope=\"col\"{class}>{}{}</th>", glossary::link(name), small(unit))
}

fn small(unit: &str) -> String {
    if unit.is_empty() { String::new() } else { format!("<small>{}</small>", line(unit)) }
}

/// The mark of a row that something disturbed.
fn badge(is_tainted: bool) -> &'static str {
    if is_tainted {
        "<abbr class=\"badge\" title=\"other programs or the state of the machine affected this measurement: see the warnings\">*</abbr>"
    } else {
        ""
    }
}
