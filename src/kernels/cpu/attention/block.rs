//! Attention of many queries, a lane each: scores lie as `[positions, queries]`, so that the softmax runs down the lanes and nothing is added up
//! across a vector.

use super::product::{End, SmallProduct};
use super::tile::{TiledAttention, cap_scores};
use super::{Context, Partial};
use crate::kernels::cpu::lanes::{Lanes, exp};

/// From so many queries on, full lanes outweigh those that stay empty.
pub(super) const FROM_QUERIES: usize = 12;

/// Positions of a tile. Its keys or values are 16 KiB at 64 elements a head, as are its scores for 64 queries.
const TILE: usize = 64;

/// Rows of the output that share what is loaded.
const ROWS: usize = 4;

/// Bytes of a cache line.
const LINE: usize = 64;

/// What a block keeps from tile to tile; all but `q` are `[.., lanes]`, where `lanes` are the queries up to a whole vector.
struct Block<'a> {
    lanes: usize,
    /// `[d, lanes]`, zeros in lanes without a query.
    q: &'a mut [f32],
    /// `[TILE, lanes]`: scores, then weights.
    scores: &'a mut [f32],
    /// Greatest score so far.
    max: &'a mut [f32],
    /// `Σ e^(score − max)`
    sum: &'a mut [f32],
    /// What the last tile made of the sums before it.
    factor: &'a mut [f32],
}

impl<'a> Block<'a> {
    fn new<L: Lanes>(n: usize, d: usize, scratch: &'a mut Vec<f32>) -> Self {
        let lanes = n.next_multiple_of(L::WIDTH);
        scratch.resize((d + TILE + 3) * lanes + LINE / size_of::<f32>(), 0.0);
        let aligned = scratch.as_ptr().align_offset(LINE).min(LINE / size_of::<f32>());
        let (q, rest) = scratch[aligned..].split_at_mut(d * lanes);
        let (scores, rest) = rest.split_at_mut(TILE * lanes);
        let (max, rest) = rest.split_at_mut(lanes);
        let (sum, rest) = rest.split_at_mut(lanes);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        Self { lanes, q, scores, max, sum, factor: &mut rest[..lanes] }
    }

    /// `q` is `[n, d]`.
    fn set_queries(&mut self, q: &[f32], d: usize) {
        for (e, row) in self.q.chunks_exact_mut(self.lanes).enumerate() {
            let column = q.chunks_exact(d).map(|query| query[e]).chain(std::iter::repeat(0.0));
            row.iter_mut().zip(column).for_each(|(out, value)| *out = value);
        }
    }

    /// Scaled scores of `keys` `[len, d]`.
    #[inline(always)]
    fn score<L: Lanes>(&mut self, keys: &[f32], Context { d, scale, softcap, .. }: Context) {
        let (len, lanes) = (keys.len() / d, self.lanes);
        let scale = softcap.map_or(scale, |cap| scale / cap);
        let scores = &mut self.scores[..len * lanes];
        let product = SmallProduct { a: keys, row: d, step: 1, depth: d, b: self.q, columns: lanes };
        product.run::<L, ROWS, false>(scores, End::Scaled(scale));
        if let Some(cap) = softcap {
            cap_scores::<L>(scores, 1.0, cap);
        }
    }

    /// Turns the scores of `len` positions into weights `e^(score − max)`.
    #[inline(always)]
    fn soften<L: Lanes>(&mut self, len: usize) {
        let lanes = self.lanes;
        for first in (0..lanes).step_by(L::WIDTH) {
            let old = L::load(&self.max[first..]);
            let mut greatest = [old; 4];
            for (j, row) in self.scores[..len * lanes].chunks_exact(lanes).enumerate() {
                // A NaN is no maximum; it comes out through its weight.
                greatest[j % 4] = L::load(&row[first..]).max(greatest[j % 4]);
            }
            let max = greatest[0].max(greatest[1]).max(greatest[2].max(greatest[3]));
            // Finite where all scores are −∞, as −∞ − (−∞) is NaN.
            let base = max.max(L::splat(f32::MIN));
            let factor = exp(old.sub(base));
            let mut sum = L::load(&self.sum[first..]).mul(factor);
            for row in self.scores[..len * lanes].chunks_exact_mut(lanes) {
                let weight = exp(L::load(&row[first..]).sub(base));
                sum = sum.add(weight);
                weight.store(&mut row[first..]);
            }
            max.store(&mut self.max[first..]);
            sum.store(&mut self.sum[first..]);
            factor.store(&mut self.factor[first..]);
        }
    }
}

/// [`TiledAttention`] of queries without a bias.
#[inline(always)]
pub(super) fn attend<L: Lanes>(work: TiledAttention) {
    let (n, context) = (work.partials.len(), work.context);
    let (d, t) = (context.d, work.seen(n - 1));
    let mut scratch = std::mem::take(work.scratch);
    let mut block = Block::new::<L>(n, d, &mut scratch);
    block.set_queries(work.q, d);
    work.out.fill(0.0);
    for start in (work.hidden(0) / TILE * TILE..t).step_by(TILE) {
        let len = TILE.min(t - start);
        let at = start * d..(start + len) * d;
        block.score::<L>(&context.keys[at.clone()], context);
        if start + len > work.seen(0) || work.hidden(n - 1) > start {
            for query in 0..n {
                let visible = work.hidden(query).max(start) - start..work.seen(query).max(start) - start;
                for j in (0..len).filter(|j| !visible.contains(j)) {
                    block.scores[j * block.lanes + query] = f32::NEG_INFINITY;
                }
            }
        }
        block.soften::<L>(len);
        let (scores, values) = (&block.scores[..len * block.lanes], &context.values[at]);
        let product = SmallProduct { a: scores, row: 1, step: block.lanes, depth: len, b: values, columns: d };
        product.run::<L, ROWS, false>(work.out, End::Rescaled(block.factor));
    }
    for (partial, (max, sum)) in work.partials.iter_mut().zip(block.max.iter().zip(block.sum.iter())) {
        *partial = Partial { max: *max, sum: *sum };
    }
    *work.scratch = scratch;
}
