//! Operations over many rows: launches of `rows.cu`.

use std::ffi::c_void;

use candle_core::Result;

use super::attend::Heads;
use super::launch::{Fatbin, Grid, Launcher, dimension};
use super::place::RowPlaces;
use super::program::TokenOutput;
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("rows");

/// Threads of a block for elements, and of one that owns a row.
const THREADS: u32 = 256;
const WIDE_THREADS: u32 = 1024;
/// Kernels that do not wait for the launch before.
const NOT_OVERLAPPING: [&str; 2] = ["place_token", "read_all"];

/// Addresses where `on` runs. Every method says what lies there; all are `unsafe` for that reason: the caller vouches that the
/// memory is as large as said and lives until the stream has come past the call.
#[derive(Clone, Copy)]
pub struct RowKernels<'a> {
    pub on: &'a dyn Launcher,
}

/// A table of fp16 rows.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    pub address: u64,
    pub stride: usize,
    pub width: usize,
}

/// A product `[t, n]` that is added to a residual, as `struct Addend` of rows.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Addend {
    /// 0 for none.
    pub values: u64,
    /// fp32 `[n]` that is added to the values first, and that sum rounded as they are; or 0.
    pub bias: u64,
    /// 1 where the values are fp32, 0 where they are fp16.
    pub is_float: i32,
    /// It multiplies values and bias.
    pub scale: f32,
}

