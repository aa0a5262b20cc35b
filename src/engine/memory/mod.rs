//! The memory of a session's device: its pool's own counters, whether an error says that it is full, and how fast it is read.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;

pub use cuda::{is_out_of_memory, of, read_bandwidth};

use anyhow::Result;

use crate::error::Refused;

/// Bytes of a pool, now and at most since its marks were reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct PoolUse {
    /// Held by live allocations.
    pub used_bytes: u64,
    pub used_high_bytes: u64,
    /// Taken from the device: `used_bytes` and what the pool keeps for later.
    pub reserved_bytes: u64,
    pub reserved_high_bytes: u64,
}

/// The pool that a session allocates from. Every call waits until the device has done what was queued.
pub trait MemoryPool {
    fn read(&self) -> Result<PoolUse>;

    /// Starts both high-water marks anew from what is in use.
    fn reset_high_marks(&self) -> Result<()>;

    /// Gives unused memory back to the device.
    fn release_unused(&self) -> Result<()>;

    /// Unused bytes that the pool keeps at a synchronisation.
    fn release_threshold_bytes(&self) -> u64;
}

/// Says of an allocation that did not fit how large it was and what for.
pub fn named<T, E: Into<anyhow::Error>>(
    allocated: std::result::Result<T, E>,
    bytes: usize,
    what: impl FnOnce() -> String,
) -> Result<T> {
    allocated.map_err(|error| {
        let error: anyhow::Error = error.into();
        match is_out_of_memory(&error) {
            true => error.context(Refused { bytes: bytes as u64, what: what() }),
            false => error,
        }
    })
}

/// The read bandwidth of a device's memory, in 1e9 bytes a second; `None` where it was not measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct MeasuredBandwidth {
    pub read_gb_s: Option<f64>,
    /// Bytes read plus bytes written.
    pub copy_gb_s: Option<f64>,
    /// fp32 operations of a large matrix product, in 1e9 a second.
    #[serde(default)]
    pub matmul_gflop_s: Option<f64>,
}
