//! SmolLM3 (Bakouch et al. 2025): Llama's blocks, some of which have no rotary positions.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, FeedForward, NormPlace};
use super::keys::Keys;
use super::rope::{RopeBasis, RopeSettings};
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "smollm3", doc: "SmolLM3: decoder-only, some layers without positions", build };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 128_256,
    hidden_size: 2048,
    intermediate_size: 11_008,
    layers: 36,
    heads: 16,
    kv_heads: Some(4),
    head_dim: None,
    max_positions: 32_768,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    tied: true,
};

/// transformers' base where a file has none.
const THETA: f64 = 2_000_000.0;

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let (attention_bias, bias) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let turns = rotated(keys, config.layers)?;
    let window = keys.optional_size("sliding_window")?;
    let window = if keys.flag("use_sliding_window", false)? { window } else { None };
    let windows = config.windows(keys, window, |layer| window.is_some() && !turns[layer])?;
    let rope = RopeSettings::read(keys, RopeBasis { theta: THETA, ..config.rope_basis() })?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            window: windows[layer],
            ..config.attention(turns[layer].then_some(angles))
        },
        feed_forward: FeedForward::Gated {
            intermediate: config.intermediate_size,
            activation: config.activation,
            bias,
            fused: false,
        },
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}

/// Says for each layer if it rotates: `no_rope_layers` is 1 where it does, and without it one layer of `no_rope_layer_interval` does not.
fn rotated(keys: &Keys, layers: usize) -> Result<Vec<bool>> {
    let interval = keys.size("no_rope_layer_interval", 4)?;
    match keys.sizes("no_rope_layers")? {
        Some(flags) if flags.len() < layers || flags.iter().any(|flag| *flag > 1) => {
            Err(keys.wrong("no_rope_layers", &format!("a list of 0 and 1 for each of {layers} layers")))
        }
        Some(flags) => Ok(flags.iter().take(layers).map(|flag| *flag == 1).collect()),
        None if interval == 0 => Err(keys.wrong("no_rope_layer_interval", "a number above 0")),
        None => Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect()),
    }
}
