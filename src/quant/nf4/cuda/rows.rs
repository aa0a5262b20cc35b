//! Few rows of activations: launches of `nf4_rows.cu`, which decode the codes as they stream.

use candle_core::Result;
use half::f16;

use crate::kernels::cuda::launch::{Fatbin, Grid, Launcher, dimension};
use crate::kernels::cuda::matvec::MatrixDesc;
use crate::kernels::cuda::shared_input::ProductAt;
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("nf4_rows");

/// As in nf4_rows.cu.
const THREADS: u32 = 256;
const TILE: usize = 32;

/// Rows of activations that a kernel takes at most, the fewest first.
const BY_ROWS: [(usize, &str); 3] = [(8, "nf4_rows_8"), (16, "nf4_rows_16"), (32, "nf4_rows_32")];
const MOST_ROWS: usize = BY_ROWS[BY_ROWS.len() - 1].0;

/// As `struct RowsProduct` of nf4_rows.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Operands {
    x: u64,
    y: u64,
    alpha: f32,
    m: i32,
    n: i32,
    k: i32,
    stride: i32,
    is_float: i32,
}

/// `y = x · matrixᵀ` for fp16 `[m, k]` at `x`, whose rows begin on 16 bytes. No block of the matrix crosses rows.
///
/// # Errors
/// If a launch fails.
///
/// # Safety
/// As [`MatrixDesc::multiply_rows`].
pub unsafe fn multiply(matrix: &MatrixDesc, on: &dyn Launcher, x: u64, m: usize, y: ProductAt) -> Result<()> {
    let (part, constants) = (matrix.part()?, matrix.constants);
    let value_bytes = if y.is_float { size_of::<f32>() } else { size_of::<f16>() };
    for first in (0..m).step_by(MOST_ROWS) {
        let rows = (m - first).min(MOST_ROWS);
        let operands = Operands {
            x: x + (first * matrix.k * size_of::<f16>()) as u64,
            y: y.address + (first * matrix.n * value_bytes) as u64,
            alpha: y.scale,
            m: dimension(rows)?,
            n: dimension(matrix.n)?,
            k: dimension(matrix.k)?,
            stride: dimension(matrix.stride_bytes)?,
            is_float: i32::from(y.is_float),
        };
        let name =
            BY_ROWS.iter().find(|(most, _)| rows <= *most).map_or(BY_ROWS[BY_ROWS.len() - 1].1, |(_, name)| name);
        let grid = Grid::new((matrix.n.div_ceil(TILE), 1), THREADS);
        // SAFETY: parameters as nf4_rows.cu declares them, and a block for each tile of rows; the caller vouches for the addresses.
        unsafe { on.launch(&KERNELS, name, grid, parameters![part, constants, operands]) }?;
    }
    Ok(())
}
