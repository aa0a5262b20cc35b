//! Phi (Phi-1, Phi-1.5, Phi-2): attention and feed-forward read the same norm, side by side; biases everywhere; only a
//! part of each head rotates.

use candle_core::{Result, bail};

use super::Architecture;
use super::config::{activation, check_heads, check_layers, check_sizes, check_window};
use super::keys::Keys;
use super::rope::{RopeSettings, Rotary};
use super::rule::{HARMLESS, Off, REFUSED, REFUSED_IN_DECODERS, Rule};
use crate::plan::{
    ActivationKind, BufferId, Builder, CacheScope, LinearLayer, Mask, Model, ModelMetadata, Path, Role, RopeId,
};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "phi", doc: "Phi-1, Phi-1.5, Phi-2: decoder-only, parallel blocks, biases", build };

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

/// transformers' default where config.json has no `partial_rotary_factor`.
const PARTIAL_ROTARY_FACTOR: f64 = 0.5;

/// A checked config, with PhiConfig's defaults where a file leaves a key out.
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layer_norm_eps: f32,
    activation: ActivationKind,
    tie_word_embeddings: bool,
    eos: Vec<u32>,
    rope: RopeSettings,
}

impl Config {
    fn read(keys: &Keys) -> Result<Self> {
        let (hidden_size, heads) = (keys.size("hidden_size", 2048)?, keys.size("num_attention_heads", 32)?);
        let max_position_embeddings = keys.size("max_position_embeddings", 2048)?;
        let kv_heads = keys.size("num_key_value_heads", heads)?;
        let (vocab_size, intermediate_size) = (keys.size("vocab_size", 51_200)?, keys.size("intermediate_size", 8192)?);
        check_sizes(&[
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
        ])?;
        let head_dim = match keys.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => bail!("config.json says hidden size {hidden_size} over {heads} heads; they must divide"),
        };
        check_heads(heads, kv_heads, head_dim)?;
        let num_hidden_layers = keys.size("num_hidden_layers", 24)?;
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
            layer_norm_eps: keys.number("layer_norm_eps", 1e-5)? as f32,
            activation: activation(keys, "hidden_act", "gelu_new")?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            eos: keys.token_ids("eos_token_id")?.unwrap_or_default(),
            rope: RopeSettings::read(keys, head_dim, Rotary::Part(PARTIAL_ROTARY_FACTOR), max_position_embeddings)?,
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
    let x = b.layer_norm(&model.at("final_layernorm"), config.layer_norm_eps, x);
    let lm_head = Path::root().at("lm_head");
    let head = match config.tie_word_embeddings {
        true => table,
        false => b.matrix(&lm_head, config.vocab_size, config.hidden_size, Role::Head),
    };
    b.head(x, 1.0, head, Some(&lm_head));
    Ok(b.finish(ModelMetadata {
        architecture: ARCHITECTURE.model_type,
        context: config.rope.context(),
        vocab: config.vocab_size,
        eos: config.eos.clone(),
        decoder_start: None,
    }))
}

/// `x += attention(norm(x)) + feed_forward(norm(x))`, one norm for both.
fn block(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, x: BufferId) {
    let h = b.layer_norm(&path.at("input_layernorm"), config.layer_norm_eps, x);
    let attention = attention(b, &path.at("self_attn"), config, rope, h);
    let feed_forward = feed_forward(b, &path.at("mlp"), config, h);
    b.add_to(x, attention);
    b.add_to(x, feed_forward);
}

fn attention(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, x: BufferId) -> BufferId {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    let layer = |name: &str, heads: usize| LinearLayer { path: path.at(name), n: heads * head_dim, bias: true };
    let [q, k, v] = b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)]);
    let cache = b.cache(kv_heads, head_dim, CacheScope::Decoder);
    b.rope_append(q, k, v, cache, rope);
    let h = b.attention(q, cache, 1.0 / (head_dim as f32).sqrt(), Mask::Causal, None);
    b.linear(h, path.at("dense"), config.hidden_size, true)
}

fn feed_forward(b: &mut Builder, path: &Path, config: &Config, x: BufferId) -> BufferId {
    let h = b.linear(x, path.at("fc1"), config.intermediate_size, true);
    let h = b.activate(config.activation, h, None);
    b.linear(h, path.at("fc2"), config.hidden_size, true)
}
