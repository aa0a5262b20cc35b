//! Phi (Phi-1, Phi-1.5, Phi-2): attention and feed-forward read the same norm, side by side; biases everywhere; only a
//! part of each head rotates.

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::Architecture;
use super::config::{RopeSettings, TokenIds, activation, check_layers, check_sizes, parse};
use crate::plan::{BufferId, Builder, Facts, Holds, LinearLayer, Mask, Model, Path, Role, RopeId};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "phi", doc: "Phi-1, Phi-1.5, Phi-2: decoder-only, parallel blocks, biases", build };

/// transformers' default where config.json has no `partial_rotary_factor`.
const PARTIAL_ROTARY_FACTOR: f64 = 0.5;

#[derive(Debug, Deserialize)]
struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    max_position_embeddings: usize,
    layer_norm_eps: f32,
    hidden_act: String,
    #[serde(default)]
    qk_layernorm: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    eos_token_id: TokenIds,
    #[serde(flatten)]
    rope: RopeSettings,
}

impl Config {
    fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    fn check(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.kv_heads()),
        ])?;
        check_layers("num_hidden_layers", self.num_hidden_layers)?;
        let (heads, kv_heads) = (self.num_attention_heads, self.kv_heads());
        if !heads.is_multiple_of(kv_heads) || !self.hidden_size.is_multiple_of(heads) {
            bail!(
                "config.json says hidden size {}, {heads} heads, {kv_heads} key/value heads; they must divide",
                self.hidden_size
            );
        }
        if self.qk_layernorm {
            bail!("config.json sets `qk_layernorm`, which no released Phi uses and this engine does not compute");
        }
        Ok(())
    }
}

fn build(config: &Value) -> Result<Model> {
    let config: Config = parse(config)?;
    config.check()?;
    let mut b = Builder::new();
    let model = Path::root().at("model");

    let table = b.matrix(&model.at("embed_tokens"), config.vocab_size, config.hidden_size, Role::Embedding);
    let rope = b.rope(config.rope.rope(config.head_dim(), PARTIAL_ROTARY_FACTOR)?);
    let x = b.embed(table);
    for layer in 0..config.num_hidden_layers {
        block(&mut b, &model.at("layers").at(layer), &config, rope, x)?;
    }
    let x = b.layer_norm(&model.at("final_layernorm"), config.layer_norm_eps, x);
    let lm_head = Path::root().at("lm_head");
    let head = match config.tie_word_embeddings {
        true => table,
        false => b.matrix(&lm_head, config.vocab_size, config.hidden_size, Role::Head),
    };
    b.head(x, 1.0, head, Some(&lm_head));
    Ok(b.finish(Facts {
        architecture: ARCHITECTURE.model_type,
        context: config.max_position_embeddings,
        vocab: config.vocab_size,
        eos: config.eos_token_id.to_vec(),
        decoder_start: None,
    }))
}

/// `x += attention(norm(x)) + feed_forward(norm(x))`, one norm for both.
fn block(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, x: BufferId) -> Result<()> {
    let h = b.layer_norm(&path.at("input_layernorm"), config.layer_norm_eps, x);
    let attention = attention(b, &path.at("self_attn"), config, rope, h);
    let feed_forward = feed_forward(b, &path.at("mlp"), config, h)?;
    b.add_to(x, attention);
    b.add_to(x, feed_forward);
    Ok(())
}

fn attention(b: &mut Builder, path: &Path, config: &Config, rope: RopeId, x: BufferId) -> BufferId {
    let head_dim = config.head_dim();
    let layer = |name: &str, heads: usize| LinearLayer { path: path.at(name), n: heads * head_dim, bias: true };
    let (heads, kv_heads) = (config.num_attention_heads, config.kv_heads());
    let [q, k, v] = b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)]);
    let cache = b.cache(kv_heads, head_dim, Holds::Decoder);
    b.rope_append(q, k, v, cache, rope);
    let h = b.attention(q, cache, 1.0 / (head_dim as f32).sqrt(), Mask::Causal, None);
    b.linear(h, path.at("dense"), config.hidden_size, true)
}

fn feed_forward(b: &mut Builder, path: &Path, config: &Config, x: BufferId) -> Result<BufferId> {
    let h = b.linear(x, path.at("fc1"), config.intermediate_size, true);
    let h = b.activate(activation(&config.hidden_act)?, h, None);
    Ok(b.linear(h, path.at("fc2"), config.hidden_size, true))
}
