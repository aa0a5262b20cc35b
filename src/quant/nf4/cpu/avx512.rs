//! NF4 on AVX-512: `vpermps` looks 16 codes up at once, one of each row of the strip, exactly in fp32.

use std::arch::x86_64::*;

use half::f16;

use super::absmax::{StripAbsmax, StripLanes};
use super::{BLOCK, BLOCK_BYTES, BLOCK_GROUPS, CODES, GROUP, GROUP_BYTES, SLACK, encode_blocks, portable};
use crate::quant::cpu::{FewSums, STRIP_ROWS, StripSums};

/// Sums in flight: one for each column of a group. With four, an FMA would wait for the one before it.
const SUMS: usize = GROUP;
/// How far ahead codes are fetched into L1: the hardware's prefetcher stops at pages.
const PREFETCH_BYTES: usize = 4096;

/// # Safety
/// The machine has what [`crate::kernels::isa::Isa::Avx512`] stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
pub unsafe fn encode(weights: &[f16], packed: &mut [u8], absmax: &mut [f32]) {
    encode_blocks(weights, packed, absmax);
}

/// The values of column `j` of a group.
macro_rules! values {
    ($table:expr, $group:expr, $j:expr) => {
        _mm512_permutexvar_ps(_mm512_srli_epi32::<{ 4 * ($j ^ 1) }>($group), $table)
    };
}

/// `Σ W · x` for the rows of a strip that are whole blocks. `codes` end with [`SLACK`].
///
/// Two pipes do the shifts, the look-ups and the sums; loads are free beside them. So each byte of a lane is brought down by a load of its own
/// (which crosses a cache line), and only the upper codes are shifted: 20 instructions for 128 weights instead of 23.
///
/// # Safety
/// The machine has AVX-512F.
#[target_feature(enable = "avx512f")]
pub unsafe fn dot_strip(codes: &[u8], absmax: &mut impl StripAbsmax, x: &[f32]) -> StripSums {
    let blocks = x.len() / BLOCK;
    assert_eq!(codes.len(), blocks * BLOCK_BYTES + SLACK);
    // SAFETY: 16 values.
    let table = unsafe { _mm512_loadu_ps(CODES.as_ptr()) };
    // Unknown to the compiler, or it unrolls the block: 64 long instructions more miss the decoded-instruction cache, which
    // cost a fifth of the rate on Zen 5.
    let groups = std::hint::black_box(BLOCK_GROUPS).min(BLOCK_GROUPS);
    let mut total = _mm512_setzero_ps();
    for block in 0..blocks {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for group in 0..groups {
            absmax.decode_ahead(block, group);
            // SAFETY: a group of block `block` and `SLACK` lie within `codes`, its columns in `x`; a prefetch may point anywhere.
            unsafe {
                let codes = codes.as_ptr().add(block * BLOCK_BYTES + group * GROUP_BYTES);
                let x = x.as_ptr().add(block * BLOCK + group * GROUP);
                _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
                macro_rules! add {
                    ($($byte:literal)*) => {$(
                        let (even, odd) = (2 * $byte, 2 * $byte + 1);
                        let pairs = _mm512_loadu_si512(codes.add($byte).cast());
                        let value = _mm512_set1_ps(*x.add(odd));
                        sums[odd] = _mm512_fmadd_ps(_mm512_permutexvar_ps(pairs, table), value, sums[odd]);
                        let (pairs, value) = (_mm512_srli_epi32::<4>(pairs), _mm512_set1_ps(*x.add(even)));
                        sums[even] = _mm512_fmadd_ps(_mm512_permutexvar_ps(pairs, table), value, sums[even]);
                    )*};
                }
                add!(0 1 2 3);
            }
        }
        let [a, b, c, d, e, f, g, h] = sums;
        let low = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
        let sum = _mm512_add_ps(low, _mm512_add_ps(_mm512_add_ps(e, f), _mm512_add_ps(g, h)));
        // SAFETY: 16 values.
        total = _mm512_fmadd_ps(sum, unsafe { _mm512_loadu_ps(absmax.lanes(block).as_ptr()) }, total);
    }
    let mut out = [0.0; STRIP_ROWS];
    // SAFETY: 16 values.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
    out
}

