//! Qwen3 (Yang et al. 2025): Llama's blocks with an RMS norm of each head's queries and keys, and a head dim of its own.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, NormPlace};
use super::keys::Keys;
use super::qwen2;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path, QkNormOver, RopeId, Window};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "qwen3", doc: "Qwen3: decoder-only, norms of each head's queries and keys", build };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 4096,
    intermediate_size: 22_016,
    layers: 32,
    heads: 32,
    kv_heads: Some(32),
    head_dim: Some(128),
    max_positions: 32_768,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", false)?;
    let windows = qwen2::windows(keys, &config)?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Before,
        attention: attention(&config, angles, bias, windows[layer]),
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}

/// Attention of Qwen3 and its mixtures.
pub fn attention(config: &DecoderConfig, angles: RopeId, bias: bool, window: Option<Window>) -> AttentionBlock {
    AttentionBlock {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNormOver::Head),
        window,
        ..config.attention(Some(angles))
    }
}