impl RowKernels<'_> {
    /// fp32 `out[t] = scale · table[token_t]`; rows whose token is `image` take row `feature_of_row[t]` of `features`.
    ///
    /// # Safety
    /// See [`RowKernels`].
    #[allow(clippy::too_many_arguments)] // the kernel's own
    pub unsafe fn embed(
        self,
        rows: usize,
        tokens: u64,
        feature_of_row: u64,
        table: Table,
        features: u64,
        image: Option<u32>,
        scale: f32,
        out: u64,
    ) -> Result<()> {
        let image = image.map_or(-1, |token| token as i32);
        let (stride, width) = (dimension(table.stride)?, dimension(table.width)?);
        let parameters = parameters![tokens, feature_of_row, table.address, features, out, scale, image, stride, width];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("embed_rows", Grid::new((rows, 1), THREADS), parameters) }
    }

    /// Puts a token where the next step reads it, as that of the step numbered `step`: `output` says where its state and its embedding
    /// lie.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn place_token(self, output: &TokenOutput, token: u32, position: usize, step: u32) -> Result<()> {
        let TokenOutput { state, table, embedding, table_scale, table_stride, hidden, .. } = *output;
        let row = table + u64::from(token) * (table_stride as usize * size_of::<half::f16>()) as u64;
        let (token, position, step) = (dimension(token as usize)?, dimension(position)?, step as i32);
        let parameters = parameters![row, embedding, table_scale, hidden, state, token, position, step];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("place_token", Grid::new((1, 1), WIDE_THREADS), parameters) }
    }

    /// fp32 `x[t] += table[t % period]`
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn add_table(self, rows: usize, period: usize, x: u64, table: Table) -> Result<()> {
        let (stride, width, period) = (dimension(table.stride)?, dimension(table.width)?, dimension(period)?);
        let parameters = parameters![x, table.address, stride, width, period];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("add_table_rows", Grid::new((rows, 1), THREADS), parameters) }
    }

    /// fp16 `out[s] = scale · x[s, rows - 1]` of each sequence.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn last_rows(
        self,
        sequences: usize,
        (rows, width): (usize, usize),
        x: u64,
        scale: f32,
        out: u64,
    ) -> Result<()> {
        let (rows, width) = (dimension(rows)?, dimension(width)?);
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("last_rows", Grid::new((sequences, 1), THREADS), parameters![x, out, scale, rows, width]) }
    }

    /// fp32 `x += addends`, the first of which may be all; fp16 `out = scale · norm(x)`, a layer norm where there is a `bias`.
    ///
    /// # Safety
    /// See [`RowKernels`].
    #[allow(clippy::too_many_arguments)] // the kernel's own
    pub unsafe fn norm(
        self,
        rows: usize,
        width: usize,
        x: u64,
        [first, second]: [Addend; 2],
        weight: u64,
        bias: u64,
        epsilon: f32,
        scale: f32,
        out: u64,
    ) -> Result<()> {
        let width = dimension(width)?;
        let parameters = parameters![x, first, second, weight, bias, out, epsilon, scale, width];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("norm_rows", Grid::new((rows, 1), WIDE_THREADS), parameters) }
    }

    /// `y[t] += bias`, fp32 or fp16.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn add_bias(self, rows: usize, width: usize, y: u64, is_float: bool, bias: u64) -> Result<()> {
        let (n, count, is_float) = (dimension(width)?, (rows * width) as i64, i32::from(is_float));
        // SAFETY: as rows.cu declares them.
        unsafe {
            self.launch("add_bias_rows", Grid::over(rows * width, THREADS), parameters![y, bias, is_float, n, count])
        }
    }

    /// fp32 `out = a + addends`, of which there is one at least.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn add(self, rows: usize, width: usize, a: u64, [first, second]: [Addend; 2], out: u64) -> Result<()> {
        let (n, count) = (dimension(width)?, (rows * width) as i64);
        let parameters = parameters![a, first, second, out, n, count];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("add_rows", Grid::over(rows * width, THREADS), parameters) }
    }

    /// fp16 `out = act(gate + bias) · scale · up`, the sum and what is scaled rounded to fp16; `bias`, fp32 `[width]`, and `up` may be 0.
    ///
    /// # Safety
    /// See [`RowKernels`].
    #[allow(clippy::too_many_arguments)] // the kernel's own
    pub unsafe fn activate(
        self,
        rows: usize,
        width: usize,
        kind: i32,
        gate: u64,
        bias: u64,
        up: u64,
        scale: f32,
        out: u64,
    ) -> Result<()> {
        let (n, count) = (dimension(width)?, (rows * width) as i64);
        let parameters = parameters![gate, bias, up, out, scale, kind, n, count];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("activate_rows", Grid::over(rows * width, THREADS), parameters) }
    }

    /// Adds the biases of q, k and v, fp32 or 0, and rounds to fp16; rotates `q` in place and writes `k`, `v` to a cache at `places`.
    /// `rotary` may be 0, `q` then too.
    ///
    /// # Safety
    /// See [`RowKernels`].
    #[allow(clippy::too_many_arguments)] // the kernel's own
    pub unsafe fn append(
        self,
        at: RowPlaces,
        heads: Heads,
        [q, k, v]: [u64; 3],
        [q_bias, k_bias, v_bias]: [u64; 3],
        [keys, values]: [u64; 2],
        angles: u64,
        rotary: usize,
    ) -> Result<()> {
        let (h, g) = (dimension(heads.heads)?, dimension(heads.kv_heads)?);
        let (d, d_pad, capacity) = (dimension(heads.d)?, dimension(heads.d_pad)?, dimension(heads.capacity)?);
        // As many blocks a row as give a thread one element of the keys, and one of each pair of a query.
        let blocks = (heads.kv_heads.max(heads.heads / 2) * heads.d).div_ceil(THREADS as usize).max(1);
        let (rotary, position, rows) = (dimension(rotary)?, dimension(at.position)?, dimension(at.rows)?);
        let parameters = parameters![
            q, k, v, q_bias, k_bias, v_bias, keys, values, angles, h, g, d, d_pad, rotary, capacity, position, rows,
            at.places
        ];
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("append_rows", Grid::new((at.all_rows(), blocks), THREADS), parameters) }
    }

    /// fp16 `x = norm(x + bias)` of each of the `parts` parts of a row, an rms norm whose `weight` they share; `bias`, fp32 of a
    /// row, may be 0.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn norm_parts(
        self,
        rows: usize,
        (parts, len): (usize, usize),
        x: u64,
        bias: u64,
        weight: u64,
        epsilon: f32,
    ) -> Result<()> {
        let len = dimension(len)?;
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("norm_parts", Grid::new((rows, parts), 128), parameters![x, bias, weight, epsilon, len]) }
    }

    /// Columns `start .. start + len` of rows of `n` 16-bit values.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn copy_columns(
        self,
        rows: usize,
        n: usize,
        (start, len): (usize, usize),
        from: u64,
        to: u64,
    ) -> Result<()> {
        let (n, start, width, count) = (dimension(n)?, dimension(start)?, dimension(len)?, (rows * len) as i64);
        let grid = Grid::over(rows * len, THREADS);
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("copy_columns", grid, parameters![from, to, n, start, width, count]) }
    }

    /// fp32 to fp16.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn narrow(self, count: usize, from: u64, to: u64) -> Result<()> {
        let n = count as i64;
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("narrow_rows", Grid::over(count, THREADS), parameters![from, to, n]) }
    }

    /// fp16 to fp32, multiplied by `scale`.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn widen(self, count: usize, from: u64, scale: f32, to: u64) -> Result<()> {
        let n = count as i64;
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("widen_rows", Grid::over(count, THREADS), parameters![from, to, scale, n]) }
    }

    /// Reads `words` of 16 bytes and writes one of 4 bytes now and then.
    ///
    /// # Safety
    /// See [`RowKernels`].
    pub unsafe fn read(self, blocks: usize, words: usize, from: u64, out: u64) -> Result<()> {
        let n = words as i64;
        // SAFETY: as rows.cu declares them.
        unsafe { self.launch("read_all", Grid::new((blocks, 1), 512), parameters![from, out, n]) }
    }

    /// # Safety
    /// See [`Launcher::launch`].
    unsafe fn launch(self, kernel: &'static str, grid: Grid, parameters: &mut [*mut c_void]) -> Result<()> {
        let grid = if NOT_OVERLAPPING.contains(&kernel) { grid } else { grid.overlapping() };
        // SAFETY: the caller's promise.
        unsafe { self.on.launch(&KERNELS, kernel, grid, parameters) }
    }
}
