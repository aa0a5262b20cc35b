//! Products of many rows that no kernel of ours makes, as data: fp16 or fp32 with fp32 sums, or int8 in int32.

/// A row-major matrix on the device, in elements.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    pub address: u64,
    /// From row to row.
    pub stride: usize,
    /// From one product's matrix to the next one's.
    pub batch_stride: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Half,
    Float,
    /// Signed bytes, summed in 32 bits.
    Byte,
    Int,
}

/// `batch` products `out [m, n] = alpha · a [m, k] · bᵀ`, where b is `[n, k]`, or `· b` where b is `[k, n]`.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub batch: usize,
    pub a: Operand,
    pub b: Operand,
    pub b_is_transposed: bool,
    pub out: Operand,
    /// 1 where sums are int32.
    pub alpha: f32,
    pub from: Type,
    pub to: Type,
}
