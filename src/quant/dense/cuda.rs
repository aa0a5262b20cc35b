//! Dense matrices on CUDA: row-major as they are, streamed for one row, cuBLAS for many.

mod encode;
mod rows;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result};
use half::f16;

use super::{DenseStored, DenseValue};
use crate::kernels::cuda::gemm::{Gemm, Operand, Type};
use crate::kernels::cuda::launch::{Launcher, address, upload_rows};
use crate::kernels::cuda::matvec::{Family, MatrixDesc};
use crate::kernels::cuda::rows::RowKernels;
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};
use crate::kernels::cuda::step_kernel::{CHUNK_BYTES, StepFatbins, StepKernel, WeightDecoder};
use crate::quant::cuda::download;
use crate::quant::{CudaMatrix, Stored};
use crate::step_fatbins;

pub use encode::{KERNELS as ENCODE_KERNELS, cast_rows};
pub(in crate::quant) use encode::{device_bytes, encoder};
pub use rows::KERNELS as ROWS_KERNELS;

pub static KERNELS: StepFatbins = step_fatbins!("dense");

/// Reads no format but these.
pub static STEP: StepKernel = StepKernel {
    fatbins: &KERNELS,
    name: "half_step",
    has_tables: false,
    side_data_words: 0,
    partial_bytes: size_of::<f32>(),
    converted_eighths: 0,
};
static HALVES: Family = Family {
    name: "half",
    decoder: WeightDecoder::Half,
    chunk: CHUNK_BYTES / size_of::<f16>(),
    kernels: &[&STEP],
    product_is_float: false,
    rounds_products: false,
    multiply_rows,
    multiply_few: rows::multiply,
};
static FLOATS: Family = Family {
    name: "float",
    decoder: WeightDecoder::Float,
    chunk: CHUNK_BYTES / size_of::<f32>(),
    kernels: &[&STEP],
    product_is_float: true,
    rounds_products: false,
    multiply_rows,
    // No batch is worth a kernel of fp32 weights.
    multiply_few: |_, _, _| Ok(false),
};

/// Uploads row-major values in their own dtype.
pub(super) fn upload<T: DenseValue>(stored: &DenseStored<T>, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let device = device.as_cuda_device()?;
    let bytes = stored.parts().swap_remove(0).bytes;
    let row_bytes = stored.k * size_of::<T>();
    let stride_bytes = stride_bytes(stored.k, size_of::<T>());
    Ok(Box::new(DenseOnDevice {
        n: stored.n,
        k: stored.k,
        element_bytes: size_of::<T>(),
        stride_bytes,
        weight: upload_rows(&bytes, row_bytes, stride_bytes, device)?,
        device: device.clone(),
    }))
}

/// Bytes from row to row.
fn stride_bytes(k: usize, element_bytes: usize) -> usize {
    (k * element_bytes).next_multiple_of(CHUNK_BYTES)
}

/// `[n, k]` values of 2 or 4 bytes, in rows padded to whole chunks.
pub fn desc((n, k): (usize, usize), element_bytes: usize, weight: u64) -> MatrixDesc {
    MatrixDesc {
        family: if element_bytes == 4 { &FLOATS } else { &HALVES },
        n,
        k,
        weight,
        stride_bytes: stride_bytes(k, element_bytes),
        scales: 0,
        nested: 0,
        offset: 0.0,
        constants: 0,
        threshold: f32::NAN,
    }
}

struct DenseOnDevice {
    n: usize,
    k: usize,
    element_bytes: usize,
    stride_bytes: usize,
    /// `[n, stride_bytes]`
    weight: CudaSlice<u8>,
    device: CudaDevice,
}

impl CudaMatrix for DenseOnDevice {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.n * self.k * self.element_bytes
    }

    fn resident_bytes(&self) -> usize {
        self.weight.len()
    }

    fn download(&self) -> Result<Vec<Vec<u8>>> {
        Ok(vec![download(&self.weight, &self.device)?])
    }

    fn desc(&self) -> MatrixDesc {
        desc((self.n, self.k), self.element_bytes, address(&self.weight, &self.device))
    }
}

/// Through cuBLAS; fp32 weights widen their activations.
///
/// # Safety
/// As [`MatrixDesc::multiply_rows`].
unsafe fn multiply_rows(matrix: &MatrixDesc, on: &dyn Launcher, x: &SharedInput, y: ProductAt) -> Result<()> {
    let SharedInput { at: x, m, arena, .. } = *x;
    let k = matrix.k;
    let operand = |address, stride| Operand { address, stride, batch_stride: 0 };
    let mut widened = None;
    let (from, element_bytes, a) = if matrix.family.product_is_float {
        let at = widened.insert(arena.take::<f32>(m * k)?).address;
        // SAFETY: both hold m * k values.
        unsafe { RowKernels { on }.widen(m * k, x, 1.0, at) }?;
        (Type::Float, size_of::<f32>(), at)
    } else {
        (Type::Half, size_of::<f16>(), x)
    };
    let gemm = Gemm {
        m,
        n: matrix.n,
        k,
        batch: 1,
        a: operand(a, k),
        b: operand(matrix.weight, matrix.stride_bytes / element_bytes),
        b_is_transposed: true,
        out: operand(y.address, matrix.n),
        alpha: y.scale,
        from,
        to: if y.is_float { Type::Float } else { Type::Half },
    };
    // SAFETY: the caller's promise.
    unsafe { on.multiply(&gemm) }
}
