//! PaliGemma (Beyer et al. 2024): SigLIP's patches, projected, stand before the prompt of a Gemma decoder, which reads
//! picture and prompt as one prefix.

use std::sync::LazyLock;

use candle_core::{Result, bail};
use serde_json::{Map, Value, json};

use super::gemma::Use;
use super::keys::Keys;
use super::rule::{HARMLESS, Off, REFUSED, Rule};
use super::{Architecture, gemma, siglip};
use crate::plan::{Builder, EncoderInputKind, Mask, Model, ModelMetadata, Path, Picture};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "paligemma", doc: "PaliGemma: picture and text to text, SigLIP and Gemma", build };

/// Sizes that stand at the top are those of its parts, which are read.
const RULE: Rule = Rule {
    harmless: &[HARMLESS, &["hidden_size", "num_hidden_layers", "vocab_size"]],
    refused: &[REFUSED, &[("is_encoder_decoder", Off::Empty)]],
};

/// A checked config, with PaliGemmaConfig's defaults where a file leaves a key out.
struct Config {
    image_token: u32,
    text: gemma::Config,
    vision: siglip::Config,
    eos: Option<Vec<u32>>,
}

impl Config {
    fn read(keys: &Keys) -> Result<Self> {
        let mut text = gemma::Config::read(&part(keys, "text_config", "gemma", &TEXT)?, Use::BehindPicture)?;
        let vision = siglip::Config::read(&part(keys, "vision_config", "siglip_vision_model", &VISION)?)?;
        let image_token = keys.size_by("image_token_index", "image_token_id", 256_000)?;
        let image_token = match u32::try_from(image_token) {
            Ok(token) if image_token < text.decoder.vocab_size => token,
            _ => bail!(
                "config.json says `image_token_index` {image_token}; it must be in the vocabulary of {}",
                text.decoder.vocab_size
            ),
        };
        if keys.optional_size("projection_dim")?.is_some_and(|width| width != text.decoder.hidden_size) {
            return Err(
                keys.wrong("projection_dim", &format!("`text_config.hidden_size`, {}", text.decoder.hidden_size))
            );
        }
        if !text.rope.holds_from_one() {
            bail!(
                "config.json says rope type `{}`, which this model does not compute: its positions begin with 1",
                text.rope.kind.name()
            );
        }
        // The outer word decides.
        text.decoder.tied = keys.flag("tie_word_embeddings", true)?;
        let eos = keys.token_ids("eos_token_id")?;
        keys.finish(&RULE)?;
        Ok(Self { image_token, text, vision, eos })
    }
}

/// The parts of a file that leaves them out.
static TEXT: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    object(json!({
        "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16_384, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": 257_152,
    }))
});
static VISION: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    object(json!({
        "hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4096, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    }))
});

fn object(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// The config of a part, whose `model_type` must be the one that is computed.
fn part<'a>(
    keys: &Keys<'a>,
    key: &'static str,
    model_type: &str,
    default: &'static Map<String, Value>,
) -> Result<Keys<'a>> {
    let part = keys.section_or(key, default)?;
    match part.optional_word("model_type")? {
        None => Ok(part),
        Some(name) if name == model_type => Ok(part),
        Some(_) => Err(part.refused("model_type", &format!("PaliGemma is computed here with `{model_type}` alone"))),
    }
}

fn build(keys: &Keys) -> Result<Model> {
    let Config { image_token, text, vision, eos } = Config::read(keys)?;
    let picture = Picture { size: vision.image_size, patch: vision.patch_size, token: image_token };
    let mut b = Builder::new();

    let x = siglip::tower(&mut b, &Path::root().at("vision_tower"), &vision, picture);
    let projector = Path::root().at("multi_modal_projector").at("linear");
    let x = b.linear(x, projector, text.decoder.hidden_size, true);
    b.features(x);
    b.end_encoder(EncoderInputKind::Picture(picture));

    gemma::decoder(&mut b, &Path::root().at("language_model"), &text, Mask::Prefix, Some(picture.token))?;
    Ok(b.finish(ModelMetadata {
        architecture: ARCHITECTURE.model_type,
        context: text.rope.context(),
        vocab: text.decoder.vocab_size,
        eos: eos.or(text.decoder.eos).unwrap_or_default(),
        decoder_start: None,
    }))
}
