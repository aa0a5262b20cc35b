//! Plans: what a model computes, as data.
//!
//! A model file builds one [`Model`] from its `config.json`: the tensors it needs and, for each kind of call, a [`Plan`]:
//! a list of operations over named buffers whose rows are the tokens of the call. No weights are read to build it, so
//! sizes, random weights and dry runs fall out of the same data that executors run. The set of operations is closed:
//! formats add none, and fusion is a pass over the list.
//!
//! Dimensions: `t` tokens of the call (rows), `h` heads, `g` key/value heads, `d` head dim, `[n, k]` matrices.

mod builder;
pub mod fusion;
mod storage;

pub use builder::{Builder, Facts, LinearLayer, Path};
pub use storage::{Slot, Storage};

use std::collections::HashSet;

pub use crate::weights::spec::{MatrixSpec, Role, VectorKind, VectorSpec};

/// A matrix of the model, an index into [`Model::matrices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MatrixId(pub usize);

/// A norm weight or a bias, an index into [`Model::vectors`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VectorId(pub usize);

/// A buffer of a plan, an index into [`Plan::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub usize);

/// A key/value cache, an index into [`Model::caches`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheId(pub usize);

/// A table of rotary angles, an index into [`Model::ropes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RopeId(pub usize);

/// A relative position bias, an index into [`Model::biases`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BiasId(pub usize);

/// Rows of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One row for each token of the call.
    Tokens,
    /// One row: the last token's.
    Last,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    pub name: String,
    /// fp32 or fp16 elements a row.
    pub width: usize,
    pub rows: Rows,
}

/// Keys and values of one layer, `[g, capacity, d]` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub holds: Holds,
}

/// Whose positions a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// The decoder's: it grows with every call.
    Decoder,
    /// The encoder's: written by one encoder call, kept for all decoder calls behind it.
    Encoder,
}

/// T5's bias by distance (Raffel et al. 2020, section 2.1): a learned value per head and bucket of key − query distance.
#[derive(Debug, Clone, PartialEq)]
pub struct RelativeBias {
    /// `[buckets, h]`
    pub table: MatrixId,
    /// Keys behind the query have buckets of their own.
    pub bidirectional: bool,
    /// Distances from here on share the last bucket.
    pub max_distance: usize,
}

impl RelativeBias {
    /// The bucket of `key position − query position`, of `buckets`.
    pub fn bucket(&self, distance: i64, buckets: usize) -> usize {
        let (first, buckets, distance) = match (self.bidirectional, distance > 0) {
            (true, true) => (buckets / 2, buckets / 2, distance as usize),
            (true, false) => (0, buckets / 2, -distance as usize),
            (false, _) => (0, buckets, (-distance).max(0) as usize),
        };
        let exact = buckets / 2;
        if distance < exact {
            return first + distance;
        }
        // Logarithmic from `exact` to `max_distance`, in fp32 as transformers computes it.
        let ratio = (distance as f32 / exact as f32).ln() / (self.max_distance as f64 / exact as f64).ln() as f32;
        first + (exact + (ratio * (buckets - exact) as f32) as usize).min(buckets - 1)
    }
}

/// Rotary position embedding in the half-split layout: element `i` of a head pairs with `i + rotary_dim / 2`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Elements of a head that rotate; the rest pass through. Even.
    pub rotary_dim: usize,
    /// `rotary_dim / 2` angular frequencies, radians per position.
    pub inverse_frequencies: Vec<f32>,
    /// What cosines and sines are multiplied by: 1, but for scalings that sharpen attention.
    pub attention_factor: f32,
}

