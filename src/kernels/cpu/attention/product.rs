//! Small products whose sums stay in registers.

use crate::kernels::cpu::lanes::{Lanes, prefetch};

/// How far ahead keys and values are fetched, in elements: the hardware's prefetcher stops at pages of 4 KiB.
pub(super) const AHEAD: usize = 1024;

/// What becomes of the sums of a [`SmallProduct`].
#[derive(Clone, Copy)]
pub(super) enum End<'a> {
    /// They are multiplied by this.
    Scaled(f32),
    /// They are added to the output.
    Added,
    /// They are added to each row of the output times its factor.
    Rescaled(&'a [f32]),
}

/// `Σ_k a[r, k] · b[k, c]`: `a[r, k]` at `r · row + k · step`, `b` `[depth, columns]`, the output `[rows, columns]`.
#[derive(Clone, Copy)]
pub(super) struct SmallProduct<'a> {
    pub a: &'a [f32],
    pub row: usize,
    pub step: usize,
    pub depth: usize,
    pub b: &'a [f32],
    pub columns: usize,
}

impl SmallProduct<'_> {
    /// `R` rows at a time share what is loaded of `b`, which is fetched `AHEAD` where it comes from memory.
    #[inline(always)]
    pub fn run<L: Lanes, const R: usize, const IS_FAR: bool>(self, out: &mut [f32], end: End) {
        let rows = out.len() / self.columns;
        assert!(self.b.len() == self.depth * self.columns && out.len() == rows * self.columns);
        assert!(self.depth > 0 && self.a.len() > (rows - 1) * self.row + (self.depth - 1) * self.step);
        if let End::Rescaled(factors) = end {
            assert!(factors.len() >= rows);
        }
        let mut column = 0;
        // Eight sums hide the latency of an FMA. With a row of `b` they fit 16 registers, and 16 sums fit 32.
        if L::WIDTH == 16 || R <= 2 {
            while column + 4 * L::WIDTH <= self.columns {
                self.columns::<L, R, 4, IS_FAR>(rows, column, out, end);
                column += 4 * L::WIDTH;
            }
        }
        while column + 2 * L::WIDTH <= self.columns {
            self.columns::<L, R, 2, IS_FAR>(rows, column, out, end);
            column += 2 * L::WIDTH;
        }
        while column + L::WIDTH <= self.columns {
            self.columns::<L, R, 1, IS_FAR>(rows, column, out, end);
            column += L::WIDTH;
        }
        if column < self.columns {
            self.last_columns::<L>(column, out, end);
        }
    }

    /// `C` vectors of columns from `column` on.
    #[inline(always)]
    fn columns<L: Lanes, const R: usize, const C: usize, const IS_FAR: bool>(
        self,
        rows: usize,
        column: usize,
        out: &mut [f32],
        end: End,
    ) {
        let whole = rows / R * R;
        for row in (0..whole).step_by(R) {
            // SAFETY: the lengths that `run` asserts; rows and vectors lie within them.
            unsafe { self.tile::<L, R, C, IS_FAR>(row, column, out, end) };
        }
        for row in whole..rows {
            // SAFETY: as above.
            unsafe { self.tile::<L, 1, C, IS_FAR>(row, column, out, end) };
        }
    }

    /// # Safety
    /// The lengths that [`SmallProduct::run`] asserts, `R` rows from `row` and `C` vectors from `column`.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const R: usize, const C: usize, const IS_FAR: bool>(
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
                if IS_FAR {
                    prefetch(b.wrapping_add(c * L::WIDTH + AHEAD));
                }
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
                    End::Added => L::load(out).add(sum).store(out),
                    End::Rescaled(factors) => L::load(out).mul_add(L::splat(factors[row + r]), sum).store(out),
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
                End::Added => L::load_head(out).add(sum).store_head(out),
                End::Rescaled(factors) => L::load_head(out).mul_add(L::splat(factors[row]), sum).store_head(out),
            }
        }
    }
}
