//! A comparison as text: a table for people, Markdown for a pull request, JSON for programs.

use anyhow::Result;

use super::{Check, Comparison, Kind, Verdict};
use crate::report::case::{self, GIB, plain};
use crate::report::grid::{self, Line, wrap_lines};
use crate::report::{Terminal, markdown};

/// A row of [`FORMATS`].
pub struct CompareFormat {
    /// As `--format` takes it.
    pub name: &'static str,
    /// The terminal that shows it; a file has none.
    pub write: fn(&Comparison, &Terminal) -> Result<String>,
}

/// The formats of a comparison, the default first.
pub static FORMATS: &[CompareFormat] = &[
    CompareFormat { name: "table", write: table },
    CompareFormat { name: "markdown", write: markdown },
    CompareFormat { name: "json", write: json },
];

/// The format called `name`.
pub fn find(name: &str) -> Option<&'static CompareFormat> {
    FORMATS.iter().find(|format| format.name == name)
}

const HEADERS: [&str; 7] = ["precision", "metric", "base", "new", "change [95 % interval]", "limit", "verdict"];

fn json(comparison: &Comparison, _: &Terminal) -> Result<String> {
    Ok(serde_json::to_string_pretty(comparison)? + "\n")
}

fn table(comparison: &Comparison, terminal: &Terminal) -> Result<String> {
    let wrapped = |text: &str| wrap_lines(text, terminal.columns, 2);
    let mut text = wrapped(&headline(comparison)) + &wrapped(&sides(comparison));
    // A grid aligns its first column to the left only: precision and metric share it.
    let precisions = comparison.checks.iter().map(|check| label(check).chars().count());
    let width = precisions.chain([HEADERS[0].len()]).max().unwrap_or(0);
    let joined = |cells: Vec<String>| -> Vec<String> {
        let first = format!("{:width$}  {}", cells[0], cells[1]);
        std::iter::once(first).chain(cells.into_iter().skip(2)).collect()
    };
    for checks in cases(comparison) {
        let mut rows: Vec<Vec<String>> = checks.iter().map(|check| joined(cells(check))).collect();
        let first = rows.iter().map(|cells| cells[0].chars().count()).max().unwrap_or(0);
        let has_room = |cells: &Vec<String>| {
            let last = cells.last().map_or(0, |verdict| verdict.chars().count());
            terminal.columns.is_none_or(|columns| first + 2 + last <= columns)
        };
        let mut reasons = String::new();
        // Where a reason has no room beside its check, all stand below.
        if !rows.iter().all(has_room) {
            for (cells, check) in rows.iter_mut().zip(checks).filter(|(_, check)| has_reason(check)) {
                reasons += &wrapped(&format!("{} {}: {}", label(check), check.metric, verdict(check)));
                *cells.last_mut().expect("never empty") = word(check.verdict).to_owned();
            }
        }
        let header = joined(HEADERS.map(String::from).to_vec());
        let lines: Vec<Line> = std::iter::once(header).chain(rows).map(Line::Cells).collect();
        text += &format!("\n{}\n{}", wrapped(&case_title(&checks[0])), grid::folded(&lines, terminal.columns, 1));
        text += &(if reasons.is_empty() { reasons } else { format!("\n{reasons}") });
    }
    let remarks = remarks(comparison);
    if !remarks.is_empty() {
        text.push('\n');
    }
    for remark in remarks {
        text += &wrapped(&format!("note: {remark}"));
    }
    Ok(text)
}

fn markdown(comparison: &Comparison, _: &Terminal) -> Result<String> {
    let mark = match comparison.verdict {
        Verdict::Ok => "✅",
        Verdict::CannotTell => "❔",
        Verdict::Regressed => "❌",
    };
    let mut text = format!("### {mark} {}\n\n{}\n", headline(comparison), markdown::escape(&sides(comparison)));
    for checks in cases(comparison) {
        let marks = [":---", ":---", "---:", "---:", "---:", "---:", ":---"];
        text += &format!("\n**{}**\n\n", markdown::escape(&case_title(&checks[0])));
        text += &markdown::line(HEADERS.iter().map(|header| header.to_string()));
        text += &format!("| {} |\n", marks.join(" | "));
        for check in checks {
            text += &markdown::line(cells(check).into_iter());
        }
    }
    let remarks = remarks(comparison);
    if !remarks.is_empty() {
        text.push('\n');
    }
    for remark in remarks {
        text += &format!("- {}\n", markdown::escape(&remark));
    }
    Ok(text)
}

