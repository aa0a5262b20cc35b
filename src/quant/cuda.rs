//! A matrix on a CUDA device, and its encoder. Products of whole tensors are for tests and tools; sessions launch kernels themselves.

use std::ops::Range;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use half::f16;

use crate::kernels::cuda::arena::{Arena, Layout};
use crate::kernels::cuda::launch::{Launcher, MemoryPlanner, address, half_rows, tensor};
use crate::kernels::cuda::matvec::{Epilogue, InputDesc, MatrixDesc, Mode, OutputType, Product};
use crate::kernels::cuda::program::ProgramBuilder;
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};
use crate::kernels::cuda::step_kernel::DeviceProperties;

/// A matrix on a CUDA device.
pub trait CudaMatrix: Send + Sync {
    /// `(n, k)`.
    fn shape(&self) -> (usize, usize);

    /// Bytes of the format without padding: a token reads as many.
    fn stored_bytes(&self) -> usize;

    /// Bytes that this layout takes on the device.
    fn resident_bytes(&self) -> usize;

    /// The memory that it owns, part by part, for tests and tools.
    fn download(&self) -> Result<Vec<Vec<u8>>>;

    /// The matrix as kernels read it.
    fn desc(&self) -> MatrixDesc;

    /// Returns whether products are fp32, as those of a matrix that is kept in fp32 are; fp16 otherwise.
    fn product_is_float(&self) -> bool {
        self.desc().family.product_is_float
    }
}

/// Dtypes of saved values, numbered as in source_values.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum SourceDtype {
    F16 = 0,
    Bf16 = 1,
    F32 = 2,
}

impl SourceDtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            SourceDtype::F16 | SourceDtype::Bf16 => 2,
            SourceDtype::F32 => 4,
        }
    }
}

/// Saved values on a device, as `struct SourceValues` of source_values.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SourceValues {
    pub values: u64,
    /// A count of 64 bits, of finite values that became infinite in fp16.
    pub overflow: u64,
    pub kind: SourceDtype,
}

/// Rows for a [`CudaEncoder`] begin at a multiple of so many values of the flattened matrix, and end at one or at its end: blocks of every
/// format are whole.
pub const GRANULE: usize = super::nf4::BLOCK;

/// Encodes a matrix on the device from rows in any order, bit for bit as [`super::Format::quantize`] does.
pub trait CudaEncoder: Send + Sync {
    /// The address that `rows` may be copied to as they were saved; `None` where they have to be encoded.
    fn place(&self, rows: &Range<usize>, kind: SourceDtype) -> Option<u64>;

    /// Queues the encoding of `rows`, which keep to [`GRANULE`], on the device's stream.
    ///
    /// # Safety
    /// `from` holds the values of `rows` when the stream comes to this call, and until it has come past it.
    unsafe fn encode(&self, rows: Range<usize>, from: SourceValues) -> Result<()>;

    /// The matrix, once all rows have been queued.
    fn finish(self: Box<Self>) -> Result<Box<dyn CudaMatrix>>;
}

/// Memory of a matrix on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBytes {
    pub resident: usize,
    /// Scratch beyond that while it is encoded.
    pub transient: usize,
}

/// A copy of device memory in bytes.
pub(super) fn download<T: candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    values: &CudaSlice<T>,
    device: &CudaDevice,
) -> Result<Vec<u8>> {
    // SAFETY: any memory may be read as bytes, and these are as many.
    let bytes = unsafe { values.transmute::<u8>(values.num_bytes()) };
    match bytes {
        Some(bytes) => device.clone_dtoh(&bytes),
        None => bail!("device memory that cannot be read as bytes"),
    }
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
            let y = ProductAt::new(y, matrix.product_is_float());
            let multiply = |on: &dyn Launcher, arena: &Arena| {
                // SAFETY: x and y are as large as the call says; what frees them is on the same stream.
                unsafe { matrix.desc().multiply_rows(on, &SharedInput::new(x, m, 0, arena), y) }
            };
            let layout = Layout::of(|arena| multiply(&MemoryPlanner, arena))?;
            // SAFETY: a call writes what it takes before it reads it.
            let memory = unsafe { device.alloc::<u8>(layout.bytes().max(1)) }?;
            return multiply(device, &Arena::at(address(&memory, device), &layout));
        }
        let product = Product { matrix: matrix.desc(), first_row: 0, bias: 0, out: y, activation: 0 };
        let output_type = if matrix.product_is_float() { OutputType::Floats } else { OutputType::Halves };
        let epilogue = Epilogue { output_type, ..Epilogue::default() };
        let input = InputDesc { x, scale: 1.0, ..InputDesc::default() };
        let planned =
            ProgramBuilder::single(DeviceProperties::of(device)?, Mode::Apart, vec![input], &[product], epilogue)?;
        // SAFETY: as above.
        unsafe { planned.load(device)?.launch(device) }
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
