//! The part of a record about an engine that is no code of quantbench's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What another engine holds, and how it stands to quantbench's own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OtherEngine {
    /// `16bit`, `8bit` or `4bit`; absent for a format that was asked for by name and has none of these.
    pub width: Option<String>,
    pub head: Option<HeldFormat>,
    pub embeddings: Option<HeldFormat>,
    /// Experts of a mixture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<HeldFormat>,
    pub kv_cache: Option<HeldFormat>,
    /// Linear layers and experts that stay in 16 bit or wider, where the format is narrower.
    #[serde(default)]
    pub wide_modules: Vec<String>,
    /// Parts that quantbench's record of this width holds in another format.
    #[serde(default)]
    pub held_otherwise: Vec<String>,
    /// Time that the host spends between two steps outside the engine's call into the model; median. Of an engine that says so, of a GPU or of
    /// compiled code it is the time from a token to the next step's inputs.
    pub host_ms_per_token: Option<f64>,
    /// Against quantbench's record of the same format, or else of the same width.
    pub ratio_at_width: Option<WidthRatio>,
}

/// A part of a model: its format and its stored bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HeldFormat {
    pub format: String,
    pub bytes: u64,
}

/// Decode speed of this record over quantbench's of the same format or width.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WidthRatio {
    /// Quantbench's precision.
    pub precision: String,
    pub median: f64,
    pub ci95_low: Option<f64>,
    pub ci95_high: Option<f64>,
    /// False where the two did not alternate.
    pub paired: bool,
    /// Bytes that a decode step reads here and there.
    pub step_bytes: Option<u64>,
    pub own_step_bytes: Option<u64>,
}

/// Logits and ids of a record and of quantbench's, for the same prompt. Where the engine can predict a given text, both predict the ids that
/// quantbench's record wrote; else each goes by its own, up to the step where they part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Agreement {
    /// Precision of quantbench's record: the 16-bit one where it ran, else the one of the same format or width.
    pub reference: String,
    /// Steps that were compared: those with the same ids before them.
    pub steps: u64,
    /// Step at which the ids of the measured repeats part; absent where all are equal.
    pub parts_at: Option<u64>,
    /// Quantbench's largest logit over its second at that step.
    pub margin: Option<f64>,
    /// Margin below which rounding may choose otherwise: two logits that are each off by as much as rounding to the engine's arithmetic
    /// in every layer explains.
    pub margin_bound: f64,
    /// KL(quantbench ‖ engine) in nats, of the first step and the mean of all.
    pub kl_first: f64,
    pub kl_mean: f64,
    /// Largest difference of a logit, at the first step and at any.
    pub logit_error_first: f64,
    pub logit_error_max: f64,
    /// Share of the steps with the same largest logit.
    pub top1_agreement: f64,
}
