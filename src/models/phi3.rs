//! Phi-3 (Abdin et al. 2024; Phi-4-mini): Llama's blocks with one matrix for queries, keys and values and one for gate and up, heads that rotate in part,
//! and LongRoPE.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, FeedForward, NormPlace};
use super::keys::Keys;
use super::rope::{RopeBasis, RopeKind, RopeSettings, Rotary};
use super::rule::{HARMLESS, Off, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{Builder, Model, Path};

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "phi3",
    doc: "Phi-3, Phi-3.5, Phi-4, Phi-4-mini: decoder-only, fused projections, LongRoPE",
    build,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_064,
    hidden_size: 3072,
    intermediate_size: 8192,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 4096,
    epsilon: ("rms_norm_eps", 1e-5),
    activation: ("hidden_act", "silu"),
    tied: false,
};

/// Keys that the authors' own code reads and transformers does not.
const RULE: Rule = Rule {
    harmless: &[HARMLESS, &["full_attn_mod", "interpolate_factor"]],
    refused: &[
        REFUSED,
        REFUSED_IN_DECODERS,
        &[("attention_bias", Off::Empty), ("lm_head_bias", Off::Empty), ("mlp_bias", Off::Empty)],
    ],
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let window = keys.optional_size("sliding_window")?;
    let window = config.window_of_all(keys, window)?;
    let basis = RopeBasis { rotary: Rotary::Part(1.0), original: Some(4096), knows_su: true, ..config.rope_basis() };
    let rope = RopeSettings::read(keys, basis)?;
    if !matches!(rope.kind, RopeKind::Default | RopeKind::LongRope { .. }) {
        let key = if keys.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" };
        return Err(keys.refused(key, "Phi-3 computes rotary scalings of the kinds `default` and `longrope`"));
    }
    keys.finish(&RULE)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |_| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock { fused: true, window, ..config.attention(Some(angles)) },
        feed_forward: FeedForward::Gated {
            intermediate: config.intermediate_size,
            activation: config.activation,
            bias: false,
            fused: true,
        },
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
