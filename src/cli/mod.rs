//! The command line in two stages: what was typed ([`Cli`], no I/O) and what it means ([`Request`], checked).
//!
//! Value lists, defaults, help, completions and the man page come from here and from the tables of the layers below.

mod compare;
mod export;
mod import;
mod method;
mod report;
mod request;
mod suite;

pub use compare::{Against, AgainstArgs, CompareArgs, CompareRequest, GateArgs, Judgement};
pub use export::{ExportArgs, ExportRequest};
pub use import::{ImportArgs, ImportRequest};
pub use method::MethodArgs;
pub use report::{Output, ReportArgs, ReportRequest};
pub use request::Request;
pub use suite::{MergeArgs, SuiteArgs, suite_keys, suite_task};

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::engine::{ENGINES, Engine};
use crate::harness::Protocol;
use crate::quant::{FORMATS, FormatOptions};
use crate::report::WRITERS;

/// The built-in shape that a run without `--model-id` measures.
pub const DEFAULT_MODEL_ID: &str = "smollm2-135m";

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

/// Measures what each precision of a language model costs and buys on this machine.
#[derive(Debug, Parser)]
#[command(name = "quantbench", version = VERSION.as_str(), args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure a model (what happens without a subcommand).
    Run(Box<RunArgs>),
    /// Measure what each precision costs in quality, without its speed.
    Quality(Box<QualityArgs>),
    /// Run a matrix of models, precisions, devices and lengths that a TOML file describes.
    Suite(SuiteArgs),
    /// Join the results of several suites or machines.
    Merge(MergeArgs),
    /// Compare two files of records and fail on a proven regression.
    Compare(CompareArgs),
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
    /// Print the man page in roff.
    Man,
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

    /// Print the built-in shapes and end.
    #[arg(long, help_heading = "Model")]
    pub list_models: bool,

    #[command(flatten)]
    pub precision: PrecisionArgs,

    #[command(flatten)]
    pub prompt: PromptArgs,

    #[command(flatten)]
    pub picture: PictureArgs,

    /// Tokens to generate, always exactly this many.
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Workload")]
    pub max_new_tokens: usize,

    /// Synthetic tokens to put into the cache, untimed, before the prompt.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Workload")]
    pub depth: usize,

    /// End at the model's end-of-sequence token, which is ignored otherwise.
    #[arg(long, help_heading = "Workload")]
    pub stop_at_eos: bool,

    /// Write fp32 logits [n_gen, vocab] from an untimed pass as tensor `logits`, one file a precision.
    #[arg(long, value_name = "FILE.safetensors", value_hint = ValueHint::FilePath, help_heading = "Workload")]
    pub save_logits: Option<PathBuf>,

    /// Measure what each precision costs in quality as well, after its speed.
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

    /// Say what would run, what it would download and whether it fits, and end.
    #[arg(long, conflicts_with_all = ["output", "list_models"], help_heading = "Protocol")]
    pub dry_run: bool,

    /// Warm-up runs [default: until two in a row agree].
    #[arg(long, value_name = "N", help_heading = "Protocol")]
    pub warmup: Option<usize>,

    /// Counted repeats [default: until --rel-ci is reached, within --min-time and --max-time].
    #[arg(long, value_name = "N", help_heading = "Protocol")]
    pub repeats: Option<usize>,

    /// Seconds that repeating lasts at least, per precision.
    #[arg(long, value_name = "S", default_value_t = Protocol::default().min_time_s, help_heading = "Protocol")]
    pub min_time: f64,

    /// Seconds after which no further repeat starts, per precision.
    #[arg(long, value_name = "S", default_value_t = Protocol::default().max_time_s, help_heading = "Protocol")]
    pub max_time: f64,

    /// Half width of the 95 % interval over the median at which repeating ends.
    #[arg(long, value_name = "X", default_value_t = Protocol::default().rel_ci, help_heading = "Protocol")]
    pub rel_ci: f64,

    #[command(flatten)]
    pub method: MethodArgs,

    #[command(flatten)]
    pub against: AgainstArgs,

    #[command(flatten)]
    pub output: OutputArgs,
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

/// What was typed for `quantbench doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Format of stdout: table or json.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = PlainFormat::Table, hide_possible_values = true)]
    pub format: PlainFormat,
}

/// Which model, with which weights.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Hub id, local folder or built-in shape.
    #[arg(long, value_name = "ID|DIR|NAME", default_value = DEFAULT_MODEL_ID, help_heading = "Model")]
    pub model_id: String,

    /// Branch, tag or commit on the hub [default: main].
    #[arg(long, value_name = "REV", help_heading = "Model")]
    pub revision: Option<String>,

    /// Use only what the hub cache holds.
    #[arg(long, help_heading = "Model")]
    pub offline: bool,

    /// `auto`: real weights for a hub id or a folder, random ones for a built-in shape; `random`: always random.
    #[arg(long, value_name = "SOURCE", value_enum, default_value_t = WeightsWord::Auto, hide_possible_values = true, help_heading = "Model")]
    pub weights: WeightsWord,

    /// Norm channels that random weights scale up, so that int8 meets outliers.
    #[arg(long, value_name = "N", default_value_t = 6, help_heading = "Model")]
    pub outlier_channels: usize,

    /// Seed of random weights and synthetic ids.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Model")]
    pub seed: u64,
}

