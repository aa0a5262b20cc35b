//! `quantbench compare`, and what a run that compares itself says the same way.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueHint};

use crate::error::BadInput;
use crate::record::Document;
use crate::report;
use crate::report::compare::{self, CompareFormat, DEFAULT_GATES, Order, Rules};

/// What was typed for `quantbench compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Records to compare against (.json or .jsonl).
    #[arg(value_name = "BASE", value_hint = ValueHint::FilePath)]
    pub base: PathBuf,

    /// Records to compare.
    #[arg(value_name = "NEW", value_hint = ValueHint::FilePath)]
    pub new: PathBuf,

    #[command(flatten)]
    pub gate: GateArgs,

    /// Format of stdout [default: table].
    #[arg(long, value_name = "FORMAT", value_parser = format_names(), help_heading = "Output")]
    pub format: Option<String>,

    /// File to write the comparison to as well: .txt, .md or .json.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,
}

/// What counts as a regression.
#[derive(Debug, Args)]
pub struct GateArgs {
    /// Gates, comma separated: METRIC:-5% or METRIC:+3%, METRIC:+X in its unit, METRIC alone for equality; also token_ids and
    /// weights.hash [default: decode_tps:-5%,peak_bytes:+3%].
    #[arg(long, value_name = "GATES", help_heading = "Comparison")]
    pub fail_on: Option<String>,

    /// End with exit code 3 also where the runs are undecided.
    #[arg(long, help_heading = "Comparison")]
    pub strict: bool,

    /// Compare although device, instruction set, threads, driver, engine or build profile differ.
    #[arg(long, help_heading = "Comparison")]
    pub allow_different_machine: bool,
}

/// What a run compares itself with.
#[derive(Debug, Args)]
pub struct AgainstArgs {
    /// Records of an earlier run to compare this one with.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "ab", help_heading = "Comparison")]
    pub baseline: Option<PathBuf>,

    /// Another build of quantbench to compare this one with, repeat by repeat in turn.
    #[arg(long, value_name = "BINARY", value_hint = ValueHint::ExecutablePath, help_heading = "Comparison")]
    pub ab: Option<PathBuf>,

    #[command(flatten)]
    pub gate: GateArgs,
}

/// A comparison as it will happen.
pub struct CompareRequest {
    pub base: Document,
    pub new: Document,
    pub judgement: Judgement,
    pub stdout: &'static CompareFormat,
    pub file: Option<(PathBuf, &'static CompareFormat)>,
}

/// How two documents are judged, and what the exit code makes of it.
pub struct Judgement {
    pub rules: Rules,
    /// The gates were named: one that compares nothing is a mistake then.
    pub is_named: bool,
    pub strict: bool,
}

/// What a run is held against.
pub enum Against {
    Baseline(Document),
    Binary(PathBuf),
}

impl CompareRequest {
    /// Fails with [`BadInput`] on a file without records, a gate that is none, or an output that cannot be written.
    pub fn new(args: &CompareArgs) -> Result<Self> {
        Ok(Self {
            judgement: Judgement::new(&args.gate, Order::Apart)?,
            base: report::read(&args.base)?,
            new: report::read(&args.new)?,
            stdout: format(args.format.as_deref().unwrap_or("table"))?,
            file: args.output.as_deref().map(output_file).transpose()?,
        })
    }
}

impl Judgement {
    fn new(args: &GateArgs, order: Order) -> Result<Self, BadInput> {
        let gates = compare::gates(args.fail_on.as_deref().unwrap_or(DEFAULT_GATES))?;
        let rules = Rules { gates, allow_different_machine: args.allow_different_machine, order };
        Ok(Self { rules, is_named: args.fail_on.is_some(), strict: args.strict })
    }
}

impl AgainstArgs {
    /// What to compare with and how, if anything. Fails with [`BadInput`] before anything is measured.
    pub fn request(&self) -> Result<Option<(Against, Judgement)>> {
        let gate = &self.gate;
        if let Some(path) = &self.baseline {
            let judgement = Judgement::new(gate, Order::Apart)?;
            return Ok(Some((Against::Baseline(report::read(path)?), judgement)));
        }
        if let Some(path) = &self.ab {
            let judgement = Judgement::new(gate, Order::Interleaved)?;
            return Ok(Some((Against::Binary(binary(path)?), judgement)));
        }
        let typed = [("--fail-on", gate.fail_on.is_some()), ("--strict", gate.strict)];
        let typed = typed.into_iter().chain([("--allow-different-machine", gate.allow_different_machine)]);
        match typed.into_iter().find(|(_, is_typed)| *is_typed) {
            None => Ok(None),
            Some((option, _)) => Err(BadInput::new(format!("`{option}` needs `--baseline` or `--ab`"))
                .hint("add `--baseline FILE` or `--ab BINARY`, or use `quantbench compare BASE NEW`")
                .into()),
        }
    }
}

fn binary(path: &Path) -> Result<PathBuf, BadInput> {
    let bad = |why: String| BadInput::new(format!("`--ab {}`: {why}", path.display()));
    let found = path.canonicalize().map_err(|error| bad(error.to_string()))?;
    if found.is_file() { Ok(found) } else { Err(bad("it is no file".into())) }
}

pub(super) fn format(name: &str) -> Result<&'static CompareFormat, BadInput> {
    compare::find(name).ok_or_else(|| BadInput::new(format!("unknown format `{name}` of a comparison")))
}

pub(super) fn output_file(path: &Path) -> Result<(PathBuf, &'static CompareFormat)> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let name = match extension.as_str() {
        "txt" => "table",
        "md" | "markdown" => "markdown",
        "json" => "json",
        other => {
            let message = format!("no format of a comparison for `{}`: seen `{other}`", path.display());
            return Err(BadInput::new(message).hint("known extensions are .txt .md .json").into());
        }
    };
    report::check_writable(path)?;
    Ok((path.to_owned(), format(name)?))
}

pub(super) fn format_names() -> PossibleValuesParser {
    PossibleValuesParser::new(compare::FORMATS.iter().map(|format| format.name))
}
