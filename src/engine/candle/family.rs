//! The model files of candle-transformers that run here, called alike.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::{Linear, VarBuilder};
use candle_transformers::models::{gemma, llama, phi, siglip, t5};

use super::causal::{self, Causal};
use super::config::Config;
use crate::engine::EncoderInput;
use crate::error::BadInput;
use crate::plan::Picture;

/// A model with its caches. A clone shares the weights and keeps the caches of its moment.
#[derive(Clone)]
pub enum CandleFamily {
    Llama { model: Arc<llama::Llama>, cache: llama::Cache },
    Phi(phi::Model),
    Gemma(gemma::Model),
    Causal(Box<dyn Causal>),
    T5(Box<T5Sides>),
    PaliGemma { vision: Arc<VisionTower>, text: gemma::Model },
}

/// T5's encoder and its decoder, each loaded as a model of its own: candle buckets distances as the encoder does in both
/// stacks, and a decoder that is given twice the buckets, the upper half zero, computes what transformers' decoder does.
#[derive(Clone)]
pub struct T5Sides {
    encoder: t5::T5EncoderModel,
    decoder: t5::T5ForConditionalGeneration,
}

/// PaliGemma's vision, put together from candle's SigLIP here: candle's own composition gives every image feature length 1,
/// which no transformers version does.
pub struct VisionTower {
    tower: siglip::VisionModel,
    projector: Linear,
    picture: Picture,
    /// Undoes the scaling that Gemma gives to all embeddings.
    scale: f64,
}

impl CandleFamily {
    /// Reads every tensor from `tensors`, in their dtype and onto their device.
    pub fn new(config: &Config, tensors: VarBuilder) -> Result<Self> {
        Ok(match config {
            Config::Llama(config) => CandleFamily::Llama {
                cache: llama::Cache::new(true, tensors.dtype(), config, tensors.device())?,
                model: Arc::new(llama::Llama::load(tensors, config)?),
            },
            Config::Phi(config) => CandleFamily::Phi(phi::Model::new(config, tensors)?),
            Config::Gemma(config) => CandleFamily::Gemma(gemma::Model::new(false, config, tensors)?),
            Config::Causal { architecture, config } => {
                CandleFamily::Causal(causal::load(architecture, config, tensors)?)
            }
            Config::T5 { encoder, decoder } => CandleFamily::T5(Box::new(T5Sides {
                encoder: t5::T5EncoderModel::load(tensors.clone(), encoder)?,
                decoder: t5::T5ForConditionalGeneration::load(tensors, decoder)?,
            })),
            Config::PaliGemma { vision, text, picture } => {
                let tower = siglip::VisionModel::new(vision, false, tensors.pp("vision_tower.vision_model"))?;
                let projector = tensors.pp("multi_modal_projector.linear");
                let projector = candle_nn::linear(vision.hidden_size, text.hidden_size, projector)?;
                let scale = (text.hidden_size as f64).sqrt().recip();
                let text = gemma::Model::new(false, text, tensors.pp("language_model"))?;
                CandleFamily::PaliGemma {
                    vision: Arc::new(VisionTower { tower, projector, picture: *picture, scale }),
                    text,
                }
            }
        })
    }

    /// Checks that candle takes these tokens behind `position` others.
    pub fn check(&self, tokens: &[u32], position: usize) -> std::result::Result<(), BadInput> {
        if let (CandleFamily::Phi(_) | CandleFamily::T5(_), 2.., 1..) = (self, tokens.len(), position) {
            let message = "`--engine candle`: this model of candle-transformers takes several tokens at once into an \
                           empty cache only";
            return Err(BadInput::new(message).hint("drop `--depth`, or use `--engine quantbench`"));
        }
        if let (CandleFamily::PaliGemma { vision, .. }, 0) = (self, position) {
            let Picture { token, .. } = vision.picture;
            let n_image = tokens.iter().take_while(|&&id| id == token).count();
            if n_image != vision.picture.patches() || tokens.len() == n_image {
                let message = "`--engine candle`: candle's PaliGemma reads the whole picture first and text behind it";
                return Err(BadInput::new(message).hint("drop `--depth`, or use `--engine quantbench`"));
            }
        }
        Ok(())
    }

    /// The encoder's output over a prompt or a picture.
    pub fn encode(&mut self, input: EncoderInput, dtype: DType, device: &Device) -> Result<Tensor> {
        match (self, input) {
            (CandleFamily::T5(sides), EncoderInput::Tokens(tokens)) => {
                sides.encoder.forward(&Tensor::new(tokens, device)?.unsqueeze(0)?)
            }
            (CandleFamily::PaliGemma { vision, .. }, EncoderInput::Pixels(pixels)) => {
                let size = vision.picture.size;
                let pixels = Tensor::from_slice(pixels, (1, 3, size, size), device)?.to_dtype(dtype)?;
                vision.projector.forward(&vision.tower.forward(&pixels)?)? * vision.scale
            }
            _ => bail!("this model has no encoder for what it was given"),
        }
    }

    /// Logits behind the last of `ids`, `[1, t]` tokens that follow `position` others.
    pub fn forward(&mut self, ids: &Tensor, position: usize, encoded: Option<&Tensor>) -> Result<Tensor> {
        match (self, encoded) {
            (CandleFamily::Llama { model, cache }, _) => model.forward(ids, position, cache),
            (CandleFamily::Phi(model), _) => model.forward(ids),
            (CandleFamily::Gemma(model), _) => model.forward(ids, position),
            (CandleFamily::Causal(model), _) => model.forward(ids, position),
            (CandleFamily::T5(sides), Some(encoded)) => sides.decoder.decode(ids, encoded),
            (CandleFamily::PaliGemma { vision, text }, Some(features)) if position == 0 => {
                let n_image = vision.picture.patches();
                let words = text.embed_tokens().forward(&ids.narrow(1, n_image, ids.dim(1)? - n_image)?)?;
                // Without a mask: picture and prompt are one prefix that sees all of itself.
                text.forward_embeds(&Tensor::cat(&[features, &words], 1)?, None, 0)
            }
            (CandleFamily::PaliGemma { text, .. }, Some(_)) => text.forward(ids, position),
            (CandleFamily::T5(_) | CandleFamily::PaliGemma { .. }, None) => {
                bail!("the decoder runs before the encoder")
            }
        }
    }
}
