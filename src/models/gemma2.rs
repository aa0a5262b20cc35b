//! Gemma 2 (Riviere et al. 2024): Gemma with norms before and after, capped scores and logits, and a window in every other layer.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, DecoderSpec, Defaults, NormPlace};
use super::gemma;
use super::keys::Keys;
use super::rope::RopeSettings;
use crate::plan::{Builder, Model, Path, Softcap};

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma2",
    doc: "Gemma 2: decoder-only, capped scores and logits, every other layer windowed",
    build,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    layers: 26,
    heads: 8,
    kv_heads: Some(4),
    head_dim: Some(256),
    max_positions: 8192,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    tied: true,
};

fn build(keys: &Keys) -> Result<Model> {
    let config = DecoderConfig::read(keys, &DEFAULTS)?;
    let bias = keys.flag("attention_bias", false)?;
    let scale = gemma::attention_scale(keys)?;
    let cap = |key, default| keys.number_or_null(key, Some(default)).map(|cap| cap.map(|cap| Softcap(cap as f32)));
    let softcap = cap("attn_logit_softcapping", 50.0)?;
    let final_cap = cap("final_logit_softcapping", 30.0)?;
    let window = keys.size_or_null("sliding_window", Some(4096))?;
    let windows = config.windows(keys, window, |layer| window.is_some() && layer.is_multiple_of(2))?;
    let rope = RopeSettings::read(keys, config.rope_basis())?;
    keys.finish(&gemma::RULE)?;

    let mut b = Builder::new();
    let angles = b.rope(rope.rope());
    let decoder = DecoderSpec { softcap: final_cap, ..gemma::around(&config, None) };
    decoder.build(&mut b, &Path::root(), |layer| BlockSpec {
        place: NormPlace::Around,
        attention: AttentionBlock {
            qkv_bias: bias,
            output_bias: bias,
            scale,
            softcap,
            window: windows[layer],
            ..config.attention(Some(angles))
        },
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(ARCHITECTURE.model_type, rope.context())))
}
