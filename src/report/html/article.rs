//! One case of the page: what it is, what came out, the charts, and what a reader needs to judge and repeat it.

use super::{Case, table, text};
use crate::record::Record;
use crate::report::charts::Chart;
use crate::report::{Options, case, verdict};

pub fn article(case: &Case, options: &Options) -> String {
    let (number, records) = (case.number, case.records);
    let (model, scope) = heading(records);
    let charts: String = case.charts.iter().map(|chart| figure(number, chart)).collect();
    let charts = if charts.is_empty() { charts } else { format!("<div class=\"charts\">\n{charts}</div>\n") };
    format!(
        "<article id=\"case-{number}\">\n<h2>{}</h2>\n<p class=\"scope\">{}</p>\n<p class=\"verdict\">{}</p>\n{}{charts}\
         <div class=\"more\">\n{}{}{}</div>\n</article>\n",
        text(&model),
        text(&scope),
        text(&sentence(&verdict::verdict(records, options.card_bytes))),
        table(records),
        section("Warnings", &warnings(records)),
        section("Environment", &environment(records)),
        section("To repeat it", &commands(records)),
    )
}

/// The model's name apart from where and how it ran.
pub(super) fn heading(records: &[Record]) -> (String, String) {
    let title = case::title(records);
    match title.split_once(" on ").or_else(|| title.split_once(": ")) {
        Some((model, rest)) => (model.to_owned(), rest.to_owned()),
        None => (title, String::new()),
    }
}

/// With a capital, where that changes no name, and a full stop.
fn sentence(verdict: &str) -> String {
    format!("{}.", verdict.trim_end_matches('.'))
}

fn figure(number: usize, chart: &Chart) -> String {
    let id = format!("c{number}-{}", chart.name);
    let head: String = chart.headers.iter().map(|header| format!("<th scope=\"col\">{}</th>", text(header))).collect();
    let row = |row: &Vec<String>| {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", text(cell))).collect();
        format!("<tr>{cells}</tr>")
    };
    let rows: String = chart.rows.iter().map(row).collect();
    format!(
        "<figure class=\"{}\">\n<h3>{}</h3>\n{}<details><summary>Numbers</summary>\n<div class=\"scroll\"><table><thead><tr>{head}</tr></thead>\
         <tbody>{rows}</tbody></table></div></details>\n</figure>\n",
        chart.name,
        text(&chart.title),
        chart.inline(&id),
    )
}

fn section(title: &str, body: &str) -> String {
    if body.is_empty() { String::new() } else { format!("<section>\n<h3>{title}</h3>\n{body}</section>\n") }
}

fn warnings(records: &[Record]) -> String {
    let items: String = case::warnings(records).iter().map(|warning| format!("<li>{}</li>\n", text(warning))).collect();
    if items.is_empty() { items } else { format!("<ul>\n{items}</ul>\n") }
}

fn commands(records: &[Record]) -> String {
    // A word is not broken at its hyphens: a line that begins with `-warmup` misleads.
    let word = |word: &str| format!("<span>{}</span>", text(word));
    let command = |command: &&str| command.split(' ').map(word).collect::<Vec<_>>().join(" ");
    let commands: Vec<String> = case::commands(records).iter().map(command).collect();
    if commands.is_empty() { String::new() } else { format!("<pre><code>{}</code></pre>\n", commands.join("\n")) }
}

/// What is known, of the first record: the rows of a case ran on one machine.
fn environment(records: &[Record]) -> String {
    let (first, environment) = (&records[0], &records[0].environment);
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
        ("repeats", repeats(first)),
        ("time", first.timestamp.clone()),
    ];
    let known = facts.iter().filter(|(_, value)| !value.trim().is_empty());
    let items: String = known.map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", text(value))).collect();
    format!("<dl>\n{items}</dl>\n")
}

fn repeats(record: &Record) -> String {
    let protocol = &record.protocol;
    match protocol.n_repeats {
        0 => String::new(),
        n => format!("{n} after {} of warm-up, {}", protocol.n_warmup, protocol.order.replace('_', " ")),
    }
}
