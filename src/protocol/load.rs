//! Loading a model into an engine, and what the engine then holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// All that an engine needs to load. The parent has checked it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Load {
    /// Version of the protocol that the parent speaks.
    pub protocol: u32,
    /// A folder with config.json and safetensors files, or a GGUF file.
    pub model: String,
    /// A name of the engine's own, as its row shows it: `fp16`, `q4_0`.
    pub precision: String,
    /// `cpu`, or `cuda:N`.
    pub device: String,
    /// At least 1.
    pub threads: usize,
    /// Sequences that a run generates at once; more than 1 only where the engine says `batch`.
    #[serde(default = "one")]
    pub batch: usize,
    /// Tokens that the decoder's cache must hold of each sequence: depth, prompt and generated ones.
    pub capacity: usize,
    /// Seed of whatever is random; decoding is greedy.
    #[serde(default)]
    pub seed: u64,
    /// Most bytes that the engine may allocate; `null`: no limit.
    #[serde(default)]
    pub memory_limit_bytes: Option<u64>,
    /// A directory of this engine's own for arrays. The parent removes it at the end.
    pub directory: PathBuf,
    /// What one engine alone understands.
    #[serde(default)]
    pub options: Value,
}

/// What an engine loaded.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LoadReply {
    /// First byte read to weights usable, imports left out; `null`: the parent's own time from request to reply.
    pub load_s: Option<f64>,
    pub held: HeldModel,
    /// Kernels that run, such as an instruction set.
    pub kernels: String,
    /// What one engine alone says.
    pub details: Value,
}

/// What is held in memory. All is optional: what is missing is shown as unknown.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct HeldModel {
    /// Stored bytes of the weights, by the name of their format.
    pub weights_by_format: BTreeMap<String, u64>,
    /// Bytes of weights that a decode step reads: embeddings count one row a sequence.
    pub weight_bytes_per_token: Option<u64>,
    /// Dtype of products and activations.
    pub compute: Option<String>,
    /// Dtype of the logits.
    pub logits: Option<String>,
    pub head: Option<HeldPart>,
    pub embeddings: Option<HeldPart>,
    /// Experts of a mixture.
    pub experts: Option<HeldPart>,
    /// Format of keys and values, and the bytes of the whole cache.
    pub kv_cache: Option<HeldPart>,
    /// Bytes of keys and values of one position of one sequence.
    pub kv_bytes_per_position: Option<u64>,
    /// Linear layers that a quantized precision leaves in 16 bit or wider.
    pub wide_modules: Vec<String>,
}

/// A part of the model: its format and its stored bytes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct HeldPart {
    pub format: String,
    pub bytes: u64,
}

fn one() -> usize {
    1
}
