//! How fast a device's memory is read and copied, by the device's own clock.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, sys::CUevent_flags};
use candle_core::{CudaDevice, Result};

use super::launch::address;
use super::memory::{driver_error, free_and_total_bytes};
use super::rows::RowKernels;
use super::step_kernel::DeviceProperties;

/// Far more than any last-level cache, and little of any device that a model fits on.
const BYTES: usize = 2 << 30;
const PASSES: usize = 6;
/// Blocks of 512 threads on each multiprocessor: as many as fit.
const BLOCKS: usize = 4;

/// Read and copy bandwidth in 1e9 bytes a second, the best of some passes over 2 GiB or a quarter of what is free. A copy
/// counts what it reads and what it writes.
pub fn measure(device: &CudaDevice) -> Result<(f64, f64)> {
    let (free_bytes, _) = free_and_total_bytes(device)?;
    let bytes = BYTES.min(usize::try_from(free_bytes / 4).unwrap_or(BYTES)) / 32 * 16;
    let from: CudaSlice<u8> = device.alloc_zeros(bytes)?;
    let mut to: CudaSlice<u8> = device.alloc_zeros(bytes)?;
    let blocks = BLOCKS * DeviceProperties::of(device)?.multiprocessors;
    let (source, sink) = (address(&from, device), address(&to, device));
    let read_s = best_s(device, &mut || {
        // SAFETY: `from` holds this many words of 16 bytes, `to` at least one of 4.
        unsafe { RowKernels { on: device }.read(blocks, bytes / 16, source, sink) }
    })?;
    let copy_s = best_s(device, &mut || device.memcpy_dtod(&from, &mut to))?;
    let gb = bytes as f64 / 1e9;
    Ok((gb / read_s, 2.0 * gb / copy_s))
}

fn best_s(device: &CudaDevice, pass: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let stream = device.cuda_stream();
    let mark = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver_error);
    let mut best_ms = f32::INFINITY;
    for _ in 0..PASSES {
        let begin = mark()?;
        pass()?;
        let end = mark()?;
        end.synchronize().map_err(driver_error)?;
        best_ms = best_ms.min(begin.elapsed_ms(&end).map_err(driver_error)?);
    }
    Ok(f64::from(best_ms) / 1e3)
}
