//! One case of the page: what it is, what came out, the charts, and what a reader needs to judge and repeat it.

use super::{Part, badge, changes, head_cell, texts};
use crate::record::{Record, Status};
use crate::report::case::{self, Case};
use crate::report::charts::Chart;
use crate::report::columns::{self, Extent, Row, Sheet};
use crate::report::markup::{line, prose};
use crate::report::{Options, verdict};

pub fn article(part: &Part, options: &Options) -> String {
    let (number, whole) = (part.number, &part.case);
    let newest = part.newest_of_many();
    let case = newest.as_ref().unwrap_or(whole);
    let (model, scope) = heading(whole);
    let verdict =
        |verdict: &verdict::Verdict| format!("<p class=\"verdict\">{}</p>\n", prose(&sentence(&verdict.to_string())));
    let verdicts: String = verdict::verdicts(case, options.card_bytes).iter().map(verdict).collect();
    let left_out = newest.as_ref().map_or_else(String::new, |_| {
        format!("<p class=\"hint\">The newest of {} runs; the trend shows all of them.</p>\n", whole.runs.len())
    });
    format!(
        "<article id=\"case-{number}\">\n<h2>{}</h2>\n<p class=\"scope\">{}</p>\n{left_out}{verdicts}{}{}{}{}\
         <div class=\"more\">\n{}{}{}</div>\n</article>\n",
        line(&model),
        prose(&scope),
        table(&columns::sheet(case, Extent { wide: options.wide, changes: false })),
        changes::changes(part),
        figures(part),
        texts::texts(case),
        section("Warnings", &warnings(case)),
        environments(case),
        section("To repeat it", &commands(case.records)),
    )
}

/// The model's name apart from where and how it ran.
pub(super) fn heading(case: &Case) -> (String, String) {
    let title = case.title();
    match title.split_once(" on ").or_else(|| title.split_once(": ")) {
        Some((model, rest)) => (model.to_owned(), rest.to_owned()),
        None => (title, String::new()),
    }
}

/// With a full stop.
fn sentence(verdict: &str) -> String {
    format!("{}.", verdict.trim_end_matches('.'))
}

fn figures(part: &Part) -> String {
    let charts: String = part.charts.iter().map(|chart| figure(&part.number.to_string(), chart)).collect();
    if charts.is_empty() { charts } else { format!("<div class=\"charts\">\n{charts}</div>\n") }
}

/// A chart; the numbers behind it open over the page, so that nothing moves.
/// `part` is unique on the page.
pub(super) fn figure(part: &str, chart: &Chart) -> String {
    let id = format!("c{part}-{}", chart.name);
    let head: String = chart.headers.iter().map(|header| format!("<th scope=\"col\">{}</th>", line(header))).collect();
    let row = |row: &Vec<String>| {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", line(cell))).collect();
        format!("<tr>{cells}</tr>")
    };
    let rows: String = chart.rows.iter().map(row).collect();
    let note = chart.note.as_ref().map(|note| format!("<p class=\"hint\">{}</p>\n", line(note))).unwrap_or_default();
    let title = line(&chart.title);
    format!(
        "<figure class=\"{}\">\n<h3>{title}</h3>\n{note}{}<button type=\"button\" popovertarget=\"{id}-n\">Numbers</button>\n\
         <div popover id=\"{id}-n\"><h4>{title}</h4>\n<div class=\"numbers\"><table><thead><tr>{head}</tr></thead>\
         <tbody>{rows}</tbody></table></div></div>\n</figure>\n",
        chart.name,
        chart.inline(&id),
    )
}

/// The rows of the readable table, with units under the names and notes below.
fn table(sheet: &Sheet) -> String {
    let head: String = sheet.headers.iter().map(|(name, unit)| head_cell(name, unit)).collect();
    let row = |row: &Row| {
        let short = line(&row.short_run);
        let run = row.run.as_ref().map(|run| format!("<td class=\"name\" title=\"{}\">{short}</td>", line(run)));
        let run = run.unwrap_or_default();
        let width = sheet.headers.len() - 1 - usize::from(row.run.is_some());
        let cells = match &row.values {
            Ok(values) => values.iter().map(|value| format!("<td>{}</td>", cell(value))).collect(),
            Err(status) => format!("<td class=\"reason\" colspan=\"{width}\">{}</td>", line(status)),
        };
        let (name, is_tainted) = match row.precision.strip_suffix(columns::TAINTED) {
            Some(name) => (name, true),
            None => (row.precision.as_str(), false),
        };
        format!("<tr><th scope=\"row\">{}{}</th>{run}{cells}</tr>\n", line(name), badge(is_tainted))
    };
    let rows: String = sheet.rows.iter().map(row).collect();
    let notes = match sheet.notes.as_slice() {
        [] => String::new(),
        notes => format!("<p class=\"notes\">{}.</p>\n", line(&notes.join(". "))),
    };
    format!(
        "<div class=\"scroll\"><table class=\"wide\">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{notes}"
    )
}

