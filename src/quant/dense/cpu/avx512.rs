//! AVX-512: FMA, 16 weights an instruction; `vcvtph2ps` widens fp16.

use std::arch::x86_64::*;

use half::f16;

use super::{DenseValue, portable};
use crate::quant::cpu::{FewSums, STRIP_ROWS, StripSums};

const LANES: usize = 16;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;
/// How far ahead weights are fetched into L1, over the end of the row into the next: the hardware's prefetcher stops at
/// pages, and long rows share L1 with as long an `x`.
const PREFETCH_BYTES: usize = 4096;
/// Sums in flight: an FMA takes 4 cycles and two start in each.
const SUMS: usize = 8;

/// `Σ row · x` over equally many values.
///
/// # Safety
/// The machine has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn dot<T: DenseValue>(row: &[T], x: &[f32]) -> f32 {
    assert_eq!(row.len(), x.len());
    let mut sums = [_mm512_setzero_ps(); SUMS];
    let (rows, xs) = (row.chunks_exact(LANES * SUMS), x.chunks_exact(LANES * SUMS));
    let (row_tail, x_tail) = (rows.remainder(), xs.remainder());
    for (row, x) in rows.zip(xs) {
        for line in row.chunks(LINE_BYTES / size_of::<T>()) {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_byte_add(PREFETCH_BYTES).cast());
        }
        for (s, sum) in sums.iter_mut().enumerate() {
            // SAFETY: chunk `s` of `SUMS`.
            let (weights, x) =
                unsafe { (T::load_avx512(row.as_ptr().add(s * LANES)), _mm512_loadu_ps(x.as_ptr().add(s * LANES))) };
            *sum = _mm512_fmadd_ps(weights, x, *sum);
        }
    }
    for (s, (row, x)) in row_tail.chunks(LANES).zip(x_tail.chunks(LANES)).enumerate() {
        let mask = (1u32 << row.len()).wrapping_sub(1) as __mmask16;
        // SAFETY: the mask covers the chunk.
        let (weights, x) =
            unsafe { (T::load_masked_avx512(mask, row.as_ptr()), _mm512_maskz_loadu_ps(mask, x.as_ptr())) };
        sums[s] = _mm512_fmadd_ps(weights, x, sums[s]);
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = _mm512_add_ps(total, *sum);
    }
    _mm512_reduce_add_ps(total)
}

/// `Σ row · x` of each row for as many tokens as `x` holds.
///
/// # Safety
/// The machine has AVX-512F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn dot_few<T: DenseValue>(rows: [&[T]; STRIP_ROWS], x: &[f32], sums: &mut FewSums) {
    let k = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == k));
    macro_rules! dispatch {
        ($($tokens:literal by $unroll:literal),*) => {
            match x.len() / k {
                // SAFETY: this function's own contract; the rows and each token have `k` values.
                $($tokens => unsafe { dot_tokens::<T, $tokens, $unroll>(rows, x, sums) },)*
                tokens => assert_eq!(tokens, 0, "more tokens than a kernel takes"),
            }
        };
    }
    // Sums in flight: two rows by tokens by columns unrolled. Four wait for each other.
    dispatch!(1 by 4, 2 by 2, 3 by 2, 4 by 1, 5 by 1, 6 by 1, 7 by 1, 8 by 1)
}

/// Two rows at a time, so that each value of a token is loaded once for both.
///
/// # Safety
/// As [`dot_few`]; rows have equally many values, and `x` those of `TOKENS` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dot_tokens<T: DenseValue, const TOKENS: usize, const UNROLL: usize>(
    rows: [&[T]; STRIP_ROWS],
    x: &[f32],
    out: &mut FewSums,
) {
    let k = rows[0].len();
    let mut totals = [[_mm512_setzero_ps(); STRIP_ROWS]; TOKENS];
    for pair in 0..STRIP_ROWS / 2 {
        let (first, second) = (rows[2 * pair].as_ptr(), rows[2 * pair + 1].as_ptr());
        let mut sums = [[[_mm512_setzero_ps(); 2]; TOKENS]; UNROLL];
        let whole = k / (LANES * UNROLL) * (LANES * UNROLL);
        for column in (0..whole).step_by(LANES * UNROLL) {
            _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(column).wrapping_byte_add(PREFETCH_BYTES).cast());
            _mm_prefetch::<_MM_HINT_T0>(second.wrapping_add(column).wrapping_byte_add(PREFETCH_BYTES).cast());
            for (u, sums) in sums.iter_mut().enumerate() {
                let column = column + u * LANES;
                // SAFETY: 16 columns from `column` on lie within each row and each token.
                unsafe {
                    let (a, b) = (T::load_avx512(first.add(column)), T::load_avx512(second.add(column)));
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_loadu_ps(x.as_ptr().add(t * k + column));
                        sums[0] = _mm512_fmadd_ps(a, x, sums[0]);
                        sums[1] = _mm512_fmadd_ps(b, x, sums[1]);
                    }
                }
            }
        }
        for column in (whole..k).step_by(LANES) {
            let mask = (1u32 << LANES.min(k - column)).wrapping_sub(1) as __mmask16;
            // SAFETY: the mask covers what is left of each row and token.
            unsafe {
                let (a, b) =
                    (T::load_masked_avx512(mask, first.add(column)), T::load_masked_avx512(mask, second.add(column)));
                for (t, sums) in sums[0].iter_mut().enumerate() {
                    let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(t * k + column));
                    sums[0] = _mm512_fmadd_ps(a, x, sums[0]);
                    sums[1] = _mm512_fmadd_ps(b, x, sums[1]);
                }
            }
        }
        for (t, totals) in totals.iter_mut().enumerate() {
            for row in 0..2 {
                let all = sums.iter().map(|sums| sums[t][row]);
                totals[2 * pair + row] = all.fold(_mm512_setzero_ps(), |total, sum| _mm512_add_ps(total, sum));
            }
        }
    }
    for (totals, out) in totals.into_iter().zip(out) {
        *out = sum_lanes(totals);
    }
}

