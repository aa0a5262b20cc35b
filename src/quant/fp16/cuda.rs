//! fp16 on CUDA: cuBLAS through candle, fp32 sums.

use candle_core::{Device, Result, Tensor};

use super::Fp16Stored;
use crate::quant::CudaMatrix;

pub(super) fn upload(stored: &Fp16Stored, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let weight = Tensor::from_slice(&stored.data, (stored.n, stored.k), device)?;
    Ok(Box::new(Fp16OnDevice { weight }))
}

struct Fp16OnDevice {
    /// `[n, k]`.
    weight: Tensor,
}

impl CudaMatrix for Fp16OnDevice {
    fn shape(&self) -> (usize, usize) {
        let dims = self.weight.dims();
        (dims[0], dims[1])
    }

    fn stored_bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }

    fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.weight.t()?)
    }
}
