//! `quantbench history`: runs kept in a folder, and the newest against those before it.

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand, ValueHint};

use super::compare::{Judgement, format, format_names, output_file};
use crate::error::BadInput;
use crate::report::compare::{self, CompareFormat, DEFAULT_GATES, Order};
use crate::report::history;

/// What was typed for `quantbench history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    #[command(subcommand)]
    pub command: HistoryCommand,
}

#[derive(Debug, Subcommand)]
pub enum HistoryCommand {
    /// Append the records of files to the history.
    Add(AddArgs),
    /// Test the newest run of each case against the runs before it on the same machine, and fail on a proven regression.
    Check(HistoryCheckArgs),
    /// Show what the history holds.
    List(ListArgs),
}

#[derive(Debug, Args)]
pub struct AddArgs {
    /// Files of records (.json or .jsonl).
    #[arg(value_name = "RESULTS", required = true, value_hint = ValueHint::FilePath)]
    pub results: Vec<PathBuf>,

    #[command(flatten)]
    pub folder: FolderArgs,
}

#[derive(Debug, Args)]
pub struct HistoryCheckArgs {
    /// Records to test instead of the newest of the history, which need not be in it.
    #[arg(value_name = "RESULT", value_hint = ValueHint::FilePath)]
    pub result: Option<PathBuf>,

    #[command(flatten)]
    pub folder: FolderArgs,

    /// Earlier runs to compare with, at most.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one, help_heading = "Comparison")]
    pub last: usize,

    /// Gates, comma separated, as `quantbench compare` takes them [default: decode_tps:-5%,peak_bytes:+3%].
    #[arg(long, value_name = "GATES", help_heading = "Comparison")]
    pub fail_on: Option<String>,

    /// End with exit code 3 also where the runs are undecided.
    #[arg(long, help_heading = "Comparison")]
    pub strict: bool,

    /// Format of stdout [default: table].
    #[arg(long, value_name = "FORMAT", value_parser = format_names(), help_heading = "Output")]
    pub format: Option<String>,

    /// File to write the comparison to as well: .txt, .md or .json.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub folder: FolderArgs,

    /// Format of stdout [default: table].
    #[arg(long, value_name = "FORMAT", value_parser = list_names(), help_heading = "Output")]
    pub format: Option<String>,
}

/// Where the history is.
#[derive(Debug, Args)]
pub struct FolderArgs {
    /// Folder of the history, to be committed to git.
    #[arg(long, value_name = "DIR", default_value = "quantbench-history", value_hint = ValueHint::DirPath, help_heading = "History")]
    pub dir: PathBuf,
}

/// A check as it will happen.
pub struct HistoryCheckRequest {
    pub rules: history::CheckRules,
    pub judgement: Judgement,
    pub stdout: &'static CompareFormat,
    pub file: Option<(PathBuf, &'static CompareFormat)>,
}

impl HistoryCheckRequest {
    /// Fails with [`BadInput`] on a gate that is none, or an output that cannot be written.
    pub fn new(args: &HistoryCheckArgs) -> Result<Self> {
        let gates = compare::gates(args.fail_on.as_deref().unwrap_or(DEFAULT_GATES))?;
        let rules = compare::Rules { gates: gates.clone(), allow_different_machine: false, order: Order::Apart };
        Ok(Self {
            rules: history::CheckRules { gates, n_last: args.last },
            judgement: Judgement { rules, is_named: args.fail_on.is_some(), strict: args.strict },
            stdout: format(args.format.as_deref().unwrap_or("table"))?,
            file: args.output.as_deref().map(output_file).transpose()?,
        })
    }
}

impl ListArgs {
    /// The format that was asked for.
    pub fn format(&self) -> Result<&'static history::ListFormat, BadInput> {
        let name = self.format.as_deref().unwrap_or("table");
        history::find(name).ok_or_else(|| BadInput::new(format!("unknown format `{name}` of a list")))
    }
}

fn list_names() -> PossibleValuesParser {
    PossibleValuesParser::new(history::FORMATS.iter().map(|format| format.name))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "a whole number from 1 on is needed".to_owned())
}
