//! One token times weight matrices: what a job of `matvec.cuh` is told.

use candle_core::{Result, bail};

use super::launch::{Launcher, dimension};
use super::program::{Facts, Jobs, Kind, Planned, StepKernel, WARPS};
use super::shared_input::SharedInput;

/// Bytes of a row that a warp takes at once: rows are padded to whole ones.
pub const CHUNK_BYTES: usize = 128;
pub const MAX_PARTS: usize = 4;
const MAX_INPUTS: usize = 2;
pub(super) const TILE_ROWS: usize = 8;
/// `first_row` of a part that a job does not have.
const NO_ROW: i32 = i32::MAX;

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

/// A layout of matrices. Only those of one family share a job.
pub struct Family {
    pub name: &'static str,
    pub kind: Kind,
    /// Elements of a chunk.
    pub chunk: usize,
    /// Those that read it, the best one first.
    pub kernels: &'static [&'static StepKernel],
    /// Whether products of many rows are fp32; fp16 otherwise.
    pub product_is_float: bool,
    pub multiply_rows: MultiplyRows,
}

/// `y = x · Wᵀ` of many rows with fp32 sums, `y` `[m, n]`. What it needs beside these it takes from the arena of `x`.
///
/// # Safety
/// As [`Streamed::multiply_rows`].
pub type MultiplyRows = unsafe fn(&Streamed, &dyn Launcher, &SharedInput, u64) -> Result<()>;

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// What a job reads, as `struct Input` of job.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Input {
    /// Tagged fp32 `[k]` where it is normed, fp16 otherwise.
    pub x: u64,
    pub norm_weight: u64,
    /// Zeros for an rms norm.
    pub norm_bias: u64,
    pub epsilon: f32,
    pub scale: f32,
    /// 1 / k, for [`Matvec::new`] to fill in, as those behind the norm.
    pub per_k: f32,
    pub norm: i32,
    pub k: i32,
    pub chunks: i32,
    /// Elements of the chunks.
    pub padded: i32,
    /// Whether the fp16 is.
    pub is_tagged: i32,
    /// For [`super::program::Jobs`] to fill in.
    pub of_job: i32,
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
    first_row: i32,
    activation: i32,
}

impl Streamed {
    /// `y = x · Wᵀ`, by the matrix's family.
    ///
    /// # Safety
    /// `x` holds rows of k; it, its arena, the matrix and `y` are that much memory where `on` runs, good until its stream has come
    /// past this call.
    pub unsafe fn multiply_rows(&self, on: &dyn Launcher, x: &SharedInput, y: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { (self.family.multiply_rows)(self, on, x, y) }
    }

    /// The matrix alone, for kernels that take it as it lies.
    pub fn part(&self) -> Result<Part> {
        let Self { n, weight, scales, nested, offset, .. } = *self;
        Ok(Part { weight, scales, nested, offset, n: dimension(n)?, ..Part::default() })
    }
}

/// All that a job reads, as `struct Matvec`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Matvec {
    parts: [Part; MAX_PARTS],
    inputs: [Input; MAX_INPUTS],
    residual: u64,
    logits: u64,
    outlier_columns: u64,
    threshold: f32,
    stride: i32,
    stride_1: i32,
    n_inputs: i32,
    mode: i32,
    puts: i32,
    /// Whether the job before has read the same inputs.
    keeps: i32,
    deals: [Deal; 2],
}

/// Rows for neighbouring blocks, as `struct Deal`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
struct Deal {
    blocks: i32,
    of_block: i32,
    more: i32,
}

impl Deal {
    fn new(rows: usize, blocks: usize) -> Self {
        Self { blocks: blocks as i32, of_block: (rows / blocks) as i32, more: (rows % blocks) as i32 }
    }

    fn rows(&self) -> usize {
        (self.blocks * self.of_block + self.more) as usize
    }
}

