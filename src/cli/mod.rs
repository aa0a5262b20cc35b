//! The command line in two stages: what was typed ([`Cli`], no I/O) and what it means ([`Request`], checked).
//!
//! Value lists, defaults, help, completions and the man page come from here and from the tables of the layers below.

mod brief;
mod cases;
mod compare;
mod engines;
mod export;
mod groups;
mod history;
mod import;
mod method;
mod prompt;
mod report;
mod request;
mod suite;
mod words;

pub use compare::{Against, AgainstArgs, CompareArgs, CompareRequest, GateArgs, Judgement};
pub use export::{ExportArgs, ExportForm, ExportRequest};
pub use groups::{
    BatchWord, DeviceArgs, ModelArgs, OutputArgs, PathWord, PictureArgs, PlainFormat, PrecisionArgs, PromptArgs,
    TextArgs, WeightsWord,
};
pub use history::{AddArgs, HistoryArgs, HistoryCheckArgs, HistoryCheckRequest, HistoryCommand, ListArgs};
pub use import::{ImportArgs, ImportRequest};
pub use method::MethodArgs;
pub use report::{Destination, ReportArgs, ReportRequest};
pub use request::Request;
pub use suite::{MergeArgs, SuiteArgs, suite_keys, suite_task};

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueHint};

use self::groups::{engine_help, engine_names};
use crate::engine::Engine;
use crate::harness::MeasurementProtocol;

/// The built-in model that a run without `--model-id` measures on a CPU.
pub const DEFAULT_MODEL_ID: &str = "smollm2-135m";
/// And on a GPU, where a step of the smaller one is over sooner than it can be launched: it would show launches, not precisions. On a CPU with
/// a large cache the smaller one would show the cache.
pub const DEFAULT_CUDA_MODEL_ID: &str = "llama-3.2-1b";

/// Version, commit, features and target of this build, on one line.
pub static VERSION: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{} (commit {}, features {}, target {})",
        env!("CARGO_PKG_VERSION"),
        env!("QUANTBENCH_COMMIT"),
        if cfg!(feature = "cuda") { "cuda" } else { "none" },
        env!("QUANTBENCH_TARGET"),
    )
});

/// Measures the trade-offs of each precision of a language model on this machine: speed, memory and quality.
#[derive(Debug, Parser)]
#[command(name = "quantbench", version = VERSION.as_str(), args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub run: RunArgs,

    /// Colour of what a terminal shows: auto, always or never.
    #[arg(
        long, global = true, value_name = "WHEN", value_enum, default_value_t = clap::ColorChoice::Auto,
        hide_possible_values = true, help_heading = "Output"
    )]
    pub color: clap::ColorChoice,
}

impl Cli {
    /// What was typed, the program first. Ends the program where it is no command, and where help was asked for.
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Self {
        let words = words::joined(words);
        let command = if words.iter().any(|word| word == "-h") { brief::command() } else { Self::command() };
        let parsed = command.color(words::color(&words)).try_get_matches_from(words);
        let cli = parsed.and_then(|mut matches| Self::from_arg_matches_mut(&mut matches));
        cli.unwrap_or_else(|error| error.exit())
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure a model (what happens without a subcommand).
    Run(Box<RunArgs>),
    /// Measure the quality of each precision, without its speed.
    Quality(Box<QualityArgs>),
    /// Run a matrix of models, precisions, devices and lengths that a TOML file describes.
    Suite(SuiteArgs),
    /// Join the results of several suites or machines.
    Merge(MergeArgs),
    /// Compare two files of records and fail on a proven regression.
    Compare(CompareArgs),
    /// Keep runs in a folder and test the newest against those before it.
    History(HistoryArgs),
    /// Read rows that llama-bench, vLLM or optimum-benchmark measured.
    Import(ImportArgs),
    /// Turn files of records into a page with charts, or into another format.
    Report(ReportArgs),
    /// Write a quantized checkpoint that transformers and bitsandbytes load unchanged.
    Export(ExportArgs),
    /// Show what this machine has for measuring, what is missing, and what to do about it.
    Doctor(DoctorArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Shell to complete for.
        shell: clap_complete::Shell,
    },
    /// Print the man page of quantbench or of one of its commands in roff.
    Man(ManArgs),
    /// Run one case for a suite.
    #[command(hide = true)]
    Case,
    /// Load and time one precision for a parent process.
    #[command(hide = true)]
    Worker,
}

/// What was typed for a run.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Print the built-in models and exit.
    #[arg(long, help_heading = "Model")]
    pub list_models: bool,

    #[command(flatten)]
    pub precision: PrecisionArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    #[command(flatten)]
    pub picture: PictureArgs,

    /// Tokens to generate, always exactly this many; a list makes a case of each [default: 64; 32, 16 or 8 where each
    /// takes long].
    #[arg(short = 'n', long, alias = "n-gen", value_name = "N", value_delimiter = ',', help_heading = "Workload")]
    pub max_new_tokens: Vec<usize>,

