//! gpt-oss (OpenAI 2025): mixtures of experts with clamped gates, attention sinks, a window in every other layer, biases everywhere.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, FeedForward, NormPlace};
use super::experts::{ExpertsBlock, Packing};
use super::keys::Keys;
use super::rope::{RopeBasis, RopeSettings};
use super::rule::{HARMLESS, Off, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{Builder, CLAMPED_SWIGLU_ALPHA, ExpertWeighting, GatedActivation, Model, Path};

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "gpt_oss",
    doc: "gpt-oss: decoder-only, experts, attention sinks (experts in bf16 or MXFP4)",
    build,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 201_088,
    hidden_size: 2880,
    intermediate_size: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    head_dim: Some(64),
    max_positions: 131_072,
    epsilon: ("rms_norm_eps", 1e-5),
    activation: ("hidden_act", "silu"),
    tied: false,
};

/// transformers' base where a file has none.
const THETA: f64 = 150_000.0;

/// The authors' own names for what transformers calls otherwise.
const RULE: Rule = Rule {
    harmless: &[HARMLESS, &["experts_per_token", "initial_context_length"]],
    refused: &[REFUSED, REFUSED_IN_DECODERS, &[("swiglu_alpha", Off::Number(CLAMPED_SWIGLU_ALPHA as f64))]],
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", true)?;
    let limit = keys.number("swiglu_limit", 7.0)? as f32;
    if limit <= 0.0 {
        return Err(keys.wrong("swiglu_limit", "a number above 0"));
    }
    let experts = ExpertsBlock {
        experts: keys.size_by("num_local_experts", "num_experts", 128)?,
        top_k: keys.size("num_experts_per_tok", 4)?,
        intermediate: config.intermediate_size,
        weighting: ExpertWeighting::Chosen,
        activation: GatedActivation::ClampedSwiglu { limit },
        bias: true,
        module: "mlp",
        router: "router",
        matrices: ["gate_proj", "up_proj", "down_proj"],
        packing: Packing::InterleavedColumns,
    };
    experts.check(config.layers)?;
    let window = keys.size_or_null("sliding_window", Some(128))?;
    let windows = config.windows(keys, window, |layer| window.is_some() && layer.is_multiple_of(2))?;
    let rope = RopeSettings::read(keys, RopeBasis { theta: THETA, ..config.rope_basis() })?;
    if !keys.has("rope_scaling") && !keys.has("rope_parameters") {
        return Err(keys.wrong("rope_scaling", "an object: gpt-oss has yarn scaling"));
    }
    keys.finish(&RULE)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock {
            qkv_bias: bias,
            output_bias: bias,
            window: windows[layer],
            has_sinks: true,
            ..config.attention(Some(angles))
        },
        feed_forward: FeedForward::Experts(experts),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
