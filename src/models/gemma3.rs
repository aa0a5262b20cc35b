//! Gemma 3 (Kamath et al. 2025), its text: Gemma 2 without caps, with norms of queries and keys, and windowed layers that have a rotary base of
//! their own.

use candle_core::Result;

use super::Architecture;
use super::blocks::{AttentionBlock, BlockSpec, DecoderConfig, DecoderSpec, Defaults, NormPlace};
use super::keys::Keys;
use super::rope::{RopeBasis, RopeSettings, by_layer_type};
use super::rule::{HARMLESS, REFUSED, Rule};
use serde_json::{Map, Value};

use super::gemma;
use crate::plan::{Builder, Model, Path, QkNormOver, Softcap};

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma3_text",
    doc: "Gemma 3: decoder-only, five windowed layers to a global one",
    build,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 262_208,
    hidden_size: 2304,
    intermediate_size: 9216,
    layers: 26,
    heads: 8,
    kv_heads: Some(4),
    head_dim: Some(256),
    max_positions: 131_072,
    epsilon: ("rms_norm_eps", 1e-6),
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    tied: true,
};

/// The same decoder as a part of a model that reads pictures, which are not read here.
pub const NESTED: Architecture =
    Architecture { model_type: "gemma3", doc: "Gemma 3 with a vision tower: its text alone", build: build_nested };

const GLOBAL_THETA: f64 = 1_000_000.0;
const LOCAL_THETA: f64 = 10_000.0;

/// Keys of the nested form: they say how pictures are read.
const NESTED_RULE: Rule = Rule {
    harmless: &[
        HARMLESS,
        &["boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "vision_config"],
        &["boi_token_id", "eoi_token_id", "image_token_id"],
    ],
    refused: &[REFUSED],
};

fn build(keys: &Keys) -> Result<Model> {
    text(keys, &Path::root(), ARCHITECTURE.model_type, None)
}

fn build_nested(keys: &Keys) -> Result<Model> {
    let tied = keys.optional_flag("tie_word_embeddings")?;
    let eos = keys.token_ids("eos_token_id")?;
    static NOTHING: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    let inner = keys.section_or("text_config", &NOTHING)?;
    let outer = Outer { tied, eos };
    let model = text(&inner, &Path::root().at("language_model"), NESTED.model_type, Some(outer))?;
    keys.report.note("pictures_not_read", "Gemma 3's vision tower is not computed here: only its text is".to_owned());
    keys.finish(&NESTED_RULE)?;
    Ok(model)
}

/// Keys of the file around a text's own, which go before those.
struct Outer {
    tied: Option<bool>,
    eos: Option<Vec<u32>>,
}

fn text(keys: &Keys, path: &Path, architecture: &'static str, outer: Option<Outer>) -> Result<Model> {
    let mut config = DecoderConfig::read(keys, &DEFAULTS)?;
    if let Some(Outer { tied, eos }) = outer {
        config.tied = tied.unwrap_or(config.tied);
        config.eos = eos.or(config.eos);
    }
    let bias = keys.flag("attention_bias", false)?;
    let scale = gemma::attention_scale(keys)?;
    if let Some(cap) = keys.optional_number("attn_logit_softcapping")? {
        let message =
            format!("config.json says `attn_logit_softcapping` {cap}, which transformers 5 does not apply to Gemma 3");
        keys.report.note("config_key_not_read", message);
    }
    let softcap = keys.number_or_null("final_logit_softcapping", None)?.map(|cap| Softcap(cap as f32));
    let pattern = keys.size("sliding_window_pattern", 6)?;
    if pattern == 0 {
        return Err(keys.wrong("sliding_window_pattern", "a number above 0"));
    }
    let is_local: Vec<bool> = match keys.words("layer_types")? {
        Some(types) => types.iter().map(|kind| *kind == "sliding_attention").collect(),
        None => (1..=config.layers).map(|layer| !layer.is_multiple_of(pattern)).collect(),
    };
    let window = keys.size_or_null("sliding_window", Some(4096))?;
    let windows = config.windows(keys, window, |layer| is_local[layer])?;
    let (global, local) = ropes(keys, &config)?;
    keys.finish(&gemma::RULE)?;

    let mut b = Builder::new();
    let (global_angles, local_angles) = (b.rope(global.rope()), b.rope(local.rope()));
    let decoder = DecoderSpec { softcap, ..gemma::around(&config, None) };
    decoder.build(&mut b, path, |layer| BlockSpec {
        place: NormPlace::Around,
        attention: AttentionBlock {
            qkv_bias: bias,
            output_bias: bias,
            scale,
            qk_norm: Some(QkNormOver::Head),
            window: windows[layer],
            ..config.attention(Some(if is_local[layer] { local_angles } else { global_angles }))
        },
        feed_forward: config.gated(),
    })?;
    Ok(b.finish(config.clone().metadata(architecture, global.context())))
}

/// Rotary settings of global layers, which alone are scaled, and of windowed ones: two sections in files of transformers 5.
fn ropes(keys: &Keys, config: &DecoderConfig) -> Result<(RopeSettings, RopeSettings)> {
    let local_theta = keys.number_or_null("rope_local_base_freq", Some(LOCAL_THETA))?.unwrap_or(LOCAL_THETA);
    let basis = |theta| RopeBasis { theta, ..config.rope_basis() };
    match by_layer_type(keys, ["full_attention", "sliding_attention"])? {
        Some([global, local]) => {
            let theta = keys.number_or_null("rope_theta", Some(GLOBAL_THETA))?.unwrap_or(GLOBAL_THETA);
            let local = RopeSettings::of(keys, local.as_ref(), basis(local_theta))?;
            Ok((RopeSettings::of(keys, global.as_ref(), basis(theta))?, local))
        }
        None => {
            let global = RopeSettings::read(keys, basis(GLOBAL_THETA))?;
            let local = global.plain(local_theta);
            Ok((global, local))
        }
    }
}
