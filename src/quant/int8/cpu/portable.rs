//! Integer tiles in plain Rust.

use super::{QUAD, QUAD_BYTES, Tile, TileInput};
use crate::quant::cpu::STRIP_ROWS;

pub fn multiply_tile(input: TileInput, tile: &mut Tile) {
    for (t, x) in input.x.chunks_exact(input.padded_k).take(input.tokens).enumerate() {
        for (s, codes) in input.codes.chunks_exact(input.padded_k * STRIP_ROWS).enumerate() {
            let mut sums = [0i32; STRIP_ROWS];
            for (x, codes) in x.as_chunks::<QUAD>().0.iter().zip(codes.as_chunks::<QUAD_BYTES>().0) {
                for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<QUAD>().0) {
                    *sum += x.iter().zip(codes).map(|(x, w)| i32::from(*x) * i32::from(w.cast_signed())).sum::<i32>();
                }
            }
            tile[t][s] = sums;
        }
    }
}
