//! LLM.int8 on CUDA: outlier columns are found, listed and multiplied on the device, without asking the host.

mod encode;
mod rows;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result, bail};
use half::f16;

use super::Int8Stored;
use crate::kernels::cuda::gemm::{Gemm, Operand, Type};
use crate::kernels::cuda::launch::{Grid, Launcher, address, dimension, upload_rows};
use crate::kernels::cuda::matvec::{Family, MatrixDesc};
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};
use crate::kernels::cuda::step_kernel::{CHUNK_BYTES, StepFatbins, StepKernel, WeightDecoder};
use crate::parameters;
use crate::quant::CudaMatrix;
use crate::quant::cuda::download;
use crate::step_fatbins;

pub use encode::{KERNELS as ENCODE_KERNELS, encode_rows};
pub(super) use encode::{device_bytes, encoder};
pub use rows::KERNELS as ROWS_KERNELS;

pub static KERNELS: StepFatbins = step_fatbins!("int8");

static STEP: StepKernel = StepKernel {
    fatbins: &KERNELS,
    name: "int8_step",
    has_tables: false,
    side_data_words: 0,
    // An int32 sum and the outlier columns' fp32 one.
    partial_bytes: 8,
    // A byte of code and a bit that marks outliers.
    converted_eighths: 9,
};
static BYTES: Family = Family {
    name: "int8",
    decoder: WeightDecoder::Format,
    chunk: CHUNK_BYTES,
    kernels: &[&STEP],
    product_is_float: false,
    rounds_products: true,
    multiply_rows,
    multiply_few: rows::multiply,
};

/// Rows up to which one launch quantizes: each of its blocks examines all rows.
const FEW_ROWS: usize = 16;
/// A thread examines 8 columns.
const FLAG_THREADS: u32 = 64;
/// Parts of the rows in which outliers are looked for: enough to fill a device at a long prompt, few enough that a block does some
/// work.
const FLAG_PARTS: usize = 32;
/// As in int8.cu.
const FEW_THREADS: u32 = 1024;
const LIST_THREADS: u32 = 1024;
const QUANTIZE_THREADS: u32 = 256;
const FINISH_THREADS: u32 = 256;
/// As in int8.cu.
const FINISH_COLUMNS: usize = 64;
const FINISH_ROWS: usize = 64;
const FINISH_BLOCKS_Y: usize = 256;
const DENSE_ROWS: usize = 64;
const DENSE_COLUMNS: usize = 128;
/// Rows from which outlier columns are gathered first: below, few blocks read each weight.
const GATHERED_ROWS: usize = 64;
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

    fn desc(&self) -> MatrixDesc {
        let at = |slice: &CudaSlice<f32>| address(slice, &self.device);
        desc((self.n, self.k), address(&self.codes, &self.device), at(&self.absmax), self.threshold)
    }
}

/// # Safety
/// As [`MatrixDesc::multiply_rows`].
unsafe fn multiply_rows(matrix: &MatrixDesc, on: &dyn Launcher, x: &SharedInput, y: ProductAt) -> Result<()> {
    // Matrices that read the same rows have the same k and threshold.
    // SAFETY: the caller's promise for x.
    let Some(rows) = x.made(|| unsafe { quantize(matrix, on, x) })? else {
        bail!("activation rows were prepared for another format")
    };
    let products = x.arena.take::<i32>(x.m * matrix.n)?;
    let gathered = match rows.gathered {
        0 => None,
        _ => Some(x.arena.take::<f16>(matrix.n * matrix.stride_bytes)?),
    };
    let gathered_weights = gathered.as_ref().map_or(0, |gathered| gathered.address);
    let ProductAt { address: y, is_float: _, scale } = y;
    let call = ManyRows { y, scale, products: products.address, gathered_weights, ..many_rows(matrix, x, rows) };
    // SAFETY: all are as large as `ManyRows` says, every product is written before it is read, and what overwrites them comes
    // later on the same stream; the caller's promise for the matrix, x and y.
    unsafe {
        match matrix.n.is_multiple_of(GEMM_SIDE) {
            true => on.multiply(&call.gemm())?,
            false => call.multiply(on)?,
        }
        call.finish(on)
    }
}

/// Addresses of quantized rows of activations, for all matrices that read them.
struct QuantizedRows {
    flags: u64,
    columns: u64,
    count: u64,
    codes: u64,
    row_absmax: u64,
    gathered: u64,
}

