//! Rows of a checkpoint into LLM.int8 codes on the device.

use std::ops::Range;

use candle_core::{Device, Result, bail};

use super::{Int8OnDevice, device_threshold, stride};
use crate::kernels::cuda::launch::{Fatbin, Grid, Launcher, address, dimension};
use crate::quant::CudaMatrix;
use crate::quant::cuda::{CudaEncoder, DeviceBytes, SourceDtype, SourceValues};
use crate::quant::int8::check_columns;
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("int8_encode");

/// `ENCODE_THREADS` in int8_encode.cu.
const THREADS: u32 = 256;

pub(in crate::quant::int8) fn device_bytes(n: usize, k: usize) -> DeviceBytes {
    DeviceBytes { resident: n * stride(k) + n * size_of::<f32>(), transient: 0 }
}

pub(in crate::quant::int8) fn encoder(
    n: usize,
    k: usize,
    threshold: f32,
    device: &Device,
) -> Result<Box<dyn CudaEncoder>> {
    if n == 0 || k == 0 {
        bail!("a weight of [{n}, {k}] has no values");
    }
    check_columns(n, k)?;
    let device = device.as_cuda_device()?;
    // SAFETY: encoding writes every row's codes with their padding, and its absmax; nobody reads them before.
    let (codes, absmax) = unsafe { (device.alloc(n * stride(k))?, device.alloc(n)?) };
    let threshold = device_threshold(threshold);
    Ok(Box::new(Int8OnDevice { n, k, stride: stride(k), codes, absmax, threshold, device: device.clone() }))
}

/// The matrix itself: nothing more is needed.
impl CudaEncoder for Int8OnDevice {
    fn place(&self, _rows: &Range<usize>, _kind: SourceDtype) -> Option<u64> {
        None
    }

    unsafe fn encode(&self, rows: Range<usize>, from: SourceValues) -> Result<()> {
        assert!(rows.end <= self.n, "rows {rows:?} of {}", self.n);
        let codes = address(&self.codes, &self.device) + (rows.start * self.stride) as u64;
        let absmax = address(&self.absmax, &self.device) + (rows.start * size_of::<f32>()) as u64;
        // SAFETY: the rows are the matrix's; the caller vouches for `from`.
        unsafe { encode_rows(&self.device, from, (rows.len(), self.k), codes, absmax) }
    }

    fn finish(self: Box<Self>) -> Result<Box<dyn CudaMatrix>> {
        Ok(self)
    }
}

/// Encodes values `[rows, k]` into codes, in rows padded to whole chunks, and one absmax a row.
///
/// # Safety
/// The addresses are of this size on what `on` runs on, until it has come past this call.
pub unsafe fn encode_rows(
    on: &dyn Launcher,
    from: SourceValues,
    (rows, k): (usize, usize),
    codes: u64,
    absmax: u64,
) -> Result<()> {
    let (grid, k, stride) = (Grid::new((rows, 1), THREADS), dimension(k)?, dimension(stride(k))?);
    // SAFETY: parameters as int8_encode.cu declares them, a block for each row; the caller vouches for the addresses.
    unsafe { on.launch(&KERNELS, "int8_encode_rows", grid, parameters![from, codes, absmax, k, stride]) }
}
