//! Reports: what a reader sees of a document. A report is made from records alone and never sees a tensor or a
//! terminal.
//!
//! An output is one file here and one line in [`WRITERS`]. Machine output keeps bytes and `null`; tables for people
//! show GiB (2^30) and `-`.

mod break_even;
mod case;
mod charts;
mod columns;
mod command;
pub mod compare;
mod csv;
pub mod doctor;
pub mod dry_run;
mod file;
pub mod grid;
pub mod history;
mod html;
mod json;
mod largest;
mod limits;
mod markdown;
mod markup;
mod modules;
mod peers;
mod pivot;
mod read;
mod table;
mod texts;
mod verdict;
mod warnings;

pub use case::{by_case, label, status_word};
pub use command::{private_words, quote, shareable_command};
pub use file::{check_writable, write_file};
pub use html::pictures;
pub use limits::{ModelBytes, PrecisionBytes, limits};
pub use read::read;

use std::path::Path;

use anyhow::Result;

use crate::error::BadInput;
use crate::record::Document;

/// How a report is written; the defaults are the narrow table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Every column that the records can fill. Machine output is always whole.
    pub wide: bool,
    /// Memory of a card that the verdict names what fits into.
    pub card_bytes: Option<u64>,
    /// Each warning in full; else they are grouped, and the first few are shown.
    pub all_warnings: bool,
    /// Shows the text of each precision below its table.
    pub show_text: bool,
    /// Width and colour of what people read.
    pub terminal: Terminal,
}

/// Width and colour of a table for people. The default is a file: as wide as it comes, without colour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Terminal {
    /// Tables and texts are folded to so many; `None`: not at all.
    pub columns: Option<usize>,
    pub colour: bool,
}

/// A row of [`WRITERS`].
pub struct Writer {
    /// As `--format` takes it.
    pub name: &'static str,
    /// Of files, lower case and without the dot; the first is the usual one. Empty where only `--format` names it.
    pub extensions: &'static [&'static str],
    /// One sentence for help and README.
    pub doc: &'static str,
    /// The whole output, ending in a newline unless it is empty.
    pub write: fn(&Document, &Options) -> Result<String>,
}

/// Every output format, the default first.
pub static WRITERS: &[Writer] = &[
    table::WRITER,
    json::WRITER,
    json::LINES_WRITER,
    csv::WRITER,
    markdown::WRITER,
    html::WRITER,
    peers::summary::WRITER,
    peers::summary::CSV_WRITER,
    peers::llama_bench::WRITER,
    peers::github_action::WRITER,
];

/// Earlier names of writers, which are still taken.
pub static RENAMED: &[(&str, &str)] = &[("seed", "summary"), ("seed-csv", "summary-csv")];

/// The writer called `name`, now or earlier.
pub fn find(name: &str) -> Option<&'static Writer> {
    let name = RENAMED.iter().find(|(old, _)| *old == name).map_or(name, |(_, new)| new);
    WRITERS.iter().find(|writer| writer.name == name)
}

/// The writer for a file by its extension. Fails with [`BadInput`] where no writer has it.
pub fn by_extension(path: &Path) -> Result<&'static Writer> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let writer = WRITERS.iter().find(|writer| writer.extensions.contains(&extension.as_str()));
    writer.ok_or_else(|| {
        let known: Vec<_> = WRITERS.iter().flat_map(|w| w.extensions).map(|e| format!(".{e}")).collect();
        let seen = if extension.is_empty() { "no extension".into() } else { format!("extension `.{extension}`") };
        BadInput::new(format!("no output format for `{}`: {seen}, known are {}", path.display(), known.join(" ")))
            .hint("give the file one of these extensions")
            .into()
    })
}
