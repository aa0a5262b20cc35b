//! Dense matrices on CUDA: cuBLAS through candle, fp32 sums.

use candle_core::{DType, Device, Result, Tensor};

use super::{DenseStored, Value};
use crate::quant::{CudaMatrix, Stored};

/// Uploads row-major values in their own dtype.
pub(super) fn upload<T: Value>(stored: &DenseStored<T>, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let bytes = stored.parts().swap_remove(0).bytes;
    let dtype = if size_of::<T>() == 2 { DType::F16 } else { DType::F32 };
    let weight = Tensor::from_raw_buffer(&bytes, dtype, &[stored.n, stored.k], device)?;
    Ok(Box::new(DenseOnDevice { weight }))
}

struct DenseOnDevice {
    /// `[n, k]`
    weight: Tensor,
}

impl CudaMatrix for DenseOnDevice {
    fn shape(&self) -> (usize, usize) {
        let dims = self.weight.dims();
        (dims[0], dims[1])
    }

    fn stored_bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }

    /// An fp32 weight widens its activations and keeps its sums: the result is fp32 too.
    fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.t()?;
        match self.weight.dtype() {
            DType::F32 => x.to_dtype(DType::F32)?.matmul(&weight),
            _ => x.matmul(&weight),
        }
    }
}
