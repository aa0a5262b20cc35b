//! All rows of all cases in one table that can be filtered and sorted, each with a link to its case.

use super::{Part, article, badge, glossary, line, small};
use crate::record::{Record, Status};
use crate::report::case::{self, GIB};
use crate::report::charts::Precisions;
use crate::report::columns;

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
    let rows: String = parts.iter().map(|part| rows(part, &columns)).collect();
    format!(
        "<nav aria-label=\"Cases\">\n{}<div class=\"scroll\"><table class=\"wide overview\">\n<thead><tr>\
         {}{}{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n</nav>\n",
        tools(precisions.names(), records().count()),
        word_head("case"),
        word_head("precision"),
    )
}

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

fn rows(part: &Part, columns: &[&Column]) -> String {
    let newest = part.newest_of_many();
    let case = newest.as_ref().unwrap_or(&part.case);
    let (model, scope) = article::heading(case);
    let (model, scope) = (line(&model), line(&scope));
    let row = |(index, (run, record)): (usize, (&case::Run, &Record))| {
        // A case is written out in its first row; the script sees to it after sorting.
        let again = if index > 0 { " class=\"again\"" } else { "" };
        let cells: String = match record.status {
            Status::Ok => columns.iter().map(|column| cell(column, record)).collect(),
            _ => format!(
                "<td class=\"reason\" colspan=\"{}\">{}</td>",
                columns.len().max(1),
                line(&case::status(record))
            ),
        };
        format!(
            "<tr{again} data-case=\"{0}\" data-precision=\"{1}\"><th scope=\"row\" data-k=\"case\"><a href=\"#case-{0}\">{model}</a>\
             <small>{scope}</small></th><td class=\"name\" data-k=\"precision\">{2}{3}</td>{cells}</tr>\n",
            part.number,
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