/// # Safety
/// `x` holds rows of k, until the device's stream has come past this call.
unsafe fn quantize(matrix: &MatrixDesc, on: &dyn Launcher, x: &SharedInput) -> Result<QuantizedRows> {
    let stride = matrix.stride_bytes;
    let rows = QuantizedRows {
        flags: x.keep::<u8>(flag_bytes(x.m, stride))?,
        columns: x.keep::<i32>(matrix.k)?,
        count: x.keep::<i32>(1)?,
        codes: x.keep::<u8>(x.m * stride)?,
        row_absmax: x.keep::<f32>(x.m)?,
        gathered: if gathers(x.m, matrix.threshold) { x.keep::<f16>(x.m * stride)? } else { 0 },
    };
    // SAFETY: all are as large as `ManyRows` says. The launches write all that is read of them: codes with their padding, every
    // row's absmax, the count and as many columns. The caller's promise for x.
    unsafe { many_rows(matrix, x, &rows).quantize(on) }?;
    Ok(rows)
}

/// The product of these rows, without a place for it yet.
fn many_rows(matrix: &MatrixDesc, x: &SharedInput, rows: &QuantizedRows) -> ManyRows {
    let QuantizedRows { flags, columns, count, codes, row_absmax, gathered } = *rows;
    ManyRows {
        m: x.m,
        n: matrix.n,
        k: matrix.k,
        stride: matrix.stride_bytes,
        threshold: matrix.threshold,
        weight: matrix.weight,
        absmax: matrix.scales,
        x: x.at,
        y: 0,
        scale: 1.0,
        flags,
        columns,
        count,
        total: x.outlier_columns,
        codes,
        row_absmax,
        products: 0,
        gathered,
        gathered_weights: 0,
    }
}

/// True if m rows are worth gathering outlier columns first, of activations and weights.
pub fn gathers(m: usize, threshold: f32) -> bool {
    m >= GATHERED_ROWS && !threshold.is_nan()
}

/// Bytes of flags that quantizing m rows needs.
pub fn flag_bytes(m: usize, stride: usize) -> usize {
    if m <= FEW_ROWS { 0 } else { FLAG_PARTS.min(m) * stride / 8 }
}

/// `[n, k]` codes in rows padded to whole chunks, and each row's absmax.
pub fn desc((n, k): (usize, usize), weight: u64, absmax: u64, threshold: f32) -> MatrixDesc {
    MatrixDesc {
        family: &BYTES,
        n,
        k,
        weight,
        stride_bytes: stride(k),
        scales: absmax,
        nested: 0,
        offset: 0.0,
        constants: 0,
        threshold: device_threshold(threshold),
    }
}

/// A product with many rows: launches of int8.cu, on memory that lies where a launcher runs.
#[derive(Debug, Clone, Copy)]
pub struct ManyRows {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Codes from row to row, of weight and activations: rows are padded with zeros to whole chunks.
    pub stride: usize,
    /// NaN where outlier columns are off.
    pub threshold: f32,
    /// `[n, stride]` bytes.
    pub weight: u64,
    /// fp32 `[n]`.
    pub absmax: u64,
    /// fp16 `[m, k]`.
    pub x: u64,
    /// fp16 `[m, n]`.
    pub y: u64,
    /// A power of two that results are multiplied by before they are rounded.
    pub scale: f32,
    /// [`flag_bytes`] bytes: a bit for each column that has an outlier, in each part of the rows.
    pub flags: u64,
    /// int32 `[k]`, of which the first `count` are outlier columns, ascending.
    pub columns: u64,
    /// int32 `[1]`.
    pub count: u64,
    /// uint64 `[1]` that the count is added to, or 0.
    pub total: u64,
    /// `[m, stride]` bytes.
    pub codes: u64,
    /// fp32 `[m]`.
    pub row_absmax: u64,
    /// int32 `[m, n]`.
    pub products: u64,
    /// fp16 `[m, stride]` and `[n, stride]` for outlier columns of activations and weights, or both 0: where [`gathers`] says so.
    pub gathered: u64,
    pub gathered_weights: u64,
}

