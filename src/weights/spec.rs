//! What a model asks of a checkpoint: names, shapes and what each tensor is for.

use crate::quant::FormatId;

/// What a matrix is for; [`super::policy`] decides from it which format holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A linear layer inside a block: quantized.
    Projection,
    /// A matrix of one expert of a mixture: quantized by itself.
    Expert,
    /// The linear layer that chooses among experts: quantized.
    Router,
    /// A linear layer that the user keeps in fp16.
    Kept,
    /// The output head: kept in fp16.
    Head,
    /// A table of rows (tokens, positions, distances), also where a tied head shares it: kept in fp16.
    Embedding,
    /// A patch convolution, seen as `[n, channels · height · width]`: kept in fp16.
    Patches,
    /// A linear that transformers keeps in fp32 where the model's dtype is fp16 (T5's `wo`): not even cast.
    HighPrecision,
}

impl Role {
    /// True if a precision quantizes it by default.
    pub fn is_quantized(self) -> bool {
        matches!(self, Role::Projection | Role::Expert | Role::Router)
    }
}

/// Another place where files may hold a matrix or a vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Elsewhere {
    /// Name of the tensor.
    pub tensor: String,
    /// The part of it; `None` is the whole.
    pub slice: Option<TensorSlice>,
}

/// One matrix of a 3-D tensor, or one vector of a 2-D one: what transformers 5 packs experts into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorSlice {
    /// Index in the first dimension, in `0..count`.
    pub index: usize,
    pub count: usize,
    /// Row `r` is row `start + r · step` of the `rows` that the tensor has.
    pub start: usize,
    pub step: usize,
    pub rows: usize,
    /// Rows lie along the last dimension: `[count, k, rows]` and not `[count, rows, k]`.
    pub transposed: bool,
}

impl TensorSlice {
    /// The shape of a tensor whose part has the shape `part`: `[n, k]` of a matrix, `[len]` of a vector.
    pub fn shape_around(&self, part: &[usize]) -> Vec<usize> {
        match part {
            [_, k] if self.transposed => vec![self.count, *k, self.rows],
            [_, k] => vec![self.count, self.rows, *k],
            _ => vec![self.count, self.rows],
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct MatrixSpec {
    /// As the checkpoint spells it, `….weight` included.
    pub name: String,
    pub n: usize,
    pub k: usize,
    pub role: Role,
    /// Place of the values in files without a tensor `name`.
    pub others: Vec<Elsewhere>,
    /// The format that a file holds it in and no precision changes; `None` where its role decides.
    pub held: Option<HeldAs>,
}

/// How a file holds a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldAs {
    pub format: FormatId,
    /// Of codes and statistics.
    pub bytes: u64,
}

/// A norm weight or a bias.
#[derive(Debug, Clone, PartialEq)]
pub struct VectorSpec {
    pub name: String,
    pub len: usize,
    pub kind: VectorKind,
    /// Place of the values in files without a tensor `name`.
    pub others: Vec<Elsewhere>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorKind {
    /// Around 1.
    NormWeight,
    /// Around 0: the norm multiplies by 1 more than it (Gemma).
    NormOffset,
    Bias,
}
