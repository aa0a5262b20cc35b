//! Llama (Touvron et al. 2023; Llama 3.2): pre-norm blocks, grouped-query attention, gated feed-forward.

use candle_core::Result;

use super::Architecture;
use super::config::{activation, check_heads, check_layers, check_sizes, check_window};
use super::keys::Keys;
use super::rope::{RopeSettings, Rotary};
use super::rule::{HARMLESS, Off, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{
    ActivationKind, BufferId, Builder, CacheScope, LinearLayer, Mask, Model, ModelMetadata, Path, Role, RopeId,
};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "llama", doc: "Llama 2, 3.x, SmolLM2: decoder-only, grouped-query attention", build };

const RULE: Rule = Rule {
    harmless: &[HARMLESS],
    refused: &[
        REFUSED,
        REFUSED_IN_DECODERS,
        &[
            ("qk_layernorm", Off::Empty),
            ("query_pre_attn_scalar", Off::Empty),
            ("use_bidirectional_attention", Off::Empty),
        ],
    ],
};

/// A checked config, with LlamaConfig's defaults where a file leaves a key out.
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rms_norm_eps: f32,
    activation: ActivationKind,
    attention_bias: bool,
    mlp_bias: bool,
    tie_word_embeddings: bool,
    eos: Vec<u32>,
    rope: RopeSettings,
}

impl Config {
    fn read(keys: &Keys) -> Result<Self> {
        let (hidden_size, heads) = (keys.size("hidden_size", 4096)?, keys.size("num_attention_heads", 32)?);
        let max_position_embeddings = keys.size("max_position_embeddings", 2048)?;
        let kv_heads = keys.size("num_key_value_heads", heads)?;
        let (vocab_size, intermediate_size) =
            (keys.size("vocab_size", 32_000)?, keys.size("intermediate_size", 11_008)?);
        check_sizes(&[
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ])?;
        let head_dim = keys.size("head_dim", hidden_size / heads)?;
        check_heads(heads, kv_heads, head_dim)?;
        let num_hidden_layers = keys.size("num_hidden_layers", 32)?;
        check_layers("num_hidden_layers", num_hidden_layers)?;
        check_window(keys, max_position_embeddings)?;
        let config = Self {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", 1e-6)? as f32,
            activation: activation(keys, "hidden_act", "silu")?,
            attention_bias: keys.flag("attention_bias", false)?,
            mlp_bias: keys.flag("mlp_bias", false)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            eos: keys.token_ids("eos_token_id")?.unwrap_or_default(),
            rope: RopeSettings::read(keys, head_dim, Rotary::Whole, max_position_embeddings)?,
        };
        keys.finish(&RULE)?;
        Ok(config)
    }
}

fn build(keys: &Keys) -> Result<Model> {
    let config = &Config::read(keys)?;
    let mut b = Builder::new();
    let model = Path::root().at("model");

    let table = b.matrix(&model.at("embed_tokens"), config.vocab_size, config.hidden_size, Role::Embedding);
    let rope = b.rope(config.rope.rope());
    let x = b.embed(table);
    for layer in 0..config.num_hidden_layers {
        block(&mut b, &model.at("layers").at(layer), config, rope, x);
    }
    let x = b.rms_norm(&model.at("norm"), config.rms_norm_eps, x);
    let head = match config.tie_word_embeddings {
        true => table,
        false => b.matrix(&Path::root().at("lm_head"), config.vocab_size, config.hidden_size, Role::Head),
    };
    b.head(x, 1.0, head, None);
    Ok(b.finish(ModelMetadata {
        architecture: ARCHITECTURE.model_type,
        context: config.rope.context(),
        vocab: config.vocab_size,
        eos: config.eos.clone(),
        decoder_start: None,
    }))
}

/// `x += attention(norm(x))`, then `x += feed_forward(norm(x))`.
fn block(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, x: BufferId) {
    let h = b.rms_norm(&path.at("input_layernorm"), config.rms_norm_eps, x);
    let h = attention(b, &path.at("self_attn"), config, rope, h);
    b.add_to(x, h);
    let h = b.rms_norm(&path.at("post_attention_layernorm"), config.rms_norm_eps, x);
    let h = feed_forward(b, &path.at("mlp"), config, h);
    b.add_to(x, h);
}

fn attention(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, x: BufferId) -> BufferId {
    let Config { heads, kv_heads, head_dim, .. } = config;
    let layer = |name: &str, heads: &usize| LinearLayer {
        path: path.at(name),
        n: heads * head_dim,
        bias: config.attention_bias,
    };
    let [q, k, v] = b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)]);
    let cache = b.cache(*kv_heads, *head_dim, CacheScope::Decoder);
    b.rope_append(q, k, v, cache, rope);
    let scale = 1.0 / (*head_dim as f32).sqrt();
    let h = b.attention(q, cache, scale, Mask::Causal, None);
    b.linear(h, path.at("o_proj"), config.hidden_size, config.attention_bias)
}

fn feed_forward(b: &mut Builder, path: &Path, config: &Config, x: BufferId) -> BufferId {
    let layer = |name: &str| LinearLayer { path: path.at(name), n: config.intermediate_size, bias: config.mlp_bias };
    let [gate, up] = b.linears(x, [layer("gate_proj"), layer("up_proj")]);
    let h = b.activate(config.activation, gate, Some(up));
    b.linear(h, path.at("down_proj"), config.hidden_size, config.mlp_bias)
}
