//! Blocks that decoder families share: a model's file reads its own keys and says where its blocks differ.

use candle_core::{Result, bail};

pub use super::decoder::{DecoderConfig, Defaults};
use crate::plan::{
    ActivationKind, AttentionSpec, BufferId, Builder, CacheScope, KeyValue, LinearLayer, Mask, Norm, Path, QkNorm,
    QkNormOver, Role, RopeId, Sinks, Softcap, VectorKind, Window,
};

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

/// Place of the norms in a block.
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
    /// Soft-cap of the logits.
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
