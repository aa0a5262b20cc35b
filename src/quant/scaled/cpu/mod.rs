//! Scaled codes on the CPU: rows as they are stored, decoded piece by piece.

use std::ops::Range;

use super::super::cpu::rows::{self, DecodeRows};
use super::super::cpu::{STRIP_ROWS, checked};
use super::super::{Activations, CpuMatrix, FormatId, Stored};
use super::{ScaledStored, Scaling};
use crate::kernels::cpu::pages::Pages;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// Codes in huge pages, scales beside them.
pub struct ScaledMatrix {
    scaling: Scaling,
    isa: Isa,
    codes: Pages,
}

impl ScaledMatrix {
    pub fn new(ScaledStored { scaling, bytes }: ScaledStored, isa: Isa) -> Self {
        let mut codes = Pages::required(bytes.len());
        codes.copy_from_slice(&bytes);
        Self { scaling, isa: checked(isa), codes }
    }

    fn row_bytes(&self) -> usize {
        self.scaling.meaning.row_bytes(self.scaling.k)
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.codes[row * self.row_bytes()..][..self.row_bytes()]
    }
}

/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn decode_avx512(scaling: &Scaling, bytes: &[u8], row: usize, columns: Range<usize>, out: &mut [f32]) {
    scaling.decode(bytes, row, columns, out);
}

/// # Safety
/// The machine has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn decode_avx2(scaling: &Scaling, bytes: &[u8], row: usize, columns: Range<usize>, out: &mut [f32]) {
    scaling.decode(bytes, row, columns, out);
}

impl DecodeRows for ScaledMatrix {
    fn isa(&self) -> Isa {
        self.isa
    }

    fn shape(&self) -> (usize, usize) {
        (self.scaling.n, self.scaling.k)
    }

    fn decode(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let bytes = self.row(row);
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { decode_avx512(&self.scaling, bytes, row, columns, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { decode_avx2(&self.scaling, bytes, row, columns, out) },
            _ => self.scaling.decode(bytes, row, columns, out),
        }
    }
}

impl CpuMatrix for ScaledMatrix {
    fn format(&self) -> FormatId {
        self.scaling.format
    }

    fn shape(&self) -> (usize, usize) {
        (self.scaling.n, self.scaling.k)
    }

    fn stored_bytes(&self) -> usize {
        self.codes.len() + self.scaling.bytes()
    }

    fn resident_bytes(&self) -> usize {
        self.stored_bytes()
    }

    fn unpack(&self) -> Box<dyn Stored> {
        Box::new(ScaledStored { scaling: self.scaling.clone(), bytes: self.codes.to_vec() })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        rows::dequantize(self, rows, out);
    }

    /// The codes; scales are a small part.
    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        piece(&self.codes[rows.start * self.row_bytes()..rows.end * self.row_bytes()]);
    }

    fn row_granule(&self) -> usize {
        STRIP_ROWS
    }

    fn multiply(
        &self,
        x: Activations,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        y: &SharedSlice<'_, f32>,
        scratch: &mut Vec<f32>,
    ) {
        rows::multiply(self, x, rows, bias, y, scratch);
    }
}
