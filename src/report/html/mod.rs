//! HTML: one page that needs nothing beside itself, for a browser, a mail or a printer.

mod article;

use anyhow::Result;

use super::case::{self, Case};
use super::charts::{self, Chart, Precisions};
use super::columns::{Row, Sheet};
use super::{Options, Writer};
use crate::record::{Document, Record, Status};

pub const WRITER: Writer = Writer {
    name: "html",
    extensions: &["html", "htm"],
    doc: "one page with charts that needs no network, light and dark",
    write,
};

const STYLE: &str = include_str!("style.css");

/// A case with its charts, under the number that its ids and file names bear.
struct Part<'a> {
    number: usize,
    case: Case<'a>,
    charts: Vec<Chart>,
}

fn write(document: &Document, options: &Options) -> Result<String> {
    let parts = parts(document)?;
    let articles: String = parts.iter().map(|part| article::article(part, options)).collect();
    let title = title(&parts);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"generator\" content=\"quantbench\">\n<title>{title}</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n<p>{}</p>\n</header>\n<main>\n{}{articles}</main>\n{}</body>\n</html>\n",
        subtitle(document, &parts),
        overview(&parts),
        footer(),
    ))
}

/// Every chart of a document as a picture of its own: file name and SVG.
pub fn pictures(document: &Document) -> Result<Vec<(String, String)>> {
    let named = |part: &Part| {
        let model = file_word(&part.case.records[0].model.id);
        let name = |chart: &Chart| (format!("{:02}-{model}-{}.svg", part.number, chart.name), chart.file());
        part.charts.iter().map(name).collect::<Vec<_>>()
    };
    Ok(parts(document)?.iter().flat_map(named).collect())
}

/// Letters, digits, dots and hyphens, so that a name is one on every file system.
fn file_word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect()
}

fn parts(document: &Document) -> Result<Vec<Part<'_>>> {
    let precisions = Precisions::of(&document.records);
    let part = |(index, case)| {
        let charts = charts::charts(&case, &precisions)?;
        Ok(Part { number: index + 1, case, charts })
    };
    case::cases(document).into_iter().enumerate().map(part).collect()
}

fn title(parts: &[Part]) -> String {
    let mut models: Vec<&str> = parts.iter().map(|part| part.case.records[0].model.id.as_str()).collect();
    models.dedup();
    match models.as_slice() {
        [model] => format!("What each precision of {} costs and buys", text(model)),
        _ => "What each precision costs and buys".to_owned(),
    }
}

fn subtitle(document: &Document, cases: &[Part]) -> String {
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
fn overview(parts: &[Part]) -> String {
    if parts.len() < 2 {
        return String::new();
    }
    let records = || parts.iter().flat_map(|part| part.case.records);
    let is_known = |column: &&OverviewColumn| records().any(|record| column.3(record).is_some());
    let columns: Vec<&OverviewColumn> = OVERVIEW.iter().filter(is_known).collect();
    let groups: String = parts.iter().map(|part| overview_group(part, &columns)).collect();
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
fn overview_group(part: &Part, columns: &[&OverviewColumn]) -> String {
    let case = &part.case;
    let (model, scope) = article::heading(case);
    let head = format!(
        "<th scope=\"rowgroup\" rowspan=\"{}\"><a href=\"#case-{}\">{}</a><small>{}</small></th>",
        case.records.len(),
        part.number,
        text(&model),
        text(&scope)
    );
    let cell = |record: &Record, &(_, _, digits, value): &OverviewColumn| {
        let shown = value(record).map_or_else(|| "-".into(), |x| format!("{x:.digits$}"));
        format!("<td>{shown}</td>")
    };
    let row = |(index, (run, record)): (usize, (&case::Run, &Record))| {
        let cells: String = match record.status {
            Status::Ok => columns.iter().map(|column| cell(record, column)).collect(),
            _ => format!(
                "<td class=\"reason\" colspan=\"{}\">{}</td>",
                columns.len().max(1),
                text(&case::status(record))
            ),
        };
        let head = if index == 0 { head.as_str() } else { "" };
        format!("<tr>{head}<td class=\"name\">{}</td>{cells}</tr>\n", text(&(case.label(run, record) + mark(record))))
    };
    let rows: String = case.rows().enumerate().map(row).collect();
    format!("<tbody>\n{rows}</tbody>\n")
}

/// As the table of the case marks it, and explains below.
fn mark(record: &Record) -> &'static str {
    if record.tainted { "*" } else { "" }
}

/// The rows of the readable table, with units under the names and notes below.
fn table(sheet: &Sheet) -> String {
    let head: String = sheet.headers.iter().map(|(name, unit)| head_cell(name, unit)).collect();
    let row = |row: &Row| {
        let run = row.run.as_ref().map(|run| format!("<td>{}</td>", text(run))).unwrap_or_default();
        let width = sheet.headers.len() - 1 - usize::from(row.run.is_some());
        let cells = match &row.values {
            Ok(values) => values.iter().map(|value| format!("<td>{}</td>", text(value))).collect(),
            Err(status) => format!("<td class=\"reason\" colspan=\"{width}\">{}</td>", text(status)),
        };
        format!("<tr><th scope=\"row\">{}</th>{run}{cells}</tr>\n", text(&row.precision))
    };
    let rows: String = sheet.rows.iter().map(row).collect();
    let notes = match sheet.notes.as_slice() {
        [] => String::new(),
        notes => format!("<p class=\"notes\">{}.</p>\n", text(&notes.join(". "))),
    };
    format!(
        "<div class=\"scroll\"><table class=\"wide\">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{notes}"
    )
}

fn head_cell(name: &str, unit: &str) -> String {
    let unit = if unit.is_empty() { String::new() } else { format!("<small>{}</small>", text(unit)) };
    format!("<th scope=\"col\">{}{unit}</th>", text(name))
}

fn footer() -> String {
    "<footer>Medians with 95 % intervals; GiB are 2<sup>30</sup> bytes, GB/s are 10<sup>9</sup> bytes a second. \
     <q>bytes ratio</q> is what a decode step reads at fp16 over what it reads here; <q>of read bandwidth</q> is the share of the \
     measured read bandwidth that decoding reaches.</footer>\n"
        .to_owned()
}

/// Any text from outside, as text: one line, no markup.
fn text(text: &str) -> String {
    charts::escape(&case::plain(text))
}

/// The same with what stands in backticks as code.
fn prose(text: &str) -> String {
    let text = case::plain(text);
    let parts: Vec<&str> = text.split('`').collect();
    // An odd number of marks pairs none with the last.
    let paired = parts.len() - usize::from(parts.len().is_multiple_of(2));
    let part = |(at, part): (usize, &&str)| match at {
        at if at >= paired => format!("`{}", charts::escape(part)),
        at if at % 2 == 1 => format!("<code>{}</code>", charts::escape(part)),
        _ => charts::escape(part),
    };
    parts.iter().enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backticks_are_code() {
        for (from, expected) in [
            ("use `--a <b>` now", "use <code>--a &lt;b&gt;</code> now"),
            ("`a` and `b`", "<code>a</code> and <code>b</code>"),
            ("a ` b", "a ` b"),
            ("`a` ` b", "<code>a</code> ` b"),
            ("", ""),
        ] {
            assert_eq!(prose(from), expected, "{from}");
        }
    }
}
