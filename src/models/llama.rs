//! Llama (Touvron et al. 2023; Llama 3.2): pre-norm blocks, grouped-query attention, gated feed-forward.

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::Architecture;
use super::config::{RopeSettings, TokenIds, activation, check_layers, check_sizes, parse};
use crate::plan::{ActivationKind, BufferId, Builder, Facts, Holds, LinearLayer, Mask, Model, Path, Role, RopeId};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "llama", doc: "Llama 2, 3.x, SmolLM2: decoder-only, grouped-query attention", build };

#[derive(Debug, Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    eos_token_id: TokenIds,
    #[serde(flatten)]
    rope: RopeSettings,
}

/// A checked config: head counts that divide, the activation known.
struct Shape {
    config: Config,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    activation: ActivationKind,
}

impl Shape {
    fn new(config: Config) -> Result<Self> {
        let heads = config.num_attention_heads;
        let kv_heads = config.num_key_value_heads.unwrap_or(heads);
        check_sizes(&[
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ])?;
        check_layers("num_hidden_layers", config.num_hidden_layers)?;
        if !heads.is_multiple_of(kv_heads) {
            bail!("config.json says {heads} attention heads over {kv_heads} key/value heads; they must divide");
        }
        let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads);
        check_sizes(&[("head_dim", head_dim), ("num_attention_heads × head_dim", heads.saturating_mul(head_dim))])?;
        let activation = activation(&config.hidden_act)?;
        Ok(Self { config, heads, kv_heads, head_dim, activation })
    }
}

fn build(config: &Value) -> Result<Model> {
    let shape = Shape::new(parse(config)?)?;
    let config = &shape.config;
    let mut b = Builder::new();
    let model = Path::root().at("model");

    let table = b.matrix(&model.at("embed_tokens"), config.vocab_size, config.hidden_size, Role::Embedding);
    let rope = b.rope(config.rope.rope(shape.head_dim, 1.0)?);
    let x = b.embed(table);
    for layer in 0..config.num_hidden_layers {
        block(&mut b, &model.at("layers").at(layer), &shape, rope, x);
    }
    let x = b.rms_norm(&model.at("norm"), config.rms_norm_eps, x);
    let head = match config.tie_word_embeddings {
        true => table,
        false => b.matrix(&Path::root().at("lm_head"), config.vocab_size, config.hidden_size, Role::Head),
    };
    b.head(x, 1.0, head, None);
    Ok(b.finish(Facts {
        architecture: ARCHITECTURE.model_type,
        context: config.max_position_embeddings,
        vocab: config.vocab_size,
        eos: config.eos_token_id.to_vec(),
        decoder_start: None,
    }))
}

/// `x += attention(norm(x))`, then `x += feed_forward(norm(x))`.
fn block(b: &mut Builder, path: &Path, shape: &Shape, rope: RopeId, x: BufferId) {
    let config = &shape.config;
    let h = b.rms_norm(&path.at("input_layernorm"), config.rms_norm_eps, x);
    let h = attention(b, &path.at("self_attn"), shape, rope, h);
    b.add_to(x, h);
    let h = b.rms_norm(&path.at("post_attention_layernorm"), config.rms_norm_eps, x);
    let h = feed_forward(b, &path.at("mlp"), shape, h);
    b.add_to(x, h);
}

fn attention(b: &mut Builder, path: &Path, shape: &Shape, rope: RopeId, x: BufferId) -> BufferId {
    let Shape { heads, kv_heads, head_dim, config, .. } = shape;
    let layer = |name: &str, heads: &usize| LinearLayer {
        path: path.at(name),
        n: heads * head_dim,
        bias: config.attention_bias,
    };
    let [q, k, v] = b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)]);
    let cache = b.cache(*kv_heads, *head_dim, Holds::Decoder);
    b.rope_append(q, k, v, cache, rope);
    let scale = 1.0 / (*head_dim as f32).sqrt();
    let h = b.attention(q, cache, scale, Mask::Causal, None);
    b.linear(h, path.at("o_proj"), config.hidden_size, config.attention_bias)
}

fn feed_forward(b: &mut Builder, path: &Path, shape: &Shape, x: BufferId) -> BufferId {
    let config = &shape.config;
    let layer = |name: &str| LinearLayer { path: path.at(name), n: config.intermediate_size, bias: config.mlp_bias };
    let [gate, up] = b.linears(x, [layer("gate_proj"), layer("up_proj")]);
    let h = b.activate(shape.activation, gate, Some(up));
    b.linear(h, path.at("down_proj"), config.hidden_size, config.mlp_bias)
}
