//! Plans: what a model computes, as data.
//!
//! A model file builds one [`Model`] from its `config.json`: the tensors it needs and, for each kind of call, a [`Plan`]:
//! a list of operations over named buffers whose rows are the tokens of the call. No weights are read to build it, so
//! sizes, random weights and dry runs fall out of the same data that executors run. The set of operations is closed:
//! formats add none, and fusion is a pass over the list.
//!
//! Dimensions: `t` tokens of the call (rows), `h` heads, `g` key/value heads, `d` head dim, `[n, k]` matrices.

mod builder;
mod storage;

pub use builder::{Builder, LinearLayer, Path};
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
}

/// Rotary position embedding in the half-split layout: element `i` of a head pairs with `i + rotary_dim / 2`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Elements of a head that rotate; the rest pass through. Even.
    pub rotary_dim: usize,
    /// `rotary_dim / 2` angular frequencies, radians per position.
    pub inverse_frequencies: Vec<f32>,
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// A token sees itself and all before it.
    Causal,
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
    /// `out[t] = table[token_t]`
    Embed { table: MatrixId, out: BufferId },
    /// `out = norm(x)`, row by row.
    Norm { kind: NormKind, weight: VectorId, epsilon: f32, x: BufferId, out: BufferId },
    /// For each part `out = x · Wᵀ + bias`: matrices that read the same activations.
    Linear { x: BufferId, parts: Vec<LinearPart> },
    /// Rotates `q` in place and `k`, then appends `k` and `v` to the cache.
    RopeAppend { q: BufferId, k: BufferId, v: BufferId, cache: CacheId, rope: RopeId },
    /// `out = softmax(scale · q · Kᵀ + mask) · V` over all that the cache holds, head by head; `h / g` query heads share a
    /// key/value head.
    Attention { q: BufferId, cache: CacheId, out: BufferId, scale: f32, mask: Mask },
    /// `out = act(gate)`, times `up` where the block is gated.
    Activate { kind: ActivationKind, gate: BufferId, up: Option<BufferId>, out: BufferId },
    /// `out = a + b`; `out` may be `a`.
    Add { a: BufferId, b: BufferId, out: BufferId },
    /// `out = x[last row]`
    LastRow { x: BufferId, out: BufferId },
    /// The next token: index of the largest logit of the last row, the lowest index where several tie.
    Argmax { logits: BufferId },
}

/// What one call computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub buffers: Vec<Buffer>,
    pub ops: Vec<Op>,
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
    /// Run with many rows at prefill and with one row at each decode step.
    pub decoder: Plan,
    /// Longest sequence, prompt and generated tokens together.
    pub context: usize,
    pub vocab: usize,
    pub eos: Vec<u32>,
}

impl Model {
    /// Weights and biases, counting a tied head once.
    pub fn parameters(&self) -> usize {
        let matrices: usize = self.matrices.iter().map(|m| m.n * m.k).sum();
        matrices + self.vectors.iter().map(|v| v.len).sum::<usize>()
    }

    /// Bytes that one decode step must read of the weights: every matrix of a linear once, one row of an embedding, every
    /// vector. `matrix_bytes[i]` is what the stored form of `matrices[i]` takes; vectors count 2 bytes a value, as fp16
    /// checkpoints hold them.
    pub fn weight_bytes_per_token(&self, matrix_bytes: &[usize]) -> usize {
        let mut read = HashSet::new();
        let mut bytes = self.vector_bytes();
        for op in &self.decoder.ops {
            match op {
                Op::Embed { table, .. } => bytes += matrix_bytes[table.0] / self.matrices[table.0].n,
                Op::Linear { parts, .. } => {
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

    /// Bytes of keys and values for one position, at `element_bytes` a value.
    pub fn kv_bytes_per_position(&self, element_bytes: usize) -> usize {
        self.caches.iter().map(|c| 2 * c.kv_heads * c.head_dim * element_bytes).sum()
    }
}
