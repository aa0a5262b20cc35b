//! PaliGemma (Beyer et al. 2024): SigLIP's patches, projected, stand before the prompt of a Gemma decoder, which reads
//! picture and prompt as one prefix.

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::config::{TokenIds, parse};
use super::{Architecture, gemma, siglip};
use crate::plan::{Builder, EncoderInputKind, Facts, Mask, Model, Path, Picture};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "paligemma", doc: "PaliGemma: picture and text to text, SigLIP and Gemma", build };

#[derive(Debug, Deserialize)]
struct Config {
    image_token_index: u32,
    text_config: gemma::Config,
    vision_config: siglip::Config,
    #[serde(default)]
    eos_token_id: TokenIds,
}

fn build(config: &Value) -> Result<Model> {
    let Config { image_token_index, text_config, vision_config, eos_token_id } = parse(config)?;
    text_config.check()?;
    vision_config.check()?;
    if image_token_index as usize >= text_config.vocab_size {
        bail!("config.json says image token {image_token_index} of a vocabulary of {}", text_config.vocab_size);
    }
    let picture = Picture { size: vision_config.image_size, patch: vision_config.patch_size, token: image_token_index };
    let mut b = Builder::new();

    let x = siglip::tower(&mut b, &Path::root().at("vision_tower"), &vision_config, picture)?;
    let projector = Path::root().at("multi_modal_projector").at("linear");
    let x = b.linear(x, projector, text_config.hidden_size, true);
    b.features(x);
    b.end_encoder(EncoderInputKind::Picture(picture));

    gemma::decoder(&mut b, &Path::root().at("language_model"), &text_config, Mask::Prefix, Some(picture.token))?;
    let eos = match eos_token_id {
        TokenIds::None => text_config.eos_token_id.to_vec(),
        ids => ids.to_vec(),
    };
    Ok(b.finish(Facts {
        architecture: ARCHITECTURE.model_type,
        context: text_config.max_position_embeddings,
        vocab: text_config.vocab_size,
        eos,
        decoder_start: None,
    }))
}
