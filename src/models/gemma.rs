//! Gemma (Mesnard et al. 2024): llama's blocks with a head dim of its own, `(1 + w)` norms, scaled embeddings, a tied head.

use candle_core::Result;

use super::Architecture;
use super::config::{activation, activation_named, check_heads, check_layers, check_sizes, check_window};
use super::keys::Keys;
use super::rope::{RopeSettings, Rotary};
use super::rule::{HARMLESS, Off, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{
    ActivationKind, BufferId, Builder, CacheScope, LinearLayer, Mask, Model, ModelMetadata, Path, Role, RopeId,
};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "gemma", doc: "Gemma 1: decoder-only, tied head, (1 + w) norms", build };

const RULE: Rule = Rule {
    harmless: &[HARMLESS, &["num_image_tokens"]],
    refused: &[REFUSED, REFUSED_IN_DECODERS, &[("qk_layernorm", Off::Empty)]],
};

/// Who reads the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// By itself: a token sees those before it.
    Alone,
    /// Behind a picture: the prompt is one prefix that sees all of itself.
    BehindPicture,
}

/// A checked config, with GemmaConfig's defaults where a file leaves a key out.
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    rms_norm_eps: f32,
    activation: ActivationKind,
    attention_bias: bool,
    pub tie_word_embeddings: bool,
    pub eos: Option<Vec<u32>>,
    pub rope: RopeSettings,
}

impl Config {
    pub fn read(keys: &Keys, used: Use) -> Result<Self> {
        let max_position_embeddings = keys.size("max_position_embeddings", 8192)?;
        let (num_attention_heads, head_dim) = (keys.size("num_attention_heads", 16)?, keys.size("head_dim", 256)?);
        let config = Self {
            vocab_size: keys.size("vocab_size", 256_000)?,
            hidden_size: keys.size("hidden_size", 3072)?,
            intermediate_size: keys.size("intermediate_size", 24_576)?,
            num_hidden_layers: keys.size("num_hidden_layers", 28)?,
            num_attention_heads,
            num_key_value_heads: keys.size("num_key_value_heads", 16)?,
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", 1e-6)? as f32,
            activation: hidden_activation(keys)?,
            attention_bias: keys.flag("attention_bias", false)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", true)?,
            eos: keys.token_ids("eos_token_id")?,
            rope: RopeSettings::read(keys, head_dim, Rotary::Whole, max_position_embeddings)?,
        };
        config.check()?;
        check_window(keys, max_position_embeddings)?;
        let sees_all = keys.optional_flag("use_bidirectional_attention")?;
        if sees_all.is_some_and(|sees_all| sees_all != (used == Use::BehindPicture)) {
            return Err(keys.refused("use_bidirectional_attention", "this mask of the prompt is not computed here"));
        }
        if keys.optional_number("query_pre_attn_scalar")?.is_some_and(|scalar| scalar != head_dim as f64) {
            return Err(keys.refused("query_pre_attn_scalar", "Gemma 1 scales attention by its `head_dim`"));
        }
        keys.finish(&RULE)?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
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
    decoder(&mut b, &Path::root(), &config, Mask::Causal, None);
    Ok(b.finish(ModelMetadata {
        architecture: ARCHITECTURE.model_type,
        context: config.rope.context(),
        vocab: config.vocab_size,
        eos: config.eos.clone().unwrap_or_default(),
        decoder_start: None,
    }))
}

/// The whole decoder under `path`; `image` is the token whose rows are image features.
pub fn decoder(b: &mut Builder, path: &Path, config: &Config, mask: Mask, image: Option<u32>) {
    let model = path.at("model");
    let table = b.matrix(&model.at("embed_tokens"), config.vocab_size, config.hidden_size, Role::Embedding);
    let rope = b.rope(config.rope.rope());
    let x = b.embed_scaled(table, (config.hidden_size as f32).sqrt(), image);
    for layer in 0..config.num_hidden_layers {
        let path = model.at("layers").at(layer);
        let h = b.rms_norm_offset(&path.at("input_layernorm"), config.rms_norm_eps, x);
        let h = attention(b, &path.at("self_attn"), config, rope, mask, h);
        b.add_to(x, h);
        let h = b.rms_norm_offset(&path.at("post_attention_layernorm"), config.rms_norm_eps, x);
        let h = feed_forward(b, &path.at("mlp"), config, h);
        b.add_to(x, h);
    }
    let x = b.rms_norm_offset(&model.at("norm"), config.rms_norm_eps, x);
    let head = match config.tie_word_embeddings {
        true => table,
        false => b.matrix(&path.at("lm_head"), config.vocab_size, config.hidden_size, Role::Head),
    };
    b.head(x, 1.0, head, None);
}

fn attention(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, mask: Mask, x: BufferId) -> BufferId {
    let (d, bias) = (config.head_dim, config.attention_bias);
    let layer = |name: &str, heads: usize| LinearLayer { path: path.at(name), n: heads * d, bias };
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let [q, k, v] = b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)]);
    let cache = b.cache(kv_heads, d, CacheScope::Decoder);
    b.rope_append(q, k, v, cache, rope);
    let h = b.attention(q, cache, 1.0 / (d as f32).sqrt(), mask, None);
    b.linear(h, path.at("o_proj"), config.hidden_size, bias)
}

fn feed_forward(b: &mut Builder, path: &Path, config: &Config, x: BufferId) -> BufferId {
    let layer = |name: &str| LinearLayer { path: path.at(name), n: config.intermediate_size, bias: false };
    let [gate, up] = b.linears(x, [layer("gate_proj"), layer("up_proj")]);
    let h = b.activate(config.activation, gate, Some(up));
    b.linear(h, path.at("down_proj"), config.hidden_size, false)
}
