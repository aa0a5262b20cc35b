//! What the config.json of every decoder says alike, and the plain parts that a family starts from.

use candle_core::Result;

use super::blocks::{AttentionBlock, DecoderSpec, FeedForward, NormStyle};
use super::config::{activation, check_heads, check_layers, check_sizes};
use super::keys::Keys;
use super::rope::{DEFAULT_THETA, RopeBasis, Rotary};
use crate::plan::{ActivationKind, Mask, ModelMetadata, RopeId, VectorKind, Window};

/// The values that a family's config class of transformers has where a file leaves a key out.
pub struct Defaults {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    /// `None`: as many as heads.
    pub kv_heads: Option<usize>,
    /// `None`: the hidden size over the heads.
    pub head_dim: Option<usize>,
    pub max_positions: usize,
    /// Its key, and the value.
    pub epsilon: (&'static str, f64),
    /// Its key, and the value.
    pub activation: (&'static str, &'static str),
    pub tied: bool,
}

/// Values that every decoder's config.json has, checked.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub max_positions: usize,
    pub epsilon: f32,
    pub activation: ActivationKind,
    pub tied: bool,
    pub eos: Option<Vec<u32>>,
}

impl DecoderConfig {
    /// # Errors
    /// If a value is mistyped, too large, or does not fit the others.
    pub fn read(keys: &Keys, defaults: &Defaults) -> Result<Self> {
        let activation = activation(keys, defaults.activation.0, defaults.activation.1)?;
        Self::read_with(keys, defaults, activation)
    }

    /// As [`Self::read`], for a family that reads its activation by itself.
    pub fn read_with(keys: &Keys, defaults: &Defaults, activation: ActivationKind) -> Result<Self> {
        let heads = keys.size("num_attention_heads", defaults.heads)?;
        let kv_heads = keys.size("num_key_value_heads", defaults.kv_heads.unwrap_or(heads))?;
        let hidden_size = keys.size("hidden_size", defaults.hidden_size)?;
        let vocab_size = keys.size("vocab_size", defaults.vocab_size)?;
        let intermediate_size = keys.size("intermediate_size", defaults.intermediate_size)?;
        check_sizes(&[
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ])?;
        let head_dim = keys.size("head_dim", defaults.head_dim.unwrap_or(hidden_size / heads))?;
        check_heads(heads, kv_heads, head_dim)?;
        let layers = keys.size("num_hidden_layers", defaults.layers)?;
        check_layers("num_hidden_layers", layers)?;
        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions: keys.size("max_position_embeddings", defaults.max_positions)?,
            epsilon: keys.number(defaults.epsilon.0, defaults.epsilon.1)? as f32,
            activation,
            tied: keys.flag("tie_word_embeddings", defaults.tied)?,
            eos: keys.token_ids("eos_token_id")?,
        })
    }

    /// Rotary settings over whole heads.
    pub fn rope_basis(&self) -> RopeBasis {
        RopeBasis {
            head_dim: self.head_dim,
            rotary: Rotary::Whole,
            max_positions: self.max_positions,
            theta: DEFAULT_THETA,
            original: None,
            knows_su: false,
        }
    }

    /// The window of each layer. `layer_types` decides where a file has it, `is_windowed` elsewhere. A window that no sequence of
    /// the model outgrows is none.
    ///
    /// # Errors
    /// If `layer_types` names another kind of attention or another number of layers, or windows have no size.
    pub fn windows(
        &self,
        keys: &Keys,
        window: Option<usize>,
        is_windowed: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<Window>>> {
        if window == Some(0) {
            return Err(keys.wrong("sliding_window", "a number above 0"));
        }
        let windowed: Vec<bool> = match keys.words("layer_types")? {
            Some(types) if types.len() != self.layers => {
                return Err(keys.wrong("layer_types", &format!("a list of {} layers", self.layers)));
            }
            Some(types) => types.iter().map(|kind| windowed_type(keys, kind)).collect::<Result<_>>()?,
            None => (0..self.layers).map(is_windowed).collect(),
        };
        if window.is_none() && windowed.contains(&true) {
            return Err(keys.wrong("sliding_window", "a number above 0, as some layers attend over a window"));
        }
        let window = window.filter(|window| *window < self.max_positions).map(Window);
        Ok(windowed.into_iter().map(|windowed| window.filter(|_| windowed)).collect())
    }

    /// The one window of all layers. One that no sequence of the model outgrows is none.
    ///
    /// # Errors
    /// If it is 0.
    pub fn window_of_all(&self, keys: &Keys, window: Option<usize>) -> Result<Option<Window>> {
        match window {
            Some(0) => Err(keys.wrong("sliding_window", "a number above 0")),
            window => Ok(window.filter(|window| *window < self.max_positions).map(Window)),
        }
    }

    pub fn metadata(self, architecture: &'static str, context: usize) -> ModelMetadata {
        ModelMetadata {
            architecture,
            context,
            vocab: self.vocab_size,
            eos: self.eos.unwrap_or_default(),
            decoder_start: None,
        }
    }

    /// Causal attention as Llama has it; what a family changes, it names.
    pub fn attention(&self, rope: Option<RopeId>) -> AttentionBlock {
        AttentionBlock {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            fused: false,
            output: "o_proj",
            qkv_bias: false,
            output_bias: false,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            mask: Mask::Causal,
            rope,
            window: None,
            softcap: None,
            qk_norm: None,
            has_sinks: false,
        }
    }

    /// A gated feed-forward as Llama has it.
    pub fn gated(&self) -> FeedForward {
        let (intermediate, activation) = (self.intermediate_size, self.activation);
        FeedForward::Gated { intermediate, activation, bias: false, fused: false }
    }

    /// Norms as Llama has them.
    pub fn rms(&self) -> NormStyle {
        NormStyle::Rms { kind: VectorKind::NormWeight, epsilon: self.epsilon }
    }

    /// A decoder around blocks, as Llama has it.
    pub fn decoder(&self) -> DecoderSpec<'_> {
        DecoderSpec {
            config: self,
            norm: self.rms(),
            final_norm: "norm",
            embedding_scale: 1.0,
            image: None,
            head_bias: false,
            softcap: None,
        }
    }
}

fn windowed_type(keys: &Keys, kind: &str) -> Result<bool> {
    match kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        _ => {
            let known = "known are `full_attention` and `sliding_attention`";
            Err(keys.refused("layer_types", &format!("`{kind}` is not computed here; {known}")))
        }
    }
}
