//! AVX-512: codes become the same fp32 values in registers as the plain decoder makes, 32 at once.
//!
//! Of 32 codes of 4 bits in 16 bytes, byte j holds codes j (low nibble) and j + 16 (high nibble) here ([`super::blocks::split`]), so that each half becomes 16
//! values by one permutation of the table, which has zero and scale in it.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Scaling;
use super::super::codes::Meaning;
use super::super::scales::{GlobalOrder, Groups, Scales};
use super::blocks::{BLOCK, HALF, MOST_LISTED, ScaledKernel, factors};

/// The scales of 16 groups from a multiple of 16 on, as the last of them that were asked for needed them.
struct SixteenScales {
    first: usize,
    scales: [f32; HALF],
}

impl SixteenScales {
    const NONE: Self = Self { first: usize::MAX, scales: [0.0; HALF] };

    /// Scale and zero of a group; E4M3 scales are made 16 at once.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn factors(&mut self, scaling: &Scaling, group: usize) -> (f32, f32) {
        let Scales::E4m3 { scales, global, order } = &scaling.scales else { return factors(scaling, group) };
        let first = group / HALF * HALF;
        if first + HALF > scales.len() {
            return factors(scaling, group);
        }
        if first != self.first {
            let values = of_bytes(&Meaning::E4m3, load16(scales, first), (1.0, 0.0));
            let global = _mm512_set1_ps(*global);
            let made = match order {
                GlobalOrder::Divides => _mm512_div_ps(values, global),
                GlobalOrder::Multiplies => _mm512_mul_ps(values, global),
            };
            self.first = first;
            // SAFETY: 16 values.
            unsafe { _mm512_storeu_ps(self.scales.as_mut_ptr(), made) };
        }
        (self.scales[group % HALF], 0.0)
    }
}

/// 16 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn load16(bytes: &[u8], at: usize) -> __m128i {
    let bytes = &bytes[at..][..16];
    // SAFETY: 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// The values of the 4-bit codes under a scale and a zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn table_of(values: &[f32; 16], (scale, zero): (f32, f32)) -> __m512 {
    // SAFETY: 16 values.
    let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
    _mm512_mul_ps(_mm512_sub_ps(values, _mm512_set1_ps(zero)), _mm512_set1_ps(scale))
}

/// The values of 16 codes of 8 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn of_bytes(meaning: &Meaning, codes: __m128i, (scale, zero): (f32, f32)) -> __m512 {
    let wide = _mm512_cvtepu8_epi32(codes);
    let values = match meaning {
        Meaning::E4m3 => {
            let magnitude = _mm512_slli_epi32::<20>(_mm512_and_si512(wide, _mm512_set1_epi32(0x7f)));
            let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)));
            let bits = _mm512_castsi512_ps(_mm512_or_si512(magnitude, sign));
            _mm512_mul_ps(bits, _mm512_set1_ps(f32::from_bits(0x7b80_0000)))
        }
        Meaning::Bytes { offset } => _mm512_sub_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(zero + offset)),
        Meaning::Nibbles(_) => _mm512_setzero_ps(),
    };
    _mm512_mul_ps(values, _mm512_set1_ps(scale))
}

/// Hands out the whole blocks of `columns` of a row as two halves of 16 values, in order. Returns the column behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
fn blocks(
    scaling: &Scaling,
    codes: &[u8],
    row: usize,
    columns: Range<usize>,
    mut each: impl FnMut(usize, __m512, __m512),
) -> usize {
    let mut column = columns.start;
    let mut scales = SixteenScales::NONE;
    let behind = columns.start + columns.len() / BLOCK * BLOCK;
    while column < behind {
        let (group, end) = scaling.groups.at(scaling.k, row, column);
        // Of groups of 16 each half has its own.
        let is_half = end - column == HALF;
        let end = if is_half { column + BLOCK } else { end.min(behind) };
        let low = scales.factors(scaling, group);
        let high = if is_half { scales.factors(scaling, group + 1) } else { low };
        match &scaling.meaning {
            Meaning::Nibbles(values) => {
                let (low, high) = (table_of(values, low), table_of(values, high));
                for at in (column..end).step_by(BLOCK) {
                    // A permutation reads the lowest four bits of an index.
                    let wide = _mm512_cvtepu8_epi32(load16(codes, at / 2));
                    let high_codes = _mm512_srli_epi32::<4>(wide);
                    each(at, _mm512_permutexvar_ps(wide, low), _mm512_permutexvar_ps(high_codes, high));
                }
            }
            meaning => {
                for at in (column..end).step_by(BLOCK) {
                    let halves = (load16(codes, at), load16(codes, at + HALF));
                    each(at, of_bytes(meaning, halves.0, low), of_bytes(meaning, halves.1, high));
                }
            }
        }
        column = end;
    }
    behind
}

/// 16 values from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn values(x: &[f32], at: usize) -> __m512 {
    let x = &x[at..][..16];
    // SAFETY: 16 values.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Scales and zeros of a row's groups.