/// [`dot_strip`] for each token of `x`, `k` values each: a code is looked up once for all of them.
///
/// # Safety
/// The machine has AVX-512F.
#[target_feature(enable = "avx512f")]
pub unsafe fn dot_few(codes: &[u8], absmax: &mut impl StripAbsmax, x: &[f32], k: usize, sums: &mut FewSums) {
    assert_eq!(codes.len(), k / BLOCK * BLOCK_BYTES + SLACK);
    macro_rules! dispatch {
        ($($tokens:literal by $sums:literal),*) => {
            match x.len() / k {
                // SAFETY: this function's own contract; `codes` hold `k` columns and `x` as many values of each token.
                $($tokens => unsafe { dot_tokens::<$tokens, $sums>(codes, absmax, x, k, sums) },)*
                tokens => assert_eq!(tokens, 0, "more tokens than a kernel takes"),
            }
        };
    }
    // At least eight sums in flight: an FMA takes four cycles and two start in each.
    dispatch!(1 by 8, 2 by 4, 3 by 4, 4 by 2, 5 by 2, 6 by 2, 7 by 2, 8 by 2)
}

/// # Safety
/// As [`dot_few`], for `TOKENS` tokens.
#[target_feature(enable = "avx512f")]
unsafe fn dot_tokens<const TOKENS: usize, const EACH: usize>(
    codes: &[u8],
    absmax: &mut impl StripAbsmax,
    x: &[f32],
    k: usize,
    out: &mut FewSums,
) {
    // SAFETY: 16 values.
    let table = unsafe { _mm512_loadu_ps(CODES.as_ptr()) };
    let mut totals = [_mm512_setzero_ps(); TOKENS];
    for block in 0..k / BLOCK {
        let mut sums = [[_mm512_setzero_ps(); EACH]; TOKENS];
        for group in 0..BLOCK_GROUPS {
            absmax.decode_ahead(block, group);
            // SAFETY: a group of block `block` and `SLACK` lie within `codes`, its columns in each token; a prefetch may point anywhere.
            unsafe {
                let codes = codes.as_ptr().add(block * BLOCK_BYTES + group * GROUP_BYTES);
                let x = x.as_ptr().add(block * BLOCK + group * GROUP);
                _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
                macro_rules! add {
                    ($($byte:literal)*) => {$(
                        let (even, odd) = (2 * $byte, 2 * $byte + 1);
                        let pairs = _mm512_loadu_si512(codes.add($byte).cast());
                        let weights = _mm512_permutexvar_ps(pairs, table);
                        for (t, sums) in sums.iter_mut().enumerate() {
                            let value = _mm512_set1_ps(*x.add(t * k + odd));
                            sums[odd % EACH] = _mm512_fmadd_ps(weights, value, sums[odd % EACH]);
                        }
                        let weights = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(pairs), table);
                        for (t, sums) in sums.iter_mut().enumerate() {
                            let value = _mm512_set1_ps(*x.add(t * k + even));
                            sums[even % EACH] = _mm512_fmadd_ps(weights, value, sums[even % EACH]);
                        }
                    )*};
                }
                add!(0 1 2 3);
            }
        }
        // SAFETY: 16 values.
        let lanes = unsafe { _mm512_loadu_ps(absmax.lanes(block).as_ptr()) };
        for (total, sums) in totals.iter_mut().zip(sums) {
            let sum = sums[1..].iter().fold(sums[0], |sum, part| _mm512_add_ps(sum, *part));
            *total = _mm512_fmadd_ps(sum, lanes, *total);
        }
    }
    for (out, total) in out.iter_mut().zip(totals) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
    }
}

/// Writes values as `[column][row]`; `absmax` is `[block of the columns][row]`.
///
/// # Safety
/// The machine has AVX-512F.
#[target_feature(enable = "avx512f")]
pub unsafe fn decode(codes: &[u8], absmax: &[StripLanes], panel: &mut [f32]) {
    const GROUP_VALUES: usize = GROUP * STRIP_ROWS;
    // SAFETY: 16 values.
    let table = unsafe { _mm512_loadu_ps(CODES.as_ptr()) };
    let (groups, rest) = panel.as_chunks_mut::<GROUP_VALUES>();
    let whole = groups.len();
    for ((g, out), codes) in groups.iter_mut().enumerate().zip(codes.as_chunks::<GROUP_BYTES>().0) {
        // SAFETY: 16 values, 64 bytes, and 8 · 16 values.
        unsafe {
            let absmax = _mm512_loadu_ps(absmax[g * GROUP / BLOCK].as_ptr());
            let group = _mm512_loadu_si512(codes.as_ptr().cast());
            let out = out.as_mut_ptr();
            macro_rules! store {
                ($($j:literal)*) => {$(
                    _mm512_storeu_ps(out.add($j * STRIP_ROWS), _mm512_mul_ps(values!(table, group, $j), absmax));
                )*};
            }
            store!(0 1 2 3 4 5 6 7);
        }
    }
    if !rest.is_empty() {
        portable::decode(&codes[whole * GROUP_BYTES..], &absmax[whole * GROUP / BLOCK..], rest);
    }
}
