//! What each precision wrote, side by side.

use super::Terminal;
use super::case::Case;
use super::grid::wrap;
use super::table::TextStyle;
use crate::record::{Record, Status};

/// Columns of a text at least; narrower, and texts stand below each other.
const MIN_COLUMNS: usize = 28;

/// Columns of a text where nothing is known of the terminal.
const COLUMNS: usize = 100;

/// Lines of a text at most; the record has all of it.
const MOST_LINES: usize = 24;

/// The texts of a case under its precisions, and where each leaves fp16's; empty where no record has one.
pub fn side_by_side(case: &Case, terminal: &Terminal) -> String {
    let rows: Vec<(String, &Record, &str)> = case
        .rows()
        .filter(|(_, record)| record.status == Status::Ok)
        .filter_map(|(run, record)| Some((case.label(run, record), record, record.output.text.as_deref()?)))
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let base = rows.iter().find(|(_, record, _)| record.precision == "fp16").map(|(_, record, _)| *record);
    let heads: Vec<String> = rows.iter().map(|(label, record, _)| head(label, record, base)).collect();
    let total = terminal.columns.unwrap_or(COLUMNS);
    let width = (total + 2) / rows.len() - 2;
    let texts = rows.iter().map(|(_, _, text)| *text);
    if rows.len() > 1 && terminal.columns.is_some() && width >= MIN_COLUMNS {
        let columns: Vec<Vec<String>> = heads.iter().zip(texts).map(|(head, text)| column(head, text, width)).collect();
        return format!("\n{}", beside(&columns, width, terminal));
    }
    let below = |(head, text): (&String, &str)| {
        format!("\n{}\n{}\n", terminal.paint(TextStyle::Bold, head), lines(text, total).join("\n"))
    };
    heads.iter().zip(texts).map(below).collect()
}

/// `nf4, differs from fp16 from token 7 of 64`.
fn head(label: &str, record: &Record, base: Option<&Record>) -> String {
    let ids = &record.output.token_ids;
    let Some(base) = base.filter(|base| !std::ptr::eq(*base, record)) else { return label.to_owned() };
    let others = &base.output.token_ids;
    match ids.iter().zip(others).position(|(a, b)| a != b) {
        None if ids.len() == others.len() => format!("{label}, as fp16"),
        at => format!("{label}, from token {} not as fp16", at.unwrap_or(ids.len().min(others.len())) + 1),
    }
}

fn column(head: &str, text: &str, width: usize) -> Vec<String> {
    let mut column: Vec<String> = wrap(head, Some(width), 0).split('\n').map(|line| cut(line, width)).collect();
    // All texts begin in one line.
    column.resize(2, String::new());
    column.extend(lines(text, width));
    column
}

/// Lines of a text, without what a terminal would obey.
fn lines(text: &str, width: usize) -> Vec<String> {
    let clean = |line: &str| line.chars().filter(|c| !c.is_control()).collect::<String>();
    let wrapped = text.trim_end().lines().map(|line| wrap(clean(line).trim_end(), Some(width), 0));
    let mut lines: Vec<String> =
        wrapped.flat_map(|text| text.split('\n').map(|line| cut(line, width)).collect::<Vec<_>>()).collect();
    if lines.len() > MOST_LINES {
        lines.truncate(MOST_LINES);
        lines.push("…".to_owned());
    }
    lines
}

/// A word may be longer than a column.
fn cut(line: &str, width: usize) -> String {
    if line.chars().count() <= width { line.to_owned() } else { line.chars().take(width - 1).chain(['…']).collect() }
}

fn beside(columns: &[Vec<String>], width: usize, terminal: &Terminal) -> String {
    let n_lines = columns.iter().map(Vec::len).max().unwrap_or(0);
    let line = |at: usize| {
        let cells = columns.iter().map(|column| format!("{:<width$}", column.get(at).map_or("", String::as_str)));
        let line = cells.collect::<Vec<_>>().join("  ");
        let line = line.trim_end();
        (if at < 2 && !line.is_empty() { terminal.paint(TextStyle::Bold, line) } else { line.to_owned() }) + "\n"
    };
    // A second line of heads is there where one of them needs it.
    let is_head = |at: usize| at == 1 && columns.iter().all(|column| column[1].is_empty());
    (0..n_lines).filter(|at| !is_head(*at)).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Document;
    use crate::report::case;

    fn document() -> Document {
        let text = include_str!("../../tests/golden/records/three_precisions.json");
        let mut document: Document = serde_json::from_str(text).expect("an example");
        let said = [
            ("Paris, the capital of\nFrance.", [1, 2, 3]),
            ("Paris, a city.", [1, 2, 4]),
            ("Paris, the capital of\nFrance.", [1, 2, 3]),
        ];
        for (record, (text, ids)) in document.records.iter_mut().zip(said) {
            record.output.text = Some(text.to_owned() + "\x1b[31m");
            record.output.token_ids = ids.to_vec();
        }
        document
    }

    #[test]
    fn texts_stand_side_by_side_where_there_is_room() {
        let document = document();
        let cases = case::cases(&document);
        let at = |columns| side_by_side(&cases[0], &Terminal { columns, colour: false });
        let wide = at(Some(90));
        let lines: Vec<&str> = wide.lines().collect();
        assert_eq!(lines[1], "fp16                          int8, from token 3 not as     nf4, as fp16");
        assert_eq!(lines[2], "                              fp16");
        assert_eq!(lines[3], "Paris, the capital of         Paris, a city.[31m            Paris, the capital of");
        assert!(wide.lines().all(|line| line.chars().count() <= 90 && !line.contains('\x1b')), "{wide}");
        let narrow = at(Some(60));
        assert!(
            narrow.starts_with("\nfp16\nParis, the capital of\nFrance.[31m\n\nint8, from token 3 not as fp16\n"),
            "{narrow}"
        );
        assert_eq!(at(None), narrow);
    }
}
