//! How a long prompt on a GPU is cut into calls, so that what they hold does not grow with it.

use crate::plan::{CacheScope, Mask, Model, Op};

/// Rows of a call at most: a matrix is read once for as many, and more would not make products faster.
const MOST_ROWS: usize = 4096;
/// No call is cut below this.
const LEAST_ROWS: usize = 256;
/// Bound on the activations of a call, where fewer rows help.
pub const CALL_BYTES: u64 = 448 << 20;

/// The most rows of a decoder's call, where `bytes` says what a call of so many holds: a power of two, or no limit where rows see later ones.
pub fn rows_of_call(model: &Model, bytes: impl Fn(usize) -> u64) -> usize {
    // Rows that see later ones belong together.
    let sees_later = |op: &Op| {
        matches!(op, Op::Attention(spec)
            if spec.mask != Mask::Causal && model.caches[spec.cache.0].scope == CacheScope::Decoder)
    };
    if model.decoder.ops.iter().any(sees_later) {
        return usize::MAX;
    }
    let mut rows = MOST_ROWS;
    while rows > LEAST_ROWS && bytes(rows) > CALL_BYTES {
        rows /= 2;
    }
    rows
}
