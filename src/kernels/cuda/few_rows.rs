//! Few rows of activations: launches of kernels that `few_rows.cuh` describes.

use candle_core::Result;
use half::f16;

use super::launch::{Fatbin, Grid, Launcher, dimension};
use super::matvec::{MatrixDesc, MatrixPart};
use super::shared_input::ProductAt;
use crate::parameters;

/// Rows of a weight that a block owns, and matrices of a launch: as in few_rows.cuh.
const TILE: usize = 32;
const PARTS: usize = 4;
/// `first_tile` of a part that does not exist.
const NO_TILE: i32 = i32::MAX;
/// Blocks below which each has twice the warps: two for each multiprocessor of an H100.
const WIDE_BELOW: usize = 264;
/// Threads of a block, and of one with twice the warps.
const THREADS: u32 = 256;
const WIDE_THREADS: u32 = 512;

/// The kernels of a format.
pub struct FewRowsKernels {
    pub fatbin: &'static Fatbin,
    /// By rows of activations that each takes at most, the fewest first.
    pub by_rows: &'static [(usize, &'static str)],
    /// The first of these with twice the warps.
    pub wide: &'static str,
}

/// As `struct FewRowsPart`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Part {
    part: MatrixPart,
    y: u64,
    scale: f32,
    is_float: i32,
    first_tile: i32,
    unused: i32,
}

/// As `struct FewRows`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Operands {
    parts: [Part; PARTS],
    x: u64,
    m: i32,
    k: i32,
    stride: i32,
    x_stride: i32,
    values: u64,
    row_absmax: u64,
    columns: u64,
    count: u64,
    constants: u64,
}

/// Activations `[m, k]` as a format reads them.
#[derive(Debug, Clone, Copy, Default)]
pub struct FewRowsInput {
    /// Rows of `x_stride` bytes, a multiple of 16.
    pub x: u64,
    pub x_stride: usize,
    pub m: usize,
    /// LLM.int8 alone: fp16 `[m, k]`, fp32 `[m]`, and the list of outlier columns.
    pub values: u64,
    pub row_absmax: u64,
    pub columns: u64,
    pub count: u64,
}

impl FewRowsInput {
    /// The rows from `first` on.
    fn from(self, first: usize, k: usize) -> Self {
        let behind = |address: u64, bytes: usize| if address == 0 { 0 } else { address + (first * bytes) as u64 };
        Self {
            x: behind(self.x, self.x_stride),
            m: self.m - first,
            values: behind(self.values, k * size_of::<f16>()),
            row_absmax: behind(self.row_absmax, size_of::<f32>()),
            ..self
        }
    }
}

impl FewRowsKernels {
    /// `y = scale · x · Wᵀ` of all `parts`, matrices of one family and of one k.
    ///
    /// # Errors
    /// If a launch fails.
    ///
    /// # Safety
    /// As [`MatrixDesc::multiply_rows`], for each part.
    pub unsafe fn multiply(
        &self,
        parts: &[(MatrixDesc, ProductAt)],
        on: &dyn Launcher,
        input: FewRowsInput,
    ) -> Result<()> {
        let (most, _) = self.by_rows[self.by_rows.len() - 1];
        for parts in parts.chunks(PARTS) {
            for first in (0..input.m).step_by(most) {
                // SAFETY: the caller's promise.
                unsafe { self.launch(parts, first, on, input.from(first, parts[0].0.k)) }?;
            }
        }
        Ok(())
    }

    /// One launch of as many rows as a kernel takes; `first` is the first of them in y.
    ///
    /// # Safety
    /// As [`Self::multiply`].
    unsafe fn launch(
        &self,
        parts: &[(MatrixDesc, ProductAt)],
        first: usize,
        on: &dyn Launcher,
        input: FewRowsInput,
    ) -> Result<()> {
        let matrix = parts[0].0;
        let by_rows = self.by_rows.iter().find(|(rows, _)| input.m <= *rows);
        let (rows, name) = *by_rows.unwrap_or(&self.by_rows[self.by_rows.len() - 1]);
        let no_part =
            Part { part: MatrixPart::default(), y: 0, scale: 1.0, is_float: 0, first_tile: NO_TILE, unused: 0 };
        let (mut placed, mut tiles) = ([no_part; PARTS], 0);
        for (place, (matrix, y)) in placed.iter_mut().zip(parts) {
            let value_bytes = if y.is_float { size_of::<f32>() } else { size_of::<f16>() };
            *place = Part {
                part: matrix.part()?,
                y: y.address + (first * matrix.n * value_bytes) as u64,
                scale: y.scale,
                is_float: i32::from(y.is_float),
                first_tile: dimension(tiles)?,
                unused: 0,
            };
            tiles += matrix.n.div_ceil(TILE);
        }
        let FewRowsInput { x, x_stride, m, values, row_absmax, columns, count } = input;
        let operands = Operands {
            parts: placed,
            x,
            m: dimension(m.min(rows))?,
            k: dimension(matrix.k)?,
            stride: dimension(matrix.stride_bytes)?,
            x_stride: dimension(x_stride)?,
            values,
            row_absmax,
            columns,
            count,
            constants: matrix.constants,
        };
        let is_wide = name == self.by_rows[0].1 && tiles < WIDE_BELOW;
        let (name, threads) = if is_wide { (self.wide, WIDE_THREADS) } else { (name, THREADS) };
        // SAFETY: the kernels take one struct, which `Operands` mirrors; a block for each tile; the caller vouches for the addresses.
        unsafe { on.launch(self.fatbin, name, Grid::new((tiles, 1), threads).overlapping(), parameters![operands]) }
    }
}
