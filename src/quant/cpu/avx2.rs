//! Tiles on AVX2: 6 tokens times one strip are 12 accumulators of the 16 registers.

use std::arch::x86_64::*;

use super::STRIP_ROWS;
use super::panel::{PANEL_LEN, Tile, TileInput};

const TOKENS_AT_ONCE: usize = 6;
const LANES: usize = 8;

/// # Safety
/// The machine has AVX2 and FMA, and `input.check()` passed.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply_tile(input: TileInput, tile: &mut Tile) {
    for strip in 0..input.strips() {
        for first in (0..input.tokens).step_by(TOKENS_AT_ONCE) {
            // SAFETY: this function's own contract; `first` and the tokens after it are within the input.
            unsafe {
                match input.tokens - first {
                    1 => kernel::<1>(input, first, strip, tile),
                    2 => kernel::<2>(input, first, strip, tile),
                    3 => kernel::<3>(input, first, strip, tile),
                    4 => kernel::<4>(input, first, strip, tile),
                    5 => kernel::<5>(input, first, strip, tile),
                    _ => kernel::<TOKENS_AT_ONCE>(input, first, strip, tile),
                }
            }
        }
    }
}

/// # Safety
/// As [`multiply_tile`]; the input has tokens `first..first + TOKENS` and strip `strip`.
#[target_feature(enable = "avx2,fma")]
unsafe fn kernel<const TOKENS: usize>(input: TileInput, first: usize, strip: usize, tile: &mut Tile) {
    let mut sums = [[_mm256_setzero_ps(); 2]; TOKENS];
    let x = input.x[first * input.stride..].as_ptr();
    let panel = input.panels[strip * PANEL_LEN..].as_ptr();
    for column in 0..input.columns {
        // SAFETY: `input.check()`: the panel holds `columns` strips, `x` the last token's `columns` values.
        unsafe {
            let weights = panel.add(column * STRIP_ROWS);
            let (low, high) = (_mm256_loadu_ps(weights), _mm256_loadu_ps(weights.add(LANES)));
            for (t, sums) in sums.iter_mut().enumerate() {
                let value = _mm256_broadcast_ss(&*x.add(t * input.stride + column));
                sums[0] = _mm256_fmadd_ps(low, value, sums[0]);
                sums[1] = _mm256_fmadd_ps(high, value, sums[1]);
            }
        }
    }
    for (out, [low, high]) in tile.0[first..].iter_mut().zip(sums) {
        let out = &mut out[strip * STRIP_ROWS..][..STRIP_ROWS];
        // SAFETY: 16 values.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), low);
            _mm256_storeu_ps(out.as_mut_ptr().add(LANES), high);
        }
    }
}
