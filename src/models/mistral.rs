//! Mistral (Jiang et al. 2023): Llama's blocks, every layer of which attends over one window, where there is one.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, NormPlace};
use super::keys::Keys;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "mistral", doc: "Mistral, Ministral: decoder-only, sliding window", build };

pub const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    head_dim: None,
    max_positions: 131_072,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "silu"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let window = keys.size_or_null("sliding_window", Some(4096))?;
    let window = config.window_of_all(keys, window)?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |_| BlockSpec {
        place: NormPlace::Before,
        attention: AttentionBlock { window, ..config.attention(Some(angles)) },
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
