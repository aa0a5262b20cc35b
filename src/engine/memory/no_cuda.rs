//! Stands in for the device's memory in a build without CUDA.

use anyhow::Result;
use candle_core::Device;

use super::{MeasuredBandwidth, MemoryPool};

/// The CPU has no pool.
pub fn of(_device: &Device) -> Option<&dyn MemoryPool> {
    None
}

/// No device can be full.
pub fn is_out_of_memory(_error: &anyhow::Error) -> bool {
    false
}

/// Nothing is measured.
pub fn read_bandwidth(_ordinal: usize) -> Result<MeasuredBandwidth> {
    Ok(MeasuredBandwidth::default())
}
