//! The device's memory pool: candle allocates from it, and its own high-water marks give exact peaks without polling.

use candle_core::cuda_backend::CudaError;
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};
use candle_core::{CudaDevice, Error, Result};

use sys::CUmemPool_attribute as attribute;

/// Bytes of the pool, now and at most since [`reset_high_marks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePoolUse {
    /// Held by live allocations.
    pub used_bytes: u64,
    pub used_high_bytes: u64,
    /// Taken from the device: `used_bytes` and what the pool keeps for later.
    pub reserved_bytes: u64,
    pub reserved_high_bytes: u64,
}

/// The pool's state when all that was queued on the device's stream is done.
pub fn pool_use(device: &CudaDevice) -> Result<DevicePoolUse> {
    let pool = synchronized_pool(device)?;
    Ok(DevicePoolUse {
        used_bytes: read(pool, attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        used_high_bytes: read(pool, attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        reserved_bytes: read(pool, attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        reserved_high_bytes: read(pool, attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
    })
}

/// Sets both high-water marks to what is in use now.
pub fn reset_high_marks(device: &CudaDevice) -> Result<()> {
    let pool = synchronized_pool(device)?;
    // The driver takes no other value than zero here, and starts again from the current one.
    write(pool, attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
    write(pool, attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, 0)
}

/// How many unused bytes the pool keeps at a synchronisation; the driver's own choice is none, which makes the next
/// allocation slow.
pub fn set_release_threshold(device: &CudaDevice, bytes: u64) -> Result<()> {
    write(synchronized_pool(device)?, attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, bytes)
}

/// Gives unused memory back to the device.
pub fn release_unused(device: &CudaDevice) -> Result<()> {
    let pool = synchronized_pool(device)?;
    // SAFETY: the pool is the device's own, which lives as long as its context.
    unsafe { result::mem_pool::trim_to(pool, 0) }.map_err(driver_error)
}

/// Free and total bytes of the device, all processes counted.
pub fn free_and_total_bytes(device: &CudaDevice) -> Result<(u64, u64)> {
    let (free, total) = device.cuda_stream().context().mem_get_info().map_err(driver_error)?;
    Ok((free as u64, total as u64))
}

/// Returns whether the error is an allocation that did not fit. The pool then holds all it could get: see [`release_unused`].
pub fn is_out_of_memory(error: &Error) -> bool {
    match error {
        Error::Cuda(inner) => match inner.downcast_ref::<CudaError>() {
            Some(CudaError::Cuda(DriverError(code))) => *code == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY,
            _ => false,
        },
        Error::Context { inner, .. } | Error::WithBacktrace { inner, .. } | Error::WithPath { inner, .. } => {
            is_out_of_memory(inner)
        }
        _ => false,
    }
}

pub(super) fn driver_error(error: DriverError) -> Error {
    Error::Cuda(Box::new(CudaError::Cuda(error)))
}

/// The pool that stream-ordered allocations of this device come from, after the stream has drained.
fn synchronized_pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let stream = device.cuda_stream();
    stream.synchronize().map_err(driver_error)?;
    // SAFETY: the device number comes from a live context.
    unsafe { result::device::get_mem_pool(stream.context().cu_device()) }.map_err(driver_error)
}

fn read(pool: sys::CUmemoryPool, attribute: attribute) -> Result<u64> {
    let mut value = 0u64;
    // SAFETY: every attribute read here is a 64-bit count (cuMemPoolGetAttribute), and the pool is live.
    unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.map_err(driver_error)?;
    Ok(value)
}

fn write(pool: sys::CUmemoryPool, attribute: attribute, mut value: u64) -> Result<()> {
    // SAFETY: every attribute written here is a 64-bit count (cuMemPoolSetAttribute), and the pool is live.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) }.map_err(driver_error)
}