impl Rope {
    /// Cosine and sine of each pair at a position, `rotary_dim / 2` of each. The angle is the fp32 product of position and
    /// frequency, as transformers computes it: a more exact angle would drift from the reference at large positions.
    pub fn turns(&self, position: usize) -> impl Iterator<Item = (f32, f32)> + '_ {
        let angles = self.inverse_frequencies.iter().map(move |frequency| position as f32 * frequency);
        angles.map(|angle| (angle.cos() * self.attention_factor, angle.sin() * self.attention_factor))
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `x / rms(x) · w`
    Rms,
    /// `(x − mean) / std · w + b`
    Layer { bias: VectorId },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationKind {
    Silu,
    /// Gaussian error linear unit by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    Relu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// A token sees itself and all before it.
    Causal,
    /// A token sees all that the cache holds once the call is appended.
    Full,
    /// The first call into an empty cache is one prefix and sees all of itself; later ones are causal.
    Prefix,
}

/// One matrix of a linear group.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearPart {
    pub weight: MatrixId,
    pub bias: Option<VectorId>,
    pub out: BufferId,
}

/// One operation. Buffers that an operation reads were written before it in the same call.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out[t] = scale · table[token_t]`; rows whose token is `image` take the next row of the image features, unscaled.
    Embed { table: MatrixId, scale: f32, image: Option<u32>, out: BufferId },
    /// `out` = the patches of the picture, one a row, channel by channel.
    Patches { out: BufferId },
    /// `x[t] += table[t]`: learned positions.
    AddRows { x: BufferId, table: MatrixId },
    /// The rows of `x` are the image features that [`Op::Embed`] takes.
    Features { x: BufferId },
    /// `out = norm(x)`, row by row.
    Norm { kind: NormKind, weight: VectorId, epsilon: f32, x: BufferId, out: BufferId },
    /// For each part `out = x · Wᵀ + bias`: matrices that read the same activations.
    Linear { x: BufferId, parts: Vec<LinearPart> },
    /// Rotates where `rotate` says so, then appends `k` and `v` to the cache.
    Append { k: BufferId, v: BufferId, cache: CacheId, rotate: Option<Rotate> },
    /// `out = softmax(scale · q · Kᵀ + bias + mask) · V`, head by head; `h / g` query heads share a key/value head.
    Attention { q: BufferId, cache: CacheId, out: BufferId, scale: f32, mask: Mask, bias: Option<BiasId> },
    /// `out = act(gate)`, times `up` where the block is gated.
    Activate { kind: ActivationKind, gate: BufferId, up: Option<BufferId>, out: BufferId },
    /// `out = a + b`; `out` may be `a`.
    Add { a: BufferId, b: BufferId, out: BufferId },
    /// `out = scale · x[last row]`
    LastRow { x: BufferId, out: BufferId, scale: f32 },
    /// The next token: index of the largest logit of the last row, the lowest index where several tie.
    Argmax { logits: BufferId },
}

/// Rotates `q` in place and the keys that are appended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotate {
    pub rope: RopeId,
    pub q: BufferId,
}

/// What one call computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub buffers: Vec<Buffer>,
    pub ops: Vec<Op>,
}

/// What turns a plan's last rows into logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Head {
    /// Rows of the call, before the last one is taken.
    pub x: BufferId,
    pub scale: f32,
    pub weight: MatrixId,
    pub bias: Option<VectorId>,
    /// Operations before the head.
    pub body_len: usize,
}

impl Plan {
    /// The head of a decoder's plan, which ends with the last row, its logits and the token.
    pub fn head(&self) -> Option<Head> {
        let [Op::LastRow { x, scale, .. }, Op::Linear { parts, .. }, Op::Argmax { .. }] = self.ops.last_chunk()? else {
            return None;
        };
        let part = parts.first()?;
        Some(Head { x: *x, scale: *scale, weight: part.weight, bias: part.bias, body_len: self.ops.len() - 3 })
    }
}

