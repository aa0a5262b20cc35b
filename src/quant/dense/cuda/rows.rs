//! Few rows of activations: launches of `dense_rows.cu`.

use candle_core::Result;
use half::f16;

use crate::fatbin;
use crate::kernels::cuda::few_rows::{FewRowsInput, FewRowsKernels};
use crate::kernels::cuda::launch::{Fatbin, Launcher};
use crate::kernels::cuda::matvec::MatrixDesc;
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};

pub static KERNELS: Fatbin = fatbin!("dense_rows");

/// Rows up to which cuBLAS is slower (docs/benchmarks.md).
const MOST_ROWS: usize = 16;
/// Elements of a row's step.
const STEP: usize = 64;

static FEW: FewRowsKernels =
    FewRowsKernels { fatbin: &KERNELS, by_rows: &[(8, "half_rows_8"), (16, "half_rows_16")], wide: "half_rows_8_wide" };

/// # Safety
/// As [`MatrixDesc::multiply_rows`].
pub unsafe fn multiply(parts: &[(MatrixDesc, ProductAt)], on: &dyn Launcher, x: &SharedInput) -> Result<bool> {
    let k = parts[0].0.k;
    if x.m > MOST_ROWS || !k.is_multiple_of(STEP) {
        return Ok(false);
    }
    let input = FewRowsInput { x: x.at, x_stride: k * size_of::<f16>(), m: x.m, ..FewRowsInput::default() };
    // SAFETY: the caller's promise.
    unsafe { FEW.multiply(parts, on, input) }?;
    Ok(true)
}