/// A matrix of a job and what becomes of its product.
#[derive(Clone, Copy)]
pub struct Product {
    pub matrix: Streamed,
    /// fp32 `[n]`, or 0.
    pub bias: u64,
    pub out: u64,
    /// `enum Activation` of job.cuh.
    pub activation: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apart = 0,
    Gated = 1,
    Joined = 2,
}

/// How results lie, as `enum Puts` of job.cuh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Puts {
    #[default]
    Halves = 0,
    Floats = 1,
    /// For a later job of the same launch.
    TaggedHalves = 2,
}

/// What happens to a job's results.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue {
    /// Tagged fp32 `[n]` that the products are added to, or 0.
    pub residual: u64,
    /// A count of 64 bits that LLM.int8's outlier columns are added to, or 0.
    pub outlier_columns: u64,
    pub puts: Puts,
    /// fp32 `[n]` of a head, 0 for every other matrix.
    pub logits: u64,
}

impl Matvec {
    /// All products have matrices of one family; `Joined` ones read `inputs` one by one, others share the first.
    pub fn new(
        facts: Facts,
        mode: Mode,
        mut inputs: Vec<Input>,
        products: &[Product],
        epilogue: Epilogue,
    ) -> Result<Self> {
        let Some(first) = products.first().map(|product| product.matrix) else { bail!("a job of no matrices") };
        if products.len() > MAX_PARTS
            || inputs.len() > MAX_INPUTS
            || products.iter().any(|p| p.matrix.family != first.family)
        {
            bail!("matrices that cannot share a job");
        }
        if inputs.len() > 1 && inputs.iter().any(|input| input.norm != 0) {
            bail!("a norm in front of one of several inputs");
        }
        for (input, product) in inputs.iter_mut().zip(products) {
            let (k, chunk) = (product.matrix.k, first.family.chunk);
            input.per_k = 1.0 / k as f32;
            (input.k, input.chunks) = (dimension(k)?, dimension(k.div_ceil(chunk))?);
            input.padded = dimension(k.next_multiple_of(chunk))?;
        }
        // A single joined product is one part.
        let mode = if mode == Mode::Joined && products.len() == 1 { Mode::Apart } else { mode };
        // Kernels count rows in 31 bits.
        dimension(products.iter().map(|product| product.matrix.n).sum())?;
        let mut matvec = Self {
            parts: [Part { first_row: NO_ROW, ..Part::default() }; MAX_PARTS],
            inputs: [Input::default(); MAX_INPUTS],
            residual: epilogue.residual,
            logits: epilogue.logits,
            outlier_columns: epilogue.outlier_columns,
            threshold: first.threshold,
            stride: dimension(first.stride_bytes)?,
            stride_1: dimension(products.last().map_or(0, |p| p.matrix.stride_bytes))?,
            n_inputs: inputs.len() as i32,
            mode: mode as i32,
            puts: epilogue.puts as i32,
            keeps: 0,
            deals: [Deal::default(); 2],
        };
        matvec.inputs[..inputs.len()].copy_from_slice(&inputs);
        let part_of =
            |&Product { matrix, bias, out, activation }: &Product| Ok(Part { bias, out, activation, ..matrix.part()? });
        matvec.set_parts(&products.iter().map(part_of).collect::<Result<Vec<_>>>()?, facts);
        Ok(matvec)
    }

    /// A launch of this job alone.
    pub fn plan(
        facts: Facts,
        mode: Mode,
        inputs: Vec<Input>,
        products: &[Product],
        epilogue: Epilogue,
    ) -> Result<Planned> {
        let mut jobs = Jobs::new(facts);
        jobs.multiply(mode, inputs, products, epilogue)?;
        jobs.plan(0)
    }

