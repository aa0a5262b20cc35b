//! A matrix on a CUDA device. Products of whole tensors are for tests and tools; sessions launch by themselves.

use candle_core::{DType, Result, Tensor, bail};
use half::f16;

use crate::kernels::cuda::launch::{address, half_rows, tensor};
use crate::kernels::cuda::matvec::{Epilogue, Input, Matvec, Mode, Product, Streamed};

/// A matrix on a CUDA device.
pub trait CudaMatrix: Send + Sync {
    /// `(n, k)`.
    fn shape(&self) -> (usize, usize);

    /// Bytes of the format, without padding: what a token has to read.
    fn stored_bytes(&self) -> usize;

    /// Bytes that this layout takes on the device.
    fn resident_bytes(&self) -> usize;

    /// How the product with one row streams it.
    fn streamed(&self) -> Streamed;

    /// Whether products are fp32, as those of a matrix that is kept in fp32 are; fp16 otherwise.
    fn product_is_float(&self) -> bool {
        false
    }

    /// `y = x · Wᵀ` for `m` rows: `x` fp16 `[m, k]`, `y` `[m, n]`, fp32 sums.
    ///
    /// # Safety
    /// `x` and `y` are addresses of that much memory on the matrix's device, good until its stream has come past this call.
    unsafe fn multiply_rows(&self, x: u64, m: usize, y: u64) -> Result<()>;
}

/// `y = x · Wᵀ` for fp16 `x` `[m, k]`: one row streams the matrix, several take the product for prompts.
pub fn multiply(matrix: &dyn CudaMatrix, x: &Tensor) -> Result<Tensor> {
    let candle_core::Device::Cuda(device) = x.device() else { bail!("activations must be on the weights' device") };
    if x.dtype() != DType::F16 {
        bail!("activations are {:?}, not F16", x.dtype());
    }
    let (n, k) = matrix.shape();
    let (storage, layout) = x.storage_and_layout();
    let (rows, m) = half_rows(&storage, layout, k)?;
    let x = address(&rows, device);
    let run = |y: u64| -> Result<()> {
        if m > 1 {
            // SAFETY: both are as large as the call says; what frees them is on the same stream.
            return unsafe { matrix.multiply_rows(x, m, y) };
        }
        let product = Product { matrix: matrix.streamed(), bias: 0, out: y, activation: 0 };
        let epilogue = Epilogue { out_is_float: matrix.product_is_float(), ..Epilogue::default() };
        let input = Input { x, scale: 1.0, ..Input::default() };
        // SAFETY: as above.
        unsafe { Matvec::new(device, Mode::Apart, vec![input], &[product], epilogue)?.launch(device) }
    };
    if matrix.product_is_float() {
        let y = device.alloc_zeros::<f32>(m * n)?;
        run(address(&y, device))?;
        tensor(y, m, n, device)
    } else {
        let y = device.alloc_zeros::<f16>(m * n)?;
        run(address(&y, device))?;
        tensor(y, m, n, device)
    }
}