struct RowTable {
    scales: [f32; MOST_LISTED],
    zeros: [f32; MOST_LISTED],
}

/// Hands out `columns` of a row, 16 at once, whose groups are listed; the last may be fewer, with zeros behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
fn listed(
    scaling: &Scaling,
    codes: &[u8],
    row: usize,
    columns: Range<usize>,
    mut each: impl FnMut(usize, __mmask16, __m512),
) {
    let Groups::Listed { count, of_column } = &scaling.groups else { return };
    let mut table = RowTable { scales: [0.0; MOST_LISTED], zeros: [0.0; MOST_LISTED] };
    for group in 0..*count {
        (table.scales[group], table.zeros[group]) = factors(scaling, row * count + group);
    }
    for column in columns.clone().step_by(HALF) {
        let len = HALF.min(columns.end - column);
        let mask = ((1u32 << len) - 1) as __mmask16;
        // SAFETY: the mask covers `len` columns of as many as there are, and every group is below `count` (`Scaling::check`).
        let (scales, zeros) = unsafe {
            let groups = _mm512_maskz_loadu_epi32(mask, of_column[column..column + len].as_ptr().cast());
            let gathered = |from: &[f32; MOST_LISTED]| _mm512_i32gather_ps::<4>(groups, from.as_ptr());
            (gathered(&table.scales), gathered(&table.zeros))
        };
        let values = match &scaling.meaning {
            Meaning::Nibbles(values) => {
                let mut bytes = [0u8; HALF / 2];
                let from = &codes[column / 2..(column + len).div_ceil(2)];
                bytes[..from.len()].copy_from_slice(from);
                let packed = _mm_set_epi64x(0, i64::from_le_bytes(bytes));
                let (low, high) = (_mm_set1_epi8(15), _mm_srli_epi16::<4>(packed));
                let in_order = _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(high, low));
                // SAFETY: 16 values.
                let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
                _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(in_order), values)
            }
            Meaning::Bytes { offset } => {
                // SAFETY: the mask covers `len` codes of as many as there are.
                let bytes = unsafe { _mm_maskz_loadu_epi8(mask, codes[column..column + len].as_ptr().cast()) };
                _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_set1_ps(*offset))
            }
            Meaning::E4m3 => _mm512_setzero_ps(),
        };
        each(column, mask, _mm512_mul_ps(_mm512_sub_ps(values, zeros), scales));
    }
}

/// `Σ row · x` for `x` `[k]`, of a matrix with this kernel; the 4-bit codes of [`ScaledKernel::Blocks`] are split.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ, F16C and FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
pub unsafe fn dot(kernel: ScaledKernel, scaling: &Scaling, codes: &[u8], row: usize, x: &[f32]) -> f32 {
    if kernel == ScaledKernel::Listed {
        let mut sum = _mm512_setzero_ps();
        listed(scaling, codes, row, 0..scaling.k, |column, mask, values| {
            let x = &x[column..][..mask.count_ones() as usize];
            // SAFETY: the mask covers `x`.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) };
            sum = _mm512_mask3_fmadd_ps(values, x, sum, mask);
        });
        return _mm512_reduce_add_ps(sum);
    }
    let mut sums = [_mm512_setzero_ps(); 4];
    let behind = blocks(scaling, codes, row, 0..scaling.k, |column, low, high| {
        let pair = column / BLOCK % 2 * 2;
        sums[pair] = _mm512_fmadd_ps(low, values(x, column), sums[pair]);
        sums[pair + 1] = _mm512_fmadd_ps(high, values(x, column + HALF), sums[pair + 1]);
    });
    let sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    let mut tail = [0.0f32; BLOCK];
    let tail = &mut tail[..scaling.k - behind];
    scaling.decode(codes, row, behind..scaling.k, tail);
    tail.iter().zip(&x[behind..]).fold(_mm512_reduce_add_ps(sum), |sum, (w, x)| w.mul_add(*x, sum))
}

/// Decodes `columns` of a row, which begin at a block and end with one or with the row.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ, F16C and FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
pub unsafe fn decode(
    kernel: ScaledKernel,
    scaling: &Scaling,
    codes: &[u8],
    row: usize,
    columns: Range<usize>,
    out: &mut [f32],
) {
    let start = columns.start;
    if kernel == ScaledKernel::Listed {
        listed(scaling, codes, row, columns, |column, mask, values| {
            let out = &mut out[column - start..][..mask.count_ones() as usize];
            // SAFETY: the mask covers `out`.
            unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, values) };
        });
        return;
    }
    let behind = blocks(scaling, codes, row, columns.clone(), |column, low, high| {
        let out = &mut out[column - start..][..BLOCK];
        // SAFETY: 32 values.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), low);
            _mm512_storeu_ps(out.as_mut_ptr().add(HALF), high);
        }
    });
    scaling.decode(codes, row, behind..columns.end, &mut out[behind - start..]);
}
