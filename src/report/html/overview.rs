//! All rows of all cases in one table that can be filtered and sorted, each with a link to its case.

use super::{Part, article, badge, glossary, line, small};
use crate::record::{Record, Status};
use crate::report::case::{self, Case, GIB, Run};
use crate::report::charts::{AllCases, Chart, PageRow, Precisions, all_cases};
use crate::report::columns;
use crate::report::pivot::Telling;

/// A column; the first click on its head brings the best to the top.
struct Column {
    name: &'static str,
    unit: &'static str,
    decimals: usize,
    higher_is_better: bool,
    value: fn(&Record) -> Option<f64>,
    /// Ends of the 95 % interval.
    interval: fn(&Record) -> Option<(f64, f64)>,
}

fn median(record: &Record, key: &str) -> Option<f64> {
    record.metrics.get(key)?.median.filter(|median| median.is_finite())
}

fn interval(record: &Record, key: &str) -> Option<(f64, f64)> {
    let summary = record.metrics.get(key)?;
    summary.ci95_low.zip(summary.ci95_high)
}

const COLUMNS: &[Column] = &[
    Column {
        name: "decode",
        unit: "tokens/s",
        decimals: 1,
        higher_is_better: true,
        value: |r| median(r, "decode_tps"),
        interval: |r| interval(r, "decode_tps"),
    },
    Column {
        name: "speed-up",
        unit: "x fp16",
        decimals: 2,
        higher_is_better: true,
        value: columns::speed_up_number,
        interval: |r| r.ratio_to_fp16.and_then(|ratio| ratio.ci95_low.zip(ratio.ci95_high)),
    },
    Column {
        name: "peak",
        unit: "GiB",
        decimals: 2,
        higher_is_better: false,
        value: |r| Some(r.memory.peak_bytes? as f64 / GIB),
        interval: |_| None,
    },
    Column {
        name: "TTFT",
        unit: "ms",
        decimals: 1,
        higher_is_better: false,
        value: |r| median(r, "ttft_ms"),
        interval: |r| interval(r, "ttft_ms"),
    },
    Column {
        name: "prefill",
        unit: "tokens/s",
        decimals: 1,
        higher_is_better: true,
        value: |r| median(r, "prefill_tps"),
        interval: |r| interval(r, "prefill_tps"),
    },
    Column {
        name: "energy",
        unit: "J/token",
        decimals: 3,
        higher_is_better: false,
        value: |r| median(r, "joules_per_token"),
        interval: |r| interval(r, "joules_per_token"),
    },
    Column {
        name: "KL",
        unit: "nats/token",
        decimals: 5,
        higher_is_better: false,
        value: |r| Some(r.quality.as_ref()?.kl_mean),
        interval: |r| {
            let quality = r.quality.as_ref()?;
            quality.kl_mean_half_width.map(|half| (quality.kl_mean - half, quality.kl_mean + half))
        },
    },
];

/// Empty where there is only one case: its own table shows all.
pub fn overview(parts: &[Part], precisions: &Precisions) -> String {
    if parts.len() < 2 {
        return String::new();
    }
    let records = || parts.iter().flat_map(|part| part.case.records);
    let is_known = |column: &&Column| records().any(|record| (column.value)(record).is_some());
    let columns: Vec<&Column> = COLUMNS.iter().filter(is_known).collect();
    let heads: String = columns.iter().map(|column| head(column)).collect();
    let newest = newest(parts);
    let cases = cases(parts, &newest);
    let all = all_cases(&page_rows(&cases), precisions);
    let dots = all.as_ref().map_or(&[][..], |all| &all.rows);
    let mut at = 0;
    let rows: String =
        parts.iter().zip(&cases).map(|(part, case)| rows((part.number, case), &columns, dots, &mut at)).collect();
    format!(
        "<nav aria-label=\"Cases\">\n{}<div class=\"scroll\"><table class=\"wide overview\">\n<thead><tr>\
         {}{}{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{}</nav>\n",
        tools(precisions.names(), records().count()),
        word_head("case"),
        word_head("precision"),
        all.as_ref().map(|all| over_all(all, precisions.names())).unwrap_or_default(),
    )
}

/// The chart of all rows alone; `None` where there is only one case.
pub fn chart(parts: &[Part], precisions: &Precisions) -> Option<Chart> {
    let newest = newest(parts);
    let cases = cases(parts, &newest);
    (cases.len() > 1).then(|| all_cases(&page_rows(&cases), precisions)).flatten().map(|all| all.chart)
}

fn newest<'a>(parts: &'a [Part]) -> Vec<Option<Case<'a>>> {
    parts.iter().map(Part::newest_of_many).collect()
}

/// Those of the parts, with the newest of many runs.
fn cases<'a>(parts: &'a [Part], newest: &'a [Option<Case<'a>>]) -> Vec<&'a Case<'a>> {
    parts.iter().zip(newest).map(|(part, newest)| newest.as_ref().unwrap_or(&part.case)).collect()
}

