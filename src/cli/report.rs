//! `quantbench report`: records to a page, a table or another format.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, ValueHint};

use crate::error::BadInput;
use crate::record::{Document, SCHEMA_VERSION};
use crate::report::{self, Options, WRITERS, Writer};

/// What was typed for `quantbench report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Files of records (.json or .jsonl); runs of the same work stand in one table, in the order of the files.
    #[arg(value_name = "RESULTS", required = true, value_hint = ValueHint::FilePath)]
    pub results: Vec<PathBuf>,

    /// File to write, in the format of its extension; without it the report goes to stdout.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,

    /// Format, where the file's extension does not name it [default: table on stdout].
    #[arg(long, value_name = "FORMAT", value_parser = writer_names(), help_heading = "Output")]
    pub format: Option<String>,

    /// Folder to write every chart to as an .svg file of its own; it is made where it is missing.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Output")]
    pub svg: Option<PathBuf>,

    /// Show every column of the table.
    #[arg(long, help_heading = "Output")]
    pub wide: bool,

    /// Show what each precision wrote below the table.
    #[arg(long, help_heading = "Output")]
    pub show_text: bool,

    /// Show every warning in full [default: the worst five, grouped].
    #[arg(long, help_heading = "Output")]
    pub warnings: bool,

    /// GiB of a card's memory, in place of what the records name: the verdict says which precisions fit.
    #[arg(long, value_name = "GIB", value_parser = gib, help_heading = "Output")]
    pub card: Option<u64>,
}

/// A report as it will be written.
pub struct ReportRequest {
    pub document: Document,
    pub output: Destination,
    pub svg: Option<PathBuf>,
    pub options: Options,
}

pub enum Destination {
    File(PathBuf, &'static Writer),
    Stdout(&'static Writer),
}

impl ReportRequest {
    /// Fails with [`BadInput`] on a file without records and on an output that cannot be written.
    pub fn new(args: &ReportArgs) -> Result<Self> {
        let output = output(args.output.as_deref(), args.format.as_deref(), "table")?;
        let mut records = Vec::new();
        for path in &args.results {
            records.extend(report::read(path)?.records);
        }
        let document = Document { schema_version: SCHEMA_VERSION, records: report::by_case(records) };
        Ok(Self {
            document,
            output,
            svg: args.svg.clone(),
            options: Options {
                wide: args.wide,
                card_bytes: args.card,
                all_warnings: args.warnings,
                show_text: args.show_text,
                ..Options::default()
            },
        })
    }
}

/// A file in the format of its extension or the one named, or stdout. Fails before anything is written.
pub(super) fn output(path: Option<&Path>, format: Option<&str>, usual: &str) -> Result<Destination> {
    let Some(path) = path else { return Ok(Destination::Stdout(writer(format.unwrap_or(usual))?)) };
    let writer = format.map_or_else(|| report::by_extension(path), |format| Ok(writer(format)?))?;
    report::check_writable(path)?;
    Ok(Destination::File(path.to_owned(), writer))
}

fn writer(name: &str) -> Result<&'static Writer, BadInput> {
    report::find(name).ok_or_else(|| BadInput::new(format!("unknown output format `{name}`")))
}

pub(super) fn writer_names() -> PossibleValuesParser {
    let values = WRITERS.iter().map(|writer| {
        let earlier = report::RENAMED.iter().filter(|(_, new)| *new == writer.name).map(|(old, _)| *old);
        PossibleValue::new(writer.name).aliases(earlier)
    });
    PossibleValuesParser::new(values)
}

/// Bytes of so many GiB.
pub(super) fn gib(text: &str) -> Result<u64, String> {
    match text.trim().trim_end_matches("GiB").trim_end().parse::<f64>() {
        Ok(gib) if gib.is_finite() && gib > 0.0 => Ok((gib * (1u64 << 30) as f64) as u64),
        _ => Err("a number of GiB above 0 is needed, such as 8".into()),
    }
}
