//! Integer tiles on AVX2. `vpmaddubsw` multiplies unsigned by signed bytes: the activation's magnitude by the weight under
//! the activation's sign. A pair is at most 2 · 127² = 32258, so that 16 bits never saturate.

use std::arch::x86_64::*;

use super::{QUAD, QUAD_BYTES, Tile, TileInput};
use crate::quant::cpu::STRIP_ROWS;

const LANES: usize = 8;
const TOKENS_AT_ONCE: usize = 3;
const PREFETCH_BYTES: usize = 4096;

/// # Safety
/// The machine has AVX2, and `input.check()` passed.
#[target_feature(enable = "avx2")]
pub unsafe fn multiply_tile(input: TileInput, tile: &mut Tile) {
    for strip in 0..input.strips() {
        for first in (0..input.tokens).step_by(TOKENS_AT_ONCE) {
            // SAFETY: this function's own contract; `first` and the tokens after it are within the input.
            unsafe {
                match input.tokens - first {
                    1 => kernel::<1>(input, first, strip, tile),
                    2 => kernel::<2>(input, first, strip, tile),
                    _ => kernel::<TOKENS_AT_ONCE>(input, first, strip, tile),
                }
            }
        }
    }
}

/// # Safety
/// As [`multiply_tile`]; the input has tokens `first..first + TOKENS` and strip `strip`.
#[target_feature(enable = "avx2")]
unsafe fn kernel<const TOKENS: usize>(input: TileInput, first: usize, strip: usize, tile: &mut Tile) {
    let k = input.padded_k;
    let codes = input.codes[strip * k * STRIP_ROWS..].as_ptr();
    let x = input.x[first * k..].as_ptr();
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_si256(); 2]; TOKENS];
    for quad in 0..k / QUAD {
        // SAFETY: `input.check()`: quad `quad` of the strip and of every token; a prefetch may point anywhere.
        unsafe {
            let codes = codes.add(quad * QUAD_BYTES);
            _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_BYTES).cast());
            let weights = [_mm256_loadu_si256(codes.cast()), _mm256_loadu_si256(codes.add(QUAD_BYTES / 2).cast())];
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_epi32(x.add(t * k + quad * QUAD).cast::<i32>().read_unaligned());
                let magnitude = _mm256_abs_epi8(x);
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(weights, x));
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    for (out, sums) in tile[first..].iter_mut().zip(sums) {
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: half of 16 values.
            unsafe { _mm256_storeu_si256(out[strip].as_mut_ptr().add(half * LANES).cast(), sum) };
        }
    }
}