/// Which precisions, and how they are set.
#[derive(Debug, Args)]
pub struct PrecisionArgs {
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', default_value = "all", help_heading = "Precision",
        help = precision_help(), value_parser = PrecisionWord, hide_possible_values = true
    )]
    pub precision: Vec<String>,

    /// Keep the absmax of nf4 in fp32 instead of quantizing it too; recorded as `nf4-nodq`.
    #[arg(long, help_heading = "Precision")]
    pub no_double_quant: bool,

    /// Activation magnitude from which int8 computes a column in fp16; 0 turns outlier columns off.
    #[arg(long, value_name = "X", default_value_t = FormatOptions::default().int8_threshold, help_heading = "Precision")]
    pub int8_threshold: f32,

    /// Linear layers to keep in fp16 at every precision, comma separated: parts of names, from dot to dot, `*` within dots.
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',', help_heading = "Precision")]
    pub keep_fp16: Vec<String>,
}

/// What a model that sees is shown.
#[derive(Debug, Args)]
pub struct PictureArgs {
    /// Picture (PNG, JPEG or WebP) for a model that sees [default: a generated test picture].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Workload")]
    pub image: Option<PathBuf>,
}

/// The text that quality is measured on. Any of these asks for quality.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// File whose text quality is measured on [default: a sample of about 500 tokens in English].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Quality")]
    pub quality_text: Option<PathBuf>,

    /// Tokens of the text at most [default: 512].
    #[arg(long, value_name = "N", help_heading = "Quality")]
    pub quality_tokens: Option<usize>,

    /// How the text goes through the model: prefill or decode [default: decode for int8, prefill otherwise].
    #[arg(long, value_name = "PATH", value_enum, hide_possible_values = true, help_heading = "Quality")]
    pub quality_path: Option<PathWord>,
}

/// Where to run.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Where to run: auto, cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = "Device")]
    pub device: String,

    /// Threads on the CPU [default: physical cores that this process may use].
    #[arg(long, value_name = "N", help_heading = "Device")]
    pub threads: Option<usize>,
}

/// What is shown and written.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// Format of stdout [default: table].
    #[arg(long, value_name = "FORMAT", value_parser = writer_names(), help_heading = "Output")]
    pub format: Option<String>,

    /// File to write as well, in the format of its extension, whole or not at all.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,

    /// Show every column of the table.
    #[arg(long, help_heading = "Output")]
    pub wide: bool,

    /// GiB of a card's memory: the verdict says which precisions fit.
    #[arg(long, value_name = "GIB", value_parser = report::gib, help_heading = "Output")]
    pub card: Option<u64>,

    /// Show no progress.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

/// The prompt, said in one way.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct PromptArgs {
    /// Text to continue [default: "Explain quantization in simple terms.", "caption en" for a picture; 8 synthetic ids
    /// without a tokenizer].
    #[arg(long, value_name = "TEXT", help_heading = "Workload")]
    pub prompt: Option<String>,

    /// File whose text to continue, to the last byte.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Workload")]
    pub prompt_file: Option<PathBuf>,

    /// Number of synthetic ids to continue.
    #[arg(long, value_name = "N", help_heading = "Workload")]
    pub prompt_tokens: Option<usize>,

    /// Exact token ids to continue, comma separated.
    #[arg(long, value_name = "IDS", value_delimiter = ',', help_heading = "Workload")]
    pub prompt_ids: Option<Vec<u32>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsWord {
    #[value(help = None)]
    Auto,
    #[value(help = None)]
    Random,
}

/// Formats of what is no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlainFormat {
    #[value(help = None)]
    Table,
    #[value(help = None)]
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PathWord {
    #[value(help = None)]
    Prefill,
    #[value(help = None)]
    Decode,
}

fn precision_help() -> String {
    let words: Vec<String> = FORMATS
        .iter()
        .map(|entry| match entry.aliases {
            [] => entry.name.to_owned(),
            aliases => format!("{} ({})", entry.name, aliases.join(", ")),
        })
        .collect();
    format!("Precisions to measure, comma separated: {} or all", words.join(", "))
}

fn engine_names() -> PossibleValuesParser {
    PossibleValuesParser::new(ENGINES.iter().map(|engine| engine.name()))
}

fn engine_help() -> String {
    let version = Engine::Candle.version();
    format!("Whose code runs, comma separated: quantbench, candle (the fp16 models of candle-transformers {version})")
}

fn writer_names() -> PossibleValuesParser {
    PossibleValuesParser::new(WRITERS.iter().map(|writer| writer.name))
}

/// Takes any word, so that [`Request`] can name the nearest one, and tells completions the known ones.
#[derive(Clone)]
struct PrecisionWord;

impl TypedValueParser for PrecisionWord {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        clap::builder::StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let names = FORMATS.iter().flat_map(|entry| [entry.name].into_iter().chain(entry.aliases.iter().copied()));
        Some(Box::new(names.chain(["all"]).map(PossibleValue::new)))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
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
