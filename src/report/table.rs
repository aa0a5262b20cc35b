//! The default output: a table for people, one for each case.

use anyhow::Result;

use super::case::{self, Case};
use super::columns::{self, Extent, Row, Sheet};
use super::grid::{self, Line};
use super::{Options, Writer, modules, verdict};
use crate::record::Document;

pub const WRITER: Writer = Writer {
    name: "table",
    extensions: &["txt"],
    doc: "a table for people: one row per precision, a verdict above and warnings below",
    write,
};

fn write(document: &Document, options: &Options) -> Result<String> {
    let blocks: Vec<_> = case::cases(document).iter().map(|case| block(case, options)).collect();
    Ok(blocks.join("\n"))
}

fn block(case: &Case, options: &Options) -> String {
    let mut sheet = columns::sheet(case, Extent { wide: options.wide, changes: true });
    let notes = std::mem::take(&mut sheet.notes);
    let verdicts: String =
        verdict::verdicts(case, options.card_bytes).iter().map(|verdict| format!("{verdict}\n")).collect();
    let mut text = format!("{}\n{verdicts}\n{}", case.title(), grid::render(&lines(sheet)));
    text += &paragraph("", &notes);
    text += &modules::tables(case);
    text + &paragraph("warning: ", &case::warnings(case))
}

/// Lines behind an empty one, if any.
fn paragraph(start: &str, lines: &[String]) -> String {
    let lines: String = lines.iter().map(|line| format!("{start}{line}\n")).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
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
