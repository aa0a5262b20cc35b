//! The default output: a table for people, one for each case.

use anyhow::Result;

use super::columns::{self, Row, Sheet};
use super::grid::{self, Line};
use super::{Options, Writer, case, modules, verdict};
use crate::record::{Document, Record};

pub const WRITER: Writer = Writer {
    name: "table",
    extensions: &["txt"],
    doc: "a table for people: one row per precision, a verdict above and warnings below",
    write,
};

fn write(document: &Document, options: &Options) -> Result<String> {
    let blocks: Vec<_> = case::cases(document).map(|records| block(records, options)).collect();
    Ok(blocks.join("\n"))
}

fn block(records: &[Record], options: &Options) -> String {
    let rows = grid::render(&lines(columns::sheet(records, options.wide)));
    let mut text = format!("{}\n{}\n\n{rows}", case::title(records), verdict::verdict(records, options.card_bytes));
    text += &modules::tables(records);
    let warnings = case::warnings(records);
    if !warnings.is_empty() {
        text.push('\n');
    }
    for warning in warnings {
        text += &format!("warning: {warning}\n");
    }
    text
}

fn lines(sheet: Sheet) -> Vec<Line> {
    let (names, units): (Vec<_>, Vec<_>) = sheet.headers.iter().map(|(n, u)| (n.to_string(), u.to_string())).unzip();
    let row = |row: Row| match row.values {
        Ok(values) => Line::Cells(std::iter::once(row.precision).chain(values).collect()),
        Err(status) => Line::Span(row.precision, status),
    };
    [Line::Cells(names), Line::Cells(units)].into_iter().chain(sheet.rows.into_iter().map(row)).collect()
}
