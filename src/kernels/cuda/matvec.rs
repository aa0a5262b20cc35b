//! One token times weight matrices: what a launch of `matvec.cuh` is told.

use candle_core::{CudaDevice, Result, bail};

use super::launch::{Fatbin, Grid, Kernel, Planned, dimension, launch};
use crate::parameters;

/// Bytes of a row that a warp takes at once: rows are padded to whole ones.
pub const CHUNK_BYTES: usize = 128;
pub const MAX_PARTS: usize = 4;
const MAX_INPUTS: usize = 2;
const THREADS: u32 = 512;
const WARPS: usize = 16;
const TILE_ROWS: usize = 8;
const STEP_BYTES: usize = TILE_ROWS * CHUNK_BYTES;
/// `first_tile` of a part that a launch does not have.
const NO_TILE: i32 = i32::MAX;

/// A matrix on the device as the streaming product reads it.
#[derive(Clone, Copy)]
pub struct Streamed {
    pub family: &'static Family,
    pub n: usize,
    pub k: usize,
    /// Rows of `stride_bytes`.
    pub weight: u64,
    pub stride_bytes: usize,
    /// What the family calls its scales; 0 where it has none.
    pub scales: u64,
    pub nested: u64,
    pub offset: f32,
    /// The family's constants, 0 where it has none.
    pub code: u64,
    /// LLM.int8's, NaN where outlier columns are off.
    pub threshold: f32,
}

/// The kernels of one layout.
pub struct Family {
    pub fatbin: &'static Fatbin,
    /// The kernel of a matrix, and that of a head.
    pub kernels: [&'static str; 2],
    /// Elements of a chunk.
    pub chunk: usize,
    /// Shared memory for an element of x, in eighths of a byte.
    pub shared_eighths: usize,
    /// Steps that a warp copies ahead, and the words that a lane copies for a step beside the weights.
    pub stages: usize,
    pub extra_words: usize,
    /// Of what one matrix and tile add to a row.
    pub partial_bytes: usize,
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.kernels == other.kernels
    }
}

/// Whether launches of a step may overlap. In a chain of one kind of matrix they gain 2 to 3 µs each that way (docs/benchmarks.md);
/// in a whole step on an H200, with attention between them, the step took longer than the sum of its launches alone.
pub const EARLY: bool = false;

/// What a launch reads, as `struct Input` of matvec.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Input {
    /// fp32 `[k]` where it is normed, fp16 otherwise.
    pub x: u64,
    pub norm_weight: u64,
    /// Zeros for an rms norm.
    pub norm_bias: u64,
    pub epsilon: f32,
    pub scale: f32,
    /// 1 / k, for [`Matvec::plan`] to fill in, as the two behind the norm.
    pub per_k: f32,
    pub norm: i32,
    pub k: i32,
    pub chunks: i32,
}

pub const NORM_RMS: i32 = 1;
pub const NORM_LAYER: i32 = 2;

/// A matrix, as `struct Part`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Part {
    weight: u64,
    scales: u64,
    nested: u64,
    bias: u64,
    out: u64,
    offset: f32,
    n: i32,
    first_tile: i32,
    activation: i32,
}

impl Streamed {
    /// The matrix alone, for kernels that take it as it lies.
    pub fn part(&self) -> Result<Part> {
        let Self { n, weight, scales, nested, offset, .. } = *self;
        Ok(Part { weight, scales, nested, offset, n: dimension(n)?, ..Part::default() })
    }
}

/// Where the token goes, as `struct Head`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Head {
    /// fp32 `[n]`; 0 for every matrix but a head.
    pub logits: u64,
    /// `[blocks]` of 8 bytes.
    pub best: u64,
    pub arrived: u64,
    /// Token, position and step.
    pub state: u64,
    pub host: u64,
    pub table: u64,
    pub embedding: u64,
    pub table_scale: f32,
    pub table_stride: i32,
    pub hidden: i32,
    pub host_slots: i32,
    pub advance: i32,
}

/// All that a launch reads, as `struct Matvec`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Job {
    parts: [Part; MAX_PARTS],
    inputs: [Input; MAX_INPUTS],
    code: u64,
    residual: u64,
    outlier_columns: u64,
    head: Head,
    threshold: f32,
    stride: i32,
    stride_1: i32,
    n_inputs: i32,
    mode: i32,
    tiles: i32,
    segments: i32,
    out_is_float: i32,
}

/// A matrix of a launch and what becomes of its product.
#[derive(Clone, Copy)]
pub struct Product {
    pub matrix: Streamed,
    /// fp32 `[n]`, or 0.
    pub bias: u64,
    pub out: u64,
    /// `enum Activation` of matvec.cuh.
    pub activation: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apart = 0,
    Gated = 1,
    Joined = 2,
}

/// What happens to a launch's results.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue {
    /// fp32 `[n]` that the products are added to, or 0.
    pub residual: u64,
    /// A count of 64 bits that LLM.int8's outlier columns are added to, or 0.
    pub outlier_columns: u64,
    pub out_is_float: bool,
    pub head: Head,
}

/// A launch, ready to be repeated.
pub struct Matvec {
    kernel: Kernel,
    grid: Grid,
    job: Job,
}

