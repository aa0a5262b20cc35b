//! LLM.int8 on CUDA: outlier columns are found, listed and multiplied on the device, without asking the host.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{CudaDevice, Device, Result, Tensor};
use half::f16;

use super::Int8Stored;
use crate::kernels::cuda::launch::{Fatbin, dimension, half_rows, half_tensor, launch};
use crate::quant::CudaMatrix;

pub static KERNELS: Fatbin = Fatbin { name: "int8", image: include_bytes!(concat!(env!("OUT_DIR"), "/int8.fatbin")) };

/// Bytes that a lane loads at once: rows of codes are padded to whole ones.
const CHUNK_BYTES: usize = 16;
const FLAG_THREADS: u32 = 256;
/// Rows of blocks that look for outliers: enough to fill a device at a long prompt, few enough that a block does some work.
const FLAG_BLOCKS_Y: usize = 32;
/// `LIST_THREADS`, `QUANTIZE_THREADS` and `MATMUL_WARPS` in int8.cu.
const LIST_THREADS: u32 = 1024;
const QUANTIZE_THREADS: u32 = 256;
const MATMUL_WARPS: usize = 4;
const LANES: u32 = 32;
/// The most rows of x that a block multiplies.
const MATMUL_ROWS: usize = 8;

pub(super) fn upload(stored: &Int8Stored, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let device = device.as_cuda_device()?;
    let (n, k, codes) = (stored.n, stored.k, &stored.codes);
    let stride = k.next_multiple_of(CHUNK_BYTES);
    let codes = if stride == k { device.clone_htod(codes)? } else { device.clone_htod(&padded(codes, k, stride))? };
    Ok(Box::new(Int8OnDevice {
        n,
        k,
        stride,
        codes,
        absmax: device.clone_htod(&stored.absmax)?,
        threshold: if stored.threshold > 0.0 { stored.threshold } else { f32::NAN },
        device: device.clone(),
    }))
}

/// Rows of `k` codes, each followed by zeros up to `stride`.
fn padded(codes: &[i8], k: usize, stride: usize) -> Vec<i8> {
    let mut rows = vec![0; codes.len() / k * stride];
    rows.chunks_exact_mut(stride).zip(codes.chunks_exact(k)).for_each(|(row, codes)| row[..k].copy_from_slice(codes));
    rows
}

struct Int8OnDevice {
    n: usize,
    k: usize,
    /// Codes from row to row.
    stride: usize,
    /// `[n, stride]`.
    codes: CudaSlice<i8>,
    /// `[n]`.
    absmax: CudaSlice<f32>,
    /// NaN where outlier columns are off: nothing is at least that.
    threshold: f32,
    device: CudaDevice,
}

/// Activations of one call as the product takes them.
struct Quantized {
    /// `[m, stride]`.
    codes: CudaSlice<i8>,
    /// `[m]`.
    row_absmax: CudaSlice<f32>,
    /// `[k]`, of which the first `count` are outlier columns, ascending.
    columns: CudaSlice<i32>,
    /// `[1]`.
    count: CudaSlice<i32>,
}

impl CudaMatrix for Int8OnDevice {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.n * self.k + self.n * size_of::<f32>()
    }

    fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let (storage, layout) = x.storage_and_layout();
        let (rows, m) = half_rows(&storage, layout, self.k)?;
        let flags = self.flag_outliers(&rows, m)?;
        let quantized = self.quantize(&rows, m, &flags)?;
        self.matmul(&rows, m, &quantized)
    }
}

