//! What each precision wrote, side by side.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::Terminal;
use super::case::Case;
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
    let mut column = folded(head, width);
    // All texts begin in one line.
    column.resize(2, String::new());
    column.extend(lines(text, width));
    column
}

/// Lines of a text, without what a terminal would obey.
fn lines(text: &str, width: usize) -> Vec<String> {
    let clean = |line: &str| line.chars().filter(|c| !c.is_control()).collect::<String>();
    let mut lines: Vec<String> =
        text.trim_end().lines().flat_map(|line| folded(clean(line).trim_end(), width)).collect();
    if lines.len() > MOST_LINES {
        lines.truncate(MOST_LINES);
        lines.push("…".to_owned());
    }
    lines
}

/// A line in lines of at most `width` columns, cut between words, and within those that are wider: text of some languages has no blanks. A
/// character of these takes two columns.
fn folded(line: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in line.split_inclusive(' ') {
        if used > 0 && used + word.trim_end().width() > width {
            lines.push(String::new());
            used = 0;
        }
        for c in word.chars() {
            let columns = c.width().unwrap_or(0);
            if used + columns > width && c != ' ' {
                lines.push(String::new());
                used = 0;
            }
            lines.last_mut().expect("never empty").push(c);
            used += columns;
        }
    }
    lines.into_iter().map(|line| line.trim_end().to_owned()).collect()
}

fn beside(columns: &[Vec<String>], width: usize, terminal: &Terminal) -> String {
    let n_lines = columns.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |text: &str| format!("{text}{}", " ".repeat(width.saturating_sub(text.width())));
    let line = |at: usize| {
        let cells = columns.iter().map(|column| cell(column.get(at).map_or("", String::as_str)));
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
    fn lines_are_cut_by_columns_and_lose_nothing() {
        assert_eq!(folded("one two three", 8), ["one two", "three"]);
        assert_eq!(folded("extraordinary word", 6), ["extrao", "rdinar", "y word"]);
        assert_eq!(folded("巴黎是法国的首都。", 10), ["巴黎是法国", "的首都。"]);
        assert_eq!(folded("a 巴黎是法国的首都。", 9), ["a", "巴黎是法", "国的首都", "。"]);
        assert_eq!(folded("", 9), [""]);
        let columns = [vec!["a".to_owned(), "巴黎".to_owned()], vec!["b".to_owned(), "Paris".to_owned()]];
        let text = beside(&columns, 6, &Terminal::default());
        assert_eq!(text, "a       b\n巴黎    Paris\n");
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
