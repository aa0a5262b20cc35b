//! Floating-point matrices on the CPU: rows as they are, widened in registers.

mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{DenseFormat, DenseStored};
use crate::kernels::cpu::pages::Pages;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;
use crate::quant::cpu::panel::{self, PanelSource, Start};
use crate::quant::cpu::{FewSums, STRIP_ROWS, checked, strips, write_few, write_strip};
use crate::quant::{Activations, CpuMatrix, FormatId, Stored};

/// A floating-point type that matrices are made of.
pub trait DenseValue: DenseFormat + Pod + Send + Sync + std::fmt::Debug + PartialEq + 'static {
    fn little_endian(self) -> impl Iterator<Item = u8>;

    /// From as many bytes as a value has.
    fn of_little_endian(bytes: &[u8]) -> Self;

    /// Equally many fp32 values.
    fn widen(values: &[Self], out: &mut [f32]);

    /// 8 values at `from`, which need no alignment, as fp32.
    ///
    /// # Safety
    /// The machine has AVX2 and F16C; the values lie in one allocation.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_avx2(from: *const Self) -> std::arch::x86_64::__m256;

    /// 16 values at `from`, which need no alignment, as fp32.
    ///
    /// # Safety
    /// The machine has AVX-512F; the values lie in one allocation.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_avx512(from: *const Self) -> std::arch::x86_64::__m512;

    /// Those of 16 values at `from` whose bit is set, as fp32, and zeros.
    ///
    /// # Safety
    /// The machine has AVX-512F, BW and VL; the values whose bits are set lie in one allocation.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_masked_avx512(mask: u16, from: *const Self) -> std::arch::x86_64::__m512;
}

impl DenseValue for f16 {
    fn little_endian(self) -> impl Iterator<Item = u8> {
        self.to_le_bytes().into_iter()
    }

    fn of_little_endian(bytes: &[u8]) -> Self {
        Self::from_le_bytes(std::array::from_fn(|i| bytes[i]))
    }

    fn widen(values: &[Self], out: &mut [f32]) {
        values.convert_to_f32_slice(out);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load_avx2(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { avx2::load_f16(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_avx512(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { avx512::load_f16(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_masked_avx512(mask: u16, from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { avx512::load_masked_f16(mask, from) }
    }
}

impl DenseValue for f32 {
    fn little_endian(self) -> impl Iterator<Item = u8> {
        self.to_le_bytes().into_iter()
    }

    fn of_little_endian(bytes: &[u8]) -> Self {
        Self::from_le_bytes(std::array::from_fn(|i| bytes[i]))
    }

    fn widen(values: &[Self], out: &mut [f32]) {
        out.copy_from_slice(values);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_avx2(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_avx512(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_masked_avx512(mask: u16, from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm512_maskz_loadu_ps(mask, from) }
    }
}

/// Row-major values in huge pages. Rows are long and read in order, which is all that the prefetcher needs; embedding rows
/// stay one read.
pub struct DenseMatrix<T> {
    n: usize,
    k: usize,
    isa: Isa,
    weights: Pages,
    value: PhantomData<T>,
}

impl<T: DenseValue> DenseMatrix<T> {
    pub fn new(stored: &DenseStored<T>, isa: Isa) -> Self {
        let mut weights = Pages::required(size_of_val(&stored.data[..]));
        weights.as_values_mut().copy_from_slice(&stored.data);
        Self { n: stored.n, k: stored.k, isa: checked(isa), weights, value: PhantomData }
    }

    fn row(&self, row: usize) -> &[T] {
        &self.weights.as_values()[row * self.k..][..self.k]
    }

    /// The rows of a strip; the last row stands in for those that are missing.
    fn strip_rows(&self, strip: usize) -> [&[T]; STRIP_ROWS] {
        std::array::from_fn(|r| self.row((strip * STRIP_ROWS + r).min(self.n - 1)))
    }
}

/// `Σ row · x` over equally many values by the kernel of `isa`, which was [`checked`].
pub fn dot<T: DenseValue>(isa: Isa, row: &[T], x: &[f32]) -> f32 {
    match isa {
        // SAFETY: the instruction set is checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot(row, x) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot(row, x) },
        _ => portable::dot(row, x),
    }
}

/// `Σ row · x` of each of equally long `rows` for each of a few tokens, whose values lie one behind the other, by the kernel of
/// `isa`, which was [`checked`]: each weight is widened once.
fn dot_few<T: DenseValue>(isa: Isa, rows: [&[T]; STRIP_ROWS], x: &[f32], sums: &mut FewSums) {
    match isa {
        // SAFETY: the instruction set is checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::dot_few(rows, x, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::dot_few(rows, x, sums) },
        _ => {
            for (sums, x) in sums.iter_mut().zip(x.chunks_exact(rows[0].len())) {
                *sums = rows.map(|row| portable::dot(row, x));
            }
        }
    }
}

/// The columns of equally long `rows` as `[columns][16]`, by the kernel of `isa`, which was [`checked`].
pub fn transpose<T: DenseValue>(isa: Isa, rows: [&[T]; STRIP_ROWS], panel: &mut [f32]) {
    match isa {
        // SAFETY: the instruction set is checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::transpose(rows, panel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::transpose(rows, panel) },
        _ => portable::transpose(&rows, 0, panel),
    }
}

impl<T: DenseValue> PanelSource for DenseMatrix<T> {
    fn isa(&self) -> Isa {
        self.isa
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn decode_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]) {
        let rows = self.strip_rows(strip).map(|row| &row[columns.clone()]);
        transpose(self.isa, rows, panel);
    }
}

impl<T: DenseValue> CpuMatrix for DenseMatrix<T> {
    fn format(&self) -> FormatId {
        T::ID
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
        let data: Vec<T> = self.weights.as_values().to_vec();
        Box::new(DenseStored { n: self.n, k: self.k, data })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let values: &[T] = self.weights.as_values();
        T::widen(&values[rows.start * self.k..rows.end * self.k], out);
    }

    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        let row_bytes = self.k * size_of::<T>();
        piece(&self.weights[rows.start * row_bytes..rows.end * row_bytes]);
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
        if x.are_few() {
            let mut sums = FewSums::default();
            for strip in strips(&rows) {
                dot_few(self.isa, self.strip_rows(strip), x.f32s, &mut sums);
                write_few(&sums, x.m, (strip, &rows), bias, self.n, y);
            }
            return;
        }
        if x.m > 1 {
            return panel::multiply(self, x.f32s, x.m, rows, Start::Bias(bias), y, scratch);
        }
        for strip in strips(&rows) {
            let sums = self.strip_rows(strip).map(|row| dot(self.isa, row, x.f32s));
            write_strip(&sums, strip, &rows, bias, 0, y);
        }
    }
}
