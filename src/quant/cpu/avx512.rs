//! Tiles on AVX-512: 12 tokens times two strips are 24 accumulators of the 32 registers.

use std::arch::x86_64::*;

use super::STRIP_ROWS;
use super::panel::{PANEL_LEN, Tile, TileInput};

/// # Safety
/// The machine has AVX-512F and `input.check()` passed.
#[target_feature(enable = "avx512f")]
pub unsafe fn multiply_tile(input: TileInput, tile: &mut Tile) {
    macro_rules! dispatch {
        ($($tokens:literal)*) => {
            match (input.tokens, input.strips()) {
                // SAFETY: this function's own contract.
                $(($tokens, 1) => unsafe { kernel::<$tokens, 1>(input, tile) },
                ($tokens, _) => unsafe { kernel::<$tokens, 2>(input, tile) },)*
                _ => {}
            }
        };
    }
    dispatch!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// # Safety
/// As [`multiply_tile`], for an input of `TOKENS` tokens and `STRIPS` strips.
#[target_feature(enable = "avx512f")]
unsafe fn kernel<const TOKENS: usize, const STRIPS: usize>(input: TileInput, tile: &mut Tile) {
    let mut sums = [[_mm512_setzero_ps(); STRIPS]; TOKENS];
    let (x, panels) = (input.x.as_ptr(), input.panels.as_ptr());
    for column in 0..input.columns {
        // SAFETY: `input.check()`: panels hold `STRIPS` panels, `x` the last token's `columns` values.
        unsafe {
            let mut weights = [_mm512_setzero_ps(); STRIPS];
            for (s, weights) in weights.iter_mut().enumerate() {
                *weights = _mm512_loadu_ps(panels.add(s * PANEL_LEN + column * STRIP_ROWS));
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*x.add(t * input.stride + column));
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_fmadd_ps(weights, value, *sum);
                }
            }
        }
    }
    for (out, sums) in tile.0.iter_mut().zip(sums) {
        for (s, sum) in sums.into_iter().enumerate() {
            // SAFETY: a row of the tile holds two strips.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(s * STRIP_ROWS), sum) };
        }
    }
}
