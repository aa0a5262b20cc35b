//! Attention of one query: what a launch of `attention.cu` is told.

use candle_core::{CudaDevice, Result};

use super::launch::{Fatbin, Grid, Kernel, Planned, launch};
use super::matvec::{EARLY, Facts};
use crate::parameters;

pub static KERNELS: Fatbin =
    Fatbin { name: "attention", image: include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")) };

const THREADS: u32 = 256;
/// `HEADS_AT_ONCE` in attention.cu.
const HEADS_AT_ONCE: usize = 4;
/// Fewest positions of a block.
const LEAST_SPAN: usize = 64;

/// As `struct Attention` of attention.cu, which says what each is.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Job {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub keys: u64,
    pub values: u64,
    pub out: u64,
    pub angles: u64,
    pub bias: u64,
    pub position: u64,
    pub length: u64,
    pub partials: u64,
    pub arrived: u64,
    pub scale: f32,
    pub group: i32,
    pub d: i32,
    pub d_pad: i32,
    pub rotary: i32,
    pub reach: i32,
    pub capacity: i32,
    pub span: i32,
    pub splits: i32,
}

/// How positions are split over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Positions of a block.
    pub span: usize,
    pub splits: usize,
}

impl Split {
    /// About two blocks for each multiprocessor at `capacity` positions, none with too little to do.
    pub fn new(capacity: usize, kv_heads: usize, facts: Facts) -> Self {
        let blocks = 2 * facts.multiprocessors;
        let span = (capacity * kv_heads).div_ceil(blocks).next_multiple_of(32).max(LEAST_SPAN);
        Self { span, splits: capacity.div_ceil(span) }
    }

    /// fp32 values that the blocks of one key/value head leave for each other.
    pub fn partials(self, kv_heads: usize, group: usize, d: usize) -> usize {
        kv_heads * self.splits * group * (2 + d)
    }
}

/// A launch, ready to be repeated.
pub struct Attention {
    kernel: Kernel,
    grid: Grid,
    job: Job,
}

impl Attention {
    pub fn new(device: &CudaDevice, kv_heads: usize, job: Job) -> Result<Self> {
        let Planned { fatbin, kernel, grid, job } = Self::plan(kv_heads, job);
        let kernel = fatbin.kernel(device, kernel)?;
        kernel.allow_shared(grid.shared_bytes)?;
        Ok(Self { kernel, grid, job })
    }

    pub fn plan(kv_heads: usize, job: Job) -> Planned<Job> {
        let [group, d_pad, span] = [job.group, job.d_pad, job.span].map(|value| value as usize);
        let slots = (THREADS as usize / (d_pad / 8)).max(1);
        let floats = group * d_pad + (group * span).max(job.splits as usize) + slots * HEADS_AT_ONCE * d_pad;
        let shared_bytes = 4 * floats;
        let grid = Grid { blocks: (kv_heads, job.splits as usize), threads: THREADS, shared_bytes, early: EARLY };
        Planned { fatbin: &KERNELS, kernel: "attention_step", grid, job }
    }

    /// # Safety
    /// Every address that this launch was made of is still good.
    pub unsafe fn launch(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: the kernel takes one `Attention`, which `Job` mirrors; the caller vouches for the addresses.
        unsafe { launch(device, self.kernel, self.grid, parameters![self.job]) }
    }
}
