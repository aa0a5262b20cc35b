//! Few rows of activations: launches of `int8_rows.cu`, which multiply and finish at once.

use candle_core::{Result, bail};

use super::{QuantizedRows, quantize};
use crate::fatbin;
use crate::kernels::cuda::few_rows::{FewRowsInput, FewRowsKernels};
use crate::kernels::cuda::launch::{Fatbin, Launcher};
use crate::kernels::cuda::matvec::MatrixDesc;
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};

pub static KERNELS: Fatbin = fatbin!("int8_rows");

/// Rows up to which cuBLAS and a launch behind it are slower (docs/benchmarks.md).
pub const MOST_ROWS: usize = 16;

static FEW: FewRowsKernels =
    FewRowsKernels { fatbin: &KERNELS, by_rows: &[(8, "int8_rows_8"), (16, "int8_rows_16")], wide: "int8_rows_8_wide" };

/// # Safety
/// As [`MatrixDesc::multiply_rows`].
pub unsafe fn multiply(parts: &[(MatrixDesc, ProductAt)], on: &dyn Launcher, x: &SharedInput) -> Result<bool> {
    if x.m > MOST_ROWS {
        return Ok(false);
    }
    let matrix = parts[0].0;
    // SAFETY: the caller's promise for x.
    let Some(rows) = x.made(|| unsafe { quantize(&matrix, on, x) })? else {
        bail!("activation rows were prepared for another format")
    };
    let &QuantizedRows { columns, count, codes, row_absmax, .. } = rows;
    let input =
        FewRowsInput { x: codes, x_stride: matrix.stride_bytes, m: x.m, values: x.at, row_absmax, columns, count };
    // SAFETY: the rows were quantized on this stream; the caller's promise for the matrices, x and y.
    unsafe { FEW.multiply(parts, on, input) }?;
    Ok(true)
}