impl Int8OnDevice {
    /// `[k]`: 1 for a column with an outlier in any row.
    fn flag_outliers(&self, x: &CudaView<'_, f16>, m: usize) -> Result<CudaSlice<u8>> {
        let kernel = KERNELS.kernel(&self.device, "int8_outlier_flags")?;
        let stream = self.device.cuda_stream();
        let mut flags = self.device.alloc_zeros::<u8>(self.k)?;
        let (m_argument, k) = (dimension(m)?, dimension(self.k)?);
        let mut arguments = stream.launch_builder(&kernel);
        arguments.arg(x).arg(&mut flags).arg(&m_argument).arg(&k).arg(&self.threshold);
        let blocks = (self.k.div_ceil(FLAG_THREADS as usize), m.min(FLAG_BLOCKS_Y));
        // SAFETY: parameters as int8.cu declares them; x is m * k by `half_rows`, flags is k; a thread past k returns.
        unsafe { launch("int8_outlier_flags", &mut arguments, blocks, FLAG_THREADS) }?;
        Ok(flags)
    }

    fn quantize(&self, x: &CudaView<'_, f16>, m: usize, flags: &CudaSlice<u8>) -> Result<Quantized> {
        let list = KERNELS.kernel(&self.device, "int8_outlier_list")?;
        let rows = KERNELS.kernel(&self.device, "int8_quantize_rows")?;
        let stream = self.device.cuda_stream();
        let (k, stride) = (dimension(self.k)?, dimension(self.stride)?);
        // SAFETY: the two kernels below write all that is read of these: codes with their padding, every row's absmax, the
        // count and as many columns.
        let mut quantized = unsafe { self.uninitialised(m) }?;

        let mut arguments = stream.launch_builder(&list);
        arguments.arg(flags).arg(&mut quantized.columns).arg(&mut quantized.count).arg(&k);
        // SAFETY: parameters as int8.cu declares them; flags and columns are k long, and the kernel wants one block.
        unsafe { launch("int8_outlier_list", &mut arguments, (1, 1), LIST_THREADS) }?;

        let mut arguments = stream.launch_builder(&rows);
        arguments.arg(x).arg(flags).arg(&mut quantized.codes).arg(&mut quantized.row_absmax);
        arguments.arg(&k).arg(&stride).arg(&self.threshold);
        // SAFETY: parameters as int8.cu declares them; a block for each of the m rows of x, codes and row_absmax.
        unsafe { launch("int8_quantize_rows", &mut arguments, (m, 1), QUANTIZE_THREADS) }?;
        Ok(quantized)
    }

    /// # Safety
    /// Nothing may be read before it is written.
    unsafe fn uninitialised(&self, m: usize) -> Result<Quantized> {
        // SAFETY: the caller's promise.
        unsafe {
            Ok(Quantized {
                codes: self.device.alloc(m * self.stride)?,
                row_absmax: self.device.alloc(m)?,
                columns: self.device.alloc(self.k)?,
                count: self.device.alloc(1)?,
            })
        }
    }

    fn matmul(&self, x: &CudaView<'_, f16>, m: usize, quantized: &Quantized) -> Result<Tensor> {
        let rows = m.next_power_of_two().min(MATMUL_ROWS);
        let name = format!("int8_matmul_{rows}");
        let kernel = KERNELS.kernel(&self.device, &name)?;
        let stream = self.device.cuda_stream();
        // SAFETY: the kernel writes all m * n values before anything reads them.
        let mut y = unsafe { self.device.alloc::<f16>(m * self.n) }?;
        let (m_argument, n, k, stride) =
            (dimension(m)?, dimension(self.n)?, dimension(self.k)?, dimension(self.stride)?);
        let mut arguments = stream.launch_builder(&kernel);
        arguments.arg(&self.codes).arg(&self.absmax).arg(&quantized.codes).arg(&quantized.row_absmax);
        arguments.arg(&quantized.columns).arg(&quantized.count).arg(x).arg(&mut y);
        arguments.arg(&m_argument).arg(&n).arg(&k).arg(&stride);
        let blocks = (self.n.div_ceil(MATMUL_WARPS), m.div_ceil(rows));
        // SAFETY: parameters as int8.cu declares them; codes are rows of `stride` on both sides, the columns listed are
        // below k; rows past m and columns past n are masked.
        unsafe { launch(&name, &mut arguments, blocks, MATMUL_WARPS as u32 * LANES) }?;
        half_tensor(y, m, self.n, &self.device)
    }
}