/// A model as data: what it needs and what it computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// `model_type` of config.json.
    pub architecture: &'static str,
    pub matrices: Vec<MatrixSpec>,
    pub vectors: Vec<VectorSpec>,
    pub caches: Vec<CacheSpec>,
    pub ropes: Vec<Rope>,
    pub biases: Vec<RelativeBias>,
    /// What runs once before the decoder.
    pub encoder: Option<Encoder>,
    /// Run with many rows at prefill and with one row at each decode step.
    pub decoder: Plan,
    /// Longest sequence, prompt and generated tokens together; of each side where there is an encoder.
    pub context: usize,
    pub vocab: usize,
    pub eos: Vec<u32>,
    /// What an encoder-decoder model's decoder starts from.
    pub decoder_start: Option<u32>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Encoder {
    pub input: EncoderInputKind,
    pub plan: Plan,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderInputKind {
    /// The prompt's tokens.
    Tokens,
    Picture(Picture),
}

/// What a vision encoder reads: a square picture in square patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Picture {
    /// Pixels a side.
    pub size: usize,
    /// Pixels a side of a patch.
    pub patch: usize,
    /// The token that stands for one patch in the decoder's prompt.
    pub token: u32,
}

impl Picture {
    /// Rows of the encoder, and image tokens of the prompt.
    pub fn patches(&self) -> usize {
        (self.size / self.patch).pow(2)
    }
}

impl Model {
    /// Weights and biases, counting a tied head once.
    pub fn parameters(&self) -> usize {
        let matrices: usize = self.matrices.iter().map(|m| m.n * m.k).sum();
        matrices + self.vectors.iter().map(|v| v.len).sum::<usize>()
    }

    /// Bytes that one decode step must read of the weights: every matrix of the decoder's linears once, one row of an
    /// embedding, every vector that the decoder uses. `matrix_bytes[i]` is what the stored form of `matrices[i]` takes;
    /// vectors count 2 bytes a value, as fp16 checkpoints hold them.
    pub fn weight_bytes_per_token(&self, matrix_bytes: &[usize]) -> usize {
        let mut read = HashSet::new();
        let vector = |id: VectorId| 2 * self.vectors[id.0].len;
        let mut bytes = 0;
        for op in &self.decoder.ops {
            match op {
                Op::Embed { table, .. } => bytes += matrix_bytes[table.0] / self.matrices[table.0].n,
                Op::Norm { kind: NormKind::Rms, weight, .. } => bytes += vector(*weight),
                Op::Norm { kind: NormKind::Layer { bias }, weight, .. } => bytes += vector(*weight) + vector(*bias),
                Op::Linear { parts, .. } => {
                    bytes += parts.iter().filter_map(|part| part.bias).map(vector).sum::<usize>();
                    let new = parts.iter().filter(|part| read.insert(part.weight));
                    bytes += new.map(|part| matrix_bytes[part.weight.0]).sum::<usize>();
                }
                _ => {}
            }
        }
        bytes
    }

    /// Norm weights and biases at 2 bytes a value.
    pub fn vector_bytes(&self) -> usize {
        self.vectors.iter().map(|v| 2 * v.len).sum()
    }

    /// Bytes of the decoder's keys and values for one position, at `element_bytes` a value.
    pub fn kv_bytes_per_position(&self, element_bytes: usize) -> usize {
        self.cache_bytes(Holds::Decoder, element_bytes)
    }

    /// Bytes that each decode step reads of one encoder position, by cross-attention, at `element_bytes` a value.
    pub fn cross_bytes_per_position(&self, element_bytes: usize) -> usize {
        let crossed = self.decoder.ops.iter().filter_map(|op| match op {
            Op::Attention { cache, .. } => Some(self.caches[cache.0]),
            _ => None,
        });
        let values = crossed.filter(|c| c.holds == Holds::Encoder).map(|c| 2 * c.kv_heads * c.head_dim);
        values.sum::<usize>() * element_bytes
    }

    fn cache_bytes(&self, holds: Holds, element_bytes: usize) -> usize {
        let caches = self.caches.iter().filter(|cache| cache.holds == holds);
        caches.map(|c| 2 * c.kv_heads * c.head_dim * element_bytes).sum()
    }
}
