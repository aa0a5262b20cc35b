//! Rows of a checkpoint into NF4 codes on the device. Double quantization is the host's: its input is a sixty-fourth of the
//! values, and its fp64 mean has one order on every device.

use std::ops::Range;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result, bail};

use super::{DeviceAbsmax, Nf4OnDevice, UNIT_BYTES, stride_bytes, values};

use crate::kernels::cuda::launch::{Fatbin, Grid, Launcher, address, dimension};
use crate::quant::CudaMatrix;
use crate::quant::cuda::{CudaEncoder, DeviceBytes, SourceDtype, SourceValues};
use crate::quant::nf4::codes::THRESHOLDS;
use crate::quant::nf4::nested::{self, NESTED_BLOCK, NestedAbsmax};
use crate::quant::nf4::{Absmax, AbsmaxKind, BLOCK, CODES, stored_bytes};
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("nf4_encode");

/// `ABSMAX_THREADS` in nf4_encode.cu, and the values that so many threads take.
const ABSMAX_THREADS: u32 = 256;
const ABSMAX_VALUES: usize = 1024;
const UNIT_THREADS: u32 = 256;

pub(in crate::quant::nf4) fn device_bytes(n: usize, k: usize, kind: AbsmaxKind) -> DeviceBytes {
    let blocks = (n * k).div_ceil(BLOCK);
    let plain = blocks * size_of::<f32>();
    let code = (CODES.len() + nested::VALUES.len()) * size_of::<f32>();
    let (absmax, transient) = match kind {
        AbsmaxKind::Plain => (plain, 0),
        AbsmaxKind::Nested => {
            let words = blocks.next_multiple_of(size_of::<u32>());
            (words + blocks.div_ceil(NESTED_BLOCK) * size_of::<f32>(), plain)
        }
    };
    DeviceBytes { resident: n * stride_bytes(k) + absmax + code, transient }
}

pub(in crate::quant::nf4) fn encoder(
    n: usize,
    k: usize,
    kind: AbsmaxKind,
    device: &Device,
) -> Result<Box<dyn CudaEncoder>> {
    if n == 0 || k == 0 {
        bail!("a weight of [{n}, {k}] has no values");
    }
    let device = device.as_cuda_device()?;
    // SAFETY: encoding writes every unit, padding included, and every absmax; nobody reads them before.
    let (chunks, absmax) = unsafe { (device.alloc(n * stride_bytes(k))?, device.alloc((n * k).div_ceil(BLOCK))?) };
    Ok(Box::new(Encoder { n, k, kind, chunks, absmax, device: device.clone() }))
}

struct Encoder {
    n: usize,
    k: usize,
    kind: AbsmaxKind,
    /// As the matrix will have them.
    chunks: CudaSlice<u8>,
    /// fp32, one for each block.
    absmax: CudaSlice<f32>,
    device: CudaDevice,
}

impl CudaEncoder for Encoder {
    fn place(&self, _rows: &Range<usize>, _kind: SourceDtype) -> Option<u64> {
        None
    }

    unsafe fn encode(&self, rows: Range<usize>, from: SourceValues) -> Result<()> {
        let (first, end) = (rows.start * self.k, rows.end * self.k);
        assert!(rows.end <= self.n && first.is_multiple_of(BLOCK), "rows {rows:?} of {}", self.n);
        assert!(rows.end == self.n || end.is_multiple_of(BLOCK), "rows {rows:?} end within a block");
        let absmax = address(&self.absmax, &self.device) + (first / BLOCK * size_of::<f32>()) as u64;
        let chunks = address(&self.chunks, &self.device) + (rows.start * stride_bytes(self.k)) as u64;
        // SAFETY: the rows are the matrix's and begin with a block; the caller vouches for `from`.
        unsafe { encode_rows(&self.device, from, (rows.len(), self.k), absmax, chunks) }
    }

    fn finish(self: Box<Self>) -> Result<Box<dyn CudaMatrix>> {
        let Self { n, k, kind, chunks, absmax, device } = *self;
        let absmax = match kind {
            AbsmaxKind::Plain => DeviceAbsmax::Plain(absmax),
            AbsmaxKind::Nested => {
                // Waits for the stream to come past all that was queued.
                let values = device.clone_dtoh(&absmax)?;
                DeviceAbsmax::upload(&Absmax::Nested(NestedAbsmax::quantize(values)), &device)?
            }
        };
        let (stored_bytes, code) = (stored_bytes(n, k, kind), device.clone_htod(&values())?);
        Ok(Box::new(Nf4OnDevice { n, k, stored_bytes, chunks, absmax, code, device }))
    }
}

/// Encodes values `[rows, k]`, the first of a block, into one fp32 absmax a block and rows of whole chunks.
///
/// # Safety
/// The addresses are of this size on what `on` runs on, until it has come past this call.
pub unsafe fn encode_rows(
    on: &dyn Launcher,
    from: SourceValues,
    (rows, k): (usize, usize),
    absmax: u64,
    chunks: u64,
) -> Result<()> {
    let (values, units_per_row) = (rows * k, stride_bytes(k) / UNIT_BYTES);
    let threads = rows * units_per_row;
    let (blocks, encode) =
        (Grid::new((values.div_ceil(ABSMAX_VALUES), 1), ABSMAX_THREADS), Grid::over(threads, UNIT_THREADS));
    let (k, units, count, threads) =
        (dimension(k)?, dimension(units_per_row)?, dimension(values)?, dimension(threads)?);
    let thresholds = THRESHOLDS;
    // SAFETY: parameters as nf4_encode.cu declares them, a thread for four values and one for each unit; the caller vouches for
    // the addresses.
    unsafe {
        on.launch(&KERNELS, "nf4_block_absmax", blocks, parameters![from, absmax, count])?;
        let parameters = parameters![from, absmax, chunks, thresholds, k, units, count, threads];
        on.launch(&KERNELS, "nf4_encode_units", encode, parameters)
    }
}
