//! The part of a record about the quality of a precision.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A text, teacher-forced, against the reference's predictions. Entropies are in nats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Quality {
    /// Reference that the predictions are compared with.
    pub reference: String,
    /// `prefill`: a window in one call, or `decode`: one token a call.
    pub path: String,
    /// `sample`, or the last component of the user's file.
    pub text: String,
    /// Tokens that were scored.
    pub n_tokens: u64,
    /// Calls or call sequences that the text was cut into; each later one rereads half of the one before.
    pub n_windows: u64,
    pub window_tokens: u64,
    /// Mean negative log likelihood of a token.
    pub nll_mean: f64,
    pub reference_nll_mean: f64,
    pub perplexity: f64,
    /// Perplexity over that of fp16 in the same run.
    pub perplexity_ratio: Option<f64>,
    /// 95 % interval from the differences of each token, taken for independent.
    pub perplexity_ratio_ci95_low: Option<f64>,
    pub perplexity_ratio_ci95_high: Option<f64>,
    /// KL divergence of the measured distribution from the reference's, mean over the tokens.
    pub kl_mean: f64,
    /// Half the 95 % interval of `kl_mean`.
    pub kl_mean_half_width: Option<f64>,
    pub kl_median: f64,
    pub kl_p99: f64,
    /// Share of the tokens at which both expect the same token most.
    pub top1_agreement: f64,
    /// Largest difference of a logit.
    pub logit_error_max: f64,
    /// Length of the greedy texts that were compared.
    pub greedy_tokens: u64,
    /// The first token, from 0, where the greedy text departs from the reference's; `null` where it never does.
    pub greedy_departs_at: Option<u64>,
    /// LLM.int8's outlier columns over all columns that it looked through.
    #[serde(default)]
    pub outlier_share: Option<f64>,
    /// With one part of the model quantized and all others in fp16; empty unless asked for.
    #[serde(default)]
    pub modules: Vec<ModuleQuality>,
    /// Layers whose divergence per byte saved is more than twice the median layer's, the most sensitive first: patterns for
    /// `--keep-fp16`.
    #[serde(default)]
    pub suggested_keep_fp16: Vec<String>,
}

/// Cost and saving of quantizing one part of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModuleQuality {
    /// `attention`, `mlp`, `head`, `embeddings`, or the name of a layer. A layer is part of attention and mlp too.
    pub module: String,
    /// Against fp16.
    pub saved_bytes: u64,
    /// `null` where it could not be measured.
    pub kl_mean: Option<f64>,
    pub kl_mean_half_width: Option<f64>,
    pub top1_agreement: Option<f64>,
    /// LLM.int8's outlier columns over all columns that it looked through.
    pub outlier_share: Option<f64>,
}
