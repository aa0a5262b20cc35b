//! NF4 on CUDA: one row and few rows multiply the codes as they stream; many go through fp16 weights made for the call.

mod encode;
mod rows;

use std::ops::Range;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Device, Result};
use half::f16;

use super::nested::{self, NestedAbsmax};
use super::tile::tile_rows;
use super::{Absmax, BLOCK, CODES, Nf4Stored};
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

pub static KERNELS: StepFatbins = step_fatbins!("nf4");

const fn step(name: &'static str, side_data_words: usize) -> StepKernel {
    StepKernel {
        fatbins: &KERNELS,
        name,
        has_tables: true,
        side_data_words,
        partial_bytes: size_of::<f32>(),
        converted_eighths: 0,
    }
}
static NESTED_STEP: StepKernel = step("nf4_nested_step", 1);
static PLAIN_STEP: StepKernel = step("nf4_plain_step", 1);
static NESTED_CROSSING_STEP: StepKernel = step("nf4_nested_crossing_step", 0);
static PLAIN_CROSSING_STEP: StepKernel = step("nf4_plain_crossing_step", 0);

const fn family(name: &'static str, kernels: &'static [&'static StepKernel]) -> Family {
    Family {
        name,
        decoder: WeightDecoder::Format,
        chunk: CHUNK_ELEMENTS,
        kernels,
        product_is_float: false,
        rounds_products: false,
        multiply_rows,
        multiply_few: rows::multiply,
    }
}
// The kernels for blocks that cross rows read the others too.
static NESTED: Family = family("nf4_nested", &[&NESTED_STEP, &NESTED_CROSSING_STEP]);
static PLAIN: Family = family("nf4_plain", &[&PLAIN_STEP, &PLAIN_CROSSING_STEP]);
static NESTED_CROSSING: Family = family("nf4_nested", &[&NESTED_CROSSING_STEP]);
static PLAIN_CROSSING: Family = family("nf4_plain", &[&PLAIN_CROSSING_STEP]);

const CHUNK_ELEMENTS: usize = 2 * CHUNK_BYTES;
/// Half a chunk is reordered by itself: two blocks.
const HALF_BYTES: usize = CHUNK_BYTES / 2;
/// Bytes that stay together: 16 elements.
const UNIT_BYTES: usize = 8;
const DEQUANTIZE_THREADS: u32 = 256;

pub(super) fn upload(stored: &Nf4Stored, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let device = device.as_cuda_device()?;
    Ok(Box::new(Nf4OnDevice {
        n: stored.n,
        k: stored.k,
        stored_bytes: stored.packed.len() + stored.absmax.stored_bytes(),
        chunks: device.clone_htod(&chunks(stored.n, stored.k, &stored.packed))?,
        absmax: DeviceAbsmax::upload(&stored.absmax, device)?,
        code: device.clone_htod(&values())?,
        device: device.clone(),
    }))
}

/// Bytes from row to row.
fn stride_bytes(k: usize) -> usize {
    k.div_ceil(CHUNK_ELEMENTS) * CHUNK_BYTES
}

/// Values of the 16 codes, then of the 256 absmax codes.
pub fn values() -> Vec<f32> {
    CODES.iter().chain(&nested::VALUES[..]).copied().collect()
}

/// Rows of whole chunks, their units in the order that nf4.cu draws, of the stored codes.
pub fn chunks(n: usize, k: usize, packed: &[u8]) -> Vec<u8> {
    let stride = stride_bytes(k);
    let mut rows = vec![0u8; n * stride];
    for (row, out) in rows.chunks_exact_mut(stride).enumerate() {
        let mut natural = vec![0u8; stride];
        if k.is_multiple_of(2) {
            natural[..k / 2].copy_from_slice(&packed[row * k / 2..][..k / 2]);
        } else {
            let nibble = |column: usize| super::code(packed, row * k + column);
            (0..k).for_each(|column| natural[column / 2] |= nibble(column) << if column % 2 == 0 { 4 } else { 0 });
        }
        for (from, to) in natural.chunks_exact(HALF_BYTES).zip(out.chunks_exact_mut(HALF_BYTES)) {
            for (unit, bytes) in from.chunks_exact(UNIT_BYTES).enumerate() {
                // The first block's units go to even places, the second's to odd ones.
                let place = 2 * (unit % 4) + unit / 4;
                to[place * UNIT_BYTES..][..UNIT_BYTES].copy_from_slice(bytes);
            }
        }
    }
    rows
}

/// Addresses of the blocks' absmax.
#[derive(Debug, Clone, Copy)]
pub enum AbsmaxAt {
    /// fp32, one for each block.
    Plain(u64),
    /// Codes up to whole words, and the fp32 values that [`NestedAbsmax`] has.
    Nested { codes: u64, nested: u64, offset: f32 },
}

/// `weight` lies as [`chunks`] says, `code` as [`values`].
pub fn desc((n, k): (usize, usize), weight: u64, absmax: AbsmaxAt, code: u64) -> MatrixDesc {
    let (families, scales, nested, offset) = match absmax {
        AbsmaxAt::Plain(values) => ([&PLAIN, &PLAIN_CROSSING], values, 0, 0.0),
        AbsmaxAt::Nested { codes, nested, offset } => ([&NESTED, &NESTED_CROSSING], codes, nested, offset),
    };
    MatrixDesc {
        family: families[usize::from(!k.is_multiple_of(BLOCK))],
        n,
        k,
        weight,
        stride_bytes: stride_bytes(k),
        scales,
        nested,
        offset,
        constants: code,
        threshold: f32::NAN,
    }
}

/// Writes `rows` of the weight as fp16 `[rows, k]` to `out`, each value rounded once.
///
/// # Safety
/// `matrix` is one of [`desc`]'s on what `on` runs on and has these rows, and `out` has the room.
pub unsafe fn dequantize(on: &dyn Launcher, matrix: &MatrixDesc, rows: Range<usize>, out: u64) -> Result<()> {
    let name = if matrix.nested == 0 { "nf4_dequantize_plain" } else { "nf4_dequantize_nested" };
    let (part, k, stride) = (matrix.part()?, dimension(matrix.k)?, dimension(matrix.stride_bytes)?);
    let (first, end) = (dimension(rows.start)?, dimension(rows.end)?);
    // The kernel counts threads in 31 bits.
    let units = dimension(rows.len() * matrix.stride_bytes / UNIT_BYTES)? as usize;
    let grid = Grid::over(units, DEQUANTIZE_THREADS);
    // SAFETY: parameters as nf4.cu declares them, a thread for each unit; the caller vouches for the addresses.
    unsafe { on.launch(&KERNELS.plain, name, grid, parameters![part, matrix.constants, out, k, stride, first, end]) }
}

struct Nf4OnDevice {
    n: usize,
    k: usize,
    stored_bytes: usize,
    chunks: CudaSlice<u8>,
    absmax: DeviceAbsmax,
    /// [`values`].
    code: CudaSlice<f32>,
    device: CudaDevice,
}

enum DeviceAbsmax {
    Plain(CudaSlice<f32>),
    Nested { codes: CudaSlice<u8>, nested: CudaSlice<f32>, offset: f32 },
}

impl DeviceAbsmax {
    fn upload(absmax: &Absmax, device: &CudaDevice) -> Result<Self> {
        Ok(match absmax {
            Absmax::Plain(values) => DeviceAbsmax::Plain(device.clone_htod(values)?),
            Absmax::Nested(NestedAbsmax { codes, absmax, offset }) => DeviceAbsmax::Nested {
                // The kernels read codes as whole words.
                codes: upload_rows(codes, codes.len(), codes.len().next_multiple_of(size_of::<u32>()), device)?,
                nested: device.clone_htod(absmax)?,
                offset: *offset,
            },
        })
    }
}

impl CudaMatrix for Nf4OnDevice {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }

    fn resident_bytes(&self) -> usize {
        let absmax = match &self.absmax {
            DeviceAbsmax::Plain(values) => 4 * values.len(),
            DeviceAbsmax::Nested { codes, nested, .. } => codes.len() + 4 * nested.len(),
        };
        self.chunks.len() + absmax + 4 * self.code.len()
    }

    fn download(&self) -> Result<Vec<Vec<u8>>> {
        let mut parts = vec![download(&self.chunks, &self.device)?, download(&self.code, &self.device)?];
        match &self.absmax {
            DeviceAbsmax::Plain(values) => parts.push(download(values, &self.device)?),
            DeviceAbsmax::Nested { codes, nested, offset } => parts.extend([
                download(codes, &self.device)?,
                download(nested, &self.device)?,
                offset.to_le_bytes().to_vec(),
            ]),
        }
        Ok(parts)
    }

    fn desc(&self) -> MatrixDesc {
        let at = |slice: &CudaSlice<f32>| address(slice, &self.device);
        let absmax = match &self.absmax {
            DeviceAbsmax::Plain(values) => AbsmaxAt::Plain(at(values)),
            DeviceAbsmax::Nested { codes, nested, offset } => {
                AbsmaxAt::Nested { codes: address(codes, &self.device), nested: at(nested), offset: *offset }
            }
        };
        desc((self.n, self.k), address(&self.chunks, &self.device), absmax, at(&self.code))
    }
}

