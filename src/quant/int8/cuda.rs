//! LLM.int8 on CUDA: outlier columns are found, listed and multiplied on the device, without asking the host.

mod encode;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result};

use super::Int8Stored;
use crate::kernels::cuda::gemm::{Gemm, Operand, Type};
use crate::kernels::cuda::launch::{Fatbin, Grid, address, dimension, launch, upload_rows};
use crate::kernels::cuda::matvec::{CHUNK_BYTES, Family, Streamed};
use crate::parameters;
use crate::quant::CudaMatrix;
use crate::quant::cuda::download;

pub use encode::{KERNELS as ENCODE_KERNELS, encode_rows};
pub(super) use encode::{device_bytes, encoder};

pub static KERNELS: Fatbin = Fatbin { name: "int8", image: include_bytes!(concat!(env!("OUT_DIR"), "/int8.fatbin")) };
/// A byte of code, an eighth of a byte of outlier bits and the half that both are made of.
static BYTES: Family = Family {
    fatbin: &KERNELS,
    kernels: ["int8_matvec", "int8_head"],
    chunk: CHUNK_BYTES,
    shared_eighths: 25,
    stages: 4,
    extra_words: 0,
    // An int32 sum and the outlier columns' fp32 one.
    partial_bytes: 8,
};

const FLAG_THREADS: u32 = 256;
/// Rows of blocks that look for outliers: enough to fill a device at a long prompt, few enough that a block does some work.
const FLAG_BLOCKS_Y: usize = 32;
/// `LIST_THREADS` and `QUANTIZE_THREADS` in int8.cu.
const LIST_THREADS: u32 = 1024;
const QUANTIZE_THREADS: u32 = 256;
const FINISH_THREADS: u32 = 256;
const FINISH_BLOCKS_Y: usize = 256;
/// cuBLAS multiplies bytes only in matrices whose sides are multiples of this.
const GEMM_SIDE: usize = 4;

pub(super) fn upload(stored: &Int8Stored, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let device = device.as_cuda_device()?;
    let (n, k) = (stored.n, stored.k);
    let stride = stride(k);
    let codes: Vec<u8> = stored.codes.iter().map(|code| code.cast_unsigned()).collect();
    Ok(Box::new(Int8OnDevice {
        n,
        k,
        stride,
        codes: upload_rows(&codes, k, stride, device)?,
        absmax: device.clone_htod(&stored.absmax)?,
        threshold: device_threshold(stored.threshold),
        device: device.clone(),
    }))
}

/// Codes from row to row.
fn stride(k: usize) -> usize {
    k.next_multiple_of(CHUNK_BYTES)
}

/// NaN where outlier columns are off: nothing is at least that.
fn device_threshold(threshold: f32) -> f32 {
    if threshold > 0.0 { threshold } else { f32::NAN }
}

struct Int8OnDevice {
    n: usize,
    k: usize,
    /// Codes from row to row.
    stride: usize,
    /// `[n, stride]`.
    codes: CudaSlice<u8>,
    /// `[n]`.
    absmax: CudaSlice<f32>,
    /// As [`device_threshold`] has it.
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

    fn resident_bytes(&self) -> usize {
        self.codes.len() + 4 * self.absmax.len()
    }

    fn download(&self) -> Result<Vec<Vec<u8>>> {
        Ok(vec![download(&self.codes, &self.device)?, download(&self.absmax, &self.device)?])
    }

    fn streamed(&self) -> Streamed {
        Streamed {
            family: &BYTES,
            n: self.n,
            k: self.k,
            weight: address(&self.codes, &self.device),
            stride_bytes: self.stride,
            scales: address(&self.absmax, &self.device),
            nested: 0,
            offset: 0.0,
            code: 0,
            threshold: self.threshold,
        }
    }

    unsafe fn multiply_rows(&self, x: u64, m: usize, y: u64) -> Result<()> {
        let flags = self.flag_outliers(x, m)?;
        let quantized = self.quantize(x, m, &flags)?;
        let products = self.products(m, &quantized)?;
        self.finish(x, m, &quantized, &products, y)
    }
}

