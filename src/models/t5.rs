//! T5 (Raffel et al. 2020; Flan-T5): encoder and decoder, relative position bias, no scaling of attention scores.
//!
//! Keys and values of the cross-attention are computed once, at the end of the encoder's plan.

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::Architecture;
use super::config::{TokenIds, check_layers, check_sizes, parse};
use crate::plan::{
    ActivationKind, BiasId, BufferId, Builder, CacheId, EncoderInputKind, Facts, Holds, LinearLayer, Mask, MatrixId,
    Model, Path, RelativeBias, Role,
};

pub const ARCHITECTURE: Architecture =
    Architecture { model_type: "t5", doc: "T5, Flan-T5: encoder-decoder, relative position bias", build };

#[derive(Debug, Deserialize)]
struct Config {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_heads: usize,
    num_layers: usize,
    num_decoder_layers: Option<usize>,
    #[serde(default = "default_buckets")]
    relative_attention_num_buckets: usize,
    #[serde(default = "default_max_distance")]
    relative_attention_max_distance: usize,
    layer_norm_epsilon: f32,
    #[serde(default = "default_feed_forward")]
    feed_forward_proj: String,
    #[serde(default = "default_tied")]
    tie_word_embeddings: bool,
    /// transformers 5 saves every T5 as tied, and says here whether it scales what the head reads.
    scale_decoder_outputs: Option<bool>,
    #[serde(default = "default_positions")]
    n_positions: usize,
    #[serde(default)]
    decoder_start_token_id: u32,
    #[serde(default)]
    eos_token_id: TokenIds,
}

// transformers' T5Config has these where a file leaves the key out.
fn default_buckets() -> usize {
    32
}
fn default_max_distance() -> usize {
    128
}
fn default_feed_forward() -> String {
    "relu".to_owned()
}
fn default_tied() -> bool {
    true
}
fn default_positions() -> usize {
    512
}

/// The feed-forward that `feed_forward_proj` names.
#[derive(Clone, Copy)]
struct FeedForward {
    activation: ActivationKind,
    gated: bool,
}

fn feed_forward_of(name: &str) -> Result<FeedForward> {
    match name {
        "relu" => Ok(FeedForward { activation: ActivationKind::Relu, gated: false }),
        "gated-gelu" => Ok(FeedForward { activation: ActivationKind::GeluTanh, gated: true }),
        "gated-silu" => Ok(FeedForward { activation: ActivationKind::Silu, gated: true }),
        other => bail!("config.json says `feed_forward_proj` `{other}`; known are `relu`, `gated-gelu`, `gated-silu`"),
    }
}

/// What the blocks of both stacks share.
struct Stack {
    config: Config,
    feed_forward: FeedForward,
}

fn build(config: &Value) -> Result<Model> {
    let config: Config = parse(config)?;
    check_sizes(&[
        ("vocab_size", config.vocab_size),
        ("d_model", config.d_model),
        ("d_kv", config.d_kv),
        ("d_ff", config.d_ff),
        ("num_heads", config.num_heads),
        ("num_heads × d_kv", config.num_heads.saturating_mul(config.d_kv)),
        ("relative_attention_num_buckets", config.relative_attention_num_buckets),
    ])?;
    check_layers("num_layers", config.num_layers)?;
    check_layers("num_decoder_layers", config.num_decoder_layers.unwrap_or(config.num_layers))?;
    if config.relative_attention_num_buckets < 4 || config.relative_attention_max_distance < 32 {
        bail!("config.json's relative attention needs at least 4 buckets and a distance of 32");
    }
    let stack = Stack { feed_forward: feed_forward_of(&config.feed_forward_proj)?, config };
    let mut b = Builder::new();
    let shared = b.matrix(&Path::root().at("shared"), stack.config.vocab_size, stack.config.d_model, Role::Embedding);
    let cross = encoder(&mut b, &stack, shared);
    decoder(&mut b, &stack, shared, &cross);
    let config = stack.config;
    Ok(b.finish(Facts {
        architecture: ARCHITECTURE.model_type,
        context: config.n_positions,
        vocab: config.vocab_size,
        eos: config.eos_token_id.to_vec(),
        decoder_start: Some(config.decoder_start_token_id),
    }))
}

/// Returns the caches that hold keys and values for each decoder layer's cross-attention.
fn encoder(b: &mut Builder, stack: &Stack, shared: MatrixId) -> Vec<CacheId> {
    let config = &stack.config;
    let path = Path::root().at("encoder");
    let bias = stack.relative_bias(b, &path, true);
    // The layers of one call use it one after the other.
    let cache = b.cache(config.num_heads, config.d_kv, Holds::Encoder);
    let x = b.embed(shared);
    for layer in 0..config.num_layers {
        let path = path.at("block").at(layer).at("layer");
        stack.self_attention(b, &path.at(0), x, cache, Mask::Full, bias);
        stack.feed_forward(b, &path.at(1), x);
    }
    let x = b.rms_norm(&path.at("final_layer_norm"), config.layer_norm_epsilon, x);
    let cross = (0..stack.decoder_layers()).map(|layer| stack.cross_keys_and_values(b, layer, x)).collect();
    b.end_encoder(EncoderInputKind::Tokens);
    cross
}

