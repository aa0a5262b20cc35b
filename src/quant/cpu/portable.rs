//! Tiles in plain Rust; loops of 16 that the compiler turns into whatever vectors the target has.

use super::STRIP_ROWS;
use super::panel::{PANEL_LEN, Tile, TileInput};

pub fn multiply_tile(input: TileInput, tile: &mut Tile) {
    for (s, panel) in input.panels.chunks_exact(PANEL_LEN).enumerate() {
        for (t, out) in tile.0[..input.tokens].iter_mut().enumerate() {
            let x = &input.x[t * input.stride..][..input.columns];
            let mut sums = [0.0f32; STRIP_ROWS];
            for (x, weights) in x.iter().zip(panel.as_chunks::<STRIP_ROWS>().0) {
                sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight * x);
            }
            out[s * STRIP_ROWS..][..STRIP_ROWS].copy_from_slice(&sums);
        }
    }
}
