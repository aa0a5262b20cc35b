//! Rows of a checkpoint into dense matrices on the device.

use std::ops::Range;

use candle_core::{Device, Result, bail};

use super::{DenseOnDevice, stride_bytes};
use crate::kernels::cuda::launch::{Fatbin, Grid, Launcher, address, dimension};
use crate::quant::CudaMatrix;
use crate::quant::cuda::{CudaEncoder, DeviceBytes, SourceDtype, SourceValues};
use crate::quant::dense::DenseValue;
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("cast");

const THREADS: u32 = 256;

pub(in crate::quant) fn device_bytes<T: DenseValue>(n: usize, k: usize) -> DeviceBytes {
    DeviceBytes { resident: n * stride_bytes(k, size_of::<T>()), transient: 0 }
}

pub(in crate::quant) fn encoder<T: DenseValue>(n: usize, k: usize, device: &Device) -> Result<Box<dyn CudaEncoder>> {
    if n == 0 || k == 0 {
        bail!("a weight of [{n}, {k}] has no values");
    }
    let device = device.as_cuda_device()?;
    // SAFETY: encoding writes every row, its padding included, and whoever reads before that reads what nobody relies on.
    let weight = unsafe { device.alloc(device_bytes::<T>(n, k).resident) }?;
    Ok(Box::new(DenseOnDevice {
        n,
        k,
        element_bytes: size_of::<T>(),
        stride_bytes: stride_bytes(k, size_of::<T>()),
        weight,
        device: device.clone(),
    }))
}

impl DenseOnDevice {
    fn row_address(&self, row: usize) -> u64 {
        address(&self.weight, &self.device) + (row * self.stride_bytes) as u64
    }
}

/// The matrix itself: nothing more is needed.
impl CudaEncoder for DenseOnDevice {
    fn place(&self, rows: &Range<usize>, kind: SourceDtype) -> Option<u64> {
        let own = if self.element_bytes == size_of::<f32>() { SourceDtype::F32 } else { SourceDtype::F16 };
        let is_same = kind == own && self.stride_bytes == self.k * self.element_bytes;
        is_same.then(|| self.row_address(rows.start))
    }

    unsafe fn encode(&self, rows: Range<usize>, from: SourceValues) -> Result<()> {
        assert!(rows.end <= self.n, "rows {rows:?} of {}", self.n);
        let to = self.row_address(rows.start);
        // SAFETY: the rows are the matrix's; the caller vouches for `from`.
        unsafe { cast_rows(&self.device, from, (rows.len(), self.k), self.element_bytes, to) }
    }

    fn finish(self: Box<Self>) -> Result<Box<dyn CudaMatrix>> {
        Ok(self)
    }
}

/// Casts values `[rows, k]` to fp16 or fp32, by the bytes of an element, in rows padded to whole chunks at `to`.
///
/// # Safety
/// `from` and `to` are of this size on what `on` runs on, until it has come past this call.
pub unsafe fn cast_rows(
    on: &dyn Launcher,
    from: SourceValues,
    (rows, k): (usize, usize),
    element_bytes: usize,
    to: u64,
) -> Result<()> {
    let name = if element_bytes == size_of::<f32>() { "cast_to_floats" } else { "cast_to_halves" };
    let stride = stride_bytes(k, element_bytes) / element_bytes;
    let elements = rows * stride;
    let (k, stride, count) = (dimension(k)?, dimension(stride)?, dimension(elements)?);
    // SAFETY: parameters as cast.cu declares them, a thread for each element of the rows; the caller vouches for the addresses.
    unsafe { on.launch(&KERNELS, name, Grid::over(elements, THREADS), parameters![from, to, k, stride, count]) }
}
