//! What the CPU kernels of all formats share: their strips and the multiplication for many tokens.
//!
//! Kernels walk strips: 16 consecutive rows of a matrix, one row for each lane of a 512-bit register, so that a sum over
//! the columns ends in registers that hold one output each.

pub mod panel;
pub mod rows;

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// Rows that a kernel computes at once.
pub const STRIP_ROWS: usize = 16;

/// One output for each row of a strip.
pub type StripSums = [f32; STRIP_ROWS];

/// Tokens that a strip is multiplied by while each of its weights is in a register, at most. More pass over panels.
pub const FEW_TOKENS: usize = 8;

/// Outputs of a strip for up to [`FEW_TOKENS`] tokens.
pub type FewSums = [StripSums; FEW_TOKENS];

/// `isa`, after the check that lets kernels be called for it without another.
///
/// # Panics
/// If this machine lacks it: callers choose from [`Isa::available`].
pub fn checked(isa: Isa) -> Isa {
    assert!(isa <= Isa::detect(), "kernels for {} on a machine that has {}", isa.name(), Isa::detect().name());
    isa
}

/// The strips that cover `rows`, which start at a strip and end at one or at the last row. None of no rows, which a thread has where
/// threads are more than strips.
pub fn strips(rows: &Range<usize>) -> Range<usize> {
    if rows.is_empty() {
        return 0..0;
    }
    assert!(rows.start.is_multiple_of(STRIP_ROWS), "rows {rows:?} start inside a strip");
    rows.start / STRIP_ROWS..rows.end.div_ceil(STRIP_ROWS)
}

/// Writes `sums + bias` to those outputs of one token that lie within `rows`. `token` is where its outputs begin in `y`.
pub fn write_strip(
    sums: &StripSums,
    strip: usize,
    rows: &Range<usize>,
    bias: Option<&[f32]>,
    token: usize,
    y: &SharedSlice<'_, f32>,
) {
    let first = strip * STRIP_ROWS;
    let end = (first + STRIP_ROWS).min(rows.end);
    // SAFETY: `CpuMatrix::multiply`'s caller gives `rows` to one thread only.
    let out = unsafe { y.range_mut(token + first..token + end) };
    match bias {
        Some(bias) => out.iter_mut().zip(sums).zip(&bias[first..end]).for_each(|((y, sum), bias)| *y = sum + bias),
        None => out.copy_from_slice(&sums[..end - first]),
    }
}

/// [`write_strip`] for each of `tokens` tokens, whose outputs are `n` apart.
pub fn write_few(
    sums: &FewSums,
    tokens: usize,
    (strip, rows): (usize, &Range<usize>),
    bias: Option<&[f32]>,
    n: usize,
    y: &SharedSlice<'_, f32>,
) {
    (0..tokens).zip(sums).for_each(|(token, sums)| write_strip(sums, strip, rows, bias, token * n, y));
}

/// The first `len` values of `scratch`, grown once.
pub fn grown(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}
