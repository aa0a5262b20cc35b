//! Integer tiles on AVX-512 VNNI: four products a lane and instruction. The activations' bytes are codes + 128.

use std::arch::x86_64::*;

use super::{QUAD, QUAD_BYTES, Tile, TileInput};
use crate::quant::cpu::STRIP_ROWS;

/// Sums in flight for one token and strip: `vpdpbusd` takes 4 or 5 cycles and two start in each.
const SUMS: usize = 8;
/// How far ahead codes are fetched into L1; the hardware's prefetcher stops at pages.
const PREFETCH_BYTES: usize = 4096;

/// # Safety
/// The machine has AVX-512F and VNNI, and `input.check()` passed.
#[target_feature(enable = "avx512f,avx512vnni")]
pub unsafe fn multiply_tile(input: TileInput, tile: &mut Tile) {
    if (input.tokens, input.strips()) == (1, 1) {
        // SAFETY: this function's own contract.
        return unsafe { stream(input, tile) };
    }
    macro_rules! dispatch {
        ($($tokens:literal)*) => {
            match (input.tokens, input.strips()) {
                // SAFETY: as above.
                $(($tokens, 1) => unsafe { kernel::<$tokens, 1>(input, tile) },
                ($tokens, 2) => unsafe { kernel::<$tokens, 2>(input, tile) },
                ($tokens, 3) => unsafe { kernel::<$tokens, 3>(input, tile) },
                ($tokens, _) => unsafe { kernel::<$tokens, 4>(input, tile) },)*
                _ => {}
            }
        };
    }
    dispatch!(1 2 3 4 5 6)
}

/// One token and strip, as fast as the codes come.
///
/// # Safety
/// As [`multiply_tile`].
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn stream(input: TileInput, tile: &mut Tile) {
    let quads = input.padded_k / QUAD;
    let (codes, x) = (input.codes.as_ptr(), input.x.as_ptr());
    let mut sums = [_mm512_setzero_si512(); SUMS];
    let whole = quads / SUMS * SUMS;
    for first in (0..whole).step_by(SUMS) {
        for (s, sum) in sums.iter_mut().enumerate() {
            // SAFETY: quad `first + s` of the codes and of the token; a prefetch may point anywhere.
            *sum = unsafe { add_quad(codes, x, first + s, *sum) };
        }
    }
    for quad in whole..quads {
        // SAFETY: as above.
        sums[0] = unsafe { add_quad(codes, x, quad, sums[0]) };
    }
    let mut total = sums[0];
    for sum in &sums[1..] {
        total = _mm512_add_epi32(total, *sum);
    }
    // SAFETY: 16 values.
    unsafe { _mm512_storeu_si512(tile[0][0].as_mut_ptr().cast(), total) };
}

/// # Safety
/// `codes` and `x` have quad `quad`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_quad(codes: *const u8, x: *const i8, quad: usize, sum: __m512i) -> __m512i {
    // SAFETY: the caller's promise; a prefetch may point anywhere.
    unsafe {
        let codes = codes.add(quad * QUAD_BYTES);
        _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
        let x = _mm512_set1_epi32(x.add(quad * QUAD).cast::<i32>().read_unaligned());
        _mm512_dpbusd_epi32(sum, x, _mm512_loadu_si512(codes.cast()))
    }
}

/// # Safety
/// As [`multiply_tile`], for an input of `TOKENS` tokens and `STRIPS` strips.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn kernel<const TOKENS: usize, const STRIPS: usize>(input: TileInput, tile: &mut Tile) {
    let mut sums = [[_mm512_setzero_si512(); STRIPS]; TOKENS];
    let (codes, x, k) = (input.codes.as_ptr(), input.x.as_ptr(), input.padded_k);
    for quad in 0..k / QUAD {
        // SAFETY: `input.check()`: quad `quad` of every strip and token.
        unsafe {
            let mut weights = [_mm512_setzero_si512(); STRIPS];
            for (s, weights) in weights.iter_mut().enumerate() {
                *weights = _mm512_loadu_si512(codes.add(s * k * STRIP_ROWS + quad * QUAD_BYTES).cast());
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(x.add(t * k + quad * QUAD).cast::<i32>().read_unaligned());
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbusd_epi32(*sum, x, weights);
                }
            }
        }
    }
    for (out, sums) in tile.iter_mut().zip(sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            // SAFETY: 16 values.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum) };
        }
    }
}
