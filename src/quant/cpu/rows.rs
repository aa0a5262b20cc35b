//! Matrices whose rows are decoded to fp32 piece by piece, in the first-level cache, and multiplied there by dense kernels: right for every
//! format and every instruction set, and fast where a row's product with one token has a kernel of its own.

use std::ops::Range;

use super::super::Activations;
use super::super::dense::cpu as dense;
use super::panel::{self, PANEL_COLUMNS, PanelSource, Start};
use super::{STRIP_ROWS, strips, write_strip};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// Values decoded at once: 4 KiB, some panels.
pub const PIECE: usize = 4 * PANEL_COLUMNS;

/// A matrix that decodes its rows.
pub trait DecodeRows: Send + Sync {
    /// Checked: this machine has it.
    fn isa(&self) -> Isa;

    /// `(n, k)`.
    fn shape(&self) -> (usize, usize);

    /// Decodes `columns` of a row, which begin at a multiple of [`PANEL_COLUMNS`] and end at one or at the row's end.
    fn decode(&self, row: usize, columns: Range<usize>, values: &mut [f32]);

    /// `Σ row · x` for `x` `[k]`.
    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        decoded_dot(self, row, x)
    }
}

/// `Σ row · x`, decoded piece by piece.
pub fn decoded_dot<D: DecodeRows + ?Sized>(matrix: &D, row: usize, x: &[f32]) -> f32 {
    let mut piece = [0.0f32; PIECE];
    let mut sum = 0.0;
    for (at, x) in x.chunks(PIECE).enumerate() {
        let values = &mut piece[..x.len()];
        matrix.decode(row, at * PIECE..at * PIECE + x.len(), values);
        sum += dense::dot::<f32>(matrix.isa(), values, x);
    }
    sum
}

/// A matrix as the panels of a product with several tokens.
struct Panels<'a, D: ?Sized>(&'a D);

impl<D: DecodeRows + ?Sized> PanelSource for Panels<'_, D> {
    fn isa(&self) -> Isa {
        self.0.isa()
    }

    fn shape(&self) -> (usize, usize) {
        self.0.shape()
    }

    fn decode_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]) {
        let (n, _) = self.0.shape();
        let mut rows = [[0.0f32; PANEL_COLUMNS]; STRIP_ROWS];
        for (r, values) in rows.iter_mut().enumerate() {
            // The last row stands in for those that are missing.
            let row = (strip * STRIP_ROWS + r).min(n - 1);
            self.0.decode(row, columns.clone(), &mut values[..columns.len()]);
        }
        dense::transpose::<f32>(self.0.isa(), rows.each_ref().map(|row| &row[..columns.len()]), panel);
    }
}

/// Dequantized rows, as [`super::super::CpuMatrix::dequantize_rows`] gives them.
pub fn dequantize<D: DecodeRows + ?Sized>(matrix: &D, rows: Range<usize>, out: &mut [f32]) {
    let (_, k) = matrix.shape();
    rows.zip(out.chunks_exact_mut(k)).for_each(|(row, out)| matrix.decode(row, 0..k, out));
}

/// The product of [`super::super::CpuMatrix::multiply`].
pub fn multiply<D: DecodeRows + ?Sized>(
    matrix: &D,
    x: Activations,
    rows: Range<usize>,
    bias: Option<&[f32]>,
    y: &SharedSlice<'_, f32>,
    scratch: &mut Vec<f32>,
) {
    if x.m > 1 {
        return panel::multiply(&Panels(matrix), x.f32s, x.m, rows, Start::Bias(bias), y, scratch);
    }
    let (n, _) = matrix.shape();
    for strip in strips(&rows) {
        let sums = std::array::from_fn(|r| matrix.dot((strip * STRIP_ROWS + r).min(n - 1), x.f32s));
        write_strip(&sums, strip, &rows, bias, 0, y);
    }
}
