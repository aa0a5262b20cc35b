//! Attention of a call of many rows: one launch of our own for few rows, cuBLAS and a softmax for others.

use candle_core::Result;
use half::f16;

use super::{BiasAt, CacheAt};
use crate::kernels::cuda::arena::Arena;
use crate::kernels::cuda::gemm::{Gemm, Operand, Type};
use crate::kernels::cuda::launch::Launcher;
use crate::kernels::cuda::rows::{Bias, Heads, Rows};
use crate::lower::score_tiles::{ScoreTile, ScoreTiles, is_one_kernel};

/// One attention.
pub struct RowsAttention {
    pub rows: usize,
    pub heads: Heads,
    /// fp16 `[rows, h · d]`, rotated; so is `out`.
    pub q: u64,
    pub out: u64,
    pub cache: CacheAt,
    /// Positions of the cache that the last row sees.
    pub keys: usize,
    pub scale: f32,
    pub is_causal: bool,
    /// The first row's.
    pub position: usize,
    pub bias: Option<BiasAt>,
}

impl RowsAttention {
    /// # Safety
    /// `q` and `out` hold rows of all heads and the cache `keys` positions; all stay where `on` runs until its stream has come past
    /// this call.
    pub unsafe fn run(&self, on: &dyn Launcher, arena: &Arena) -> Result<()> {
        let Self { rows, heads, q, out, cache, keys, scale, is_causal, position, bias: _ } = *self;
        if is_one_kernel(rows, keys) {
            let (memory, shape, bias) = ([cache.keys, cache.values], (rows, keys), self.bias(0));
            // SAFETY: the caller's promise.
            return unsafe { Rows { on }.attend(shape, heads, q, memory, out, scale, is_causal, position, bias) };
        }
        let tiles = ScoreTiles::new(heads.heads, self.group(), rows, keys);
        // cuBLAS and the softmax write both before they are read.
        let count = tiles.heads * tiles.rows * keys;
        let held = (arena.take::<f32>(count)?, arena.take::<f16>(count)?);
        let (scores, probabilities) = (held.0.address, held.1.address);
        for tile in tiles.tiles(heads.heads, self.group(), rows) {
            let (to_scores, to_values) = self.products(tile, scores, probabilities);
            let (shape, bias) = ((tile.heads, tile.rows, keys), self.bias(tile.first_head));
            // SAFETY: scores and probabilities hold a tile; the caller's promise for the others.
            unsafe {
                on.multiply(&to_scores)?;
                let position = position + tile.first_row;
                Rows { on }.softmax(shape, scores, probabilities, scale, is_causal, position, bias)?;
                on.multiply(&to_values)?;
            }
        }
        Ok(())
    }

    /// Query heads of a key/value head.
    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }

    fn bias(&self, first_head: usize) -> Bias {
        self.bias.map_or(Bias::default(), |BiasAt { address, reach }| Bias { address, reach, first_head })
    }

    /// `scores = q · Kᵀ` and `out = probabilities · V` of a tile. Its heads either share a key/value head or have one each.
    fn products(&self, tile: ScoreTile, scores: u64, probabilities: u64) -> (Gemm, Gemm) {
        let Self { heads, q, out, cache, keys, .. } = *self;
        let ScoreTile { first_head, heads: count, first_row, rows } = tile;
        let (group, d, width) = (self.group(), heads.d, heads.heads * heads.d);
        let shared = group > 1;
        let head_len = heads.capacity * heads.d_pad;
        let cache_head = first_head / group;
        let of_cache = |base: u64| Operand {
            address: base + (size_of::<f16>() * cache_head * head_len) as u64,
            stride: heads.d_pad,
            batch_stride: if shared { 0 } else { head_len },
        };
        let of_rows = |base: u64| Operand {
            address: base + (size_of::<f16>() * (first_row * width + first_head * d)) as u64,
            stride: width,
            batch_stride: d,
        };
        let of_scores = |address| Operand { address, stride: keys, batch_stride: rows * keys };
        let to_scores = Gemm {
            m: rows,
            n: keys,
            k: d,
            batch: count,
            a: of_rows(q),
            b: of_cache(cache.keys),
            b_is_transposed: true,
            out: of_scores(scores),
            from: Type::Half,
            to: Type::Float,
        };
        let to_values = Gemm {
            m: rows,
            n: d,
            k: keys,
            batch: count,
            a: of_scores(probabilities),
            b: of_cache(cache.values),
            b_is_transposed: false,
            out: of_rows(out),
            from: Type::Half,
            to: Type::Half,
        };
        (to_scores, to_values)
    }
}
