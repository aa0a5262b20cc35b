//! `quantbench suite` and `quantbench merge`: what was typed, and what the keys of a suite file are.

use std::path::PathBuf;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{ArgAction, Args, Parser, ValueHint};

use super::{Cli, Command, Request, RunArgs};
use crate::error::BadInput;
use crate::harness::Case;
use crate::report;
use crate::suite::{Planned, Shard, SuiteCase, SuiteKey, ValueKind};

/// What was typed for a suite.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// Suite file, for example configs/smoke.toml.
    #[arg(value_name = "FILE.toml", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    /// Go on where the output ends: cases that are in it do not run again.
    #[arg(long, requires = "output", help_heading = "Suite")]
    pub resume: bool,

    /// With --resume, run cases with a record that is not ok again.
    #[arg(long, requires = "resume", help_heading = "Suite")]
    pub retry_failed: bool,

    /// Stop after the first case that fails; otherwise the others go on.
    #[arg(long, help_heading = "Suite")]
    pub fail_fast: bool,

    /// Run part I of N [default: what a Slurm array or a Kubernetes Indexed Job says, else all].
    #[arg(long, value_name = "I/N", help_heading = "Suite")]
    pub shard: Option<String>,

    /// List the cases and exit.
    #[arg(long, help_heading = "Suite")]
    pub dry_run: bool,

    /// File that gets the records of each case as it ends [default: stdout].
    #[arg(short, long, value_name = "FILE.jsonl", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,

    /// Show no progress.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

/// What was typed for a merge.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Files of records (.jsonl or .json), as suites and runs write them.
    #[arg(value_name = "FILES", required = true, value_hint = ValueHint::FilePath)]
    pub files: Vec<PathBuf>,

    /// File to write atomically: a document where it ends in .json, else one record a line [default: stdout].
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,
}

impl SuiteArgs {
    /// The part to run: what was typed, else what the scheduler says.
    pub fn shard(&self) -> Result<Shard, BadInput> {
        match &self.shard {
            Some(text) => Shard::parse(text),
            None => Ok(Shard::from_env(&|name| std::env::var(name).ok())?.unwrap_or(Shard::WHOLE)),
        }
    }
}

/// Headings of the options that say what is measured: these are keys of a suite file.
const HEADINGS: &[&str] = &["Model", "Precision", "Workload", "Quality", "Device", "Protocol"];

/// Options under these headings that are about one run alone.
const NOT_IN_SUITES: &[&str] = &["list-models", "save-logits"];

/// Options whose list makes cases: that is what a suite's matrix is for.
const AXES: &[&str] = &["prompt-tokens", "max-new-tokens", "depth", "batch-size"];

/// Options that read a list from one text.
const LISTS: &[&str] = &["prompt-ids"];

/// The keys of a suite file: the options of `quantbench run`.
pub fn suite_keys() -> Vec<SuiteKey> {
    let command = RunArgs::augment_args(clap::Command::new("run"));
    let is_key = |arg: &&clap::Arg| arg.get_help_heading().is_some_and(|heading| HEADINGS.contains(&heading));
    let key = |arg: &clap::Arg| {
        let long = arg.get_long().filter(|long| !NOT_IN_SUITES.contains(long))?;
        let kind = match arg.get_action() {
            ArgAction::SetTrue => ValueKind::Switch,
            _ if AXES.contains(&long) => ValueKind::One,
            _ if arg.get_value_delimiter().is_some() || LISTS.contains(&long) => ValueKind::List,
            _ => ValueKind::One,
        };
        Some(SuiteKey { name: long.replace('-', "_"), kind })
    };
    command.get_arguments().filter(is_key).filter_map(key).collect()
}

/// A planned case through the same door as `quantbench run`. Fails on what that would refuse, and names the file's line.
pub fn suite_task(planned: Planned) -> Result<SuiteCase> {
    let command = planned.command();
    let refused = |message: &str| BadInput::new(planned.complain(message));
    let cli = Cli::try_parse_from(&command).map_err(|error| refused(&complaint(&error)))?;
    let Some(Command::Run(args)) = cli.command else {
        return Err(refused("these are no options of a run").into());
    };
    let command = report::shareable_command(command.into_iter());
    let request = Request::new(&args, command).map_err(|error| {
        let bad = refused(&format!("{error:#}"));
        match crate::error::hint(&error) {
            Some(hint) => bad.hint(hint),
            None => bad,
        }
    })?;
    match <[Case; 1]>::try_from(request.cases) {
        // The same work on every machine, so that its records can be merged.
        Ok([case]) if case.largest_batch => {
            Err(refused("`--batch-size max` makes a case of each precision").hint("give numbers of sequences").into())
        }
        Ok([case]) => Ok(SuiteCase { planned, case: Case { may_shorten: false, ..case } }),
        Err(_) => Err(refused("a list of lengths makes several cases").hint("put the lengths into `[matrix]`").into()),
    }
}

/// What the parser says, without its advice about help.
fn complaint(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.is_empty() || error.kind() == ErrorKind::DisplayHelp);
    lines.map(|line| line.trim_start_matches("error: ").trim()).collect::<Vec<_>>().join(" ")
}