fn decoder(b: &mut Builder, stack: &Stack, shared: MatrixId, cross: &[CacheId]) {
    let config = &stack.config;
    let path = Path::root().at("decoder");
    let bias = stack.relative_bias(b, &path, false);
    let x = b.embed(shared);
    for (layer, &cross) in cross.iter().enumerate() {
        let path = path.at("block").at(layer).at("layer");
        let cache = b.cache(config.num_heads, config.d_kv, Holds::Decoder);
        stack.self_attention(b, &path.at(0), x, cache, Mask::Causal, bias);
        stack.cross_attention(b, &path.at(1), x, cross);
        stack.feed_forward(b, &path.at(2), x);
    }
    let x = b.rms_norm(&path.at("final_layer_norm"), config.layer_norm_epsilon, x);
    let head = match config.tie_word_embeddings {
        true => shared,
        false => b.matrix(&Path::root().at("lm_head"), config.vocab_size, config.d_model, Role::Head),
    };
    // Where nothing else is said, a tied head reads the output scaled by d_model^-0.5.
    let scale = match config.scale_decoder_outputs.unwrap_or(config.tie_word_embeddings) {
        true => (config.d_model as f32).powf(-0.5),
        false => 1.0,
    };
    b.head(x, scale, head, None);
}

impl Stack {
    fn decoder_layers(&self) -> usize {
        self.config.num_decoder_layers.unwrap_or(self.config.num_layers)
    }

    fn projection(&self, path: Path) -> LinearLayer {
        LinearLayer { path, n: self.config.num_heads * self.config.d_kv, bias: false }
    }

    /// The first block's table serves all blocks of its stack.
    fn relative_bias(&self, b: &mut Builder, stack: &Path, bidirectional: bool) -> BiasId {
        let config = &self.config;
        let path = stack.at("block.0.layer.0.SelfAttention.relative_attention_bias");
        let table = b.matrix(&path, config.relative_attention_num_buckets, config.num_heads, Role::Embedding);
        b.relative_bias(RelativeBias { table, bidirectional, max_distance: config.relative_attention_max_distance })
    }

    /// `x += attention(norm(x))`
    fn self_attention(&self, b: &mut Builder, path: &Path, x: BufferId, cache: CacheId, mask: Mask, bias: BiasId) {
        let h = b.rms_norm(&path.at("layer_norm"), self.config.layer_norm_epsilon, x);
        let path = path.at("SelfAttention");
        let [q, k, v] = b.linears(h, ["q", "k", "v"].map(|name| self.projection(path.at(name))));
        b.append(k, v, cache);
        let h = b.attention(q, cache, 1.0, mask, Some(bias));
        let h = b.linear(h, path.at("o"), self.config.d_model, false);
        b.add_to(x, h);
    }

    /// Keys and values of decoder layer `layer` from the encoder's output.
    fn cross_keys_and_values(&self, b: &mut Builder, layer: usize, encoded: BufferId) -> CacheId {
        let path = Path::root().at("decoder.block").at(layer).at("layer.1.EncDecAttention");
        let [k, v] = b.linears(encoded, ["k", "v"].map(|name| self.projection(path.at(name))));
        let cache = b.cache(self.config.num_heads, self.config.d_kv, Holds::Encoder);
        b.append(k, v, cache);
        cache
    }

    /// `x += attention(norm(x))` over the encoder's keys and values; this attention has no position bias.
    fn cross_attention(&self, b: &mut Builder, path: &Path, x: BufferId, cache: CacheId) {
        let h = b.rms_norm(&path.at("layer_norm"), self.config.layer_norm_epsilon, x);
        let path = path.at("EncDecAttention");
        let [q] = b.linears(h, [self.projection(path.at("q"))]);
        let h = b.attention(q, cache, 1.0, Mask::Full, None);
        let h = b.linear(h, path.at("o"), self.config.d_model, false);
        b.add_to(x, h);
    }

    /// `x += wo · act(wi · norm(x))`, gated in later T5s.
    fn feed_forward(&self, b: &mut Builder, path: &Path, x: BufferId) {
        let h = b.rms_norm(&path.at("layer_norm"), self.config.layer_norm_epsilon, x);
        let path = path.at("DenseReluDense");
        let layer = |name: &str| LinearLayer { path: path.at(name), n: self.config.d_ff, bias: false };
        let (gate, up) = if self.feed_forward.gated {
            let [gate, up] = b.linears(h, [layer("wi_0"), layer("wi_1")]);
            (gate, Some(up))
        } else {
            let [gate] = b.linears(h, [layer("wi")]);
            (gate, None)
        };
        let h = b.activate(self.feed_forward.activation, gate, up);
        let h = b.linear_as(Role::HighPrecision, h, path.at("wo"), self.config.d_model, false);
        b.add_to(x, h);
    }
}