    /// Takes the parts that write to none of `outs` away, as a job of its own over the same input. None where that is nothing, everything
    /// or less than `least_bytes`, or where a block would have no row of what stays.
    pub(super) fn split_off(&mut self, outs: &[u64], least_bytes: usize, facts: Facts) -> Option<Self> {
        let is_part = |part: &&Part| part.first_row != NO_ROW;
        let (stay, leave): (Vec<Part>, Vec<Part>) =
            self.parts.iter().filter(is_part).partition(|part| outs.contains(&part.out));
        let rows = |parts: &[Part]| parts.iter().map(|part| part.n as usize).sum::<usize>();
        let is_apart = self.mode == Mode::Apart as i32 && self.residual == 0 && self.logits == 0;
        let is_long = rows(&leave) * self.stride as usize >= least_bytes;
        if !is_apart || !is_long || stay.is_empty() || leave.is_empty() || rows(&stay) < facts.multiprocessors {
            return None;
        }
        let [mut own, mut taken] = [*self; 2];
        own.set_parts(&stay, facts);
        taken.set_parts(&leave, facts);
        taken.keeps = 1;
        *self = own;
        Some(taken)
    }

    /// Parts with rows of their own, counted through, or with the same ones; dealt evenly.
    fn set_parts(&mut self, parts: &[Part], facts: Facts) {
        self.parts = [Part { first_row: NO_ROW, ..Part::default() }; MAX_PARTS];
        let (is_apart, mut rows) = (self.mode == Mode::Apart as i32, 0);
        for (place, part) in self.parts.iter_mut().zip(parts) {
            *place = Part { first_row: if is_apart { rows } else { 0 }, ..*part };
            rows = if is_apart { rows + part.n } else { parts[0].n };
        }
        self.deals = [Deal::default(), Deal::new(rows as usize, facts.multiprocessors)];
    }

    /// Gives the first `busy` blocks fewer rows, since each has something else to do that takes as long as `bytes` of weights.
    pub(super) fn spare(&mut self, busy: usize, bytes: usize, facts: Facts) {
        let (rows, blocks) = (self.deals.iter().map(Deal::rows).sum::<usize>(), facts.multiprocessors);
        // Where every block is equally busy there is nothing to deal otherwise.
        if busy == 0 || busy >= blocks {
            return;
        }
        let saved = bytes / self.stride.max(1) as usize;
        let others = ((rows + busy * saved).div_ceil(blocks) * (blocks - busy)).min(rows);
        self.deals = [Deal::new(rows - others, busy), Deal::new(others, blocks - busy)];
    }

    /// Partial results of a block: of 8 rows each where a warp leaves a run.
    pub(super) fn partials(&self) -> usize {
        let most = self.deals.iter().map(|deal| deal.of_block + i32::from(deal.more > 0)).max().unwrap_or(0);
        let tiles = (most as usize).div_ceil(TILE_ROWS);
        let runs = if self.mode == Mode::Apart as i32 { 1 } else { 2 };
        (tiles * runs + WARPS) * TILE_ROWS
    }

    /// Elements of all inputs' chunks.
    pub(super) fn padded(&self) -> usize {
        self.inputs().iter().map(|input| input.padded as usize).sum()
    }

    /// Rows that it looks through for outlier columns, and their elements.
    pub(super) fn examines(&self) -> (usize, usize) {
        let inputs = if self.threshold.is_nan() || self.keeps != 0 { &[][..] } else { self.inputs() };
        (inputs.len(), inputs.iter().map(|input| input.k as usize).sum())
    }

    pub(super) fn inputs(&self) -> &[Input] {
        &self.inputs[..self.n_inputs as usize]
    }

    /// Whether results go to `address`, which is not 0.
    pub(super) fn writes(&self, address: u64) -> bool {
        self.residual == address || self.parts.iter().any(|part| part.out == address)
    }

    /// Tells inputs the job that writes them.
    pub(super) fn link(&mut self, writer: impl Fn(u64) -> i32) -> Result<()> {
        for input in &mut self.inputs[..self.n_inputs as usize] {
            input.of_job = writer(input.x);
            if input.of_job >= 0 && input.norm == 0 && input.is_tagged == 0 {
                bail!("an input of fp16 without tags that job {} writes", input.of_job);
            }
        }
        Ok(())
    }
}