/// Launches of int8.cu. `x` is fp16 `[m, k]`, as `multiply_rows` was promised.
impl Int8OnDevice {
    /// `[k]`: 1 for a column with an outlier in any row.
    fn flag_outliers(&self, x: u64, m: usize) -> Result<CudaSlice<u8>> {
        let kernel = KERNELS.kernel(&self.device, "int8_outlier_flags")?;
        let flags = self.device.alloc_zeros::<u8>(self.k)?;
        let (out, rows, k) = (address(&flags, &self.device), dimension(m)?, dimension(self.k)?);
        let grid = Grid::new((self.k.div_ceil(FLAG_THREADS as usize), m.min(FLAG_BLOCKS_Y)), FLAG_THREADS);
        // SAFETY: parameters as int8.cu declares them; a thread past k returns.
        unsafe { launch(&self.device, kernel, grid, parameters![x, out, rows, k, self.threshold]) }?;
        Ok(flags)
    }

    fn quantize(&self, x: u64, m: usize, flags: &CudaSlice<u8>) -> Result<Quantized> {
        let (k, stride) = (dimension(self.k)?, dimension(self.stride)?);
        // SAFETY: the two kernels below write all that is read of these: codes with their padding, every row's absmax, the
        // count and as many columns.
        let quantized = unsafe { self.uninitialised(m) }?;
        let at = |slice: &CudaSlice<i32>| address(slice, &self.device);
        let (flags, columns, count) = (address(flags, &self.device), at(&quantized.columns), at(&quantized.count));
        let (codes, absmax) = (address(&quantized.codes, &self.device), address(&quantized.row_absmax, &self.device));

        let list = KERNELS.kernel(&self.device, "int8_outlier_list")?;
        // SAFETY: parameters as int8.cu declares them; flags and columns are k long, and the kernel wants one block.
        unsafe { launch(&self.device, list, Grid::new((1, 1), LIST_THREADS), parameters![flags, columns, count, k]) }?;

        let rows = KERNELS.kernel(&self.device, "int8_quantize_rows")?;
        let parameters = parameters![x, flags, codes, absmax, k, stride, self.threshold];
        // SAFETY: parameters as int8.cu declares them; a block for each of the m rows of x, codes and row_absmax.
        unsafe { launch(&self.device, rows, Grid::new((m, 1), QUANTIZE_THREADS), parameters) }?;
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

    /// int32 `[m, n]`
    fn products(&self, m: usize, quantized: &Quantized) -> Result<CudaSlice<i32>> {
        // SAFETY: either product below writes all of it.
        let products = unsafe { self.device.alloc::<i32>(m * self.n) }?;
        let (out, a) = (address(&products, &self.device), address(&quantized.codes, &self.device));
        let b = address(&self.codes, &self.device);
        if self.n.is_multiple_of(GEMM_SIDE) {
            let operand = |address, stride| Operand { address, stride, batch_stride: 0 };
            let gemm = Gemm {
                m,
                n: self.n,
                // Padding is zeros on both sides.
                k: self.stride,
                batch: 1,
                a: operand(a, self.stride),
                b: operand(b, self.stride),
                b_is_transposed: true,
                out: operand(out, self.n),
                from: Type::Byte,
                to: Type::Int,
            };
            // SAFETY: all three are allocated in these sizes.
            unsafe { gemm.run(&self.device) }?;
            return Ok(products);
        }
        let kernel = KERNELS.kernel(&self.device, "int8_products")?;
        let (rows, n, stride) = (dimension(m)?, dimension(self.n)?, dimension(self.stride)?);
        let grid = Grid::over(m * self.n, FINISH_THREADS);
        // SAFETY: parameters as int8.cu declares them; a thread for each product.
        unsafe { launch(&self.device, kernel, grid, parameters![a, b, out, rows, n, stride]) }?;
        Ok(products)
    }

    fn finish(&self, x: u64, m: usize, quantized: &Quantized, products: &CudaSlice<i32>, y: u64) -> Result<()> {
        let kernel = KERNELS.kernel(&self.device, "int8_finish_rows")?;
        let at = |slice: &CudaSlice<i32>| address(slice, &self.device);
        let (products, columns, count) = (at(products), at(&quantized.columns), at(&quantized.count));
        let (weight, absmax) = (address(&self.codes, &self.device), address(&self.absmax, &self.device));
        let row_absmax = address(&quantized.row_absmax, &self.device);
        let (rows, n) = (dimension(m)?, dimension(self.n)?);
        let (k, stride) = (dimension(self.k)?, dimension(self.stride)?);
        let blocks = (self.n.div_ceil(FINISH_THREADS as usize), m.min(FINISH_BLOCKS_Y));
        let parameters = parameters![products, weight, absmax, row_absmax, columns, count, x, y, rows, n, k, stride];
        // SAFETY: parameters as int8.cu declares them; the columns listed are below k, and a thread past n returns.
        unsafe { launch(&self.device, kernel, Grid::new(blocks, FINISH_THREADS), parameters) }
    }
}
