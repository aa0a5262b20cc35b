//! What a call runs, and what is held of each of its sequences.

use std::ops::Range;

use candle_core::Tensor;

/// What the session holds of one sequence.
#[derive(Clone)]
pub struct Sequence {
    /// Keys and values of each cache, `[g, t, d]`; empty before the first token.
    pub caches: Vec<Option<(Tensor, Tensor)>>,
    /// Tokens in the decoder's caches.
    pub position: usize,
    /// Rows of the last encoder call.
    pub encoded: usize,
    /// `[patches, hidden]`
    pub features: Option<Tensor>,
    pub last_token: u32,
}

/// A call: the rows of some sequences, equally many of each, those of one together.
pub struct SequenceCall<'a> {
    pub sequences: Range<usize>,
    pub rows_each: usize,
    pub tokens: &'a [u32],
}

impl<'a> SequenceCall<'a> {
    pub fn of(sequences: Range<usize>, tokens: &'a [u32]) -> Self {
        Self { rows_each: tokens.len() / sequences.len().max(1), sequences, tokens }
    }
}
