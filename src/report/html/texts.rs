//! What each precision wrote, side by side, with the place where it departs from the first.

use super::line;
use crate::record::{Record, Status};
use crate::report::case::{self, Case};
use crate::report::markup::escape;

/// Empty where no row has a text, as with random weights.
pub fn texts(case: &Case) -> String {
    let run = case.newest_run();
    let is_told = |record: &&Record| record.status == Status::Ok && text_of(record).is_some();
    let records: Vec<&Record> = run.records.iter().filter(is_told).collect();
    // The first of fp16, which the others are read against.
    let Some(base) = records.iter().find(|record| record.precision == "fp16").or(records.first()) else {
        return String::new();
    };
    let reference = text_of(base).unwrap_or_default();
    let column = |record: &&Record| {
        let text = text_of(record).unwrap_or_default();
        let (same, differs) = if std::ptr::eq(*record, *base) { (text, "") } else { departed(reference, text) };
        let differs = if differs.is_empty() { String::new() } else { format!("<mark>{}</mark>", shown(differs)) };
        format!("<div><h4>{}</h4><p>{}{differs}</p></div>\n", line(&case::label(record, case.records)), shown(same))
    };
    let columns: String = records.iter().map(column).collect();
    let others = records.iter().filter(|record| text_of(record) != Some(reference)).count();
    let base = line(&case::label(base, case.records));
    let note = match (records.len(), others) {
        (1, _) => String::new(),
        (_, 0) => "<p class=\"notes\">All wrote the same.</p>\n".to_owned(),
        _ => format!("<p class=\"notes\">Marked from where it departs from {base}.</p>\n"),
    };
    format!(
        "<section class=\"written\">\n<h3>Generated text</h3>\n{note}<div class=\"texts\">\n{columns}</div>\n</section>\n"
    )
}

fn text_of(record: &Record) -> Option<&str> {
    record.output.text.as_deref().filter(|text| !text.trim().is_empty())
}

/// `text` up to where it departs from `reference`, and the rest.
fn departed<'a>(reference: &str, text: &'a str) -> (&'a str, &'a str) {
    let same = text.char_indices().zip(reference.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
    text.split_at(same.unwrap_or_else(|| text.len().min(reference.len())))
}

/// With its line breaks and without other control characters.
fn shown(text: &str) -> String {
    escape(&text.chars().filter(|&c| c == '\n' || !c.is_control()).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_part_at_a_letter() {
        for (reference, text, expected) in [
            ("a cat", "a cat", ("a cat", "")),
            ("a cat", "a cow", ("a c", "ow")),
            ("a", "ab", ("a", "b")),
            ("naïve", "naïf", ("naï", "f")),
            ("ab", "a", ("a", "")),
            ("", "x", ("", "x")),
        ] {
            assert_eq!(departed(reference, text), expected, "{reference} {text}");
        }
    }
}