/// An interval stands below its number.
fn cell(value: &str) -> String {
    match value.split_once(" [") {
        Some((number, ends)) => format!("{} <small>[{}</small>", line(number), line(ends)),
        None => line(value),
    }
}

fn section(title: &str, body: &str) -> String {
    if body.is_empty() { String::new() } else { format!("<section>\n<h3>{title}</h3>\n{body}</section>\n") }
}

fn warnings(case: &Case) -> String {
    let items: String = case::warnings(case).iter().map(|warning| format!("<li>{}</li>\n", prose(warning))).collect();
    if items.is_empty() { items } else { format!("<ul>\n{items}</ul>\n") }
}

fn commands(records: &[Record]) -> String {
    // A word is not broken at its hyphens: a line that begins with `-warmup` misleads.
    let word = |word: &str| format!("<span>{}</span>", line(word));
    let command = |command: &&str| command.split(' ').map(word).collect::<Vec<_>>().join(" ");
    let commands: Vec<String> = case::commands(records).iter().map(command).collect();
    if commands.is_empty() { String::new() } else { format!("<pre><code>{}</code></pre>\n", commands.join("\n")) }
}

/// A section for each run.
fn environments(case: &Case) -> String {
    let title = |run: &case::Run| match case.names_run {
        true => line(&format!("Environment of {}", run.label)),
        false => "Environment".to_owned(),
    };
    case.runs.iter().map(|run| section(&title(run), &environment(run.records))).collect()
}

/// What is known, of the first record that ran: the rows of a run share a machine.
fn environment(records: &[Record]) -> String {
    let first = records.iter().find(|record| record.status == Status::Ok).unwrap_or(&records[0]);
    let environment = &first.environment;
    let optional = |value: &Option<String>| value.clone().unwrap_or_default();
    let weights = match first.weights.seed {
        Some(seed) => format!("{}, seed {seed}, {}", first.weights.source, first.weights.dtype),
        None => format!("{}, {}, {}", first.weights.source, first.weights.dtype, first.weights.hash),
    };
    let bandwidth = records.iter().filter_map(|record| record.bandwidth.read_gb_s).reduce(f64::max);
    let threads = if environment.threads > 0 { environment.threads.to_string() } else { String::new() };
    let facts = [
        ("CPU", environment.cpu.clone()),
        ("instruction set", environment.isa.clone()),
        ("threads", threads),
        ("GPU", optional(&environment.gpu)),
        ("driver", optional(&environment.driver)),
        ("CUDA", optional(&environment.cuda)),
        ("read bandwidth", bandwidth.map(|gb_s| format!("{gb_s:.1} GB/s, measured in the run")).unwrap_or_default()),
        ("system", environment.os.clone()),
        ("engine", format!("{} {} {}", first.engine.name, first.engine.version, first.engine.commit)),
        ("build", environment.build_profile.clone()),
        ("weights", weights.trim_matches([' ', ',']).to_owned()),
        ("revision", optional(&first.model.revision)),
        ("repeats", repeats(records)),
        ("time", first.timestamp.clone()),
    ];
    let known = facts.iter().filter(|(_, value)| !value.trim().is_empty());
    let items: String = known.map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", line(value))).collect();
    format!("<dl>\n{items}</dl>\n")
}

/// How many, of each precision where they differ.
fn repeats(records: &[Record]) -> String {
    let ok: Vec<&Record> = records.iter().filter(|record| record.status == Status::Ok).collect();
    let Some(first) = ok.first().filter(|record| record.protocol.n_repeats > 0) else { return String::new() };
    let count = |record: &&Record| record.protocol.n_repeats;
    let n = match ok.iter().all(|record| count(record) == count(first)) {
        true => count(first).to_string(),
        false => {
            let each = ok.iter().map(|record| format!("{} of {}", count(record), case::label(record, records)));
            each.collect::<Vec<_>>().join(", ")
        }
    };
    let order = first.protocol.order.replace('_', " ");
    let order = if order.is_empty() { order } else { format!(", {order}") };
    let warmup = match first.protocol.n_warmup {
        0 => String::new(),
        n_warmup => format!(" after {n_warmup} of warm-up"),
    };
    format!("{n}{warmup}{order}")
}
