//! Generating tokens, and what is read between runs.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Greedy generation of exactly `n_gen` tokens of each sequence. End-of-sequence tokens are not special. The ids of the sequences of a batch
/// (`load`) lie one behind the other, equally many of each.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RunRequest {
    /// Ids in the cache before the prompt, prefilled before the start is stamped. An engine may keep them from the run before.
    pub depth: Vec<u32>,
    /// Input of the encoder, inside the timed part.
    pub encode: Encode,
    /// Ids that the decoder starts from, each sequence its own. Empty with `n_gen` 0, which fills the cache to the depth alone, and with `proceed`.
    pub prompt: Vec<u32>,
    pub n_gen: usize,
    /// Goes on where the run before ended: `n_gen` further tokens of each sequence, without a prompt.
    pub proceed: bool,
    pub wait: RunWait,
    /// Sends the event of each token as it comes, where the engine has such events. Such a run is not timed.
    pub stream: bool,
}

/// Input of an encoder.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Encode {
    #[default]
    Nothing,
    Tokens(Vec<u32>),
    Picture {
        /// The file of the user's; `null`: the generated test picture.
        #[serde(default)]
        image: Option<PathBuf>,
        /// A safetensors file with the normalised values, fp32 `[3, size, size]`, as tensor `pixels`: the same for each sequence.
        #[serde(default)]
        pixels: Option<PathBuf>,
    },
}

/// The points at which a run waits for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunWait {
    /// Once, at its end; a token counts as soon as the host can read it.
    #[default]
    AtEnd,
    /// After every token.
    EachToken,
}

/// What one run gave. Stamps are nanoseconds of CLOCK_MONOTONIC, taken when a token's id is on the host.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RunReport {
    pub start_ns: u64,
    /// The encoder was done; absent without one.
    pub encoded_ns: Option<u64>,
    /// One a step, the first tokens' included: when the ids of all sequences are there.
    pub token_ns: Vec<u64>,
    /// One a step and sequence: those of a step lie together.
    pub ids: Vec<u32>,
    /// Whether the last logits hold finite numbers alone; `null`: the parent looks at `logits` once.
    pub finite_logits: Option<bool>,
    /// Each decode step by the device's own clock; empty where it has none.
    pub device_step_ns: Vec<u64>,
    /// Time of each decode step that the host spent outside the engine's call into the model; empty where unknown.
    pub host_step_ns: Vec<u64>,
}

/// A run that is not timed, whose logits are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Logits {
    pub run: RunRequest,
    /// File to write: tensor `logits`, fp32 `[n_gen, vocabulary]`, those that each token of the first sequence was chosen from.
    pub file: PathBuf,
}

/// A text whose next tokens are predicted, from an empty cache, by an engine that was loaded for one sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Score {
    #[serde(default)]
    pub encode: Encode,
    /// Goes in first, in one call of its own; may be empty.
    #[serde(default)]
    pub prefix: Vec<u32>,
    pub tokens: Vec<u32>,
    /// The first of `tokens` that is scored.
    pub first: usize,
    /// One token a call, as generation does it; else all in one call.
    #[serde(default)]
    pub by_token: bool,
    /// File to write: tensor `logits`, fp32 `[tokens - first, vocabulary]`, those that predict each scored token.
    pub file: PathBuf,
}

/// RowsReply of logits that were written to the file of the request.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RowsReply {
    /// What one engine alone says.
    pub details: Value,
}

/// Asks for the use of the device's memory pool.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct MemoryRequest {}

/// Bytes of the engine's allocator on its device, now and at most since the last `memory`, which starts the high-water marks
/// anew. All absent where there is no such allocator.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MemoryReport {
    /// HeldModel by live allocations.
    pub used_bytes: Option<u64>,
    pub used_high_bytes: Option<u64>,
    /// Taken from the device: used bytes and what is kept for later.
    pub reserved_bytes: Option<u64>,
    pub reserved_high_bytes: Option<u64>,
}

/// The last repeat is over. `logits` and `score` may still follow; the engine ends when the connection closes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Finish {
    /// What one engine alone understands.
    pub options: Value,
}

/// What an engine knows at the end.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Finished {
    /// What one engine alone says.
    pub details: Value,
}

/// Asks for the bandwidth of a CUDA device.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BandwidthRequest {
    pub device: usize,
}

/// BandwidthReport of a device's memory, in 1e9 bytes a second; `null` where it was not measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct BandwidthReport {
    pub read_gb_s: Option<f64>,
    /// Bytes read plus bytes written.
    pub copy_gb_s: Option<f64>,
}
