//! Few rows of activations: launches of `nf4_rows.cu`, which decode the codes as they stream.

use candle_core::Result;
use half::f16;

use crate::fatbin;
use crate::kernels::cuda::few_rows::{FewRowsInput, FewRowsKernels};
use crate::kernels::cuda::launch::{Fatbin, Launcher};
use crate::kernels::cuda::matvec::MatrixDesc;
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};
use crate::quant::nf4::tile::is_fused;

pub static KERNELS: Fatbin = fatbin!("nf4_rows");

static FEW: FewRowsKernels = FewRowsKernels {
    fatbin: &KERNELS,
    by_rows: &[(8, "nf4_rows_8"), (16, "nf4_rows_16"), (32, "nf4_rows_32")],
    wide: "nf4_rows_8_wide",
};

/// # Safety
/// As [`MatrixDesc::multiply_rows`].
pub unsafe fn multiply(parts: &[(MatrixDesc, ProductAt)], on: &dyn Launcher, x: &SharedInput) -> Result<bool> {
    let k = parts[0].0.k;
    if !is_fused(x.m, k) {
        return Ok(false);
    }
    let input = FewRowsInput { x: x.at, x_stride: k * size_of::<f16>(), m: x.m, ..FewRowsInput::default() };
    // SAFETY: the caller's promise.
    unsafe { FEW.multiply(parts, on, input) }?;
    Ok(true)
}
