//! Attention of few queries, and of queries with a bias: two at a time against tiles of positions that stay in the nearest cache.

use std::ops::Range;

use super::product::{AHEAD, End, SmallProduct};
use super::{Context, Partial, block, finite_base};
use crate::kernels::cpu::lanes::{Lanes, LanesKernel, exp, prefetch};

/// Positions of a tile, a multiple of every vector's width. Keys and values of 64 × 64 fp32 are 16 KiB each.
const TILE: usize = 64;

/// Fills `out` and `partials` for all queries: query `i` sees the last `window` of the first `first + i / group` positions.
pub(super) struct TiledAttention<'a> {
    pub q: &'a [f32],
    pub context: Context<'a>,
    pub first: usize,
    pub group: usize,
    /// `[queries, t]`
    pub bias: Option<&'a [f32]>,
    pub out: &'a mut [f32],
    pub partials: &'a mut [Partial],
    pub scratch: &'a mut Vec<f32>,
}

/// One tile of positions.
struct Tile<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    start: usize,
    len: usize,
}

impl LanesKernel for TiledAttention<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let (n, d) = (self.partials.len(), self.context.d);
        if self.bias.is_none() && n >= block::FROM_QUERIES {
            return block::attend::<L>(self);
        }
        self.out.fill(0.0);
        self.partials.fill(Partial::EMPTY);
        let t = if n == 0 { 0 } else { self.seen(n - 1) };
        for start in (self.hidden(0) / TILE * TILE..t).step_by(TILE) {
            let len = TILE.min(t - start);
            let keys = &self.context.keys[start * d..(start + len) * d];
            let values = &self.context.values[start * d..(start + len) * d];
            let tile = Tile { keys, values, start, len };
            let mut i = (0..n).find(|i| self.seen(*i) > start).unwrap_or(n);
            while i + 1 < n {
                self.absorb::<L, 2>(i, &tile);
                i += 2;
            }
            if i < n {
                self.absorb::<L, 1>(i, &tile);
            }
        }
    }
}

impl TiledAttention<'_> {
    pub(super) fn seen(&self, query: usize) -> usize {
        self.first + query / self.group
    }

    /// Positions before the window of a query.
    pub(super) fn hidden(&self, query: usize) -> usize {
        self.context.window.map_or(0, |window| self.seen(query).saturating_sub(window))
    }

    /// Takes a tile into the softmax of the queries `i..i + H`.
    #[inline(always)]
    fn absorb<L: Lanes, const H: usize>(&mut self, i: usize, tile: &Tile) {
        let d = self.context.d;
        let len = tile.len.min(self.seen(i + H - 1) - tile.start);
        let q = &self.q[i * d..(i + H) * d];
        let mut scores = [[0.0; TILE]; H];
        dots::<L, H>(q, d, &tile.keys[..len * d], &mut scores);
        let t = self.context.keys.len() / d;
        for (h, scores) in scores.iter_mut().enumerate() {
            let seen = len.min(self.seen(i + h) - tile.start);
            let hidden = self.hidden(i + h).saturating_sub(tile.start).min(seen);
            let bias = self.bias.map(|bias| &bias[(i + h) * t + tile.start..][..seen]);
            let out = &mut self.out[(i + h) * d..][..d];
            let visible = hidden..seen;
            let Context { scale, softcap, .. } = self.context;
            soften::<L>(scores, visible, (scale, softcap), bias, &mut self.partials[i + h], out);
        }
        let values = &tile.values[..len * d];
        let product = SmallProduct { a: scores.as_flattened(), row: TILE, step: 1, depth: len, b: values, columns: d };
        product.run::<L, H, true>(&mut self.out[i * d..(i + H) * d], End::Added);
    }
}

/// `scores[h][j] = q[h] · keys[j]`, four keys at a time.
#[inline(always)]
fn dots<L: Lanes, const H: usize>(q: &[f32], d: usize, keys: &[f32], scores: &mut [[f32; TILE]; H]) {
    let len = keys.len() / d;
    let whole = d / L::WIDTH * L::WIDTH;
    for j in (0..len).step_by(4) {
        // Past the end the last key is taken again; its score is not used.
        let rows = [j, (j + 1).min(len - 1), (j + 2).min(len - 1), (j + 3).min(len - 1)];
        let mut sums = [[L::splat(0.0); 4]; H];
        for e in (0..whole).step_by(L::WIDTH) {
            for (k, row) in rows.iter().enumerate() {
                prefetch(keys.as_ptr().wrapping_add(row * d + e + AHEAD));
                // SAFETY: row < len and e + WIDTH ≤ d, so the read ends within `keys`.
                let key = unsafe { L::read(keys.as_ptr().add(row * d + e)) };
                for (h, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: h < H, and `q` holds H rows of d.
                    sums[k] = key.mul_add(unsafe { L::read(q.as_ptr().add(h * d + e)) }, sums[k]);
                }
            }
        }
        if whole < d {
            for (k, row) in rows.iter().enumerate() {
                let key = L::load_head(&keys[row * d + whole..(row + 1) * d]);
                for (h, sums) in sums.iter_mut().enumerate() {
                    sums[k] = key.mul_add(L::load_head(&q[h * d + whole..(h + 1) * d]), sums[k]);
                }
            }
        }
        for (scores, sums) in scores.iter_mut().zip(sums) {
            // j + 4 ≤ TILE, as TILE is a multiple of four.
            scores[j..j + 4].copy_from_slice(&L::sum_each(sums));
        }
    }
}

