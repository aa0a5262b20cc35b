//! T5 (Raffel et al. 2020; Flan-T5): encoder and decoder, relative position bias, no scaling of attention scores.
//!
//! Keys and values of the cross-attention are computed once, at the end of the encoder's plan.

use candle_core::{Result, bail};

use super::Architecture;
use super::config::{activation_named, check_layers, check_sizes, check_window};
use super::keys::Keys;
use super::rule::{HARMLESS, Off, REFUSED, Rule};
use crate::plan::{
    ActivationKind, BiasId, BufferId, Builder, CacheId, CacheScope, EncoderInputKind, LinearLayer, Mask, MatrixId,
    Model, ModelMetadata, Path, RelativeBias, Role,
};

pub const ARCHITECTURE: Architecture = Architecture {
    model_type: "t5",
    doc: "T5, Flan-T5, Flan-UL2, MADLAD: encoder-decoder, relative position bias",
    build,
};

/// The same code; its head is its own, and reads no scaled output.
pub const MT5: Architecture =
    Architecture { model_type: "mt5", doc: "mT5: T5 with a head of its own", build: build_mt5 };

/// `n_positions` is what it was trained on: positions are relative, so that any length works.
const RULE: Rule =
    Rule { harmless: &[HARMLESS, &["n_positions"]], refused: &[REFUSED, &[("is_encoder_decoder", Off::True)]] };

/// Longer than any text that fits a machine: a length that a user types is checked before its ids are made.
const LONGEST: usize = 1 << 20;

/// Defaults of T5Config and MT5Config for keys that a file leaves out.
struct Variant {
    model_type: &'static str,
    vocab_size: usize,
    d_ff: usize,
    num_layers: usize,
    num_heads: usize,
    feed_forward_proj: &'static str,
    /// A tied head reads a scaled output.
    scales_tied: bool,
}

const T5: Variant = Variant {
    model_type: "t5",
    vocab_size: 32_128,
    d_ff: 2048,
    num_layers: 6,
    num_heads: 8,
    feed_forward_proj: "relu",
    scales_tied: true,
};

const OF_MT5: Variant = Variant {
    model_type: "mt5",
    vocab_size: 250_112,
    d_ff: 1024,
    num_layers: 8,
    num_heads: 6,
    feed_forward_proj: "gated-gelu",
    scales_tied: false,
};

/// A checked config.
struct Config {
    vocab_size: usize,
    d_model: usize,
    d_kv: usize,
    d_ff: usize,
    num_heads: usize,
    num_layers: usize,
    num_decoder_layers: usize,
    relative_attention_num_buckets: usize,
    relative_attention_max_distance: usize,
    layer_norm_epsilon: f32,
    feed_forward: FeedForward,
    /// No head of its own: the table of embeddings is the head.
    is_tied: bool,
    /// The head reads the decoder's output scaled by `d_model^-0.5`.
    scales_output: bool,
    eos: Vec<u32>,
    decoder_start: u32,
}

