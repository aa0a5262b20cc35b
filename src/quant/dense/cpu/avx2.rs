//! AVX2: FMA, 8 weights an instruction; F16C's `vcvtph2ps` widens fp16.

use std::arch::x86_64::*;

use half::f16;

use super::{DenseValue, portable};
use crate::quant::cpu::{FewSums, STRIP_ROWS};

const LANES: usize = 8;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// How far ahead weights are fetched into L1, over the end of the row into the next: the hardware's prefetcher stops at
/// pages, and long rows share L1 with as long an `x`.
const PREFETCH_BYTES: usize = 4096;
/// Sums in flight: an FMA takes 4 or 5 cycles and two start in each.
const SUMS: usize = 8;

/// `Σ row · x` over equally many values.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dot<T: DenseValue>(row: &[T], x: &[f32]) -> f32 {
    assert_eq!(row.len(), x.len());
    let mut sums = [_mm256_setzero_ps(); SUMS];
    let (rows, xs) = (row.chunks_exact(LANES * SUMS), x.chunks_exact(LANES * SUMS));
    let (row_tail, x_tail) = (rows.remainder(), xs.remainder());
    for (row, x) in rows.zip(xs) {
        for line in row.chunks(LINE_BYTES / size_of::<T>()) {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_byte_add(PREFETCH_BYTES).cast());
        }
        for (s, sum) in sums.iter_mut().enumerate() {
            // SAFETY: chunk `s` of `SUMS`.
            let (weights, x) =
                unsafe { (T::load_avx2(row.as_ptr().add(s * LANES)), _mm256_loadu_ps(x.as_ptr().add(s * LANES))) };
            *sum = _mm256_fmadd_ps(weights, x, *sum);
        }
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = _mm256_add_ps(total, *sum);
    }
    let sum = sum_lanes(total);
    if row_tail.is_empty() { sum } else { sum + portable::dot(row_tail, x_tail) }
}

/// The sum of a vector's lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn sum_lanes(total: __m256) -> f32 {
    let pairs = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps::<1>(total));
    let pairs = _mm_add_ps(pairs, _mm_movehl_ps(pairs, pairs));
    _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
}

/// Tokens that two rows are multiplied by at once: eight sums, two weights and a value of 16 registers.
const TOKENS_AT_ONCE: usize = 4;

/// `Σ row · x` of each row for as many tokens as `x` holds.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn dot_few<T: DenseValue>(rows: [&[T]; STRIP_ROWS], x: &[f32], sums: &mut FewSums) {
    let k = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == k));
    for (x, sums) in x.chunks(TOKENS_AT_ONCE * k).zip(sums.chunks_mut(TOKENS_AT_ONCE)) {
        // SAFETY: this function's own contract; the rows and each token have `k` values.
        unsafe {
            match x.len() / k {
                1 => dot_tokens::<T, 1>(rows, x, sums),
                2 => dot_tokens::<T, 2>(rows, x, sums),
                3 => dot_tokens::<T, 3>(rows, x, sums),
                _ => dot_tokens::<T, TOKENS_AT_ONCE>(rows, x, sums),
            }
        }
    }
}

/// Two rows at a time, so that each value of a token is loaded once for both.
///
/// # Safety
/// As [`dot_few`]; rows have equally many values, and `x` those of `TOKENS` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_tokens<T: DenseValue, const TOKENS: usize>(
    rows: [&[T]; STRIP_ROWS],
    x: &[f32],
    out: &mut [[f32; STRIP_ROWS]],
) {
    let k = rows[0].len();
    let whole = k / LANES * LANES;
    for pair in 0..STRIP_ROWS / 2 {
        let (first, second) = (rows[2 * pair], rows[2 * pair + 1]);
        let mut sums = [[_mm256_setzero_ps(); 2]; TOKENS];
        for column in (0..whole).step_by(LANES) {
            for row in [first, second] {
                _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(column).wrapping_byte_add(PREFETCH_BYTES).cast());
            }
            // SAFETY: 8 columns from `column` on lie within each row and each token.
            unsafe {
                let (a, b) = (T::load_avx2(first.as_ptr().add(column)), T::load_avx2(second.as_ptr().add(column)));
                for (t, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_loadu_ps(x.as_ptr().add(t * k + column));
                    sums[0] = _mm256_fmadd_ps(a, x, sums[0]);
                    sums[1] = _mm256_fmadd_ps(b, x, sums[1]);
                }
            }
        }
        for ((t, sums), out) in sums.into_iter().enumerate().zip(out.iter_mut()) {
            for (row, (values, sum)) in [first, second].into_iter().zip(sums).enumerate() {
                let tail =
                    if whole < k { portable::dot(&values[whole..], &x[t * k + whole..(t + 1) * k]) } else { 0.0 };
                out[2 * pair + row] = sum_lanes(sum) + tail;
            }
        }
    }
}

/// # Safety
/// The machine has AVX2 and F16C; 8 values at `from`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn load_f16(from: *const f16) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
}

/// Writes equally long rows as `[columns][16]`.
///
/// # Safety
/// The machine has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn transpose<T: DenseValue>(rows: [&[T]; STRIP_ROWS], panel: &mut [f32]) {
    let columns = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == columns) && panel.len() == columns * STRIP_ROWS);
    let whole = columns / LANES * LANES;
    for column in (0..whole).step_by(LANES) {
        for first in [0, LANES] {
            let mut values = [_mm256_setzero_ps(); LANES];
            for (value, row) in values.iter_mut().zip(&rows[first..]) {
                // SAFETY: 8 columns from `column` on lie within each row.
                *value = unsafe { T::load_avx2(row.as_ptr().add(column)) };
            }
            for (c, lanes) in transpose_registers(values).into_iter().enumerate() {
                // SAFETY: `column + c` is a column of the panel and `first` half a strip.
                unsafe { _mm256_storeu_ps(panel.as_mut_ptr().add((column + c) * STRIP_ROWS + first), lanes) };
            }
        }
    }
    portable::transpose(&rows, whole, panel);
}

/// An 8 × 8 transposition: pairs, quads, then the halves' places.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_registers(rows: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = rows;
    for (i, out) in pairs.iter_mut().enumerate() {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        *out = if i & 1 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) };
    }
    // quads[4g + c]: rows 4g..4g+4, columns c and 4 + c.
    let mut quads = rows;
    for (i, out) in quads.iter_mut().enumerate() {
        let base = (i & !3) + ((i >> 1) & 1);
        let (a, b) = (_mm256_castps_pd(pairs[base]), _mm256_castps_pd(pairs[base + 2]));
        *out = _mm256_castpd_ps(if i & 1 == 0 { _mm256_unpacklo_pd(a, b) } else { _mm256_unpackhi_pd(a, b) });
    }
    let mut columns = rows;
    for (column, out) in columns.iter_mut().enumerate() {
        let (a, b) = (quads[column & 3], quads[4 + (column & 3)]);
        *out = if column < 4 { _mm256_permute2f128_ps::<0x20>(a, b) } else { _mm256_permute2f128_ps::<0x31>(a, b) };
    }
    columns
}
