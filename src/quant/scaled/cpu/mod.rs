//! Scaled codes on the CPU: rows as they are stored, decoded piece by piece; with AVX-512 and AVX2 in registers, for which the nibbles of a block
//! change places.

mod blocks;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use self::blocks::ScaledKernel;
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
    /// Its codes are in the order of this kernel.
    kernel: Option<ScaledKernel>,
}

impl ScaledMatrix {
    pub fn new(ScaledStored { scaling, bytes }: ScaledStored, isa: Isa) -> Self {
        let mut codes = Pages::required(bytes.len());
        codes.copy_from_slice(&bytes);
        let kernel = blocks::kernel(isa, &scaling, &bytes);
        if kernel == Some(ScaledKernel::Blocks) {
            reorder(&scaling, &mut codes, blocks::split);
        }
        Self { scaling, isa: checked(isa), codes, kernel }
    }

    fn row_bytes(&self) -> usize {
        self.scaling.meaning.row_bytes(self.scaling.k)
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.codes[row * self.row_bytes()..][..self.row_bytes()]
    }
}

/// Applies `order` to each row of 4-bit codes.
fn reorder(scaling: &Scaling, codes: &mut [u8], order: fn(&mut [u8])) {
    if scaling.meaning.bits() == 4 {
        codes.chunks_exact_mut(scaling.meaning.row_bytes(scaling.k)).for_each(order);
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
        match (self.isa, self.kernel) {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, Some(kernel)) => unsafe { avx512::decode(kernel, &self.scaling, bytes, row, columns, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, None) => unsafe { decode_avx512(&self.scaling, bytes, row, columns, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Some(_)) => unsafe { avx2::decode(&self.scaling, bytes, row, columns, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, None) => unsafe { decode_avx2(&self.scaling, bytes, row, columns, out) },
            _ => self.scaling.decode(bytes, row, columns, out),
        }
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        match (self.isa, self.kernel) {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, Some(kernel)) => unsafe { avx512::dot(kernel, &self.scaling, self.row(row), row, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Some(_)) => unsafe { avx2::dot(&self.scaling, self.row(row), row, x) },
            _ => rows::decoded_dot(self, row, x),
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
        let mut bytes = self.codes.to_vec();
        if self.kernel == Some(ScaledKernel::Blocks) {
            reorder(&self.scaling, &mut bytes, blocks::joined);
        }
        Box::new(ScaledStored { scaling: self.scaling.clone(), bytes })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        rows::dequantize(self, rows, out);
    }

    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        piece(&self.codes[rows.start * self.row_bytes()..rows.end * self.row_bytes()]);
        self.scaling.memory_of(rows, piece);
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
