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

/// The outlier columns of a strip.
#[derive(Clone, Copy)]
pub struct StripOutliers<'a> {
    /// `[quad][row][4]`
    pub codes: &'a [u8],
    pub absmax: &'a [f32; STRIP_ROWS],
    pub columns: &'a [u32],
    /// The token's activation in each of the columns.
    pub values: &'a [f32],
}

impl StripOutliers<'_> {
    /// `sums[row] += weight[row, column] * value` for all columns in their order; `isa` is checked.
    pub fn add_to(self, sums: &mut [f32; STRIP_ROWS], isa: Isa) {
        match isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { x86::add_avx512(self, sums) },
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { x86::add_avx2(self, sums) },
            _ => self.add(sums),
        }
    }

    /// What [`Self::add_to`] does, compiled for each instruction set.
    #[inline(always)]
    fn add(self, sums: &mut [f32; STRIP_ROWS]) {
        let mut total = *sums;
        for (column, value) in self.columns.iter().zip(self.values) {
            let weights = weights(self.codes, *column as usize, self.absmax);
            for row in 0..STRIP_ROWS {
                total[row] += weights[row] * value;
            }
        }
        *sums = total;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{STRIP_ROWS, StripOutliers};

    #[target_feature(enable = "avx512f")]
    pub fn add_avx512(outliers: StripOutliers, sums: &mut [f32; STRIP_ROWS]) {
        outliers.add(sums);
    }

    #[target_feature(enable = "avx2")]
    pub fn add_avx2(outliers: StripOutliers, sums: &mut [f32; STRIP_ROWS]) {
        outliers.add(sums);
    }
}
