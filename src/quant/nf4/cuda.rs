//! NF4 on CUDA: few rows multiply the codes as they stream; many rows go through fp16 weights made for the call.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, LaunchArgs, PushKernelArg};
use candle_core::{CudaDevice, Device, Result, Tensor};
use half::f16;

use super::nested::{self, NestedAbsmax};
use super::{Absmax, CODES, Nf4Stored};
use crate::kernels::cuda::launch::{Fatbin, dimension, half_rows, half_tensor, launch, upload_padded};
use crate::quant::CudaMatrix;

pub static KERNELS: Fatbin = Fatbin { name: "nf4", image: include_bytes!(concat!(env!("OUT_DIR"), "/nf4.fatbin")) };

/// Bytes that a lane loads at once, `CHUNK / 2` in nf4.cu: codes are padded to whole ones.
const CHUNK_BYTES: usize = 16;
/// `MATVEC_WARPS` in nf4.cu: output rows of a block.
const MATVEC_WARPS: usize = 4;
const LANES: u32 = 32;
/// Rows of x up to which the codes are decoded in the product; from the next on, decoding once for all rows is cheaper.
const MATVEC_ROWS: usize = 8;
const DEQUANTIZE_THREADS: u32 = 256;

pub(super) fn upload(stored: &Nf4Stored, device: &Device) -> Result<Box<dyn CudaMatrix>> {
    let device = device.as_cuda_device()?;
    let absmax = match &stored.absmax {
        Absmax::Plain(values) => DeviceAbsmax::Plain { values: device.clone_htod(values)? },
        Absmax::Nested(NestedAbsmax { codes, absmax, offset }) => DeviceAbsmax::Nested {
            codes: device.clone_htod(codes)?,
            nested: device.clone_htod(absmax)?,
            map: device.clone_htod(&nested::VALUES[..])?,
            offset: *offset,
        },
    };
    Ok(Box::new(Nf4OnDevice {
        n: stored.n,
        k: stored.k,
        stored_bytes: stored.packed.len() + stored.absmax.stored_bytes(),
        packed: upload_padded(&stored.packed, CHUNK_BYTES, device)?,
        absmax,
        code: device.clone_htod(&CODES)?,
        device: device.clone(),
    }))
}

struct Nf4OnDevice {
    n: usize,
    k: usize,
    stored_bytes: usize,
    /// Whole chunks.
    packed: CudaSlice<u8>,
    absmax: DeviceAbsmax,
    /// `[16]`.
    code: CudaSlice<f32>,
    device: CudaDevice,
}

enum DeviceAbsmax {
    Plain { values: CudaSlice<f32> },
    Nested { codes: CudaSlice<u8>, nested: CudaSlice<f32>, map: CudaSlice<f32>, offset: f32 },
}

impl DeviceAbsmax {
    /// As kernel names spell it.
    fn word(&self) -> &'static str {
        match self {
            DeviceAbsmax::Plain { .. } => "plain",
            DeviceAbsmax::Nested { .. } => "nested",
        }
    }

    /// The kernel parameters between the packed codes and the 16 values.
    fn push<'a>(&'a self, arguments: &mut LaunchArgs<'a>) {
        match self {
            DeviceAbsmax::Plain { values } => arguments.arg(values),
            DeviceAbsmax::Nested { codes, nested, map, offset } => {
                arguments.arg(codes).arg(nested).arg(map).arg(offset)
            }
        };
    }
}

impl CudaMatrix for Nf4OnDevice {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }

    fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let (storage, layout) = x.storage_and_layout();
        let (rows, m) = half_rows(&storage, layout, self.k)?;
        if m <= MATVEC_ROWS { self.matvec(&rows, m) } else { x.matmul(&self.dequantize()?.t()?) }
    }
}

impl Nf4OnDevice {
    fn matvec(&self, x: &CudaView<'_, f16>, m: usize) -> Result<Tensor> {
        let name = format!("nf4_matvec_{}_{}", self.absmax.word(), m.next_power_of_two());
        let kernel = KERNELS.kernel(&self.device, &name)?;
        let stream = self.device.cuda_stream();
        // SAFETY: the kernel writes all m * n values before anything reads them.
        let mut y = unsafe { self.device.alloc::<f16>(m * self.n) }?;
        let (m_argument, n, k) = (dimension(m)?, dimension(self.n)?, dimension(self.k)?);
        let mut arguments = stream.launch_builder(&kernel);
        arguments.arg(&self.packed);
        self.absmax.push(&mut arguments);
        arguments.arg(&self.code).arg(x).arg(&mut y).arg(&m_argument).arg(&n).arg(&k);
        let threads = MATVEC_WARPS as u32 * LANES;
        // SAFETY: parameters as nf4.cu declares them; `half_rows` gave m * k values, `upload` whole chunks and an absmax for
        // every block; m is at most the kernel's rows.
        unsafe { launch(&name, &mut arguments, (self.n.div_ceil(MATVEC_WARPS), 1), threads) }?;
        half_tensor(y, m, self.n, &self.device)
    }

    /// The weight as fp16 `[n, k]`, each value rounded once.
    fn dequantize(&self) -> Result<Tensor> {
        let name = format!("nf4_dequantize_{}", self.absmax.word());
        let kernel = KERNELS.kernel(&self.device, &name)?;
        let stream = self.device.cuda_stream();
        let n_elements = self.n * self.k;
        // SAFETY: the kernel writes every element before anything reads it.
        let mut weight = unsafe { self.device.alloc::<f16>(n_elements) }?;
        let n_elements_argument = n_elements as i64;
        let mut arguments = stream.launch_builder(&kernel);
        arguments.arg(&self.packed);
        self.absmax.push(&mut arguments);
        arguments.arg(&self.code).arg(&mut weight).arg(&n_elements_argument);
        let n_chunks = n_elements.div_ceil(2 * CHUNK_BYTES);
        let blocks = n_chunks.div_ceil(DEQUANTIZE_THREADS as usize);
        // SAFETY: parameters as nf4.cu declares them, buffers as in `matvec`; a thread past the last chunk returns.
        unsafe { launch(&name, &mut arguments, (blocks, 1), DEQUANTIZE_THREADS) }?;
        half_tensor(weight, self.n, self.k, &self.device)
    }
}
