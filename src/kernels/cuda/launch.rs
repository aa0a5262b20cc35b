//! Loading embedded kernels and launching them on candle's stream.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaView, DeviceRepr, DriverError, LaunchArgs, LaunchConfig,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Storage, Tensor, bail};
use half::f16;

use super::memory::driver_error;

/// The kernels of one `.cu` for all chips, as `build.rs` compiled them.
pub struct Fatbin {
    /// File name of the source without its extension.
    pub name: &'static str,
    pub image: &'static [u8],
}

/// Modules already loaded, by device ordinal and fatbin name. They are never unloaded: candle uses the device's primary
/// context, which a module keeps alive.
static MODULES: Mutex<Vec<(usize, &'static str, Arc<CudaModule>)>> = Mutex::new(Vec::new());

impl Fatbin {
    /// The kernel `name`; the first call on a device loads the module there.
    pub fn kernel(&self, device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        let explain = |error| driver_error(error).context(format!("loading kernel `{name}` of {}.cu", self.name));
        self.module(device).and_then(|module| module.load_function(name)).map_err(explain)
    }

    fn module(&self, device: &CudaDevice) -> std::result::Result<Arc<CudaModule>, DriverError> {
        let stream = device.cuda_stream();
        let ordinal = stream.context().ordinal();
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., module)) = modules.iter().find(|(at, name, _)| *at == ordinal && *name == self.name) {
            return Ok(module.clone());
        }
        // A copy, since the driver wants the image aligned, as allocations are.
        let module = stream.context().load_module(Ptx::from_binary(self.image.to_vec()))?;
        modules.push((ordinal, self.name, module.clone()));
        Ok(module)
    }
}

/// Launches on `blocks` (x, y) of `threads` threads. Work of size zero is the caller's to skip.
///
/// # Safety
/// The arguments pushed match the kernel's parameters in number, order and type, and every pointer among them is valid for
/// what a grid of this size touches.
pub unsafe fn launch(kernel: &str, arguments: &mut LaunchArgs<'_>, blocks: (usize, usize), threads: u32) -> Result<()> {
    let dimension = |blocks: usize, most: u32| match u32::try_from(blocks) {
        Ok(blocks) if (1..=most).contains(&blocks) => Ok(blocks),
        _ => bail!("kernel `{kernel}`: a grid of {blocks} blocks, allowed are 1 to {most}"),
    };
    let grid_dim = (dimension(blocks.0, i32::MAX as u32)?, dimension(blocks.1, MAX_GRID_Y)?, 1);
    let config = LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the caller's promise.
    let launched = unsafe { arguments.launch(config) };
    launched.map_err(|error| driver_error(error).context(format!("launching kernel `{kernel}`")))?;
    Ok(())
}

/// CUDA's limit for the second dimension of a grid.
pub const MAX_GRID_Y: u32 = 65535;

/// The fp16 `[m, k]` that `x` holds contiguously on a CUDA device, and m.
pub fn half_rows<'a>(x: &'a Storage, layout: &Layout, k: usize) -> Result<(CudaView<'a, f16>, usize)> {
    let Storage::Cuda(storage) = x else { bail!("activations must be on the CUDA device of the weights") };
    let (m, columns) = layout.shape().dims2()?;
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("activations [{m}, {columns}] are not contiguous")
    };
    if columns != k || m == 0 || i32::try_from(m).is_err() {
        bail!("activations are [{m}, {columns}], the weight takes [m, {k}] with 1 to {} rows", i32::MAX);
    }
    Ok((storage.as_cuda_slice::<f16>()?.slice(start..end), m))
}

/// `[rows, columns]` fp16 as a tensor.
pub fn half_tensor(values: CudaSlice<f16>, rows: usize, columns: usize, device: &CudaDevice) -> Result<Tensor> {
    if values.len() != rows * columns {
        bail!("{} values cannot be a [{rows}, {columns}]", values.len());
    }
    let storage = CudaStorage::wrap_cuda_slice(values, device.clone());
    Ok(Tensor::from_storage(Storage::Cuda(storage), (rows, columns), BackpropOp::none(), false))
}

/// `values`, and zeros after them up to a multiple of `granule`.
pub fn upload_padded<T>(values: &[T], granule: usize, device: &CudaDevice) -> Result<CudaSlice<T>>
where
    T: DeviceRepr + Copy + Default + 'static,
{
    if values.len().is_multiple_of(granule) {
        return device.clone_htod(values);
    }
    let mut padded = Vec::with_capacity(values.len().next_multiple_of(granule));
    padded.extend_from_slice(values);
    padded.resize(values.len().next_multiple_of(granule), T::default());
    device.clone_htod(&padded)
}

/// A dimension as kernels take it.
pub fn dimension(value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Msg(format!("a dimension of {value} exceeds {}", i32::MAX)))
}
