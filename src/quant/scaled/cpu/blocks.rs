//! What the kernels of all instruction sets share: blocks of 32 codes, and which matrices are made of them.

use super::super::Scaling;
use super::super::codes::{Meaning, nibble};
use super::super::scales::Groups;
use crate::kernels::isa::Isa;

/// Codes that kernels take at once.
pub const BLOCK: usize = 32;
/// A smaller group that they know: one for each half.
pub const HALF: usize = BLOCK / 2;

/// Groups of a row that a table on the stack holds.
pub const MOST_LISTED: usize = 512;

/// How the kernels run a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaledKernel {
    /// In whole blocks: no group begins or ends inside of one, but for halves, and no code of 8 bits is NaN.
    Blocks,
    /// By a table of a row's groups, from which each value takes its own.
    Listed,
}

/// The kernel of `isa` for a matrix; `None` for the plain decoder.
pub fn kernel(isa: Isa, scaling: &Scaling, bytes: &[u8]) -> Option<ScaledKernel> {
    if !matches!(isa, Isa::Avx512 | Isa::Avx2) {
        return None;
    }
    let is_e4m3 = matches!(scaling.meaning, Meaning::E4m3);
    let has_nan = || is_e4m3 && bytes.iter().any(|code| code & 0x7f == 0x7f);
    let blocks = |is_cut: bool| (is_cut && !has_nan()).then_some(ScaledKernel::Blocks);
    match &scaling.groups {
        Groups::Tiles { columns, .. } => {
            blocks(columns.is_multiple_of(BLOCK) || *columns == HALF || *columns >= scaling.k)
        }
        Groups::Runs(length) => blocks(length.is_multiple_of(BLOCK) && scaling.k.is_multiple_of(BLOCK)),
        Groups::Listed { count, .. } => {
            let is_run = isa == Isa::Avx512 && *count <= MOST_LISTED && !is_e4m3;
            is_run.then_some(ScaledKernel::Listed)
        }
    }
}

/// Puts the nibbles of each whole block of a row into the order of the kernels.
pub fn split(row: &mut [u8]) {
    for block in row.as_chunks_mut::<HALF>().0 {
        let plain = *block;
        for (at, byte) in block.iter_mut().enumerate() {
            *byte = nibble(&plain, at) | nibble(&plain, at + HALF) << 4;
        }
    }
}

/// Undoes [`split`].
pub fn joined(row: &mut [u8]) {
    for block in row.as_chunks_mut::<HALF>().0 {
        let split = *block;
        let code = |at: usize| if at < HALF { split[at] & 15 } else { split[at - HALF] >> 4 };
        for (at, byte) in block.iter_mut().enumerate() {
            *byte = code(2 * at) | code(2 * at + 1) << 4;
        }
    }
}

/// Scale and zero of a group.
#[cfg(target_arch = "x86_64")]
pub fn factors(scaling: &Scaling, group: usize) -> (f32, f32) {
    let zero = scaling.zeros.as_ref().map_or(0.0, |zeros| f32::from(zeros.get(group)));
    (scaling.scales.get(group), zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_was_split_is_joined_again() {
        // A block and a tail, which stays as it is.
        let plain: Vec<u8> = (0..19).map(|i| 13 * i + 7).collect();
        let mut row = plain.clone();
        split(&mut row);
        assert!(row[..16] != plain[..16] && row[16..] == plain[16..]);
        assert_eq!((row[0] & 15, row[0] >> 4), (plain[0] & 15, plain[8] & 15));
        joined(&mut row);
        assert_eq!(row, plain);
    }
}
