//! Products of one matrix on a CUDA device.

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::Call;
use crate::kernels::cuda::open;
use crate::quant::{Stored, cuda};

/// The products of `calls` by the format's own kernel, fp32 `[m, n]` each.
pub fn multiply(stored: &dyn Stored, calls: &[Call], ordinal: usize) -> Result<Vec<Vec<f32>>> {
    let device = open(ordinal)?;
    let (_, k) = stored.shape();
    let matrix = stored.upload(&device)?;
    let one = |call: &Call| {
        let x = Tensor::from_slice(call.x.as_slice(), (call.m, k), &device)?.to_dtype(DType::F16)?;
        cuda::multiply(matrix.as_ref(), &x)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()
    };
    Ok(calls.iter().map(one).collect::<candle_core::Result<_>>()?)
}
