//! Attention of many queries, a lane each: scores lie as `[positions, queries]`, so that the softmax runs down the lanes and nothing is added up
//! across a vector.

use super::tile::TiledAttention;
use super::{Context, Partial};
use crate::kernels::cpu::lanes::{Lanes, exp};

/// From so many queries on, full lanes outweigh those that stay empty.
pub(super) const FROM_QUERIES: usize = 12;

/// Positions of a tile. Its keys or values are 16 KiB at 64 elements a head, as are its scores for 64 queries.
const TILE: usize = 64;

/// Rows of a register tile, of up to four vectors: 16 sums, twice what hides the latency of an FMA.
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
        let product = Product { a: keys, row: d, step: 1, depth: d, b: self.q, columns: lanes };
        product.run::<L>(scores, End::Scaled(scale));
        if let Some(cap) = softcap {
            for chunk in scores.chunks_exact_mut(L::WIDTH) {
                // tanh(u) = 1 − 2 / (1 + e^(2u)), which is −1 and 1 at the ends.
                let e = exp(L::load(chunk).mul(L::splat(2.0)));
                let tanh = L::splat(1.0).sub(L::splat(2.0).div(e.add(L::splat(1.0))));
                tanh.mul(L::splat(cap)).store(chunk);
            }
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
        let product = Product { a: scores, row: 1, step: block.lanes, depth: len, b: values, columns: d };
        product.run::<L>(work.out, End::Added(block.factor));
    }
    for (partial, (max, sum)) in work.partials.iter_mut().zip(block.max.iter().zip(block.sum.iter())) {
        *partial = Partial { max: *max, sum: *sum };
    }
    *work.scratch = scratch;
}

/// What becomes of the sums of a [`Product`].
#[derive(Clone, Copy)]
enum End<'a> {
    /// They are multiplied by this.
    Scaled(f32),
    /// They are added to each row of the output times its factor.
    Added(&'a [f32]),
}

/// `Σ_k a[r, k] · b[k, c]`: `a[r, k]` at `r · row + k · step`, `b` `[depth, columns]`, the output `[rows, columns]`.
#[derive(Clone, Copy)]
struct Product<'a> {
    a: &'a [f32],
    row: usize,
    step: usize,
    depth: usize,
    b: &'a [f32],
    columns: usize,
}

impl Product<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, out: &mut [f32], end: End) {
        let rows = out.len() / self.columns;
        assert!(self.b.len() == self.depth * self.columns && out.len() == rows * self.columns);
        assert!(self.depth > 0 && self.a.len() > (rows - 1) * self.row + (self.depth - 1) * self.step);
        if let End::Added(factors) = end {
            assert!(factors.len() >= rows);
        }
        let mut column = 0;
        // Sums and a row of `b` fit 16 registers at two vectors, and 32 at four.
        if L::WIDTH == 16 {
            while column + 4 * L::WIDTH <= self.columns {
                self.columns::<L, 4>(rows, column, out, end);
                column += 4 * L::WIDTH;
            }
        }
        while column + 2 * L::WIDTH <= self.columns {
            self.columns::<L, 2>(rows, column, out, end);
            column += 2 * L::WIDTH;
        }
        while column + L::WIDTH <= self.columns {
            self.columns::<L, 1>(rows, column, out, end);
            column += L::WIDTH;
        }
        if column < self.columns {
            self.last_columns::<L>(column, out, end);
        }
    }

    /// `C` vectors of columns from `column` on.
    #[inline(always)]
    fn columns<L: Lanes, const C: usize>(self, rows: usize, column: usize, out: &mut [f32], end: End) {
        let whole = rows / ROWS * ROWS;
        for row in (0..whole).step_by(ROWS) {
            // SAFETY: the lengths that `run` asserts; rows and vectors lie within them.
            unsafe { self.tile::<L, ROWS, C>(row, column, out, end) };
        }
        for row in whole..rows {
            // SAFETY: as above.
            unsafe { self.tile::<L, 1, C>(row, column, out, end) };
        }
    }

    /// # Safety
    /// The lengths that [`Product::run`] asserts, `R` rows from `row` and `C` vectors from `column`.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const R: usize, const C: usize>(
        self,
        row: usize,
        column: usize,
        out: &mut [f32],
        end: End,
    ) {
        let mut sums = [[L::splat(0.0); C]; R];
        let (mut a, mut b) = (self.a[row * self.row..].as_ptr(), self.b[column..].as_ptr());
        for _ in 0..self.depth {
            let mut values = [L::splat(0.0); C];
            for (c, value) in values.iter_mut().enumerate() {
                // SAFETY: C vectors from `column` end within the row of `b`.
                *value = unsafe { L::read(b.add(c * L::WIDTH)) };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row `row + r` of `a` has this element.
                let factor = L::splat(unsafe { *a.add(r * self.row) });
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = value.mul_add(factor, *sum);
                }
            }
            (a, b) = (a.wrapping_add(self.step), b.wrapping_add(self.columns));
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let out = &mut out[(row + r) * self.columns + column..][..C * L::WIDTH];
            for (out, sum) in out.chunks_exact_mut(L::WIDTH).zip(sums) {
                match end {
                    End::Scaled(scale) => sum.mul(L::splat(scale)).store(out),
                    End::Added(factors) => L::load(out).mul_add(L::splat(factors[row + r]), sum).store(out),
                }
            }
        }
    }

    /// Those that fill no vector.
    #[inline(always)]
    fn last_columns<L: Lanes>(self, column: usize, out: &mut [f32], end: End) {
        for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
            let mut sum = L::splat(0.0);
            for (k, b) in self.b.chunks_exact(self.columns).enumerate() {
                let factor = L::splat(self.a[row * self.row + k * self.step]);
                sum = L::load_head(&b[column..]).mul_add(factor, sum);
            }
            let out = &mut out[column..];
            match end {
                End::Scaled(scale) => sum.mul(L::splat(scale)).store_head(out),
                End::Added(factors) => L::load_head(out).mul_add(L::splat(factors[row]), sum).store_head(out),
            }
        }
    }
}
