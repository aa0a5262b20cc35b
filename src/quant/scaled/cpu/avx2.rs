//! AVX2: what `avx512.rs` does to whole blocks, 8 values at once. A table of 16 values is two permutations, of which the codes' upper bit chooses.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Scaling;
use super::super::codes::Meaning;
use super::blocks::{BLOCK, HALF, factors};

/// Values of a register.
const LANES: usize = 8;

/// The values of the 4-bit codes under a scale and a zero.
#[inline]
#[target_feature(enable = "avx2")]
fn table_of(values: &[f32; 16], (scale, zero): (f32, f32)) -> [__m256; 2] {
    let (scale, zero) = (_mm256_set1_ps(scale), _mm256_set1_ps(zero));
    let half = |from: &[f32]| {
        // SAFETY: 8 values.
        let values = unsafe { _mm256_loadu_ps(from[..LANES].as_ptr()) };
        _mm256_mul_ps(_mm256_sub_ps(values, zero), scale)
    };
    [half(&values[..LANES]), half(&values[LANES..])]
}

/// 8 bytes from `at` on, in the lanes of a register.
#[inline]
#[target_feature(enable = "avx2")]
fn widened(bytes: &[u8], at: usize) -> __m256i {
    let mut eight = [0; LANES];
    eight.copy_from_slice(&bytes[at..][..LANES]);
    _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(eight)))
}

/// The values of the codes in the lowest nibbles of lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn of_nibbles(codes: __m256i, table: [__m256; 2]) -> __m256 {
    let (low, high) = (_mm256_permutevar8x32_ps(table[0], codes), _mm256_permutevar8x32_ps(table[1], codes));
    // The sign of a lane chooses: bit 3 of the code.
    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
}

/// The values of codes of 8 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn of_bytes(meaning: &Meaning, wide: __m256i, (scale, zero): (f32, f32)) -> __m256 {
    let values = match meaning {
        Meaning::E4m3 => {
            let magnitude = _mm256_slli_epi32::<20>(_mm256_and_si256(wide, _mm256_set1_epi32(0x7f)));
            let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(wide, _mm256_set1_epi32(0x80)));
            let bits = _mm256_castsi256_ps(_mm256_or_si256(magnitude, sign));
            _mm256_mul_ps(bits, _mm256_set1_ps(f32::from_bits(0x7b80_0000)))
        }
        Meaning::Bytes { offset } => _mm256_sub_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(zero + offset)),
        Meaning::Nibbles(_) => _mm256_setzero_ps(),
    };
    _mm256_mul_ps(values, _mm256_set1_ps(scale))
}

/// Hands out the whole blocks of `columns` of a row as four times 8 values, in order. Returns the column behind them.
#[inline]
#[target_feature(enable = "avx2,f16c,fma")]
fn blocks(
    scaling: &Scaling,
    codes: &[u8],
    row: usize,
    columns: Range<usize>,
    mut each: impl FnMut(usize, [__m256; 4]),
) -> usize {
    let mut column = columns.start;
    let behind = columns.start + columns.len() / BLOCK * BLOCK;
    while column < behind {
        let (group, end) = scaling.groups.at(scaling.k, row, column);
        // Of groups of 16 each half has its own.
        let is_half = end - column == HALF;
        let end = if is_half { column + BLOCK } else { end.min(behind) };
        let low = factors(scaling, group);
        let high = if is_half { factors(scaling, group + 1) } else { low };
        match &scaling.meaning {
            Meaning::Nibbles(values) => {
                let (low, high) = (table_of(values, low), table_of(values, high));
                for at in (column..end).step_by(BLOCK) {
                    let wide = [widened(codes, at / 2), widened(codes, at / 2 + LANES)];
                    let upper = wide.map(|codes| _mm256_srli_epi32::<4>(codes));
                    let [a, b] = [of_nibbles(wide[0], low), of_nibbles(wide[1], low)];
                    each(at, [a, b, of_nibbles(upper[0], high), of_nibbles(upper[1], high)]);
                }
            }
            meaning => {
                for at in (column..end).step_by(BLOCK) {
                    let wide = |part: usize| widened(codes, at + part * LANES);
                    let [a, b] = [of_bytes(meaning, wide(0), low), of_bytes(meaning, wide(1), low)];
                    each(at, [a, b, of_bytes(meaning, wide(2), high), of_bytes(meaning, wide(3), high)]);
                }
            }
        }
        column = end;
    }
    behind
}

/// `Σ row · x` for `x` `[k]`, of a matrix that runs in blocks.
///
/// # Safety
/// The machine has AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
pub unsafe fn dot(scaling: &Scaling, codes: &[u8], row: usize, x: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 4];
    let behind = blocks(scaling, codes, row, 0..scaling.k, |column, values| {
        for (part, (sum, values)) in sums.iter_mut().zip(values).enumerate() {
            let x = &x[column + part * LANES..][..LANES];
            // SAFETY: 8 values.
            *sum = _mm256_fmadd_ps(values, unsafe { _mm256_loadu_ps(x.as_ptr()) }, *sum);
        }
    });
    let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    let mut lanes = [0.0f32; LANES];
    // SAFETY: 8 values.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    let mut tail = [0.0f32; BLOCK];
    let tail = &mut tail[..scaling.k - behind];
    scaling.decode(codes, row, behind..scaling.k, tail);
    tail.iter().zip(&x[behind..]).fold(lanes.iter().sum(), |sum: f32, (w, x)| w.mul_add(*x, sum))
}

/// Decodes `columns` of a row, which begin at a block and end with one or with the row.
///
/// # Safety
/// The machine has AVX2, F16C and FMA.
#[target_feature(enable = "avx2,f16c,fma")]
pub unsafe fn decode(scaling: &Scaling, codes: &[u8], row: usize, columns: Range<usize>, out: &mut [f32]) {
    let start = columns.start;
    let behind = blocks(scaling, codes, row, columns.clone(), |column, values| {
        for (part, values) in values.into_iter().enumerate() {
            let out = &mut out[column - start + part * LANES..][..LANES];
            // SAFETY: 8 values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
        }
    });
    scaling.decode(codes, row, behind..columns.end, &mut out[behind - start..]);
}
