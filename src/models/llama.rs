//! Llama (Touvron et al. 2023; Llama 3.2): pre-norm blocks, grouped-query attention, gated feed-forward.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, FeedForward, NormPlace};
use super::config::check_window;
use super::keys::Keys;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "llama", doc: "Llama 2, 3.x, SmolLM2: decoder-only, grouped-query attention", build };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let attention_bias = keys.flag("attention_bias", false)?;
    let mlp_bias = keys.flag("mlp_bias", false)?;
    check_window(keys, config.max_positions)?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |_| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            ..config.attention(Some(angles))
        },
        feed_forward: FeedForward::Gated {
            intermediate: config.intermediate_size,
            activation: config.activation,
            bias: mlp_bias,
            fused: false,
        },
    })?;
    Ok(b.finish(config.metadata(ARCHITECTURE.model_type, rope.context())))
}
