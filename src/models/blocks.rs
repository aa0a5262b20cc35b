//! Blocks that decoder families share: a model's file reads its own keys and says where its blocks differ.

use candle_core::{Result, bail};

use super::config::{activation, check_heads, check_layers, check_sizes};
use super::keys::Keys;
use super::rope::{DEFAULT_THETA, RopeBasis, Rotary};
use crate::plan::{
    ActivationKind, AttentionSpec, BufferId, Builder, CacheScope, KeyValue, LinearLayer, Mask, ModelMetadata, Norm,
    Path, QkNorm, QkNormOver, Role, RopeId, Sinks, Softcap, VectorKind, Window,
};

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

/// What every decoder's config.json says alike, checked.
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

/// How a family normalises.
#[derive(Debug, Clone, Copy)]
pub enum NormStyle {
    /// `kind` says what checkpoints hold: the weight, or the weight less 1.
    Rms {
        kind: VectorKind,
        epsilon: f32,
    },
    Layer {
        epsilon: f32,
    },
}

impl NormStyle {
    fn apply(self, b: &mut Builder, path: &Path, x: BufferId) -> BufferId {
        match self {
            NormStyle::Rms { kind: VectorKind::NormOffset, epsilon } => b.rms_norm_offset(path, epsilon, x),
            NormStyle::Rms { kind: VectorKind::NormWeight | VectorKind::Bias, epsilon } => b.rms_norm(path, epsilon, x),
            NormStyle::Layer { epsilon } => b.layer_norm(path, epsilon, x),
        }
    }

    fn of_heads(self, b: &mut Builder, path: &Path, len: usize) -> Result<Norm> {
        match self {
            NormStyle::Rms { kind, epsilon } => Ok(b.rms_weight(path, len, kind, epsilon)),
            NormStyle::Layer { .. } => bail!("no family has layer norms of queries and keys"),
        }
    }
}

/// Where a block normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlace {
    /// `x += attention(norm(x))`, `x += feed_forward(norm(x))`
    Before,
    /// `x += norm(attention(x))`, `x += norm(feed_forward(x))`
    After,
    /// `x += norm(attention(norm(x)))`, `x += norm(feed_forward(norm(x)))`
    Around,
    /// `x += attention(norm(x)) + feed_forward(norm(x))`, one norm for both
    Shared,
}

/// One block of a decoder.
pub struct BlockSpec {
    pub place: NormPlace,
    pub attention: AttentionBlock,
    pub feed_forward: FeedForward,
}

/// The attention of a block, its projections included.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBlock {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// One matrix `qkv_proj` instead of `q_proj`, `k_proj` and `v_proj`.
    pub fused: bool,
    /// Name of the output projection.
    pub output: &'static str,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub scale: f32,
    pub mask: Mask,
    pub rope: Option<RopeId>,
    pub window: Option<Window>,
    pub softcap: Option<Softcap>,
    /// Norms `q_norm` and `k_norm`.
    pub qk_norm: Option<QkNormOver>,
    /// A vector `sinks`.
    pub has_sinks: bool,
}

/// The feed-forward of a block.
pub enum FeedForward {
    /// `down(act(gate(x)) · up(x))`; one matrix `gate_up_proj` where it is fused.
    Gated {
        intermediate: usize,
        activation: ActivationKind,
        bias: bool,
        fused: bool,
    },
    /// `fc2(act(fc1(x)))`, with biases.
    Plain {
        intermediate: usize,
        activation: ActivationKind,
    },
    Experts(super::experts::ExpertsBlock),
}

/// A decoder around its blocks.
pub struct DecoderSpec<'a> {
    pub config: &'a DecoderConfig,
    pub norm: NormStyle,
    pub final_norm: &'static str,
    pub embedding_scale: f32,
    /// The token whose rows are image features.
    pub image: Option<u32>,
    pub head_bias: bool,
    /// Of the logits.
    pub softcap: Option<Softcap>,
}

