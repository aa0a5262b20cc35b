//! NF4 in plain Rust.

use super::absmax::{StripAbsmax, StripLanes};
use super::{BLOCK, BLOCK_BYTES, CODES, GROUP, GROUP_BYTES};
use crate::quant::cpu::{FEW_TOKENS, FewSums, STRIP_ROWS, StripSums};

/// The value of column `j` of a group for a row.
#[inline(always)]
fn value(group: &[u8; GROUP_BYTES], row: usize, j: usize) -> f32 {
    let byte = group[row * 4 + j / 2];
    CODES[usize::from(if j.is_multiple_of(2) { byte >> 4 } else { byte & 0xf })]
}

/// `Σ W · x` for the rows of a strip that are whole blocks.
pub fn dot_strip(codes: &[u8], absmax: &mut impl StripAbsmax, x: &[f32]) -> StripSums {
    let mut total = [0.0; STRIP_ROWS];
    for (block, (codes, x)) in codes.chunks_exact(BLOCK_BYTES).zip(x.chunks_exact(BLOCK)).enumerate() {
        let mut sums = [0.0f32; STRIP_ROWS];
        for (g, (group, x)) in codes.as_chunks::<GROUP_BYTES>().0.iter().zip(x.as_chunks::<GROUP>().0).enumerate() {
            absmax.decode_ahead(block, g);
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum += x.iter().enumerate().map(|(j, x)| value(group, row, j) * x).sum::<f32>();
            }
        }
        let lanes = absmax.lanes(block);
        total.iter_mut().zip(sums).zip(lanes).for_each(|((total, sum), absmax)| *total += sum * absmax);
    }
    total
}

/// [`dot_strip`] for each token of `x`, `k` values each.
pub fn dot_few(codes: &[u8], absmax: &mut impl StripAbsmax, x: &[f32], k: usize, sums: &mut FewSums) {
    let mut totals = [[0.0f32; STRIP_ROWS]; FEW_TOKENS];
    for (block, codes) in codes.chunks_exact(BLOCK_BYTES).enumerate() {
        let mut of_block = [[0.0f32; STRIP_ROWS]; FEW_TOKENS];
        for (g, group) in codes.as_chunks::<GROUP_BYTES>().0.iter().enumerate() {
            absmax.decode_ahead(block, g);
            for row in 0..STRIP_ROWS {
                let values: [f32; GROUP] = std::array::from_fn(|j| value(group, row, j));
                for (sums, x) in of_block.iter_mut().zip(x.chunks_exact(k)) {
                    let x = &x[block * BLOCK + g * GROUP..][..GROUP];
                    sums[row] += values.iter().zip(x).map(|(value, x)| value * x).sum::<f32>();
                }
            }
        }
        let lanes = absmax.lanes(block);
        for (totals, sums) in totals.iter_mut().zip(of_block) {
            totals.iter_mut().zip(sums).zip(lanes).for_each(|((total, sum), absmax)| *total += sum * absmax);
        }
    }
    *sums = totals;
}

/// Writes values as `[column][row]`; `absmax` is `[block of the columns][row]`.
pub fn decode(codes: &[u8], absmax: &[StripLanes], panel: &mut [f32]) {
    let groups = codes.as_chunks::<GROUP_BYTES>().0;
    for (column, lanes) in panel.as_chunks_mut::<STRIP_ROWS>().0.iter_mut().enumerate() {
        for ((row, lane), absmax) in lanes.iter_mut().enumerate().zip(absmax[column / BLOCK]) {
            *lane = value(&groups[column / GROUP], row, column % GROUP) * absmax;
        }
    }
}
