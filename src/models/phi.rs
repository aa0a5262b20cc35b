//! Phi (Phi-1, Phi-1.5, Phi-2): attention and feed-forward read the same norm, side by side; biases everywhere; only a
//! part of each head rotates.

use candle_core::{Result, bail};

use super::Architecture;
use super::blocks::{
    AttentionBlock, BlockSpec, DecoderConfig, DecoderSpec, Defaults, FeedForward, NormPlace, NormStyle,
};
use super::config::check_window;
use super::keys::Keys;
use super::rope::{RopeBasis, RopeSettings, Rotary};
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "phi", doc: "Phi-1, Phi-1.5, Phi-2: decoder-only, parallel blocks, biases", build };

/// transformers' default where config.json has no `partial_rotary_factor`.
const PARTIAL_ROTARY_FACTOR: f64 = 0.5;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 51_200,
    hidden_size: 2048,
    intermediate_size: 8192,
    layers: 24,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
    epsilon: ("layer_norm_eps", 1e-5),
    activation: ("hidden_act", "gelu_new"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let DecoderConfig { hidden_size, heads, .. } = config;
    if !keys.has("head_dim") && !hidden_size.is_multiple_of(heads) {
        bail!("config.json says hidden size {hidden_size} over {heads} heads; they must divide");
    }
    check_window(keys, config.max_positions)?;
    let basis = RopeBasis { rotary: Rotary::Part(PARTIAL_ROTARY_FACTOR), ..config.rope_basis() };
    let rope = RopeSettings::read(keys, basis)?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    let decoder = DecoderSpec {
        norm: NormStyle::Layer { epsilon: config.epsilon },
        final_norm: "final_layernorm",
        head_bias: true,
        ..config.decoder()
    };
    decoder.build(&mut b, &Path::root(), |_| BlockSpec {
        place: NormPlace::Shared,
        attention: AttentionBlock {
            output: "dense",
            qkv_bias: true,
            output_bias: true,
            ..config.attention(Some(angles))
        },
        feed_forward: FeedForward::Plain { intermediate: config.intermediate_size, activation: config.activation },
    })?;
    Ok(b.finish(config.metadata(ARCHITECTURE.model_type, rope.context())))
}