    /// Synthetic tokens in the KV cache, untimed, before the prompt; a list makes a case of each.
    #[arg(
        short,
        long,
        alias = "n-depth",
        value_name = "N",
        value_delimiter = ',',
        default_value = "0",
        help_heading = "Workload"
    )]
    pub depth: Vec<usize>,

    /// Sequences to generate at once, each with a prompt of its own; a list makes a case of each, `max` one of each precision at the most
    /// that fit.
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "1", help_heading = "Workload")]
    pub batch_size: Vec<BatchWord>,

    /// End at the model's end-of-sequence token, which is ignored otherwise.
    #[arg(long, help_heading = "Workload")]
    pub stop_at_eos: bool,

    /// Show on stderr what each precision writes while it writes it, in an untimed run before its repeats.
    #[arg(long, conflicts_with = "ab", help_heading = "Workload")]
    pub stream: bool,

    /// Write fp32 logits [n_gen, vocab] from an untimed pass as tensor `logits`, one file a precision.
    #[arg(long, value_name = "FILE.safetensors", value_hint = ValueHint::FilePath, help_heading = "Workload")]
    pub save_logits: Option<PathBuf>,

    /// Measure the quality of each precision as well, after its speed.
    #[arg(long, help_heading = "Quality")]
    pub quality: bool,

    #[command(flatten)]
    pub text: TextArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    #[arg(
        long, value_name = "LIST", value_delimiter = ',', default_value = Engine::Quantbench.name(), help_heading = "Device",
        help = engine_help(), value_parser = engine_names(), hide_possible_values = true
    )]
    pub engine: Vec<String>,

    /// Interpreter of the engines in Python [default: QUANTBENCH_PYTHON, the active virtual environment's, python3].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Device")]
    pub python: Option<PathBuf>,

    /// Seconds that another engine may take for one answer, loading included.
    #[arg(long, value_name = "S", default_value_t = crate::harness::engine_timeout_s(), help_heading = "Device")]
    pub engine_timeout: f64,

    /// Warm-up runs [default: until two agree].
    #[arg(long, value_name = "N", help_heading = "Protocol")]
    pub warmup: Option<usize>,

    /// Counted repeats [default: until --rel-ci is reached, within --min-time and --max-time].
    #[arg(short, long, aliases = ["repetitions", "runs"], value_name = "N", help_heading = "Protocol")]
    pub repeats: Option<usize>,

    /// Seconds that repeating lasts at least, per precision.
    #[arg(long, value_name = "S", default_value_t = MeasurementProtocol::default().min_time_s, help_heading = "Protocol")]
    pub min_time: f64,

    /// Seconds after which no further repeat starts, per precision; three are always made.
    #[arg(long, value_name = "S", default_value_t = MeasurementProtocol::default().max_time_s, help_heading = "Protocol")]
    pub max_time: f64,

    /// Half width of the 95 % interval over the median at which repeating ends.
    #[arg(long, value_name = "X", default_value_t = MeasurementProtocol::default().rel_ci, help_heading = "Protocol")]
    pub rel_ci: f64,

    #[command(flatten)]
    pub against: AgainstArgs,

    #[command(flatten)]
    pub method: MethodArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    /// Say what would run, what it would download, whether it fits, and exit.
    #[arg(long, conflicts_with_all = ["output", "list_models"], help_heading = "Output")]
    pub dry_run: bool,
}

/// What was typed for `quantbench quality`.
#[derive(Debug, Args)]
pub struct QualityArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub precision: PrecisionArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    #[command(flatten)]
    pub picture: PictureArgs,

    #[command(flatten)]
    pub text: TextArgs,

    /// Also quantize one part of the model at a time: attention, mlp, head, embeddings and each layer.
    #[arg(long, help_heading = "Quality")]
    pub by_module: bool,

    #[command(flatten)]
    pub device: DeviceArgs,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// What was typed for `quantbench man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Command whose page to print [default: quantbench itself].
    #[arg(value_name = "COMMAND", value_parser = words::Suggested(command_names), hide_possible_values = true)]
    pub command: Option<String>,

    /// Folder to write the pages of all commands to; it is made where it is missing.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "command", help_heading = "Output")]
    pub output: Option<PathBuf>,
}

/// Of the commands that people type.
fn command_names() -> Vec<&'static str> {
    vec![
        "run",
        "quality",
        "suite",
        "merge",
        "compare",
        "history",
        "import",
        "report",
        "export",
        "doctor",
        "completions",
        "man",
    ]
}

/// What was typed for `quantbench doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Interpreter of the engines in Python, as in a run.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::ExecutablePath, help_heading = "Device")]
    pub python: Option<PathBuf>,

    /// Format of stdout: table or json.
    #[arg(
        long, value_name = "FORMAT", value_enum, default_value_t = PlainFormat::Table, hide_possible_values = true,
        help_heading = "Output"
    )]
    pub format: PlainFormat,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
        brief::command().debug_assert();
    }

    #[test]
    fn the_man_pages_are_those_of_all_commands() {
        let command = Cli::command();
        let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
        assert_eq!(shown.map(clap::Command::get_name).collect::<Vec<_>>(), command_names());
    }

    #[test]
    fn every_option_has_one_sentence_and_a_heading() {
        for arg in Cli::command().get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
            let help = arg.get_help().map(|help| help.to_string()).unwrap_or_default();
            assert!(!help.is_empty() && !help.contains(". "), "`{}`: {help}", arg.get_id());
            assert!(arg.get_help_heading().is_some(), "`{}` has no heading", arg.get_id());
        }
    }
}
