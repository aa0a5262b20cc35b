//! Scaled codes on the CPU: rows as they are stored, decoded piece by piece; with AVX-512 in registers, for which the nibbles of a block change
//! places.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use self::avx512::ScaledKernel;

use super::super::cpu::rows::{self, DecodeRows};
use super::super::cpu::{STRIP_ROWS, checked};
use super::super::{Activations, CpuMatrix, FormatId, Stored};
use super::{ScaledStored, Scaling};
use crate::kernels::cpu::pages::Pages;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// No kernels for other machines.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ScaledKernel {}

/// Codes in huge pages, scales beside them.
pub struct ScaledMatrix {
    scaling: Scaling,
    isa: Isa,
    codes: Pages,
    /// The kernel for AVX-512, whose order its codes are in.
    kernel: Option<ScaledKernel>,
}

impl ScaledMatrix {
    pub fn new(ScaledStored { scaling, bytes }: ScaledStored, isa: Isa) -> Self {
        let mut codes = Pages::required(bytes.len());
        codes.copy_from_slice(&bytes);
        let kernel = kernel(isa, &scaling, &bytes);
        #[allow(unused_mut, reason = "only kernels of x86-64 have an order of their own")]
        let mut matrix = Self { scaling, isa: checked(isa), codes, kernel };
        #[cfg(target_arch = "x86_64")]
        if kernel == Some(ScaledKernel::Blocks) {
            reorder(&matrix.scaling, &mut matrix.codes, avx512::split);
        }
        matrix
    }

    fn row_bytes(&self) -> usize {
        self.scaling.meaning.row_bytes(self.scaling.k)
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.codes[row * self.row_bytes()..][..self.row_bytes()]
    }
}

#[cfg(target_arch = "x86_64")]
fn kernel(isa: Isa, scaling: &Scaling, bytes: &[u8]) -> Option<ScaledKernel> {
    if isa == Isa::Avx512 { avx512::kernel(scaling, bytes) } else { None }
}

/// Applies `order` to each row of 4-bit codes.
#[cfg(target_arch = "x86_64")]
fn reorder(scaling: &Scaling, codes: &mut [u8], order: fn(&mut [u8])) {
    if scaling.meaning.bits() == 4 {
        codes.chunks_exact_mut(scaling.meaning.row_bytes(scaling.k)).for_each(order);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn kernel(_: Isa, _: &Scaling, _: &[u8]) -> Option<ScaledKernel> {
    None
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
            Isa::Avx512 => match self.kernel {
                // SAFETY: as above.
                Some(kernel) => unsafe { avx512::decode(kernel, &self.scaling, bytes, row, columns, out) },
                // SAFETY: as above.
                None => unsafe { decode_avx512(&self.scaling, bytes, row, columns, out) },
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { decode_avx2(&self.scaling, bytes, row, columns, out) },
            _ => self.scaling.decode(bytes, row, columns, out),
        }
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        match self.kernel {
            // SAFETY: kernels are for a checked instruction set.
            #[cfg(target_arch = "x86_64")]
            Some(kernel) => unsafe { avx512::dot(kernel, &self.scaling, self.row(row), row, x) },
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
        #[allow(unused_mut, reason = "only kernels of x86-64 have an order of their own")]
        let mut bytes = self.codes.to_vec();
        #[cfg(target_arch = "x86_64")]
        if self.kernel == Some(ScaledKernel::Blocks) {
            reorder(&self.scaling, &mut bytes, avx512::joined);
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
