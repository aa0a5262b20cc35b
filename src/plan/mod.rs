//! Plans: what a model computes, as data.
//!
//! A model file builds one [`Model`] from its `config.json`: the tensors it needs and, for each kind of call, a [`Plan`]:
//! a list of operations over named buffers whose rows are the tokens of the call. No weights are read to build it, so
//! sizes, random weights and dry runs fall out of the same data that executors run. The set of operations is closed:
//! formats add none, and fusion ([`fuse`]) is a pass over the list.
//!
//! Dimensions: `t` tokens of the call (rows), `h` heads, `g` key/value heads, `d` head dim, `[n, k]` matrices.

#![deny(clippy::wildcard_enum_match_arm)]

mod builder;
pub mod fuse;
mod op;
mod storage;

pub use builder::{Builder, LinearLayer, Mixture, ModelMetadata, Path};
pub use op::*;
pub use storage::{Columns, Lifetime, Slot, Storage};

use std::collections::HashSet;
use std::fmt::{Display, Formatter};

pub use crate::call::{Batch, CacheScope, CacheShape, CacheSpec, KvFormat};
pub use crate::weights::spec::{Elsewhere, MatrixSpec, Role, TensorSlice, VectorKind, VectorSpec};

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
    /// The factor of cosines and sines: 1, but for scalings that sharpen attention.
    pub attention_factor: f32,
    /// The dependence of frequencies on the length of the sequence; `None` where there is none.
    pub by_length: Option<RopeByLength>,
}

/// Frequencies of sequences that outgrow a length. A call's length is the number of positions in the cache once it has appended.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeByLength {
    /// LongRoPE (Ding et al. 2024): other frequencies for all positions of a sequence longer than `original`. A cache whose keys
    /// have the other rotation is computed anew.
    Switch { original: usize, inverse_frequencies: Vec<f32> },
    /// Dynamic NTK: beyond `original` positions the base grows with the length. Keys keep the rotation of the call that appended
    /// them.
    DynamicNtk { original: usize, theta: f64, factor: f64 },
}

impl Display for RopeByLength {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        match self {
            RopeByLength::Switch { original, .. } => write!(f, "other rotary frequencies beyond {original} positions"),
            RopeByLength::DynamicNtk { original, .. } => {
                write!(f, "rotary frequencies that change with each position beyond {original}")
            }
        }
    }
}

impl Rope {
    /// The frequencies of a call after which the sequence has `length` positions, for [`Self::turns_by`].
    pub fn frequencies(&self, length: usize) -> Vec<f32> {
        let mut frequencies = Vec::new();
        self.frequencies_into(length, &mut frequencies);
        frequencies
    }

    /// [`Self::frequencies`] in the place of what `out` holds: `rotary_dim / 2` values.
    pub fn frequencies_into(&self, length: usize, out: &mut Vec<f32>) {
        out.clear();
        match &self.by_length {
            Some(RopeByLength::Switch { original, inverse_frequencies }) if length > *original => {
                out.extend_from_slice(inverse_frequencies);
            }
            Some(RopeByLength::DynamicNtk { original, theta, factor }) if length > *original => {
                // In fp64 up to the base, in fp32 from there, as transformers computes it.
                let dim = self.rotary_dim as f64;
                let stretch = factor * length as f64 / *original as f64 - (factor - 1.0);
                let base = theta * stretch.powf(dim / (dim - 2.0));
                let frequency = |i: usize| 1.0 / (base as f32).powf((2 * i) as f32 / self.rotary_dim as f32);
                out.extend((0..self.rotary_dim / 2).map(frequency));
            }
            Some(RopeByLength::Switch { .. } | RopeByLength::DynamicNtk { .. }) | None => {
                out.extend_from_slice(&self.inverse_frequencies);
            }
        }
    }