impl Config {
    fn read(keys: &Keys, variant: &Variant) -> Result<Self> {
        let num_layers = keys.size_by("num_layers", "num_hidden_layers", variant.num_layers)?;
        let is_tied = keys.flag("tie_word_embeddings", true)?;
        let start = match keys.token_ids("decoder_start_token_id")? {
            Some(ids) => Some(ids),
            None => keys.token_ids("pad_token_id")?,
        };
        let config = Self {
            vocab_size: keys.size("vocab_size", variant.vocab_size)?,
            d_model: keys.size_by("d_model", "hidden_size", 512)?,
            d_kv: keys.size_by("d_kv", "head_dim", 64)?,
            d_ff: keys.size("d_ff", variant.d_ff)?,
            num_heads: keys.size_by("num_heads", "num_attention_heads", variant.num_heads)?,
            num_layers,
            num_decoder_layers: keys.size("num_decoder_layers", num_layers)?,
            relative_attention_num_buckets: keys.size("relative_attention_num_buckets", 32)?,
            relative_attention_max_distance: keys.size("relative_attention_max_distance", 128)?,
            layer_norm_epsilon: keys.number("layer_norm_epsilon", 1e-6)? as f32,
            feed_forward: FeedForward::read(keys, variant.feed_forward_proj)?,
            is_tied,
            // transformers 5 saves every T5 as tied, and says here whether the head reads a scaled output.
            scales_output: keys.flag("scale_decoder_outputs", is_tied && variant.scales_tied)?,
            eos: keys.token_ids("eos_token_id")?.unwrap_or_default(),
            decoder_start: start.and_then(|ids| ids.first().copied()).unwrap_or(0),
        };
        config.check()?;
        check_window(keys, LONGEST)?;
        keys.finish(&RULE)?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_heads", self.num_heads),
            ("num_heads × d_kv", self.num_heads.saturating_mul(self.d_kv)),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets),
        ])?;
        check_layers("num_layers", self.num_layers)?;
        check_layers("num_decoder_layers", self.num_decoder_layers)?;
        // The encoder keeps half of its buckets for each direction, and half of those for exact distances.
        let (buckets, distance) = (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        if buckets < 4 || distance <= buckets / 2 {
            bail!(
                "config.json says `relative_attention_num_buckets` {buckets} and `relative_attention_max_distance` {distance}; these must be at least 4, and more than half as many"
            );
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct FeedForward {
    activation: ActivationKind,
    gated: bool,
}

impl FeedForward {
    /// `feed_forward_proj`, of which transformers saves both halves again; these are what it computes.
    fn read(keys: &Keys, default: &'static str) -> Result<Self> {
        let name = keys.word("feed_forward_proj", default)?;
        let (gated, activation) = match name.strip_prefix("gated-") {
            // The original name of the tanh approximation.
            Some("gelu") => (true, "gelu_new"),
            Some(activation) => (true, activation),
            None => (false, name),
        };
        let (key, activation) = match keys.optional_word("dense_act_fn")? {
            Some(activation) => ("dense_act_fn", activation),
            None => ("feed_forward_proj", activation),
        };
        let known = "`relu`, `silu`, `gelu_new`, and `gated-` before them; `gated-gelu` is `gated-gelu_new`";
        let refused = || keys.refused(key, &format!("this activation is not computed here; known are {known}"));
        Ok(Self {
            activation: activation_named(activation).ok_or_else(refused)?,
            gated: keys.flag("is_gated_act", gated)?,
        })
    }
}

/// What the blocks of both stacks share.
struct Stack {
    config: Config,
}

fn build(keys: &Keys) -> Result<Model> {
    build_as(keys, &T5)
}

fn build_mt5(keys: &Keys) -> Result<Model> {
    build_as(keys, &OF_MT5)
}

fn build_as(keys: &Keys, variant: &Variant) -> Result<Model> {
    let stack = Stack { config: Config::read(keys, variant)? };
    let mut b = Builder::new();
    let shared = b.matrix(&Path::root().at("shared"), stack.config.vocab_size, stack.config.d_model, Role::Embedding);
    let cross = encoder(&mut b, &stack, shared);
    decoder(&mut b, &stack, shared, &cross);
    let config = stack.config;
    Ok(b.finish(ModelMetadata {
        architecture: variant.model_type,
        context: LONGEST,
        vocab: config.vocab_size,
        eos: config.eos,
        decoder_start: Some(config.decoder_start),
    }))
}

/// Returns the caches that hold keys and values for each decoder layer's cross-attention.
fn encoder(b: &mut Builder, stack: &Stack, shared: MatrixId) -> Vec<CacheId> {
    let config = &stack.config;
    let path = Path::root().at("encoder");
    let bias = stack.relative_bias(b, &path, true);
    // The layers of one call use it one after the other.
    let cache = b.cache(config.num_heads, config.d_kv, CacheScope::Encoder);
    let x = b.embed(shared);
    for layer in 0..config.num_layers {
        let path = path.at("block").at(layer).at("layer");
        stack.self_attention(b, &path.at(0), x, cache, Mask::Full, bias);
        stack.feed_forward(b, &path.at(1), x);
    }
    let x = b.rms_norm(&path.at("final_layer_norm"), config.layer_norm_epsilon, x);
    let cross = (0..config.num_decoder_layers).map(|layer| stack.cross_keys_and_values(b, layer, x)).collect();
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
        let cache = b.cache(config.num_heads, config.d_kv, CacheScope::Decoder);
        stack.self_attention(b, &path.at(0), x, cache, Mask::Causal, bias);
        stack.cross_attention(b, &path.at(1), x, cross);
        stack.feed_forward(b, &path.at(2), x);
    }
    let x = b.rms_norm(&path.at("final_layer_norm"), config.layer_norm_epsilon, x);
    let head = match config.is_tied {
        true => shared,
        false => b.matrix(&Path::root().at("lm_head"), config.vocab_size, config.d_model, Role::Head),
    };
    let scale = if config.scales_output { (config.d_model as f32).powf(-0.5) } else { 1.0 };
    b.head(x, scale, head, None);
}

impl Stack {
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
        let cache = b.cache(self.config.num_heads, self.config.d_kv, CacheScope::Encoder);
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
        let (gate, up) = if self.config.feed_forward.gated {
            let [gate, up] = b.linears(h, [layer("wi_0"), layer("wi_1")]);
            (gate, Some(up))
        } else {
            let [gate] = b.linears(h, [layer("wi")]);
            (gate, None)
        };
        let h = b.activate(self.config.feed_forward.activation, gate, up);
        let h = b.linear_as(Role::HighPrecision, h, path.at("wo"), self.config.d_model, false);
        b.add_to(x, h);
    }
}
