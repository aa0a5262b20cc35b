//! How a long prompt is cut into calls, so that what they hold does not grow with it.

use std::ops::Range;

use crate::plan::{CacheScope, Mask, Model, Op};

/// Bounds of a call of many rows.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// A matrix is read once for as many rows, and more would not make products faster.
    pub most_rows: usize,
    /// No call is cut below this.
    pub least_rows: usize,
    /// Of the activations of a call, where fewer rows help.
    pub bytes: u64,
}

pub const CUDA_CALLS: CallLimits = CallLimits { most_rows: 4096, least_rows: 256, bytes: 448 << 20 };

/// A weight is decoded in the time that it takes to multiply a few rows.
pub const CPU_CALLS: CallLimits = CallLimits { most_rows: 2048, least_rows: 256, bytes: 96 << 20 };

/// The most rows of a decoder's call, where `bytes` says what a call of so many holds: a power of two, or no limit where rows see later ones or
/// rotate by the number of all.
pub fn rows_of_call(model: &Model, limits: CallLimits, bytes: impl Fn(usize) -> u64) -> usize {
    // Rows that see later ones belong together.
    let sees_later = |op: &Op| {
        matches!(op, Op::Attention(spec)
            if spec.mask != Mask::Causal && model.caches[spec.cache.0].scope == CacheScope::Decoder)
    };
    let is_one = model.ropes.iter().any(|rope| rope.by_length.is_some());
    if is_one || model.decoder.ops.iter().any(sees_later) {
        return usize::MAX;
    }
    let mut rows = limits.most_rows;
    while rows > limits.least_rows && bytes(rows) > limits.bytes {
        rows /= 2;
    }
    rows
}

/// A prompt as calls of at most `rows` tokens: those before the last one, whose results are read by nobody, and the last one.
pub fn cut(tokens: &[u32], rows: usize) -> (std::slice::Chunks<'_, u32>, &[u32]) {
    let (before, last) = tokens.split_at(tokens.len().saturating_sub(1) / rows * rows);
    (before.chunks(rows), last)
}

/// [`cut`] as ranges of a prompt of `n` tokens, for sequences whose tokens do not lie together.
pub fn parts(n: usize, rows: usize) -> (impl Iterator<Item = Range<usize>>, Range<usize>) {
    let last = n.saturating_sub(1) / rows * rows;
    ((0..last).step_by(rows).map(move |start| start..start + rows), last..n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::RopeByLength;
    use crate::weights::builtin_models;

    #[test]
    fn the_last_call_is_never_empty() {
        let of = |n: usize, rows| {
            let tokens: Vec<u32> = (0..n as u32).collect();
            let (before, last) = cut(&tokens, rows);
            let cut = (before.map(<[u32]>::len).collect::<Vec<_>>(), last.len());
            let (before, last) = parts(n, rows);
            assert_eq!((before.map(|part| part.len()).collect::<Vec<_>>(), last.len()), cut);
            cut
        };
        assert_eq!(of(1, 4), (vec![], 1));
        assert_eq!(of(4, 4), (vec![], 4));
        assert_eq!(of(5, 4), (vec![4], 1));
        assert_eq!(of(12, 4), (vec![4, 4], 4));
        assert_eq!(of(3, usize::MAX), (vec![], 3));
        assert_eq!(of(0, 4), (vec![], 0));
    }

    #[test]
    fn calls_are_cut_where_rows_see_none_behind_them() {
        let model = |name: &str| {
            let shape = builtin_models().iter().find(|shape| shape.name == name).expect("a built-in shape");
            crate::models::build(&shape.config()).expect("a model")
        };
        let limits = CallLimits { most_rows: 2048, least_rows: 256, bytes: 1 << 20 };
        let rows = |model: &Model, bytes: u64| rows_of_call(model, limits, |rows| rows as u64 * bytes);
        let mut llama = model("llama-3.2-1b");
        assert_eq!(
            [0, 512, 1024, 1025, 4096, 1 << 20].map(|bytes| rows(&llama, bytes)),
            [2048, 2048, 1024, 512, 256, 256]
        );
        // The image and the prompt see each other.
        assert_eq!(rows(&model("paligemma-3b-pt-224"), 1024), usize::MAX);
        llama.ropes[0].by_length = Some(RopeByLength::DynamicNtk { original: 2048, theta: 10000.0, factor: 2.0 });
        assert_eq!(rows(&llama, 1024), usize::MAX);
    }
}
