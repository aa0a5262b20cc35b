//! Outlier columns of one token: dequantized weights of a strip times the activations as they were.

use super::{CODE_UNIT, QUAD, QUAD_BYTES};
use crate::kernels::isa::Isa;
use crate::quant::cpu::STRIP_ROWS;

/// Dequantized weights of a column, one for each row of a strip, whose `codes` are `[quad][row][4]`.
#[inline(always)]
pub fn weights(codes: &[u8], column: usize, absmax: &[f32; STRIP_ROWS]) -> [f32; STRIP_ROWS] {
    let quads: &[[u8; QUAD]; STRIP_ROWS] =
        codes[column / QUAD * QUAD_BYTES..].as_chunks().0.as_chunks().0.first().expect("a quad of the strip");
    // A row's four codes are one word, whose shifts take the code to its top and back with its sign.
    let shift = 24 - 8 * (column % QUAD) as u32;
    std::array::from_fn(|row| (i32::from_le_bytes(quads[row]) << shift >> 24) as f32 * absmax[row] * CODE_UNIT)
}

/// `sums[row] += weight[row, column] * value` for all columns in their order; `isa` is checked.
pub fn add(
    codes: &[u8],
    columns: &[u32],
    values: &[f32],
    absmax: &[f32; STRIP_ROWS],
    isa: Isa,
    sums: &mut [f32; STRIP_ROWS],
) {
    match isa {
        // SAFETY: the instruction set is checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::add_avx512(codes, columns, values, absmax, sums) },
        // SAFETY: the instruction set is checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::add_avx2(codes, columns, values, absmax, sums) },
        _ => add_columns(codes, columns, values, absmax, sums),
    }
}

/// What [`add`] does, compiled for each instruction set.
#[inline(always)]
fn add_columns(
    codes: &[u8],
    columns: &[u32],
    values: &[f32],
    absmax: &[f32; STRIP_ROWS],
    sums: &mut [f32; STRIP_ROWS],
) {
    let mut total = *sums;
    for (column, value) in columns.iter().zip(values) {
        let weights = weights(codes, *column as usize, absmax);
        for row in 0..STRIP_ROWS {
            total[row] += weights[row] * value;
        }
    }
    *sums = total;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{STRIP_ROWS, add_columns};

    #[target_feature(enable = "avx512f")]
    pub fn add_avx512(
        codes: &[u8],
        columns: &[u32],
        values: &[f32],
        absmax: &[f32; STRIP_ROWS],
        sums: &mut [f32; STRIP_ROWS],
    ) {
        add_columns(codes, columns, values, absmax, sums);
    }

    #[target_feature(enable = "avx2")]
    pub fn add_avx2(
        codes: &[u8],
        columns: &[u32],
        values: &[f32],
        absmax: &[f32; STRIP_ROWS],
        sums: &mut [f32; STRIP_ROWS],
    ) {
        add_columns(codes, columns, values, absmax, sums);
    }
}
