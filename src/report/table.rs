//! The default output: a table for people, one for each case.

use anyhow::Result;

use super::case::{self, Case};
use super::columns::{self, Extent, Row, Sheet};
use super::grid::{self, Line, wrap};
use super::{Options, Terminal, Writer, break_even, largest, modules, pivot, texts, verdict, warnings};
use crate::record::Document;

pub const WRITER: Writer = Writer {
    name: "table",
    extensions: &["txt"],
    doc: "a table for people: one row per precision, a verdict above and warnings below",
    write,
};

fn write(document: &Document, options: &Options) -> Result<String> {
    let cases = case::cases(document);
    let mut blocks: Vec<_> = cases.iter().map(|case| block(case, options)).collect();
    blocks.extend(pivot::table(&cases, &options.terminal));
    blocks.extend(break_even::table(&cases, &options.terminal));
    blocks.extend(largest::claim(&document.records).map(|claim| wrap(&claim, options.terminal.columns, 2) + "\n"));
    Ok(blocks.join("\n"))
}

fn block(case: &Case, options: &Options) -> String {
    let terminal = &options.terminal;
    let mut sheet = columns::sheet(case, Extent { wide: options.wide, changes: true });
    let notes = std::mem::take(&mut sheet.notes);
    let verdicts = verdict::verdicts(case, options.card_bytes);
    let verdicts: String =
        verdicts.iter().map(|verdict| wrap(&verdict.to_string(), terminal.columns, 2) + "\n").collect();
    let title = terminal.paint(TextStyle::Bold, &wrap(&case.title(), terminal.columns, 2));
    let mut text = format!("{title}\n{verdicts}\n{}", grid(sheet, case.runs.len(), terminal));
    text += &paragraph(&notes, terminal);
    text += &modules::tables(case, terminal);
    if options.show_text {
        text += &texts::side_by_side(case, terminal);
    }
    text + &warning_lines(case, options)
}

fn warning_lines(case: &Case, options: &Options) -> String {
    let terminal = &options.terminal;
    let lines = if options.all_warnings { case::warnings(case) } else { warnings::grouped(case) };
    let (label, columns) = (terminal.paint(TextStyle::Yellow, "warning:"), terminal.columns);
    let line = |line: &String| match line.starts_with('…') {
        true => format!("{line}\n"),
        // The label's colours take no room.
        false => wrap(&format!("warning: {line}"), columns, 2).replacen("warning:", &label, 1) + "\n",
    };
    let lines: String = lines.iter().map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// Lines behind an empty one, if any.
fn paragraph(lines: &[String], terminal: &Terminal) -> String {
    let lines: String = lines.iter().map(|line| wrap(line, terminal.columns, 2) + "\n").collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// Lines of the header.
const N_HEADER: usize = 2;

fn grid(sheet: Sheet, n_runs: usize, terminal: &Terminal) -> String {
    let lines = lines(with_short_runs(sheet, terminal));
    let n_fixed = if n_runs > 1 { 2 } else { 1 };
    let painted = |(index, text): (usize, String)| match &lines[index] {
        Line::Span(..) => terminal.paint(TextStyle::Red, &wrap(&text, terminal.columns, 2)) + "\n",
        Line::Cells(_) if index < N_HEADER => terminal.paint(TextStyle::Dim, &text) + "\n",
        Line::Cells(_) => text + "\n",
    };
    let blocks = grid::fold(&lines, terminal.columns, n_fixed).into_iter();
    blocks.map(|block| block.into_iter().map(painted).collect::<String>()).collect::<Vec<_>>().join("\n")
}

/// Names each run by its short name, which the verdicts explain, where names would take more than half of the terminal.
fn with_short_runs(mut sheet: Sheet, terminal: &Terminal) -> Sheet {
    let width = |row: &Row| row.precision.chars().count() + row.run.as_ref().map_or(0, |run| run.chars().count() + 2);
    let widest = sheet.rows.iter().map(width).max().unwrap_or(0);
    if terminal.columns.is_some_and(|columns| widest > columns / 2) {
        for row in sheet.rows.iter_mut().filter(|row| row.run.is_some()) {
            row.run = Some(row.short_run.clone());
        }
    }
    sheet
}

fn lines(sheet: Sheet) -> Vec<Line> {
    let (names, units): (Vec<_>, Vec<_>) = sheet.headers.iter().map(|(n, u)| (n.to_string(), u.to_string())).unzip();
    let row = |row: Row| match row.values {
        Ok(values) => Line::Cells(std::iter::once(row.precision).chain(row.run).chain(values).collect()),
        Err(status) => {
            let run = row.run.map(|run| format!("{run}: ")).unwrap_or_default();
            Line::Span(row.precision, format!("{run}{status}"))
        }
    };
    [Line::Cells(names), Line::Cells(units)].into_iter().chain(sheet.rows.into_iter().map(row)).collect()
}

/// How a terminal shows a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextStyle {
    Bold,
    Dim,
    Red,
    Yellow,
}

impl Terminal {
    /// `text` with the codes for it, where the terminal has colours. Each line has its own, so that a pager shows them all.
    pub(super) fn paint(&self, paint: TextStyle, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match paint {
            TextStyle::Bold => "1",
            TextStyle::Dim => "2",
            TextStyle::Red => "31",
            TextStyle::Yellow => "33",
        };
        text.split('\n').map(|line| format!("\x1b[{code}m{line}\x1b[0m")).collect::<Vec<_>>().join("\n")
    }
}
