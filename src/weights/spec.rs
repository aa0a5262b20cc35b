//! What a model asks of a checkpoint: names, shapes and what each tensor is for.

/// What a matrix is for; [`super::policy`] decides from it which format holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A linear layer inside a block: quantized.
    Projection,
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

#[derive(Debug, Clone, PartialEq)]
pub struct MatrixSpec {
    /// As the checkpoint spells it, `….weight` included.
    pub name: String,
    pub n: usize,
    pub k: usize,
    pub role: Role,
}

/// A norm weight or a bias.
#[derive(Debug, Clone, PartialEq)]
pub struct VectorSpec {
    pub name: String,
    pub len: usize,
    pub kind: VectorKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorKind {
    /// Around 1.
    NormWeight,
    /// Around 0: the norm multiplies by 1 more than it (Gemma).
    NormOffset,
    Bias,
}