    /// Cosine and sine of each pair at a position, `rotary_dim / 2` of each, where no length changes the frequencies. The angle is
    /// the fp32 product of position and frequency, as transformers computes it: a more exact angle would drift from the reference
    /// at large positions.
    pub fn turns(&self, position: usize) -> impl Iterator<Item = (f32, f32)> + '_ {
        self.turns_by(&self.inverse_frequencies, position)
    }

    /// [`Self::turns`] by the call's [`Self::frequencies`].
    pub fn turns_by<'a>(&'a self, frequencies: &'a [f32], position: usize) -> impl Iterator<Item = (f32, f32)> + 'a {
        let angles = frequencies.iter().map(move |frequency| position as f32 * frequency);
        angles.map(|angle| (angle.cos() * self.attention_factor, angle.sin() * self.attention_factor))
    }
}

/// The computation of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub buffers: Vec<Buffer>,
    pub ops: Vec<Op>,
}

/// The LM head, which turns a plan's last rows into logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LmHead {
    /// Rows of the call, before the last one is taken.
    pub x: BufferId,
    pub scale: f32,
    pub weight: MatrixId,
    pub bias: Option<VectorId>,
    pub softcap: Option<Softcap>,
    /// Operations before the head.
    pub body_len: usize,
}

impl Plan {
    /// The head of a decoder's plan, which ends with the last row, its logits and the token.
    pub fn head(&self) -> Option<LmHead> {
        let [Op::LastRow(last), Op::Linear(linear), Op::Argmax(argmax)] = self.ops.last_chunk()? else {
            return None;
        };
        let part = linear.parts.first()?;
        Some(LmHead {
            x: last.x,
            scale: last.scale,
            weight: part.weight,
            bias: part.bias,
            softcap: argmax.softcap,
            body_len: self.ops.len() - 3,
        })
    }

    /// The operation that reads the tokens.
    pub fn embedding(&self) -> Option<EmbedSpec> {
        self.ops.iter().find_map(|op| if let Op::Embed(spec) = op { Some(*spec) } else { None })
    }

    /// Rows of a buffer in a call of `batch`.
    pub fn rows(&self, buffer: BufferId, batch: Batch) -> usize {
        match self.buffers[buffer.0].rows {
            Rows::Tokens => batch.rows(),
            Rows::Last => batch.sequences,
        }
    }

    /// Floating-point operations of the matrix products in a call of `batch`.
    pub fn flops(&self, model: &Model, batch: Batch) -> usize {
        self.ops.iter().map(|op| op.flops(model, self, batch)).sum()
    }
}

/// A model as data: what it needs and what it computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// `model_type` of config.json.
    pub architecture: &'static str,
    pub matrices: Vec<MatrixSpec>,
    pub vectors: Vec<VectorSpec>,
    pub caches: Vec<CacheShape>,
    pub ropes: Vec<Rope>,
    pub biases: Vec<RelativeBias>,
    /// Runs once before the decoder.
    pub encoder: Option<Encoder>,
    /// Run with many rows at prefill and with one row at each decode step.
    pub decoder: Plan,
    /// Longest sequence, prompt and generated tokens together; of each side where there is an encoder.
    pub context: usize,
    pub vocab: usize,
    pub eos: Vec<u32>,
    /// The token that an encoder-decoder model's decoder starts from.
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

/// The input of a vision encoder: a square picture in square patches.
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

    /// The rows that a patch convolution multiplies: pixels `[3, size, size]` to `[patches, 3 · patch²]`, channel by channel.
    ///
    /// # Errors
    /// If there are not as many pixels.
    pub fn patch_rows(&self, pixels: &[f32]) -> candle_core::Result<Vec<f32>> {
        let Picture { size, patch, .. } = *self;
        if pixels.len() != 3 * size * size {
            candle_core::bail!("a picture of {} values was given; this model reads 3 × {size} × {size}", pixels.len());
        }
        let per_side = size / patch;
        let mut rows = Vec::with_capacity(pixels.len());
        for block in 0..per_side * per_side {
            let (top, left) = (block / per_side * patch, block % per_side * patch);
            for channel in 0..3 {
                for y in top..top + patch {
                    let start = (channel * size + y) * size + left;
                    rows.extend_from_slice(&pixels[start..start + patch]);
                }
            }
        }
        Ok(rows)
    }
}