/// As the table has them.
fn page_rows<'a>(cases: &[&'a Case<'a>]) -> Vec<PageRow<'a>> {
    let telling = Telling::of(cases);
    let row = |(case, (run, record)): (&&'a Case<'a>, (&Run, &'a Record))| PageRow {
        case: telling.name(run),
        label: case::label(record, case.records),
        record,
    };
    cases.iter().flat_map(|case| case.rows().map(move |pair| (case, pair))).map(row).collect()
}

/// The chart of all rows, the colours of the precisions, and the rows on its line. The script draws the line anew for the rows that a filter
/// leaves.
fn over_all(all: &AllCases, precisions: &[String]) -> String {
    let AllCases { chart, .. } = all;
    let color = |(at, name): (usize, &String)| format!("<span class=\"c{}\">{}</span>", at % N_COLORS, line(name));
    let legend: Vec<String> = precisions.iter().enumerate().map(color).collect();
    let row = |row: &Vec<String>| {
        let hidden = if row[AllCases::IS_BEST] == "yes" { "" } else { " hidden" };
        format!(
            "<tr{hidden}><td class=\"name\">{}</td><td class=\"name\">{}</td><td>{}</td><td>{}</td></tr>\n",
            line(&row[0]),
            line(&row[1]),
            line(&row[2]),
            line(&row[3])
        )
    };
    format!(
        "<div class=\"beside\">\n{}<div>\n<h3>On the Pareto line</h3>\n<div class=\"scroll\"><table class=\"front\">\n<thead><tr>\
         <th scope=\"col\">case</th><th scope=\"col\" class=\"name\">precision</th><th scope=\"col\">decode<small>tokens/s</small></th>\
         <th scope=\"col\">peak<small>GiB</small></th></tr></thead>\n<tbody>\n{}</tbody>\n</table></div>\n\
         <p class=\"legend\">{}</p>\n</div>\n</div>\n",
        article::figure("all", chart),
        chart.rows.iter().map(row).collect::<String>(),
        legend.join(" ")
    )
}

/// Colours of the style sheet; precisions beyond share them.
const N_COLORS: usize = 6;

/// Hidden without the script.
fn tools(precisions: &[String], n_rows: usize) -> String {
    let chip = |name: &String| {
        let name = line(name);
        format!("<label><input type=\"checkbox\" value=\"{name}\" checked>{name}</label>\n")
    };
    let chips: String = precisions.iter().map(chip).collect();
    format!(
        "<div class=\"tools\" role=\"search\" data-script hidden>\n<input type=\"search\" id=\"filter\" \
         placeholder=\"Filter: model, device, oom, …\" aria-label=\"Filter rows\">\n\
         <span class=\"chips\" role=\"group\" aria-label=\"Precisions\">\n{chips}</span>\n\
         <output id=\"shown\">{n_rows} of {n_rows} rows</output>\n</div>\n"
    )
}

/// A head that sorts by text.
fn word_head(name: &str) -> String {
    format!("<th scope=\"col\" class=\"name\"><button type=\"button\" data-sort=\"{name}\">{name}</button></th>")
}

fn head(column: &Column) -> String {
    let name = line(column.name);
    let first = if column.higher_is_better { "descending" } else { "ascending" };
    let meaning = glossary::meaning(column.name).map(line).unwrap_or_default();
    format!(
        "<th scope=\"col\"><button type=\"button\" data-sort=\"{name}\" data-first=\"{first}\" title=\"{meaning}\">{name}</button>{}</th>",
        small(column.unit)
    )
}

/// `dots` are the rows of the page that the chart of all cases has; `at` counts the rows.
fn rows((number, case): (usize, &Case), columns: &[&Column], dots: &[usize], at: &mut usize) -> String {
    let (model, scope) = article::heading(case);
    let (model, scope) = (line(&model), line(&scope));
    let row = |(index, (run, record)): (usize, (&Run, &Record))| {
        // A case is written out in its first row; the script sees to it after sorting.
        let again = if index > 0 { " class=\"again\"" } else { "" };
        let dot = dots.iter().position(|row| row == at).map(|dot| format!(" data-dot=\"{dot}\"")).unwrap_or_default();
        *at += 1;
        let cells: String = match record.status {
            Status::Ok => columns.iter().map(|column| cell(column, record)).collect(),
            _ => format!(
                "<td class=\"reason\" colspan=\"{}\">{}</td>",
                columns.len().max(1),
                line(&case::status(record))
            ),
        };
        format!(
            "<tr{again} data-case=\"{0}\" data-precision=\"{1}\"{dot}><th scope=\"row\" data-k=\"case\"><a href=\"#case-{0}\">{model}</a>\
             <small>{scope}</small></th><td class=\"name\" data-k=\"precision\">{2}{3}</td>{cells}</tr>\n",
            number,
            line(&case::precision(record)),
            line(&case.label(run, record)),
            badge(record.tainted)
        )
    };
    case.rows().enumerate().map(row).collect()
}

fn cell(column: &Column, record: &Record) -> String {
    let (name, digits) = (column.name, column.decimals);
    let Some(value) = (column.value)(record) else { return format!("<td data-k=\"{name}\">-</td>") };
    let interval =
        (column.interval)(record).map(|(low, high)| format!("95 % interval [{low:.digits$}, {high:.digits$}]"));
    let title = interval.map(|words| format!(" title=\"{words}\"")).unwrap_or_default();
    format!("<td data-k=\"{name}\" data-v=\"{value}\"{title}>{value:.digits$}</td>")
}