/// For example `1 of 6 checks regressed, 2 can't tell`.
fn headline(comparison: &Comparison) -> String {
    let count = |verdict| comparison.checks.iter().filter(|check| check.verdict == verdict).count();
    let n = comparison.checks.len();
    let checks = if n == 1 { "check" } else { "checks" };
    match (count(Verdict::Regressed), count(Verdict::CannotTell)) {
        _ if n == 0 => "nothing was compared".into(),
        (0, 0) => format!("ok: no regression in {n} {checks}"),
        (0, unknown) => format!("can't tell: {unknown} of {n} {checks} undecided, none regressed"),
        (regressed, 0) => format!("regressed: {regressed} of {n} {checks}"),
        (regressed, unknown) => format!("regressed: {regressed} of {n} {checks}; {unknown} can't tell"),
    }
}

fn sides(comparison: &Comparison) -> String {
    let side = |side: &super::Side| {
        let words = [&side.engine.name, &side.engine.version, &side.engine.commit, &side.timestamp];
        let known: Vec<_> = words.iter().filter(|word| !word.is_empty()).map(|word| plain(word)).collect();
        let runs = side.n_runs.map(|n| format!("the last {n} runs, to ")).unwrap_or_default();
        runs + &known.join(" ")
    };
    format!("base: {}; new: {}", side(&comparison.base), side(&comparison.new))
}

/// Neighbours of one model and workload.
fn cases(comparison: &Comparison) -> impl Iterator<Item = &[Check]> {
    comparison.checks.chunk_by(|a, b| a.model == b.model && a.workload == b.workload)
}

fn case_title(check: &Check) -> String {
    plain(&format!("{}: {}", check.model, check.workload))
}

fn cells(check: &Check) -> Vec<String> {
    let dash = || "-".to_owned();
    let metric =
        if check.unit.is_empty() { check.metric.to_owned() } else { format!("{}, {}", check.metric, unit(check)) };
    let decimals =
        grid::decimals(check.base.into_iter().chain(check.new).map(|x| shown(check, x).abs()).fold(0.0, f64::max));
    let number = |value: Option<f64>| value.map_or_else(dash, |x| format!("{:.decimals$}", shown(check, x)));
    let limit = check.limit.map_or_else(|| "equal".to_owned(), |limit| difference(check, limit));
    vec![
        label(check),
        metric,
        number(check.base),
        number(check.new),
        change(check).unwrap_or_else(dash),
        limit,
        verdict(check),
    ]
}

/// The precision, and whose it is where it is not ours.
fn label(check: &Check) -> String {
    match check.engine.as_str() {
        case::OWN => plain(&check.precision),
        engine => plain(&format!("{} by {engine}", check.precision)),
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Ok => "ok",
        Verdict::CannotTell => "can't tell",
        Verdict::Regressed => "regressed",
    }
}

/// What is fine needs none.
fn has_reason(check: &Check) -> bool {
    check.verdict != Verdict::Ok && check.reason.is_some()
}

fn verdict(check: &Check) -> String {
    let word = word(check.verdict);
    match &check.reason {
        Some(reason) if has_reason(check) => plain(&format!("{word}: {reason}")),
        _ => word.to_owned(),
    }
}

fn change(check: &Check) -> Option<String> {
    let change = difference(check, check.change?);
    let interval = check.ci95_low.zip(check.ci95_high);
    let interval = interval.map(|(low, high)| format!(" [{}, {}]", difference(check, low), difference(check, high)));
    Some(change + &interval.unwrap_or_default())
}

/// With its sign, as a share or in the metric's unit.
fn difference(check: &Check, x: f64) -> String {
    match check.limit_is_relative {
        // The smallest change that the exact gates and memory show is well below a tenth.
        true if check.kind == Kind::Exact && x != 0.0 => format!("{:+.3} %", 100.0 * x),
        true => format!("{:+.1} %", 100.0 * x),
        false if check.unit == "bytes" => format!("{:+.2}", x / GIB),
        false => format!("{x:+.4}"),
    }
}

/// Bytes are shown in GiB, but for those that have to be equal.
fn unit(check: &Check) -> &str {
    if in_gib(check) { "GiB" } else { check.unit }
}

fn shown(check: &Check, x: f64) -> f64 {
    if in_gib(check) { x / GIB } else { x }
}

fn in_gib(check: &Check) -> bool {
    check.unit == "bytes" && check.kind != Kind::Exact
}

fn remarks(comparison: &Comparison) -> Vec<String> {
    let empty = comparison.empty_gates.iter().map(|gate| format!("the gate `{gate}` compared nothing"));
    let not_compared = comparison.not_compared.iter().map(|what| format!("not compared: {what}"));
    let all = comparison.notes.iter().cloned().chain(not_compared).chain(empty);
    all.map(|remark| plain(&remark)).collect()
}
