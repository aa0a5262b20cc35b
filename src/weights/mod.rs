//! Where weights come from, and which format holds each of them.
//!
//! A [`Source`] gives tensors by name as fp16 rows, so that a loader streams them: read, cast, quantize, drop. No fp16 copy
//! of the model ever exists.

mod beside;
pub mod bnb;
mod bound;
pub mod builtin;
mod cast;
pub mod export;
pub mod foreign;
pub mod gguf;
pub mod hub;
pub mod json;
mod names;
mod open;
mod packed;
pub mod policy;
mod processor;
pub mod random;
pub mod safetensors;
mod settle;
mod sniff;
pub mod spec;
pub mod tokenizer;
mod unread;

pub use bnb::PreQuantized;
pub use builtin::builtin_models;
pub use open::{Checkpoint, Surveyed, open, open_with, survey, survey_with};

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use ::safetensors::Dtype;

use crate::quant::{Part, Stored};

/// Which model, and where its weights come from.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ModelRequest {
    /// A hub id, a local folder, a GGUF file, or a built-in shape.
    pub model_id: String,
    /// Branch, tag or commit on the hub.
    pub revision: Option<String>,
    /// Only what the cache holds.
    pub offline: bool,
    pub weights: WeightsChoice,
    /// Of random weights.
    pub seed: u64,
    /// Norm channels that random weights scale so that LLM.int8 meets outliers.
    pub outlier_channels: usize,
    /// Whether settings of the model's files that would only be warned of are refused.
    pub strict_config: bool,
}

impl ModelRequest {
    /// Real weights of a hub id, a folder or a file.
    pub fn of(model_id: impl Into<String>) -> Self {
        Self {
            model_id: model_id.into(),
            revision: None,
            offline: false,
            weights: WeightsChoice::Auto,
            seed: 0,
            outlier_channels: 0,
            strict_config: false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum WeightsChoice {
    /// Real weights for a hub id or a folder, random only for a built-in name.
    Auto,
    Random,
}

/// What records say about the weights.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SourceInfo {
    pub source: SourceKind,
    /// Dtype of the checkpoint's tensors before the cast, e.g. `bf16`; the commonest where they differ.
    pub dtype: String,
    /// Seed of random weights.
    pub seed: Option<u64>,
    /// The hub's etags, or `xxh3:…` over header, sizes and 1 MiB samples of each file, or `seed:N`.
    pub hash: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    Hub,
    Local,
    Random,
}

impl SourceKind {
    /// As records spell it.
    pub fn name(self) -> &'static str {
        match self {
            SourceKind::Hub => "hub",
            SourceKind::Local => "local",
            SourceKind::Random => "random",
        }
    }
}

/// Tensors by name. Implementations are read from many threads at once.
pub trait Source: Send + Sync {
    fn info(&self) -> &SourceInfo;

    /// Shape of a tensor, `None` where the source has no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// All names, sorted: error messages name the nearest.
    fn names(&self) -> Vec<String>;

    /// Rows of a tensor seen as `[shape[0], product of the rest]`, cast to fp16 (round to nearest even) into `out`. Returns
    /// how many finite values became infinite. Fails on an I/O error or a dtype that is not f16, bf16 or f32.
    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> anyhow::Result<usize>;

    /// As [`Self::read_rows`], in the source's own values: a cast to fp32 loses nothing.
    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> anyhow::Result<()> {
        let mut half = vec![f16::ZERO; out.len()];
        self.read_rows(name, rows, &mut half)?;
        half.convert_to_f32_slice(out);
        Ok(())
    }

    /// The dtype of the rows that [`Self::read_raw`] gives; `None` where values come from [`Self::read_rows`] alone.
    fn raw_dtype(&self, _name: &str) -> Option<Dtype> {
        None
    }

    /// Rows of a tensor that has a [`Self::raw_dtype`], little-endian as they are saved: for a device that casts them by itself.
    /// Fails on an I/O error.
    fn read_raw(&self, name: &str, _rows: Range<usize>, _out: &mut [u8]) -> anyhow::Result<()> {
        anyhow::bail!("`{name}` is not held as bytes")
    }

    /// Whether linear layers were quantized before they were saved; those that were not stay as they are then.
    fn is_quantized(&self) -> bool {
        false
    }

    /// The stored form of a matrix that was quantized before it was saved, `None` for every other. Fails on an I/O error and on
    /// what no format here means.
    fn parts(&self, _spec: &spec::MatrixSpec) -> Option<anyhow::Result<Vec<Part>>> {
        None
    }

    /// A matrix as the files hold it, where they say in which format that is; `None` for every other. Fails as [`Self::parts`] does.
    fn stored(&self, _spec: &spec::MatrixSpec) -> Option<anyhow::Result<Box<dyn Stored>>> {
        None
    }

    /// Bytes that reading the whole tensor costs, for progress and bandwidth.
    fn stored_bytes(&self, name: &str) -> u64;
}
