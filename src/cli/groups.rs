//! Groups of options that several commands share, and the words that they take.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::{DEFAULT_CUDA_MODEL_ID, DEFAULT_MODEL_ID, report, words};
use crate::engine::Engine;
use crate::engines::{self, ADAPTERS, WIDTHS, Width};
use crate::quant::{FORMATS, FormatOptions};
use crate::weights;

/// Norm channels that random weights scale up, in a run and in its export.
pub(super) const OUTLIER_CHANNELS: usize = 6;

/// Which model, with which weights.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[arg(
        short, long, alias = "model", value_name = "ID|DIR|NAME", help_heading = "Model", help = model_help(),
        value_parser = words::Suggested(builtin_names), hide_possible_values = true
    )]
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
    #[arg(long, value_name = "N", default_value_t = OUTLIER_CHANNELS, help_heading = "Model")]
    pub outlier_channels: usize,

    /// Seed of random weights and synthetic ids.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Model")]
    pub seed: u64,

    /// Refuse settings of the model's files that are not computed, instead of warning of them in the record.
    #[arg(long, help_heading = "Model")]
    pub strict_config: bool,
}

fn model_help() -> String {
    format!(
        "Hub id, local folder, GGUF file or built-in model [default: {DEFAULT_MODEL_ID}; {DEFAULT_CUDA_MODEL_ID} on a GPU and beside a CPU cache that \
         would hold the small one]"
    )
}

/// Which precisions, and how they are set.
#[derive(Debug, Args)]
pub struct PrecisionArgs {
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', default_value = "all", help_heading = "Precision",
        help = precision_help(), value_parser = words::Suggested(precision_words), hide_possible_values = true
    )]
    pub precision: Vec<String>,

    /// Keep the absmax of nf4 in fp32 instead of quantizing it too; recorded as `nf4-nodq`.
    #[arg(long, help_heading = "Precision")]
    pub no_double_quant: bool,

    /// Activation magnitude from which int8 computes a column in fp16; 0 turns outlier columns off.
    #[arg(long, value_name = "X", default_value_t = FormatOptions::default().int8_threshold, help_heading = "Precision")]
    pub int8_threshold: f32,

    /// Linear layers to keep in fp16 at every precision, comma separated: name components; `*` matches one.
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
    #[arg(
        long, value_name = "DEVICE", default_value = "auto", help_heading = "Device",
        value_parser = words::Suggested(device_words), hide_possible_values = true
    )]
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
    #[arg(long, value_name = "FORMAT", value_parser = report::writer_names(), help_heading = "Output")]
    pub format: Option<String>,

    /// File to write as well, in the format of its extension; give it again for another format.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Vec<PathBuf>,

    /// Show every column of the table.
    #[arg(long, help_heading = "Output")]
    pub wide: bool,

    /// Show what each precision wrote below the table [default: where a prompt was given as text].
    #[arg(long, help_heading = "Output")]
    pub show_text: bool,

    /// Show every warning in full [default: the worst five, grouped].
    #[arg(long, help_heading = "Output")]
    pub warnings: bool,

    /// GiB of a card's memory: the verdict says which precisions fit.
    #[arg(long, value_name = "GIB", value_parser = report::gib, help_heading = "Output")]
    pub card: Option<u64>,

    /// Show no progress.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

/// The prompt, said in one way.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// Text to continue [default: "Explain quantization in simple terms.", "caption en" for a picture; 8 synthetic ids
    /// without a tokenizer].
    #[arg(long, group = "prompt_source", value_name = "TEXT", help_heading = "Workload")]
    pub prompt: Option<String>,

    /// Take the prompt as a message and write it as the model's chat template says.
    #[arg(long, conflicts_with_all = ["prompt_tokens", "prompt_ids", "image"], help_heading = "Workload")]
    pub chat: bool,

    /// File whose text to continue, to the last byte; of a batch, one prompt a line, each cut to the length of the shortest.
    #[arg(long, group = "prompt_source", value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Workload")]
    pub prompt_file: Option<PathBuf>,

    /// Number of synthetic ids to continue; a list such as 8,512 makes a case of each.
    #[arg(
        short,
        long,
        group = "prompt_source",
        alias = "n-prompt",
        value_name = "N",
        value_delimiter = ',',
        help_heading = "Workload"
    )]
    pub prompt_tokens: Vec<usize>,

    /// Exact token ids to continue, comma separated or as Python prints a list.
    #[arg(long, group = "prompt_source", value_name = "IDS", num_args = 1.., help_heading = "Workload")]
    pub prompt_ids: Option<Vec<String>>,
}

/// A batch as it was typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchWord {
    Count(usize),
    /// The largest that fits.
    Max,
}

impl std::str::FromStr for BatchWord {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word.trim() {
            "max" => Ok(BatchWord::Max),
            "0" => Err("at least 1 is needed".to_owned()),
            word => word.parse().map(BatchWord::Count).map_err(|_| "a number or `max` is needed".to_owned()),
        }
    }
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
    format!(
        "Precisions to measure, comma separated: {} or all; 16bit, 8bit and 4bit are each engine's own format of that width",
        words.join(", ")
    )
}

/// Any word is taken: an engine may be a program of the user's.
pub(super) fn engine_names() -> words::Suggested {
    words::Suggested(engines::names)
}

pub(super) fn engine_help() -> String {
    let version = Engine::Candle.version();
    let adapters: Vec<String> = ADAPTERS.iter().map(|adapter| format!("{} ({})", adapter.name, adapter.doc)).collect();
    format!(
        "Whose code runs, comma separated: quantbench, candle (the fp16 models of candle-transformers {version}), {}, or a program \
         that speaks the engine protocol: ./path or name=command",
        adapters.join(", ")
    )
}

fn precision_words() -> Vec<&'static str> {
    let names = FORMATS.iter().flat_map(|entry| [entry.name].into_iter().chain(entry.aliases.iter().copied()));
    names.chain(WIDTHS.map(Width::name)).chain(["all"]).collect()
}

fn builtin_names() -> Vec<&'static str> {
    weights::builtin_models().iter().map(|model| model.name).collect()
}

fn device_words() -> Vec<&'static str> {
    vec!["auto", "cpu", "cuda", "cuda:0", "cuda:1"]
}
