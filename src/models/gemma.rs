//! Gemma (Mesnard et al. 2024): llama's blocks with a head dim of its own, `(1 + w)` norms, scaled embeddings, a tied head.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, DecoderSpec, Defaults, NormPlace, NormStyle};
use super::config::{activation, activation_named, check_window};
use super::keys::Keys;
use super::rope::RopeSettings;
use super::rule::{HARMLESS, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{ActivationKind, Builder, Mask, Model, Path, VectorKind};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "gemma", doc: "Gemma 1: decoder-only, tied head, (1 + w) norms", build };

pub const RULE: Rule = Rule {
    // Gemma 2 and 3 read `hidden_activation` in the place of `hidden_act`.
    harmless: &[HARMLESS, &["hidden_act", "num_image_tokens"]],
    refused: &[REFUSED, REFUSED_IN_DECODERS],
};

/// Who reads the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// By itself: a token sees those before it.
    Alone,
    /// Behind a picture: the prompt is one prefix that sees all of itself.
    BehindPicture,
}

const DEFAULTS: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 3072,
    intermediate_size: 24_576,
    layers: 28,
    heads: 16,
    kv_heads: Some(16),
    head_dim: Some(256),
    max_positions: 8192,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    tied: true,
};

/// A checked config.
pub struct Config {
    pub decoder: DecoderConfig,
    attention_bias: bool,
    pub rope: RopeSettings,
}

impl Config {
    pub fn read(keys: &Keys, used: Use) -> Result<Self> {
        let decoder = DecoderConfig::read_with(keys, &DEFAULTS, hidden_activation(keys)?)?;
        let attention_bias = keys.flag("attention_bias", false)?;
        let rope = RopeSettings::read(keys, decoder.rope_basis())?;
        check_window(keys, decoder.max_positions)?;
        let sees_all = keys.optional_flag("use_bidirectional_attention")?;
        if sees_all.is_some_and(|sees_all| sees_all != (used == Use::BehindPicture)) {
            return Err(keys.refused("use_bidirectional_attention", "this mask of the prompt is not computed here"));
        }
        if keys.optional_number("query_pre_attn_scalar")?.is_some_and(|scalar| scalar != decoder.head_dim as f64) {
            return Err(keys.refused("query_pre_attn_scalar", "Gemma 1 scales attention by its `head_dim`"));
        }
        keys.finish(&RULE)?;
        Ok(Self { decoder, attention_bias, rope })
    }
}

/// Gemma computes the tanh approximation even where a file says `gelu`. transformers 5 reads `hidden_act` alone.
fn hidden_activation(keys: &Keys) -> Result<ActivationKind> {
    let kind = match keys.optional_word("hidden_act")? {
        Some("gelu") => ActivationKind::GeluTanh,
        _ => activation(keys, "hidden_act", "gelu_pytorch_tanh")?,
    };
    if let Some(other) = keys.optional_word("hidden_activation")?.filter(|name| activation_named(name) != Some(kind)) {
        let message = format!(
            "config.json says `hidden_activation` \"{other}\", which transformers 5 does not read: `hidden_act` is computed"
        );
        keys.report.note("config_key_not_read", message);
    }
    Ok(kind)
}

fn build(keys: &Keys) -> Result<Model> {
    let config = Config::read(keys, Use::Alone)?;
    let mut b = Builder::new();
    decoder(&mut b, &Path::root(), &config, Mask::Causal, None)?;
    Ok(b.finish(config.decoder.metadata(ARCHITECTURE.model_type, config.rope.context())))
}

/// The whole decoder under `path`; `image` is the token whose rows are image features.
pub fn decoder(b: &mut Builder, path: &Path, config: &Config, mask: Mask, image: Option<u32>) -> Result<()> {
    let Config { decoder: config, attention_bias: bias, rope } = config;
    let rope = b.rope(rope.rope());
    let attention = AttentionBlock { mask, qkv_bias: *bias, output_bias: *bias, ..config.attention(Some(rope)) };
    around(config, image).build(b, path, |_| BlockSpec {
        place: NormPlace::Before,
        attention,
        feed_forward: config.gated(),
    })
}

/// Parts of every Gemma around its blocks: `(1 + w)` norms and scaled embeddings.
pub fn around(config: &DecoderConfig, image: Option<u32>) -> DecoderSpec<'_> {
    DecoderSpec {
        norm: NormStyle::Rms { kind: VectorKind::NormOffset, epsilon: config.epsilon },
        embedding_scale: (config.hidden_size as f32).sqrt(),
        image,
        ..config.decoder()
    }
}

/// The scale of scores from Gemma 2 on: `query_pre_attn_scalar^-0.5`, whatever the size of a head. Refuses other masks than the
/// causal one.
pub fn attention_scale(keys: &Keys) -> Result<f32> {
    let scalar = keys.number("query_pre_attn_scalar", 256.0)?;
    if scalar <= 0.0 {
        return Err(keys.wrong("query_pre_attn_scalar", "a number above 0"));
    }
    if keys.flag("use_bidirectional_attention", false)? {
        return Err(keys.refused("use_bidirectional_attention", "a text that sees what follows is not computed here"));
    }
    Ok(scalar.powf(-0.5) as f32)
}