/// The share of `of` experts that `tokens` tokens choose, of which each chooses `chosen`, all equally likely.
fn chosen_share(chosen: usize, of: usize, tokens: usize) -> f64 {
    let share = chosen as f64 / of as f64;
    if tokens == 1 { share } else { 1.0 - (1.0 - share).powi(tokens.min(i32::MAX as usize) as i32) }
}

impl Model {
    /// The encoder's plan and the decoder's.
    pub fn plans(&self) -> impl Iterator<Item = &Plan> {
        self.encoder.iter().map(|encoder| &encoder.plan).chain([&self.decoder])
    }

    /// Weights and biases, counting a tied head once.
    pub fn parameters(&self) -> usize {
        let matrices: usize = self.matrices.iter().map(|m| m.n * m.k).sum();
        matrices + self.vectors.iter().map(|v| v.len).sum::<usize>()
    }

    /// Bytes that one decode step of one sequence must read of the weights: [`Self::weight_bytes_per_step`].
    pub fn weight_bytes_per_token(&self, matrix_bytes: &[usize]) -> usize {
        self.weight_bytes_per_step(matrix_bytes, 1)
    }

    /// Bytes that one decode step of `sequences` sequences must read of the weights: every matrix of the decoder's linears once, one row of an
    /// embedding a sequence, every vector that the decoder uses, and of experts those that a token chooses, at their mean size. Of several
    /// tokens each chooses by itself: as many different experts are counted as they choose on average where all are equally likely.
    /// `matrix_bytes[i]` is what the stored form of `matrices[i]` takes; vectors count 2 bytes a value, as fp16 checkpoints hold
    /// them.
    pub fn weight_bytes_per_step(&self, matrix_bytes: &[usize], sequences: usize) -> usize {
        let mut read = HashSet::new();
        // Whole numbers as long as a sum is below 2^53; shares of experts are rounded once, at the end.
        let bytes = |weight| match weight {
            WeightRead::Matrix(id) if !read.insert(id) => 0.0,
            WeightRead::Matrix(id) => matrix_bytes[id.0] as f64,
            WeightRead::Rows(id) => (sequences * (matrix_bytes[id.0] / self.matrices[id.0].n)) as f64,
            WeightRead::Vector(id) => (2 * self.vectors[id.0].len) as f64,
            WeightRead::OneOf { matrix, chosen, of } => {
                matrix_bytes[matrix.0] as f64 * chosen_share(chosen, of, sequences)
            }
            WeightRead::OneVectorOf { vector, chosen, of } => {
                (2 * self.vectors[vector.0].len) as f64 * chosen_share(chosen, of, sequences)
            }
        };
        self.decoder.ops.iter().flat_map(Op::weights).map(bytes).sum::<f64>().round() as usize
    }

    /// Experts that a token is sent through and experts that there are, of the first layer that has some.
    pub fn experts(&self) -> Option<(usize, usize)> {
        let counts = |op: &Op| if let Op::Experts(spec) = op { Some((spec.top_k, spec.experts.len())) } else { None };
        self.decoder.ops.iter().find_map(counts)
    }

    /// Norm weights and biases at 2 bytes a value.
    pub fn vector_bytes(&self) -> usize {
        self.vectors.iter().map(|v| 2 * v.len).sum()
    }

    /// The caches as a session holds them in `format`.
    pub fn cache_specs(&self, format: KvFormat) -> impl Iterator<Item = CacheSpec> {
        self.caches.iter().map(move |cache| cache.held_in(format))
    }

    /// Bytes of the keys and values of the decoder's own positions that a decode step reads of one sequence, which holds
    /// `positions` with it.
    pub fn kv_bytes_read(&self, format: KvFormat, positions: usize) -> usize {
        let caches = self.cache_specs(format).filter(|cache| cache.scope == CacheScope::Decoder);
        caches.map(|cache| cache.bytes_read(positions)).sum()
    }

    /// Bytes that each decode step reads of one encoder position, by cross-attention.
    pub fn cross_bytes_per_position(&self, format: KvFormat) -> usize {
        let read =
            self.decoder.ops.iter().filter_map(Op::reads_cache).map(|cache| self.caches[cache.0].held_in(format));
        read.filter(|cache| cache.scope == CacheScope::Encoder).map(CacheSpec::bytes_per_position).sum()
    }
}
