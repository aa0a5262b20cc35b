//! `quantbench export`: what was typed and what it means.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum, ValueHint};

use super::groups::OUTLIER_CHANNELS;
use super::words::{Takes, unknown_precision};
use crate::quant::FormatId;
use crate::weights::policy::Selection;
use crate::weights::{self, export, gguf};

/// What was typed for an export.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Hub id, local folder or, in fp16, built-in shape.
    #[arg(short, long, alias = "model", value_name = "ID|DIR", value_hint = ValueHint::DirPath, help_heading = "Model")]
    pub model_id: String,

    /// Branch, tag or commit on the hub [default: main].
    #[arg(long, value_name = "REV", help_heading = "Model")]
    pub revision: Option<String>,

    /// Use only what the hub cache holds.
    #[arg(long, help_heading = "Model")]
    pub offline: bool,

    /// Refuse settings of the model's files that are not computed, instead of warning of them.
    #[arg(long, help_heading = "Model")]
    pub strict_config: bool,

    /// Precision to write: fp16, int8 (8bit), nf4 (4bit) or nf4-nodq; of a GGUF fp16, q8_0, q4_0, q4_k, q4_k_m or q6_k.
    #[arg(long, value_name = "NAME", help_heading = "Precision")]
    pub precision: String,

    /// What to write: a folder for transformers, or one file for llama.cpp (llama, qwen2, qwen3, phi).
    #[arg(long, value_name = "NAME", value_enum, default_value_t = ExportForm::Safetensors, help_heading = "Output")]
    pub format: ExportForm,

    /// Norm channels that a shape's random weights scale up, as in a run.
    #[arg(long, value_name = "N", default_value_t = OUTLIER_CHANNELS, help_heading = "Model")]
    pub outlier_channels: usize,

    /// Seed of a shape's random weights.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Model")]
    pub seed: u64,

    /// Linear layers to keep in fp16, comma separated: name components; `*` matches one.
    #[arg(long, value_name = "PATTERNS", value_delimiter = ',', help_heading = "Precision")]
    pub keep_fp16: Vec<String>,

    /// Folder or file to make, written atomically.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Output")]
    pub output: PathBuf,

    /// Show no progress.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

/// The form of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportForm {
    Safetensors,
    Gguf,
}

/// An export as it will happen.
#[derive(Debug)]
pub struct ExportRequest {
    pub model: weights::ModelRequest,
    pub precision: FormatId,
    pub selection: Selection,
    pub form: ExportForm,
    pub output: PathBuf,
}

impl ExportRequest {
    /// Fails with [`crate::error::BadInput`] on an unknown precision and on an output that cannot be made.
    pub fn new(args: &ExportArgs) -> Result<Self> {
        let word = args.precision.trim().to_lowercase();
        let is_gguf = args.format == ExportForm::Gguf;
        // Mixtures are the names of files alone.
        let mixture = || FormatId::named(&word).filter(|format| is_gguf && gguf::Recipe::of(*format).is_some());
        let parsed = FormatId::parse(&word).or_else(mixture);
        let precision = parsed.ok_or_else(|| unknown_precision(&word, Takes::One))?;
        if is_gguf && gguf::Recipe::of(precision).is_none() {
            return Err(gguf::not_written(precision).into());
        }
        export::check_output(&args.output)?;
        let model = weights::ModelRequest {
            revision: args.revision.clone(),
            offline: args.offline,
            strict_config: args.strict_config,
            seed: args.seed,
            outlier_channels: args.outlier_channels,
            ..weights::ModelRequest::of(&args.model_id)
        };
        let patterns: Vec<String> = args.keep_fp16.iter().map(|pattern| pattern.trim().to_owned()).collect();
        let selection = if patterns.is_empty() { Selection::Usual } else { Selection::Without(patterns) };
        Ok(Self { model, precision, selection, form: args.format, output: args.output.clone() })
    }
}
