//! fp16 on the CPU: rows as they are, converted in registers.

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Fp16Stored, NAME};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;
use crate::quant::cpu::memory::WeightBytes;
use crate::quant::cpu::panel::{self, PanelSource, Start};
use crate::quant::cpu::{STRIP_ROWS, checked, strips, write_strip};
use crate::quant::{CpuMatrix, HalfMatrix, Prepared, Stored};

/// Row-major fp16 in huge pages. Rows are long and read in order, which is all that the prefetcher needs; embedding rows
/// stay one read.
pub struct Fp16Matrix {
    n: usize,
    k: usize,
    isa: Isa,
    weights: WeightBytes,
}

impl Fp16Matrix {
    pub fn new(weight: &HalfMatrix, isa: Isa) -> Self {
        let mut weights = WeightBytes::zeroed(size_of_val(&weight.data[..]));
        weights.as_f16s_mut().copy_from_slice(&weight.data);
        Self { n: weight.n, k: weight.k, isa: checked(isa), weights }
    }

    fn row(&self, row: usize) -> &[f16] {
        &self.weights.as_f16s()[row * self.k..][..self.k]
    }

    /// The rows of a strip; the last row stands in for those that are missing.
    fn strip_rows(&self, strip: usize) -> [&[f16]; STRIP_ROWS] {
        std::array::from_fn(|r| self.row((strip * STRIP_ROWS + r).min(self.n - 1)))
    }

    /// `x` is `[k]`.
    fn dot(&self, row: &[f16], x: &[f32]) -> f32 {
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::dot(row, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::dot(row, x) },
            _ => portable::dot(row, x),
        }
    }
}

impl PanelSource for Fp16Matrix {
    fn isa(&self) -> Isa {
        self.isa
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn decode_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]) {
        let rows = self.strip_rows(strip).map(|row| &row[columns.clone()]);
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::transpose(rows, panel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::transpose(rows, panel) },
            _ => portable::transpose(&rows, 0, panel),
        }
    }
}

impl CpuMatrix for Fp16Matrix {
    fn format(&self) -> &'static str {
        NAME
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.weights.len()
    }

    fn resident_bytes(&self) -> usize {
        self.weights.len()
    }

    fn unpack(&self) -> Box<dyn Stored> {
        let data = self.weights.as_f16s().to_vec();
        Box::new(Fp16Stored { weight: HalfMatrix { n: self.n, k: self.k, data } })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.weights.as_f16s()[rows.start * self.k..rows.end * self.k].convert_to_f32_slice(out);
    }

    fn prepare(&self, x: &[f32], m: usize, prepared: &mut Prepared) {
        prepared.copy(x, m, self.k);
    }

    fn row_granule(&self) -> usize {
        STRIP_ROWS
    }

    fn multiply(
        &self,
        x: &Prepared,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        y: &SharedSlice<'_, f32>,
        scratch: &mut Vec<f32>,
    ) {
        if x.m > 1 {
            return panel::multiply(self, &x.f32s, x.m, rows, Start::Bias(bias), y, scratch);
        }
        for strip in strips(&rows) {
            let sums = self.strip_rows(strip).map(|row| self.dot(row, &x.f32s));
            write_strip(&sums, strip, &rows, bias, 0, y);
        }
    }
}