/// The sum of each vector's lanes: pairs, quads, then the quarters' places.
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_lanes(values: [__m512; STRIP_ROWS]) -> StripSums {
    // Each quarter has the sums of its even and odd elements of two rows.
    let pairs: [__m512; 8] = std::array::from_fn(|i| {
        let (a, b) = (values[2 * i], values[2 * i + 1]);
        _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b))
    });
    // Each quarter has its sums of four rows.
    let quads: [__m512; 4] = std::array::from_fn(|i| {
        let (a, b) = (_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    });
    // Two vectors by quarters, and then all four in the order of the rows.
    let join = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let all = join(join(quads[0], quads[1]), join(quads[2], quads[3]));
    let mut out = [0.0; STRIP_ROWS];
    // SAFETY: 16 values.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), all) };
    out
}

/// # Safety
/// The machine has AVX-512F; 16 values at `from`.
#[inline]
#[target_feature(enable = "avx512f")]
pub unsafe fn load_f16(from: *const f16) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
}

/// # Safety
/// The machine has AVX-512F, BW and VL; the values whose bits are set lie at `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn load_masked_f16(mask: __mmask16, from: *const f16) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
}

/// Writes equally long rows as `[columns][16]`.
///
/// # Safety
/// The machine has AVX-512F.
#[target_feature(enable = "avx512f")]
pub unsafe fn transpose<T: DenseValue>(rows: [&[T]; STRIP_ROWS], panel: &mut [f32]) {
    let columns = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == columns) && panel.len() == columns * STRIP_ROWS);
    let whole = columns / LANES * LANES;
    for column in (0..whole).step_by(LANES) {
        let mut values = [_mm512_setzero_ps(); STRIP_ROWS];
        for (value, row) in values.iter_mut().zip(rows) {
            // SAFETY: 16 columns from `column` on lie within each row.
            *value = unsafe { T::load_avx512(row.as_ptr().add(column)) };
        }
        for (c, lanes) in transpose_registers(values).into_iter().enumerate() {
            // SAFETY: `column + c` is a column of the panel.
            unsafe { _mm512_storeu_ps(panel.as_mut_ptr().add((column + c) * STRIP_ROWS), lanes) };
        }
    }
    portable::transpose(&rows, whole, panel);
}

/// A 16 × 16 transposition: pairs, quarters, then the quarters' places.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_registers(rows: [__m512; 16]) -> [__m512; 16] {
    let mut pairs = rows;
    for (i, out) in pairs.iter_mut().enumerate() {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        *out = if i & 1 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) };
    }
    // quads[4g + c]: rows 4g..4g+4, and in quarter q of the register column 4q + c.
    let mut quads = rows;
    for (i, out) in quads.iter_mut().enumerate() {
        let base = (i & !3) + ((i >> 1) & 1);
        let (a, b) = (_mm512_castps_pd(pairs[base]), _mm512_castps_pd(pairs[base + 2]));
        *out = _mm512_castpd_ps(if i & 1 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) });
    }
    // Column 4q + c takes quarter q of quads[c], quads[4 + c], quads[8 + c], quads[12 + c].
    let mut halves = rows;
    for (i, out) in halves.iter_mut().enumerate() {
        let (c, upper_rows, odd) = (i & 3, i & 4, i & 8);
        let (a, b) = (quads[2 * upper_rows + c], quads[2 * upper_rows + 4 + c]);
        *out = if odd == 0 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) };
    }
    let mut columns = rows;
    for (column, out) in columns.iter_mut().enumerate() {
        let (q, c) = (column >> 2, column & 3);
        let (a, b) = (halves[(q & 1) * 8 + c], halves[(q & 1) * 8 + 4 + c]);
        *out = if q < 2 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) };
    }
    columns
}
