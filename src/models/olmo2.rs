//! OLMo 2 (Walsh et al. 2025): blocks that normalise behind attention and feed-forward alone; one norm over all heads of queries, and of keys.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, Defaults, NormPlace};
use super::config::check_window;
use super::keys::Keys;
use super::rope::RopeSettings;
use super::rule::DECODER;
use crate::plan::{Builder, Model, Path, QkNormOver};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "olmo2", doc: "OLMo 2: decoder-only, norms after attention and feed-forward", build };

const DEFAULTS: Defaults = Defaults {
    vocab_size: 50_304,
    hidden_size: 4096,
    intermediate_size: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
    epsilon: ("rms_norm_eps", 1e-5),
    activation: ("hidden_act", "silu"),
    tied: false,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", false)?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    check_window(keys, config.max_positions)?;
    keys.finish(&DECODER)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    config.decoder().build(&mut b, &Path::root(), |_| BlockSpec {
        place: NormPlace::After,
        attention: AttentionBlock {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: Some(QkNormOver::Projection),
            ..config.attention(Some(angles))
        },
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
