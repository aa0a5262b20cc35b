//! HTML: one page that needs nothing beside itself, for a browser, a mail or a printer.

mod article;

use anyhow::Result;

use super::charts::{self, Chart, Precisions};
use super::columns::{self, Row};
use super::{Options, Writer, case};
use crate::record::{Document, Record, Status};

pub const WRITER: Writer = Writer {
    name: "html",
    extensions: &["html", "htm"],
    doc: "one page with charts that needs no network, light and dark",
    write,
};

const STYLE: &str = include_str!("style.css");

/// A case with its charts, under the number that its ids and file names bear.
struct Case<'a> {
    number: usize,
    records: &'a [Record],
    charts: Vec<Chart>,
}

fn write(document: &Document, options: &Options) -> Result<String> {
    let cases = cases(document)?;
    let articles: String = cases.iter().map(|case| article::article(case, options)).collect();
    let title = title(&cases);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"generator\" content=\"quantbench\">\n<title>{title}</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n<p>{}</p>\n</header>\n<main>\n{}{articles}</main>\n{}</body>\n</html>\n",
        subtitle(document, &cases),
        overview(&cases),
        footer(),
    ))
}

/// Every chart of a document as a picture of its own: file name and SVG.
pub fn pictures(document: &Document) -> Result<Vec<(String, String)>> {
    let named = |case: &Case| {
        let model = file_word(&case.records[0].model.id);
        let name = |chart: &Chart| (format!("{:02}-{model}-{}.svg", case.number, chart.name), chart.file());
        case.charts.iter().map(name).collect::<Vec<_>>()
    };
    Ok(cases(document)?.iter().flat_map(named).collect())
}

/// Letters, digits, dots and hyphens, so that a name is one on every file system.
fn file_word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

fn cases(document: &Document) -> Result<Vec<Case<'_>>> {
    let precisions = Precisions::of(&document.records);
    let case =
        |(index, records)| Ok(Case { number: index + 1, records, charts: charts::charts(records, &precisions)? });
    case::cases(document).enumerate().map(case).collect()
}

fn title(cases: &[Case]) -> String {
    let mut models: Vec<&str> = cases.iter().map(|case| case.records[0].model.id.as_str()).collect();
    models.dedup();
    match models.as_slice() {
        [model] => format!("What each precision of {} costs and buys", text(model)),
        _ => "What each precision costs and buys".to_owned(),
    }
}

fn subtitle(document: &Document, cases: &[Case]) -> String {
    let Some(first) = document.records.first() else { return "No record.".to_owned() };
    let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let day = first.timestamp.split('T').next().unwrap_or_default();
    let parts = [
        count(cases.len(), "case", "cases"),
        count(document.records.len(), "row", "rows"),
        text(&format!("{} {}", first.engine.name, first.engine.version)),
        text(day),
    ];
    let known = parts.into_iter().filter(|part| !part.trim().is_empty());
    known.map(|part| format!("<span>{part}</span>")).collect::<Vec<_>>().join(" · ")
}

/// All cases in one table, each a link to its place; none where there is only one.
fn overview(cases: &[Case]) -> String {
    if cases.len() < 2 {
        return String::new();
    }
    let records = || cases.iter().flat_map(|case| case.records);
    let is_known = |column: &&OverviewColumn| records().any(|record| column.3(record).is_some());
    let columns: Vec<&OverviewColumn> = OVERVIEW.iter().filter(is_known).collect();
    let groups: String = cases.iter().map(|case| overview_group(case, &columns)).collect();
    format!(
        "<nav aria-label=\"Cases\">\n<div class=\"scroll\"><table class=\"wide overview\">\n<thead><tr>\
         <th scope=\"col\">case</th><th scope=\"col\" class=\"name\">precision</th>{}</tr></thead>\n{groups}</table></div>\n</nav>\n",
        columns.iter().map(|(name, unit, ..)| head_cell(name, unit)).collect::<String>(),
    )
}

/// Name, unit, decimals and value.
type OverviewColumn = (&'static str, &'static str, usize, fn(&Record) -> Option<f64>);

const OVERVIEW: &[OverviewColumn] = &[
    ("decode", "tokens/s", 1, |r| r.metrics.get("decode_tps")?.median),
    ("peak", "GiB", 2, |r| Some(r.memory.peak_bytes? as f64 / case::GIB)),
    ("TTFT", "ms", 1, |r| r.metrics.get("ttft_ms")?.median),
    ("KL", "nats/token", 5, |r| Some(r.quality.as_ref()?.kl_mean)),
];

/// A case stands once, beside all its precisions.
fn overview_group(case: &Case, columns: &[&OverviewColumn]) -> String {
    let (model, scope) = article::heading(case.records);
    let head = format!(
        "<th scope=\"rowgroup\" rowspan=\"{}\"><a href=\"#case-{}\">{}</a><small>{}</small></th>",
        case.records.len(),
        case.number,
        text(&model),
        text(&scope)
    );
    let cell = |record: &Record, &(_, _, digits, value): &OverviewColumn| {
        let shown = value(record).map_or_else(|| "-".into(), |x| format!("{x:.digits$}"));
        format!("<td>{shown}</td>")
    };
    let row = |(index, record): (usize, &Record)| {
        let cells: String = match record.status {
            Status::Ok => columns.iter().map(|column| cell(record, column)).collect(),
            _ => format!(
                "<td class=\"reason\" colspan=\"{}\">{}</td>",
                columns.len().max(1),
                text(&case::status(record))
            ),
        };
        let head = if index == 0 { head.as_str() } else { "" };
        format!("<tr>{head}<td class=\"name\">{}</td>{cells}</tr>\n", text(&case::label(record, case.records)))
    };
    let rows: String = case.records.iter().enumerate().map(row).collect();
    format!("<tbody>\n{rows}</tbody>\n")
}

/// The rows of the readable table, with units under the names.
fn table(records: &[Record]) -> String {
    let sheet = columns::sheet(records, false);
    let head: String = sheet.headers.iter().map(|(name, unit)| head_cell(name, unit)).collect();
    let width = sheet.headers.len() - 1;
    let row = |row: &Row| {
        let cells = match &row.values {
            Ok(values) => values.iter().map(|value| format!("<td>{}</td>", text(value))).collect(),
            Err(status) => format!("<td class=\"reason\" colspan=\"{width}\">{}</td>", text(status)),
        };
        format!("<tr><th scope=\"row\">{}</th>{cells}</tr>\n", text(&row.precision))
    };
    let rows: String = sheet.rows.iter().map(row).collect();
    format!(
        "<div class=\"scroll\"><table class=\"wide\">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
}

fn head_cell(name: &str, unit: &str) -> String {
    let unit = if unit.is_empty() { String::new() } else { format!("<small>{}</small>", text(unit)) };
    format!("<th scope=\"col\">{}{unit}</th>", text(name))
}

fn footer() -> String {
    "<footer>Medians with 95 % intervals; GiB are 2<sup>30</sup> bytes, GB/s are 10<sup>9</sup> bytes a second. \
     <q>bytes allow</q> is the speed-up if decoding only read its bytes; <q>of limit</q> is the share of the measured read \
     bandwidth that it reaches.</footer>\n"
        .to_owned()
}

/// Any text from outside, as text: one line, no markup.
fn text(text: &str) -> String {
    charts::escape(&case::plain(text))
}