impl ManyRows {
    /// Finds the outlier columns and encodes the others.
    ///
    /// # Safety
    /// Everything that [`ManyRows`] names is as large as it says and good until the launcher has come past the call.
    pub unsafe fn quantize(&self, on: &dyn Launcher) -> Result<()> {
        let Self { x, flags, columns, count, total, codes, row_absmax, threshold, .. } = *self;
        let (m, k, stride) = (dimension(self.m)?, dimension(self.k)?, dimension(self.stride)?);
        let bytes = self.stride / 8;
        if self.m <= FEW_ROWS {
            let grid = Grid { shared_bytes: bytes, ..Grid::new((self.m, 1), FEW_THREADS).overlapping() };
            let parameters = parameters![x, columns, count, total, codes, row_absmax, m, k, stride, threshold];
            // SAFETY: parameters as int8.cu declares them, and shared memory as it says. Each row of x, codes and row_absmax has a
            // block, of which the first makes the list.
            return unsafe { on.launch(&KERNELS.plain, "int8_quantize_few", grid, parameters) };
        }
        let n_parts = FLAG_PARTS.min(self.m);
        let flag = Grid::new((bytes.div_ceil(FLAG_THREADS as usize), n_parts), FLAG_THREADS);
        let (list, encode) = (Grid::new((1, 1), LIST_THREADS), Grid::new((self.m, 1), QUANTIZE_THREADS));
        let parts = dimension(n_parts)?;
        // SAFETY: parameters as int8.cu declares them. A thread past the flags returns; the list is made by one block; each row of
        // x, codes and row_absmax has a block.
        unsafe {
            on.launch(&KERNELS.plain, "int8_outlier_flags", flag, parameters![x, flags, m, k, stride, threshold])?;
            on.launch(
                &KERNELS.plain,
                "int8_outlier_list",
                list,
                parameters![flags, columns, count, total, parts, stride],
            )?;
            let parameters = parameters![x, flags, codes, row_absmax, k, stride, threshold];
            on.launch(&KERNELS.plain, "int8_quantize_rows", encode, parameters)?;
            if self.gathered == 0 {
                return Ok(());
            }
            let gathered = self.gathered;
            on.launch(&KERNELS.plain, "int8_gather_rows", encode, parameters![x, columns, count, gathered, k, stride])
        }
    }

    /// The int32 products through cuBLAS, which takes sides of whole [`GEMM_SIDE`]s.
    fn gemm(&self) -> Gemm {
        let operand = |address, stride| Operand { address, stride, batch_stride: 0 };
        Gemm {
            m: self.m,
            n: self.n,
            // Padding is zeros on both sides.
            k: self.stride,
            batch: 1,
            a: operand(self.codes, self.stride),
            b: operand(self.weight, self.stride),
            b_is_transposed: true,
            out: operand(self.products, self.n),
            alpha: 1.0,
            from: Type::Byte,
            to: Type::Int,
        }
    }

    /// The int32 products.
    ///
    /// # Safety
    /// As [`Self::quantize`].
    pub unsafe fn multiply(&self, on: &dyn Launcher) -> Result<()> {
        let Self { codes, weight, products, .. } = *self;
        let (m, n, stride) = (dimension(self.m)?, dimension(self.n)?, dimension(self.stride)?);
        let grid = Grid::over(self.m * self.n, FINISH_THREADS);
        let parameters = parameters![codes, weight, products, m, n, stride];
        // SAFETY: parameters as int8.cu declares them; a thread for each product.
        unsafe { on.launch(&KERNELS.plain, "int8_products", grid, parameters) }
    }

    /// y, of the products and the outlier columns.
    ///
    /// # Safety
    /// As [`Self::quantize`].
    pub unsafe fn finish(&self, on: &dyn Launcher) -> Result<()> {
        let Self {
            products, weight, absmax, row_absmax, columns, count, x, y, scale, gathered, gathered_weights, ..
        } = *self;
        let (m, n, k, stride) = (dimension(self.m)?, dimension(self.n)?, dimension(self.k)?, dimension(self.stride)?);
        if gathered != 0 {
            let blocks = (self.n.div_ceil(DENSE_COLUMNS), self.m.div_ceil(DENSE_ROWS));
            let weights = parameters![weight, absmax, columns, count, gathered_weights, stride];
            let finish =
                parameters![products, gathered_weights, absmax, row_absmax, count, gathered, y, scale, m, n, stride];
            // SAFETY: parameters as int8.cu declares them; the columns listed are below k, and each row has a block that writes all that the
            // second launch reads of it.
            return unsafe {
                on.launch(&KERNELS.plain, "int8_gather_weights", Grid::new((self.n, 1), FINISH_THREADS), weights)?;
                on.launch(&KERNELS.plain, "int8_finish_gathered", Grid::new(blocks, FINISH_THREADS), finish)
            };
        }
        let blocks = (self.n.div_ceil(FINISH_COLUMNS), self.m.div_ceil(FINISH_ROWS).min(FINISH_BLOCKS_Y));
        let grid = Grid::new(blocks, FINISH_THREADS);
        let parameters =
            parameters![products, weight, absmax, row_absmax, columns, count, x, y, scale, m, n, k, stride];
        // SAFETY: parameters as int8.cu declares them; the columns listed are below k, and a thread past n returns.
        unsafe { on.launch(&KERNELS.plain, "int8_finish_rows", grid, parameters) }
    }
}
