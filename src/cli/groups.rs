//! Groups of options that several commands share, and the words that they take.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum, ValueHint};

use super::{DEFAULT_CUDA_MODEL_ID, DEFAULT_MODEL_ID, report};
use crate::engine::{ENGINES, Engine};
use crate::quant::{FORMATS, FormatOptions};
use crate::report::WRITERS;

/// Which model, with which weights.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[arg(long, value_name = "ID|DIR|NAME", help_heading = "Model", help = model_help())]
    pub model_id: Option<String>,

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

    /// Refuse settings of the model's files that are not computed, instead of warning of them in the record.
    #[arg(long, help_heading = "Model")]
    pub strict_config: bool,
}

fn model_help() -> String {
    format!("Hub id, local folder or built-in shape [default: {DEFAULT_MODEL_ID}; {DEFAULT_CUDA_MODEL_ID} on a GPU]")
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

/// Picture of a vision-language model.
#[derive(Debug, Args)]
pub struct PictureArgs {
    /// Picture (PNG, JPEG or WebP) for a vision-language model [default: a generated test picture].
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

    /// Launch each decode step and prompt on CUDA by itself, not as a graph.
    #[arg(long, help_heading = "Device")]
    pub no_cuda_graph: bool,
}

/// What is shown and written.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// Format of stdout [default: table].
    #[arg(long, value_name = "FORMAT", value_parser = writer_names(), help_heading = "Output")]
    pub format: Option<String>,

    /// File to write as well, in the format of its extension, written atomically.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
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

    /// Exact token ids to continue, comma separated or as Python prints a list.
    #[arg(long, value_name = "IDS", num_args = 1.., help_heading = "Workload")]
    pub prompt_ids: Option<Vec<String>>,
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

pub(super) fn engine_names() -> PossibleValuesParser {
    PossibleValuesParser::new(ENGINES.iter().map(|engine| engine.name()))
}

pub(super) fn engine_help() -> String {
    let version = Engine::Candle.version();
    format!("Whose code runs, comma separated: quantbench, candle (the fp16 models of candle-transformers {version})")
}

fn writer_names() -> PossibleValuesParser {
    PossibleValuesParser::new(WRITERS.iter().map(|writer| writer.name))
}

/// Takes any word, so that [`Request`] can name the nearest one, and gives completions the known ones.
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