impl Matvec {
    /// As [`Self::plan`], on a device that must have the shared memory for it.
    pub fn new(
        device: &CudaDevice,
        mode: Mode,
        inputs: Vec<Input>,
        products: &[Product],
        epilogue: Epilogue,
    ) -> Result<Self> {
        let Planned { fatbin, kernel, grid, job } = Self::plan(Facts::of(device)?, mode, inputs, products, epilogue)?;
        let kernel = fatbin.kernel(device, kernel)?;
        kernel.allow_shared(grid.shared_bytes)?;
        if kernel.blocks_per_multiprocessor(grid.threads, grid.shared_bytes)? == 0 {
            let (k, bytes) = (job.inputs[0].k, grid.shared_bytes);
            bail!("a row of {k} elements needs {bytes} bytes of shared memory, more than this device has");
        }
        Ok(Self { kernel, grid, job })
    }

    /// All products have matrices of one family; `Joined` ones read `inputs` one by one, others share the first.
    pub fn plan(
        facts: Facts,
        mode: Mode,
        mut inputs: Vec<Input>,
        products: &[Product],
        epilogue: Epilogue,
    ) -> Result<Planned<Job>> {
        let Some(first) = products.first().map(|product| product.matrix) else { bail!("a launch of no matrices") };
        if products.len() > MAX_PARTS
            || inputs.len() > MAX_INPUTS
            || products.iter().any(|p| p.matrix.family != first.family)
        {
            bail!("matrices that cannot share a launch");
        }
        let family = first.family;
        for (input, product) in inputs.iter_mut().zip(products) {
            let k = product.matrix.k;
            (input.k, input.chunks, input.per_k) =
                (dimension(k)?, dimension(k.div_ceil(family.chunk))?, 1.0 / k as f32);
        }
        // A single joined product is one part.
        let mode = if mode == Mode::Joined && products.len() == 1 { Mode::Apart } else { mode };
        let tiles_of = |product: &Product| product.matrix.n.div_ceil(TILE_ROWS);
        let (tiles, runs) = match mode {
            Mode::Apart => (products.iter().map(tiles_of).sum(), 1),
            Mode::Gated | Mode::Joined => (tiles_of(&products[0]), 2),
        };
        let blocks = tiles.min(facts.multiprocessors);
        let segments = tiles.div_ceil(blocks) * runs + WARPS;
        let kernel = family.kernels[usize::from(epilogue.head.logits != 0)];
        let x_bytes: usize =
            inputs.iter().map(|i| (i.chunks as usize * family.chunk * family.shared_eighths).div_ceil(8)).sum();
        let slot_bytes = STEP_BYTES + 4 * 32 * family.extra_words;
        let shared_bytes = WARPS * family.stages * slot_bytes + segments * TILE_ROWS * family.partial_bytes + x_bytes;
        let mut job = Job {
            parts: [Part { first_tile: NO_TILE, ..Part::default() }; MAX_PARTS],
            inputs: [Input::default(); MAX_INPUTS],
            code: first.code,
            residual: epilogue.residual,
            outlier_columns: epilogue.outlier_columns,
            head: epilogue.head,
            threshold: first.threshold,
            stride: dimension(first.stride_bytes)?,
            stride_1: dimension(products.last().map_or(0, |p| p.matrix.stride_bytes))?,
            n_inputs: inputs.len() as i32,
            mode: mode as i32,
            tiles: dimension(tiles)?,
            segments: dimension(segments)?,
            out_is_float: i32::from(epilogue.out_is_float),
        };
        job.inputs[..inputs.len()].copy_from_slice(&inputs);
        let mut first_tile = 0;
        for (part, product) in job.parts.iter_mut().zip(products) {
            let (bias, out, activation) = (product.bias, product.out, product.activation);
            *part = Part { bias, out, first_tile, activation, ..product.matrix.part()? };
            if mode == Mode::Apart {
                first_tile += dimension(tiles_of(product))?;
            }
        }
        let grid = Grid { blocks: (blocks, 1), threads: THREADS, shared_bytes, early: EARLY };
        Ok(Planned { fatbin: family.fatbin, kernel, grid, job })
    }

    /// Rows that it looks through for outlier columns, and their elements.
    pub fn examines(&self) -> (usize, usize) {
        let inputs = &self.job.inputs[..if self.job.threshold.is_nan() { 0 } else { self.job.n_inputs as usize }];
        (inputs.len(), inputs.iter().map(|input| input.k as usize).sum())
    }

    /// # Safety
    /// Every address that this launch was made of is still good.
    pub unsafe fn launch(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: the kernels take one `Matvec`, which `Job` mirrors; the caller vouches for the addresses.
        unsafe { launch(device, self.kernel, self.grid, parameters![self.job]) }
    }
}

/// What the shape of a grid depends on.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    pub multiprocessors: usize,
}

impl Facts {
    pub fn of(device: &CudaDevice) -> Result<Self> {
        use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let stream = device.cuda_stream();
        let count = stream
            .context()
            .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(super::memory::driver_error)?;
        Ok(Self { multiprocessors: usize::try_from(count).unwrap_or(1) })
    }
}
