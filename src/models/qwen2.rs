//! Qwen2 (Yang et al. 2024; Qwen2.5): Llama's blocks with biases on queries, keys and values; windows from a layer on, if asked for.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, NormPlace};
use super::keys::Keys;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path, Window};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "qwen2", doc: "Qwen2, Qwen2.5: decoder-only, biases on q, k and v", build };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 4096,
    intermediate_size: 22_016,
    layers: 32,
    heads: 32,
    kv_heads: Some(32),
    head_dim: None,
    max_positions: 32_768,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let windows = windows(keys, &config)?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock { qkv_bias: true, window: windows[layer], ..config.attention(Some(angles)) },
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}

/// `sliding_window` counts where `use_sliding_window` says so, in layers from `max_window_layers` on.
pub fn windows(keys: &Keys, config: &DecoderConfig) -> Result<Vec<Option<Window>>> {
    let window = keys.size_or_null("sliding_window", Some(4096))?;
    let first = keys.size("max_window_layers", 28)?;
    let window = window.filter(|_| keys.flag("use_sliding_window", false).unwrap_or(false));
    keys.flag("use_sliding_window", false)?;
    config.windows(keys, window, |layer| window.is_some() && layer >= first)
}