/// Of many rows through fp16 weights, some rows of the matrix at a time.
///
/// # Safety
/// As [`MatrixDesc::multiply_rows`].
unsafe fn multiply_rows(matrix: &MatrixDesc, on: &dyn Launcher, x: &SharedInput, y: ProductAt) -> Result<()> {
    let SharedInput { at: x, m, arena, .. } = *x;
    let (to, value_bytes) = if y.is_float { (Type::Float, size_of::<f32>()) } else { (Type::Half, size_of::<f16>()) };
    let &MatrixDesc { n, k, .. } = matrix;
    let step = tile_rows(m, n, k);
    let tile = arena.take::<f16>(step * k)?;
    let weight = tile.address;
    let operand = |address, stride| Operand { address, stride, batch_stride: 0 };
    for first in (0..n).step_by(step) {
        let rows = first..n.min(first + step);
        let gemm = Gemm {
            m,
            n: rows.len(),
            k,
            batch: 1,
            a: operand(x, k),
            b: operand(weight, k),
            b_is_transposed: true,
            out: operand(y.address + (value_bytes * first) as u64, n),
            alpha: y.scale,
            from: Type::Half,
            to,
        };
        // SAFETY: the caller's promise for the matrix, x and y; the weight has room for these rows, and what overwrites it comes
        // later on the same stream.
        unsafe {
            dequantize(on, matrix, rows, weight)?;
            on.multiply(&gemm)?;
        }
    }
    Ok(())
}
