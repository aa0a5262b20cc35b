//! AVX2: FMA, 8 weights an instruction; F16C's `vcvtph2ps` widens fp16.

use std::arch::x86_64::*;

use half::f16;

use super::{DenseValue, portable};
use crate::quant::cpu::STRIP_ROWS;

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
    let pairs = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps::<1>(total));
    let pairs = _mm_add_ps(pairs, _mm_movehl_ps(pairs, pairs));
    let sum = _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
    if row_tail.is_empty() { sum } else { sum + portable::dot(row_tail, x_tail) }
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
