//! NF4 on AVX2: two `vpermps` of eight entries each and a blend look 8 codes up at once, exactly in fp32.
//!
//! The vector pipes are the limit, not memory: 46 instructions for 64 codes are 10.3 GB/s of codes in the cache of a Zen 5 core
//! at 4 GHz, which reads 30 GB/s. What was tried instead, by tables of bytes for `vpshufb`: all four bytes of an fp32,
//! exact, 11.6 GB/s, but 24 shuffles for 64 codes where many cores do one a cycle; three bytes of a fixed-point value against
//! activations in two integers, 12.5 GB/s, and an error of up to 2⁻²⁰ of a block's greatest product, with which the golden models'
//! logits move beyond their bound; two bytes against int16 activations, 21 GB/s, and an error 30 times as large.

use std::arch::x86_64::*;

use half::f16;

use super::absmax::{StripAbsmax, StripLanes};
use super::{BLOCK, BLOCK_BYTES, CODES, GROUP, GROUP_BYTES, encode_blocks, portable};
use crate::quant::cpu::{STRIP_ROWS, StripSums};

const LANES: usize = 8;
const PREFETCH_BYTES: usize = 1024;

/// # Safety
/// The machine has what [`crate::kernels::isa::Isa::Avx2`] stands for.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn encode(weights: &[f16], packed: &mut [u8], absmax: &mut [f32]) {
    encode_blocks(weights, packed, absmax);
}

/// The values of column `j` of a group for 8 rows; bit 3 of a code chooses the half of the table.
macro_rules! values {
    ($table:expr, $group:expr, $j:expr) => {{
        let (low, high) = $table;
        let index = _mm256_srli_epi32::<{ 4 * ($j ^ 1) }>($group);
        let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<{ 28 - 4 * ($j ^ 1) }>($group));
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper)
    }};
}

#[inline]
#[target_feature(enable = "avx2")]
fn table() -> (__m256, __m256) {
    // SAFETY: 16 values.
    unsafe { (_mm256_loadu_ps(CODES.as_ptr()), _mm256_loadu_ps(CODES.as_ptr().add(LANES))) }
}

/// `Σ W · x` for the rows of a strip that are whole blocks.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn dot_strip(codes: &[u8], absmax: &mut impl StripAbsmax, x: &[f32]) -> StripSums {
    let blocks = x.len() / BLOCK;
    assert_eq!(codes.len(), blocks * BLOCK_BYTES);
    let table = table();
    let mut total = [_mm256_setzero_ps(); 2];
    for block in 0..blocks {
        let mut sums = [[_mm256_setzero_ps(); 2]; 2];
        for group in 0..BLOCK / GROUP {
            absmax.decode_ahead(block, group);
            // SAFETY: a group of block `block` lies within `codes` and `x`; a prefetch may point anywhere.
            unsafe {
                let codes = codes.as_ptr().add(block * BLOCK_BYTES + group * GROUP_BYTES);
                let x = x.as_ptr().add(block * BLOCK + group * GROUP);
                _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
                let low = _mm256_loadu_si256(codes.cast());
                let high = _mm256_loadu_si256(codes.add(GROUP_BYTES / 2).cast());
                macro_rules! add {
                    ($($j:literal)*) => {$(
                        let value = _mm256_broadcast_ss(&*x.add($j));
                        let pair = &mut sums[$j % 2];
                        pair[0] = _mm256_fmadd_ps(values!(table, low, $j), value, pair[0]);
                        pair[1] = _mm256_fmadd_ps(values!(table, high, $j), value, pair[1]);
                    )*};
                }
                add!(0 1 2 3 4 5 6 7);
            }
        }
        let lanes = absmax.lanes(block);
        for (half, total) in total.iter_mut().enumerate() {
            // SAFETY: half of 16 values.
            let absmax = unsafe { _mm256_loadu_ps(lanes.as_ptr().add(half * LANES)) };
            *total = _mm256_fmadd_ps(_mm256_add_ps(sums[0][half], sums[1][half]), absmax, *total);
        }
    }
    let mut out = [0.0; STRIP_ROWS];
    for (half, total) in total.into_iter().enumerate() {
        // SAFETY: half of 16 values.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(half * LANES), total) };
    }
    out
}

/// Writes values as `[column][row]`; `absmax` is `[block of the columns][row]`.
///
/// # Safety
/// The machine has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn decode(codes: &[u8], absmax: &[StripLanes], panel: &mut [f32]) {
    const GROUP_VALUES: usize = GROUP * STRIP_ROWS;
    let table = table();
    let (groups, rest) = panel.as_chunks_mut::<GROUP_VALUES>();
    let whole = groups.len();
    for ((g, out), codes) in groups.iter_mut().enumerate().zip(codes.as_chunks::<GROUP_BYTES>().0) {
        for half in 0..2 {
            // SAFETY: halves of 16 values, of 64 bytes, and of each 16 of 8 · 16 values.
            unsafe {
                let absmax = _mm256_loadu_ps(absmax[g * GROUP / BLOCK].as_ptr().add(half * LANES));
                let group = _mm256_loadu_si256(codes.as_ptr().add(half * GROUP_BYTES / 2).cast());
                let out = out.as_mut_ptr().add(half * LANES);
                macro_rules! store {
                    ($($j:literal)*) => {$(
                        _mm256_storeu_ps(out.add($j * STRIP_ROWS), _mm256_mul_ps(values!(table, group, $j), absmax));
                    )*};
                }
                store!(0 1 2 3 4 5 6 7);
            }
        }
    }
    if !rest.is_empty() {
        portable::decode(&codes[whole * GROUP_BYTES..], &absmax[whole * GROUP / BLOCK..], rest);
    }
}