/// Turns the dot products of one query into weights `e^(score − max)` (0 outside of `visible`), and rescales what the query
/// has so far where the maximum grew.
#[inline(always)]
fn soften<L: Lanes>(
    scores: &mut [f32; TILE],
    visible: Range<usize>,
    (mut scale, softcap): (f32, Option<f32>),
    bias: Option<&[f32]>,
    partial: &mut Partial,
    out: &mut [f32],
) {
    let Range { start: hidden, end: seen } = visible;
    let padded = seen.next_multiple_of(L::WIDTH);
    if let Some(cap) = softcap {
        cap_scores::<L>(&mut scores[..padded], scale / cap, cap);
        scale = 1.0;
    }
    if let Some(bias) = bias {
        for (score, bias) in scores.iter_mut().zip(bias) {
            *score = *score * scale + bias;
        }
    }
    scores[..hidden].fill(f32::NEG_INFINITY);
    scores[seen..padded].fill(f32::NEG_INFINITY);
    let scale = L::splat(if bias.is_some() { 1.0 } else { scale });
    let mut greatest = L::splat(partial.max);
    for chunk in scores[..padded].chunks_exact_mut(L::WIDTH) {
        let score = L::load(chunk).mul(scale);
        // A NaN is no maximum; it comes out through its weight.
        greatest = score.max(greatest);
        score.store(chunk);
    }
    // Not the scaled padding: a negative scale would make it +∞.
    scores[..hidden].fill(f32::NEG_INFINITY);
    scores[seen..padded].fill(f32::NEG_INFINITY);
    let max = greatest.greatest();
    let base = L::splat(finite_base(max));
    let mut sum = L::splat(0.0);
    for chunk in scores[..padded].chunks_exact_mut(L::WIDTH) {
        let weight = exp(L::load(chunk).sub(base));
        sum = sum.add(weight);
        weight.store(chunk);
    }
    scores[padded..].fill(0.0);
    if max > partial.max {
        let factor = (partial.max - finite_base(max)).exp();
        combine::<L>(out, factor, None);
        *partial = Partial { max, sum: partial.sum * factor };
    }
    partial.sum += sum.sum();
}

/// `cap · tanh(factor · score)` in place of each score, within 2e-7 · cap.
#[inline(always)]
pub(super) fn cap_scores<L: Lanes>(scores: &mut [f32], factor: f32, cap: f32) {
    for chunk in scores.chunks_exact_mut(L::WIDTH) {
        // tanh(u) = 1 − 2 / (1 + e^(2u)), which is −1 and 1 at the ends.
        let e = exp(L::load(chunk).mul(L::splat(2.0 * factor)));
        let tanh = L::splat(1.0).sub(L::splat(2.0).div(e.add(L::splat(1.0))));
        tanh.mul(L::splat(cap)).store(chunk);
    }
}

/// `out = out · factor`, plus `other · its factor`.
pub(super) struct Combine<'a> {
    pub out: &'a mut [f32],
    pub factor: f32,
    pub other: Option<(&'a [f32], f32)>,
}

impl LanesKernel for Combine<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        combine::<L>(self.out, self.factor, self.other);
    }
}

#[inline(always)]
fn combine<L: Lanes>(out: &mut [f32], factor: f32, other: Option<(&[f32], f32)>) {
    let factor = L::splat(factor);
    let whole = out.len() / L::WIDTH * L::WIDTH;
    for e in (0..whole).step_by(L::WIDTH) {
        let own = L::load(&out[e..]).mul(factor);
        let sum = other.map_or(own, |(other, factor)| L::load(&other[e..]).mul_add(L::splat(factor), own));
        sum.store(&mut out[e..]);
    }
    let own = L::load_head(&out[whole..]).mul(factor);
    let sum = other.map_or(own, |(other, factor)| L::load_head(&other[whole..]).mul_add(L::splat(factor), own));
    sum.store_head(&mut out[whole..]);
}
