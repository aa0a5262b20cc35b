//! Markdown for issues and notes: the same rows as the table, the warnings, and the command to repeat it.

use anyhow::Result;

use super::case::{self, Case};
use super::columns::{self, Extent, Row, Sheet};
use super::{Options, Terminal, Writer, modules, verdict};
use crate::record::Document;

pub const WRITER: Writer = Writer {
    name: "markdown",
    extensions: &["md", "markdown"],
    doc: "the table for issues and notes, with the command that repeats it",
    write,
};

fn write(document: &Document, options: &Options) -> Result<String> {
    let blocks: Vec<_> = case::cases(document).iter().map(|case| block(case, options)).collect();
    Ok(blocks.join("\n"))
}

fn block(case: &Case, options: &Options) -> String {
    let sheet = columns::sheet(case, Extent { wide: options.wide, changes: true });
    let mut text = format!("## {}\n\n", escape(&case.title()));
    for verdict in verdict::verdicts(case, options.card_bytes) {
        text += &format!("{}\n\n", escape(&verdict.to_string()));
    }
    text += &rows(&sheet);
    if !sheet.notes.is_empty() {
        text += &format!("\n{}.\n", escape(&sheet.notes.join(". ")));
    }
    let modules = modules::tables(case, &Terminal::default());
    if !modules.is_empty() {
        text += &format!("\n{}", fenced(modules.trim_matches('\n')));
    }
    let warnings = case::warnings(case);
    if !warnings.is_empty() {
        text += "\nWarnings:\n\n";
    }
    for warning in warnings {
        text += &format!("- {}\n", escape(&warning));
    }
    let commands = case::commands(case.records);
    if !commands.is_empty() {
        text += &format!("\nTo repeat it:\n\n{}", fenced(&commands.join("\n")));
    }
    text
}

fn rows(sheet: &Sheet) -> String {
    let header = |&(name, unit): &(&str, &str)| match unit {
        "" => name.to_owned(),
        unit => format!("{name}, {unit}"),
    };
    let marks = std::iter::once(":---").chain(std::iter::repeat("---:")).take(sheet.headers.len());
    let mut text = line(sheet.headers.iter().map(header)) + &line(marks.map(String::from));
    for Row { precision, run, values, short_run: _ } in &sheet.rows {
        let lead: Vec<String> = std::iter::once(precision).chain(run).cloned().collect();
        // A table has no spanning cells: a reason stands in the first column and the others stay empty.
        let values = match values {
            Ok(values) => values.clone(),
            Err(status) => {
                let empty = std::iter::repeat_n(String::new(), sheet.headers.len().saturating_sub(lead.len() + 1));
                std::iter::once(status.clone()).chain(empty).collect()
            }
        };
        text += &line(lead.into_iter().chain(values));
    }
    text
}

/// A row of a table.
pub(super) fn line(cells: impl Iterator<Item = String>) -> String {
    let cells: Vec<_> = cells.map(|cell| escape(&cell)).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Characters that Markdown or HTML would read as markup.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '|' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '#' | '~') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A code block whose fence is longer than any run of backticks in it.
fn fenced(code: &str) -> String {
    let code: String = code.chars().filter(|&c| c == '\n' || !c.is_control()).collect();
    let longest = code.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}sh\n{code}\n{fence}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_names_is_text() {
        assert_eq!(escape("a|b_c <i>"), "a\\|b\\_c \\<i\\>");
    }

    #[test]
    fn a_fence_outlasts_what_it_holds() {
        assert_eq!(fenced("echo hi"), "```sh\necho hi\n```\n");
        assert_eq!(fenced("a ```` b"), "`````sh\na ```` b\n`````\n");
    }
}
