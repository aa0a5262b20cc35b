//! The pool of a CUDA device, through the driver's own counters.

use anyhow::Result;
use candle_core::{CudaDevice, Device};

use super::{MeasuredBandwidth, MemoryPool, PoolUse};
use crate::kernels::cuda::{bandwidth, memory, open};

/// The pool of `device`; `None` on the CPU.
pub fn of(device: &Device) -> Option<&dyn MemoryPool> {
    device.as_cuda_device().ok().map(|device| device as &dyn MemoryPool)
}

impl MemoryPool for CudaDevice {
    fn read(&self) -> Result<PoolUse> {
        let memory::DevicePoolUse { used_bytes, used_high_bytes, reserved_bytes, reserved_high_bytes } =
            memory::pool_use(self)?;
        Ok(PoolUse { used_bytes, used_high_bytes, reserved_bytes, reserved_high_bytes })
    }

    fn reset_high_marks(&self) -> Result<()> {
        Ok(memory::reset_high_marks(self)?)
    }

    fn release_unused(&self) -> Result<()> {
        Ok(memory::release_unused(self)?)
    }

    /// The threshold that `kernels::cuda::open` sets: all of it, until [`Self::release_unused`].
    fn release_threshold_bytes(&self) -> u64 {
        u64::MAX
    }
}

/// Returns whether the cause of `error` is an allocation that did not fit the device.
pub fn is_out_of_memory(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref()).any(memory::is_out_of_memory)
}

/// Read and copy bandwidth of device `ordinal`, for the limit that decode speed is held against.
pub fn read_bandwidth(ordinal: usize) -> Result<MeasuredBandwidth> {
    let device = open(ordinal)?;
    let (read_gb_s, copy_gb_s) = bandwidth::measure(device.as_cuda_device()?)?;
    Ok(MeasuredBandwidth { read_gb_s: Some(read_gb_s), copy_gb_s: Some(copy_gb_s), matmul_gflop_s: None })
}
