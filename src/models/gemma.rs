//! Gemma (Mesnard et al. 2024): llama's blocks with a head dim of its own, `(1 + w)` norms, scaled embeddings, a tied head.

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::Architecture;
use super::config::{RopeSettings, TokenIds, activation, check_layers, check_sizes, parse};
use crate::plan::{ActivationKind, BufferId, Builder, Facts, Holds, LinearLayer, Mask, Model, Path, Role, RopeId};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "gemma", doc: "Gemma 1: decoder-only, tied head, (1 + w) norms", build };

/// Settings with GemmaConfig's defaults where a file leaves the key out, as PaliGemma's text configs do.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    pub max_position_embeddings: usize,
    rms_norm_eps: f32,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    attention_bias: bool,
    tie_word_embeddings: bool,
    pub eos_token_id: TokenIds,
    #[serde(flatten)]
    rope: RopeSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vocab_size: 256_000,
            hidden_size: 3072,
            intermediate_size: 24_576,
            num_hidden_layers: 28,
            num_attention_heads: 16,
            num_key_value_heads: 16,
            head_dim: 256,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-6,
            hidden_act: None,
            hidden_activation: None,
            attention_bias: false,
            tie_word_embeddings: true,
            eos_token_id: TokenIds::One(1),
            rope: RopeSettings::default(),
        }
    }
}

impl Config {
    pub fn check(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("num_attention_heads × head_dim", self.num_attention_heads.saturating_mul(self.head_dim)),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
            bail!("config.json says {heads} attention heads over {kv_heads} key/value heads; they must divide");
        }
        Ok(())
    }

    /// Gemma computes the tanh approximation even where a file says `gelu`.
    fn activation(&self) -> Result<ActivationKind> {
        match self.hidden_activation.as_deref().or(self.hidden_act.as_deref()) {
            None | Some("gelu") => Ok(ActivationKind::GeluTanh),
            Some(name) => activation(name),
        }
    }
}

fn build(config: &Value) -> Result<Model> {
    let config: Config = parse(config)?;
    config.check()?;
    let mut b = Builder::new();
    decoder(&mut b, &Path::root(), &config, Mask::Causal, None)?;
    Ok(b.finish(Facts {
        architecture: ARCHITECTURE.model_type,
        context: config.max_position_embeddings,
        vocab: config.vocab_size,
        eos: config.eos_token_id.to_vec(),
        decoder_start: None,
    }))
}

/// The whole decoder under `path`; `image` is the token whose rows are image features.
pub fn decoder(b: &mut Builder, path: &Path, config: &Config, mask: Mask, image: Option<u32>) -> Result<()> {
    let model = path.at("model");
    let table = b.matrix(&model.at("embed_tokens"), config.vocab_size, config.hidden_size, Role::Embedding);
    let rope = b.rope(config.rope.rope(config.head_dim, 1.0)?);
    let activation = config.activation()?;
    let x = b.embed_scaled(table, (config.hidden_size as f32).sqrt(), image);
    for layer in 0..config.num_hidden_layers {
        let path = model.at("layers").at(layer);
        let h = b.rms_norm_offset(&path.at("input_layernorm"), config.rms_norm_eps, x);
        let h = attention(b, &path.at("self_attn"), config, rope, mask, h);
        b.add_to(x, h);
        let h = b.rms_norm_offset(&path.at("post_attention_layernorm"), config.rms_norm_eps, x);
        let h = feed_forward(b, &path.at("mlp"), config, activation, h);
        b.add_to(x, h);
    }
    let x = b.rms_norm_offset(&model.at("norm"), config.rms_norm_eps, x);
    let head = match config.tie_word_embeddings {
        true => table,
        false => b.matrix(&path.at("lm_head"), config.vocab_size, config.hidden_size, Role::Head),
    };
    b.head(x, 1.0, head, None);
    Ok(())
}

fn attention(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, mask: Mask, x: BufferId) -> BufferId {
    let (d, bias) = (config.head_dim, config.attention_bias);
    let layer = |name: &str, heads: usize| LinearLayer { path: path.at(name), n: heads * d, bias };
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let [q, k, v] = b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)]);
    let cache = b.cache(kv_heads, d, Holds::Decoder);
    b.rope_append(q, k, v, cache, rope);
    let h = b.attention(q, cache, 1.0 / (d as f32).sqrt(), mask, None);
    b.linear(h, path.at("o_proj"), config.hidden_size, bias)
}

fn feed_forward(b: &mut Builder, path: &Path, config: &Config, activation: ActivationKind, x: BufferId) -> BufferId {
    let layer = |name: &str| LinearLayer { path: path.at(name), n: config.intermediate_size, bias: false };
    let [gate, up] = b.linears(x, [layer("gate_proj"), layer("up_proj")]);
    let h = b.activate(activation, gate, Some(up));
    b.linear(h, path.at("down_proj"), config.hidden_size, false)
}
