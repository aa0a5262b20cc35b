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
use crate::quant::cpu::{FEW_TOKENS, FewSums, STRIP_ROWS, StripSums};

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

/// Tokens that a strip is multiplied by at once: eight sums of 16 registers.
const TOKENS_AT_ONCE: usize = 4;

/// [`dot_strip`] for each token of `x`, `k` values each: a code is looked up once for four of them.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn dot_few(codes: &[u8], absmax: &mut impl StripAbsmax, x: &[f32], k: usize, sums: &mut FewSums) {
    assert_eq!(codes.len(), k / BLOCK * BLOCK_BYTES);
    // Looked up once for all, where there are more tokens than registers for them.
    let mut lanes = [[0.0; STRIP_ROWS]; MOST_BLOCKS];
    let blocks = k / BLOCK;
    let mut totals = [[[_mm256_setzero_ps(); 2]; TOKENS_AT_ONCE]; FEW_TOKENS / TOKENS_AT_ONCE];
    for first in (0..blocks).step_by(MOST_BLOCKS) {
        let some = first..(first + MOST_BLOCKS).min(blocks);
        for (block, lanes) in some.clone().zip(&mut lanes) {
            (0..BLOCK / GROUP).for_each(|group| absmax.decode_ahead(block, group));
            *lanes = absmax.lanes(block);
        }
        let codes = &codes[some.start * BLOCK_BYTES..some.end * BLOCK_BYTES];
        for (part, totals) in x.chunks(TOKENS_AT_ONCE * k).zip(&mut totals) {
            let x = &part[some.start * BLOCK..];
            // SAFETY: this function's own contract; `codes` are those of the blocks, and `x` begins at the first one's column of each token.
            unsafe {
                match part.len() / k {
                    1 => dot_tokens::<1>(codes, &lanes, x, k, totals),
                    2 => dot_tokens::<2>(codes, &lanes, x, k, totals),
                    3 => dot_tokens::<3>(codes, &lanes, x, k, totals),
                    _ => dot_tokens::<TOKENS_AT_ONCE>(codes, &lanes, x, k, totals),
                }
            }
        }
    }
    for (out, total) in sums.iter_mut().zip(totals.as_flattened()) {
        for (half, total) in total.iter().enumerate() {
            // SAFETY: half of 16 values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(half * LANES), *total) };
        }
    }
}

/// Blocks of a row whose absmax values are held on the stack: 4 KiB.
const MOST_BLOCKS: usize = 64;

/// # Safety
/// As [`dot_few`], for `TOKENS` tokens, whose values at the first code's column are `k` apart from `x` on; `lanes` has one entry a block of `codes`.
#[target_feature(enable = "avx2,fma")]
unsafe fn dot_tokens<const TOKENS: usize>(
    codes: &[u8],
    lanes: &[StripLanes],
    x: &[f32],
    k: usize,
    totals: &mut [[__m256; 2]; TOKENS_AT_ONCE],
) {
    let table = table();
    for (block, (codes, lanes)) in codes.chunks_exact(BLOCK_BYTES).zip(lanes).enumerate() {
        let mut sums = [[_mm256_setzero_ps(); 2]; TOKENS];
        for group in 0..BLOCK / GROUP {
            // SAFETY: a group of the block lies within its codes and each token; a prefetch may point anywhere.
            unsafe {
                let codes = codes.as_ptr().add(group * GROUP_BYTES);
                let x = x.as_ptr().add(block * BLOCK + group * GROUP);
                _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
                let low = _mm256_loadu_si256(codes.cast());
                let high = _mm256_loadu_si256(codes.add(GROUP_BYTES / 2).cast());
                macro_rules! add {
                    ($($j:literal)*) => {$(
                        let upper = values!(table, high, $j);
                        let lower = values!(table, low, $j);
                        for (t, sums) in sums.iter_mut().enumerate() {
                            let value = _mm256_broadcast_ss(&*x.add(t * k + $j));
                            sums[0] = _mm256_fmadd_ps(lower, value, sums[0]);
                            sums[1] = _mm256_fmadd_ps(upper, value, sums[1]);
                        }
                    )*};
                }
                add!(0 1 2 3 4 5 6 7);
            }
        }
        for half in 0..2 {
            // SAFETY: half of 16 values.
            let absmax = unsafe { _mm256_loadu_ps(lanes.as_ptr().add(half * LANES)) };
            for (total, sums) in totals.iter_mut().zip(sums) {
                total[half] = _mm256_fmadd_ps(sums[half], absmax, total[half]);
            }
        }
    }
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