impl DecoderSpec<'_> {
    /// The whole decoder under `path`; `block` describes the block of each layer.
    pub fn build(&self, b: &mut Builder, path: &Path, block: impl Fn(usize) -> BlockSpec) -> Result<()> {
        let config = self.config;
        let model = path.at("model");
        let table = b.matrix(&model.at("embed_tokens"), config.vocab_size, config.hidden_size, Role::Embedding);
        let x = b.embed_scaled(table, self.embedding_scale, self.image);
        for layer in 0..config.layers {
            self.block(b, &model.at("layers").at(layer), x, &block(layer))?;
        }
        let x = self.norm.apply(b, &model.at(self.final_norm), x);
        let lm_head = path.at("lm_head");
        let head = match config.tied {
            true => table,
            false => b.matrix(&lm_head, config.vocab_size, config.hidden_size, Role::Head),
        };
        b.capped_head(x, 1.0, head, self.head_bias.then_some(&lm_head), self.softcap);
        Ok(())
    }

    fn block(&self, b: &mut Builder, path: &Path, x: BufferId, spec: &BlockSpec) -> Result<()> {
        let norm = |b: &mut Builder, name: &str, x| self.norm.apply(b, &path.at(name), x);
        match spec.place {
            NormPlace::Before => {
                let h = norm(b, "input_layernorm", x);
                let h = self.attention(b, path, h, &spec.attention)?;
                b.add_to(x, h);
                let h = norm(b, "post_attention_layernorm", x);
                let h = self.feed_forward(b, path, h, &spec.feed_forward);
                b.add_to(x, h);
            }
            NormPlace::After => {
                let h = self.attention(b, path, x, &spec.attention)?;
                let h = norm(b, "post_attention_layernorm", h);
                b.add_to(x, h);
                let h = self.feed_forward(b, path, x, &spec.feed_forward);
                let h = norm(b, "post_feedforward_layernorm", h);
                b.add_to(x, h);
            }
            NormPlace::Around => {
                let h = norm(b, "input_layernorm", x);
                let h = self.attention(b, path, h, &spec.attention)?;
                let h = norm(b, "post_attention_layernorm", h);
                b.add_to(x, h);
                let h = norm(b, "pre_feedforward_layernorm", x);
                let h = self.feed_forward(b, path, h, &spec.feed_forward);
                let h = norm(b, "post_feedforward_layernorm", h);
                b.add_to(x, h);
            }
            NormPlace::Shared => {
                let h = norm(b, "input_layernorm", x);
                let attention = self.attention(b, path, h, &spec.attention)?;
                let feed_forward = self.feed_forward(b, path, h, &spec.feed_forward);
                b.add_to(x, attention);
                b.add_to(x, feed_forward);
            }
        }
        Ok(())
    }

    fn attention(&self, b: &mut Builder, block: &Path, x: BufferId, spec: &AttentionBlock) -> Result<BufferId> {
        let path = block.at("self_attn");
        let AttentionBlock { heads, kv_heads, head_dim, .. } = *spec;
        let [q, k, v] = match spec.fused {
            true => b.fused_linears(x, &path.at("qkv_proj"), [heads, kv_heads, kv_heads].map(|n| n * head_dim)),
            false => {
                let layer = |name: &str, heads: usize| LinearLayer {
                    path: path.at(name),
                    n: heads * head_dim,
                    bias: spec.qkv_bias,
                };
                b.linears(x, [layer("q_proj", heads), layer("k_proj", kv_heads), layer("v_proj", kv_heads)])
            }
        };
        let mut norm = |name: &str, heads: usize, over: QkNormOver| {
            let len = if over == QkNormOver::Head { head_dim } else { heads * head_dim };
            self.norm.of_heads(b, &path.at(name), len)
        };
        let qk_norm = match spec.qk_norm {
            Some(over) => Some(QkNorm { q: norm("q_norm", heads, over)?, k: norm("k_norm", kv_heads, over)?, over }),
            None => None,
        };
        let sinks = spec.has_sinks.then(|| Sinks(b.parameter(&path.at("sinks"), heads)));
        let cache = b.windowed_cache(kv_heads, head_dim, CacheScope::Decoder, spec.window);
        let out = b.attention_out(q);
        let AttentionBlock { scale, mask, rope, window, softcap, .. } = *spec;
        let append = Some(KeyValue { k, v });
        let attention = AttentionSpec {
            append,
            scale,
            mask,
            rope,
            window,
            softcap,
            qk_norm,
            sinks,
            ..AttentionSpec::over(q, cache, out)
        };
        let h = b.attend(attention);
        Ok(b.linear(h, path.at(spec.output), self.config.hidden_size, spec.output_bias))
    }

    fn feed_forward(&self, b: &mut Builder, block: &Path, x: BufferId, spec: &FeedForward) -> BufferId {
        let (path, hidden) = (block.at("mlp"), self.config.hidden_size);
        match spec {
            FeedForward::Gated { intermediate: n, activation, bias, fused } => {
                let [gate, up] = match fused {
                    true => b.fused_linears(x, &path.at("gate_up_proj"), [*n; 2]),
                    false => {
                        let layer = |name: &str| LinearLayer { path: path.at(name), n: *n, bias: *bias };
                        b.linears(x, [layer("gate_proj"), layer("up_proj")])
                    }
                };
                let h = b.activate(*activation, gate, Some(up));
                b.linear(h, path.at("down_proj"), hidden, *bias)
            }
            FeedForward::Plain { intermediate, activation } => {
                let h = b.linear(x, path.at("fc1"), *intermediate, true);
                let h = b.activate(*activation, h, None);
                b.linear(h, path.at("fc2"), hidden, true)
            }
            FeedForward::Experts(experts) => experts.build(b, block, x, self.config.hidden_size),
        }
    }
}
