//! Matrix-vector products of one token: the operands of a matvec instruction of `matvec.cuh`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{Result, bail};

use super::launch::{Launcher, dimension};
use super::route::MAX_CHOSEN;
use super::shared_input::{ProductAt, SharedInput};
use super::step_kernel::{DeviceProperties, StepFeatures, StepKernel, TILE_ROWS, WARPS, WeightDecoder};

pub const MAX_PARTS: usize = 4;
const MAX_INPUTS: usize = 2;
/// `first_row` of a part that does not exist.
const NO_ROW: i32 = i32::MAX;

/// A matrix on the device as kernels read it.
#[derive(Clone, Copy)]
pub struct MatrixDesc {
    pub family: &'static Family,
    pub n: usize,
    pub k: usize,
    /// Rows of `stride_bytes`.
    pub weight: u64,
    pub stride_bytes: usize,
    /// NF4: absmax of blocks; LLM.int8: absmax of rows; 0 in other families.
    pub scales: u64,
    /// NF4: absmax of absmax codes, and their mean.
    pub nested: u64,
    pub offset: f32,
    /// The family's constants, 0 where it has none.
    pub constants: u64,
    /// LLM.int8's, NaN where outlier columns are off.
    pub threshold: f32,
}

/// A layout of matrices. Only matrices of one family share an instruction.
pub struct Family {
    pub name: &'static str,
    pub decoder: WeightDecoder,
    /// Elements of a chunk.
    pub chunk: usize,
    /// Kernels that read it, the best one first.
    pub kernels: &'static [&'static StepKernel],
    /// Products of many rows are fp32 if set, fp16 otherwise.
    pub product_is_float: bool,
    /// Whether every product is rounded to fp16; it may be fp32 otherwise, where that is wanted ([`ProductAt::is_float`]).
    pub rounds_products: bool,
    pub multiply_rows: MultiplyRows,
    /// Products of few rows, of several matrices at once: false where they are too many.
    pub multiply_few: MultiplyFew,
}

/// [`MultiplyRows`] of matrices of one family that read the same rows, if these are few enough.
///
/// # Safety
/// As [`MatrixDesc::multiply_rows`], for each of them.
pub type MultiplyFew = unsafe fn(&[(MatrixDesc, ProductAt)], &dyn Launcher, &SharedInput) -> Result<bool>;

/// `y = scale · x · Wᵀ` of many rows with fp32 sums, `y` `[m, n]`. Scratch memory comes from the arena of `x`.
///
/// # Safety
/// As [`MatrixDesc::multiply_rows`].
pub type MultiplyRows = unsafe fn(&MatrixDesc, &dyn Launcher, &SharedInput, ProductAt) -> Result<()>;

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

/// An input of a matvec, as `struct InputDesc` of instruction.cuh.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct InputDesc {
    /// Tagged fp32 `[k]` where it is normed or cast, fp16 otherwise.
    pub x: u64,
    pub norm_weight: u64,
    /// Zeros for an rms norm.
    pub norm_bias: u64,
    pub epsilon: f32,
    pub scale: f32,
    /// 1 / k, set by [`Matvec::new`], as the fields behind the norm.
    pub per_k: f32,
    pub norm: i32,
    pub k: i32,
    pub chunks: i32,
    /// Elements of the chunks.
    pub padded: i32,
    /// 1 where the fp16 values have tags.
    pub is_tagged: i32,
    /// Set by [`super::program::ProgramBuilder`].
    pub written_by: i32,
}

pub const NORM_RMS: i32 = 1;
pub const NORM_LAYER: i32 = 2;
/// No norm: the fp32 values of a residual, cast to fp16.
pub const NORM_CAST: i32 = 3;
/// Activations that [`Epilogue::softcap`] belongs to: a cap of logits, and gpt-oss' gate.
pub const ACT_CAP: i32 = 4;
pub const ACT_CLAMPED: i32 = 5;

/// A matrix of a matvec, as `struct MatrixPart`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct MatrixPart {
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

// SAFETY: laid out as the kernels' struct, and made of numbers and of addresses that are the caller's promise at each launch.
unsafe impl DeviceRepr for MatrixPart {}

impl MatrixDesc {
    /// `y = scale · x · Wᵀ`, by the matrix's family.
    ///
    /// # Safety
    /// `x` holds rows of k; it, its arena, the matrix and `y` are that much memory where `on` runs, good until its stream has come
    /// past this call.
    pub unsafe fn multiply_rows(&self, on: &dyn Launcher, x: &SharedInput, y: ProductAt) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { Self::multiply_all(&[(*self, y)], on, x) }
    }

    /// [`Self::multiply_rows`] of all `parts`, by as few launches as their families have.
    ///
    /// # Safety
    /// As [`Self::multiply_rows`], for each part.
    pub unsafe fn multiply_all(parts: &[(Self, ProductAt)], on: &dyn Launcher, x: &SharedInput) -> Result<()> {
        for parts in parts.chunk_by(|(a, _), (b, _)| a.family == b.family) {
            let family = parts[0].0.family;
            // SAFETY: the caller's promise.
            if unsafe { (family.multiply_few)(parts, on, x) }? {
                continue;
            }
            for (matrix, y) in parts {
                // SAFETY: as above.
                unsafe { (family.multiply_rows)(matrix, on, x, *y) }?;
            }
        }
        Ok(())
    }

    /// The matrix alone, for kernels that take it as it is.
    pub fn part(&self) -> Result<MatrixPart> {
        let Self { n, weight, scales, nested, offset, .. } = *self;
        Ok(MatrixPart { weight, scales, nested, offset, n: dimension(n)?, ..MatrixPart::default() })
    }

    /// The matrix of an expert: `bias`, fp32 `[n]`, may be 0; `activation` is that of a gate and of what it gates.
    pub fn expert_part(&self, bias: u64, activation: i32) -> Result<MatrixPart> {
        Ok(MatrixPart { bias, activation, ..self.part()? })
    }
}

/// The operands of a matvec, as `struct Matvec`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Matvec {
    parts: [MatrixPart; MAX_PARTS],
    inputs: [InputDesc; MAX_INPUTS],
    residual: u64,
    logits: u64,
    outlier_columns: u64,
    threshold: f32,
    softcap: f32,
    stride: i32,
    stride_1: i32,
    n_inputs: i32,
    mode: i32,
    output_type: i32,
    /// 1 where the matvec before has read the same inputs.
    reuses_input: i32,
    /// 1 where the matvec behind reuses them.
    keeps_input: i32,
    partitions: [RowPartition; 2],
    chosen: ChosenExperts,
    out_scale: f32,
    rounded_scale: f32,
    product_scale: f32,
}

/// Rows of neighbouring blocks, as `struct RowPartition`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
struct RowPartition {
    blocks: i32,
    rows_per_block: i32,
    extra_rows: i32,
}

impl RowPartition {
    fn new(rows: usize, blocks: usize) -> Self {
        Self { blocks: blocks as i32, rows_per_block: (rows / blocks) as i32, extra_rows: (rows % blocks) as i32 }
    }

    fn rows(&self) -> usize {
        (self.blocks * self.rows_per_block + self.extra_rows) as usize
    }
}

/// A matrix of an instruction and the epilogue of its product.
#[derive(Clone, Copy)]
pub struct Product {
    pub matrix: MatrixDesc,
    /// The first of the `n` rows in its matrix, whose addresses `matrix` has; 0 in [`Mode::Apart`].
    pub first_row: usize,
    /// fp32 `[n]`, or 0.
    pub bias: u64,
    pub out: u64,
    /// `enum Activation` of instruction.cuh.
    pub activation: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apart = 0,
    Gated = 1,
    Joined = 2,
    /// The downs of the chosen experts, each over its vector of the only input.
    Weighed = 3,
}

/// The type of results, as `enum OutputType` of instruction.cuh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OutputType {
    #[default]
    Halves = 0,
    Floats = 1,
    /// For a later instruction of the same launch.
    TaggedHalves = 2,
    /// The same in fp32, for a norm.
    TaggedFloats = 3,
}

/// The epilogue of all products of an instruction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue {
    /// Tagged fp32 `[n]` that the products are added to, or 0.
    pub residual: u64,
    /// A count of 64 bits that LLM.int8's outlier columns are added to, or 0.
    pub outlier_columns: u64,
    pub output_type: OutputType,
    /// fp32 `[n]` of the LM head, 0 for every other matrix.
    pub logits: u64,
    /// The cap or the limit of [`ACT_CAP`] and [`ACT_CLAMPED`].
    pub softcap: f32,
    pub range: PowersOfTwo,
    /// The experts whose matrices take the place of the products'.
    pub chosen: ChosenExperts,
}

/// Exact powers of two that keep fp16 values in range.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PowersOfTwo {
    /// That the inputs were stored by; products are divided by it.
    pub read: f32,
    /// That a gate's results are stored by.
    pub stored: f32,
    /// That a product is rounded by, where the format rounds it to fp16.
    pub rounded: f32,
}

impl Default for PowersOfTwo {
    fn default() -> Self {
        Self { read: 1.0, stored: 1.0, rounded: 1.0 }
    }
}

/// Experts that the router has chosen, as the end of `struct Matvec`; all zeros for a matvec that has matrices of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ChosenExperts {
    pub count: i32,
    pub rows_of_expert: i32,
}

impl Matvec {
    /// All products have matrices of one family; `Joined` ones read `inputs` one by one, others share the first.
    pub fn new(
        properties: DeviceProperties,
        mode: Mode,
        mut inputs: Vec<InputDesc>,
        products: &[Product],
        epilogue: Epilogue,
    ) -> Result<Self> {
        let Some(first) = products.first().map(|product| product.matrix) else { bail!("a matvec of no matrices") };
        if products.len() > MAX_PARTS
            || inputs.len() > MAX_INPUTS
            || products.iter().any(|p| p.matrix.family != first.family)
        {
            bail!("matrices that cannot share an instruction");
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
        let rounded_scale = if first.family.rounds_products { epilogue.range.rounded } else { 1.0 };
        let mut matvec = Self {
            parts: [MatrixPart { first_row: NO_ROW, ..MatrixPart::default() }; MAX_PARTS],
            inputs: [InputDesc::default(); MAX_INPUTS],
            residual: epilogue.residual,
            logits: epilogue.logits,
            outlier_columns: epilogue.outlier_columns,
            // Outliers of what was stored by a power of two are at least that part of the threshold.
            threshold: first.threshold * epilogue.range.read,
            softcap: epilogue.softcap,
            stride: dimension(first.stride_bytes)?,
            stride_1: dimension(products.last().map_or(0, |p| p.matrix.stride_bytes))?,
            n_inputs: inputs.len() as i32,
            mode: mode as i32,
            output_type: epilogue.output_type as i32,
            reuses_input: 0,
            keeps_input: 0,
            partitions: [RowPartition::default(); 2],
            chosen: epilogue.chosen,
            out_scale: epilogue.range.stored,
            rounded_scale,
            product_scale: 1.0 / (epilogue.range.read * rounded_scale),
        };
        matvec.inputs[..inputs.len()].copy_from_slice(&inputs);
        let part_of = |&Product { matrix, first_row, bias, out, activation }: &Product| {
            Ok(MatrixPart { bias, out, activation, first_row: -dimension(first_row)?, ..matrix.part()? })
        };
        matvec.set_parts(&products.iter().map(part_of).collect::<Result<Vec<_>>>()?, properties);
        Ok(matvec)
    }

    /// Splits off the parts that write to none of `outs`, as a matvec over the same input. `None` where these are no part, all parts or less
    /// than `least_bytes`, or where a block would have no row of the other parts.
    pub(super) fn split_off(&mut self, outs: &[u64], least_bytes: usize, properties: DeviceProperties) -> Option<Self> {
        let is_part = |part: &&MatrixPart| part.first_row != NO_ROW;
        let (stay, leave): (Vec<MatrixPart>, Vec<MatrixPart>) =
            self.parts.iter().filter(is_part).partition(|part| outs.contains(&part.out));
        let rows = |parts: &[MatrixPart]| parts.iter().map(|part| part.n as usize).sum::<usize>();
        let is_apart = self.is(Mode::Apart) && self.residual == 0 && self.logits == 0;
        let is_long = rows(&leave) * self.stride as usize >= least_bytes;
        if !is_apart || !is_long || stay.is_empty() || leave.is_empty() || rows(&stay) < properties.multiprocessors {
            return None;
        }
        let [mut own, mut taken] = [*self; 2];
        own.set_parts(&stay, properties);
        taken.set_parts(&leave, properties);
        taken.reuses_input = 1;
        *self = own;
        Some(taken)
    }

    /// Sets the parts, whose rows are counted through in [`Mode::Apart`] and shared otherwise, and partitions the rows evenly.
    fn set_parts(&mut self, parts: &[MatrixPart], properties: DeviceProperties) {
        self.parts = [MatrixPart { first_row: NO_ROW, ..MatrixPart::default() }; MAX_PARTS];
        let (is_apart, mut rows) = (self.is(Mode::Apart), 0);
        for (place, part) in self.parts.iter_mut().zip(parts) {
            *place = MatrixPart { first_row: if is_apart { rows } else { part.first_row }, ..*part };
            rows = if is_apart { rows + part.n } else { parts[0].n };
        }
        self.partitions = [RowPartition::default(), RowPartition::new(rows as usize, properties.multiprocessors)];
    }

    /// Lets this matvec reuse the input of `before`, the matvec before it, which is still in shared memory: where it is the same, by one decoder, and
    /// every block has rows of this one. A block without rows would wait for values that others may already have overwritten.
    pub(super) fn reuse_input_of(&mut self, before: &mut Self) {
        let is_same = |a: &Self, b: &Self| a.inputs() == b.inputs() && a.threshold.to_bits() == b.threshold.to_bits();
        let has_rows = self.partitions.iter().all(|partition| partition.blocks == 0 || partition.rows_per_block > 0);
        if self.n_inputs == 1 && has_rows && is_same(self, before) {
            (before.keeps_input, self.reuses_input) = (1, 1);
        }
    }

    /// Gives the first `busy` blocks fewer rows: each has other work that takes as long as `bytes` of weights.
    pub(super) fn rebalance(&mut self, busy: usize, bytes: usize, properties: DeviceProperties) {
        let (rows, blocks) =
            (self.partitions.iter().map(RowPartition::rows).sum::<usize>(), properties.multiprocessors);
        // Where every block is equally busy an even partition is right.
        if busy == 0 || busy >= blocks {
            return;
        }
        let saved = bytes / self.stride.max(1) as usize;
        let others = ((rows + busy * saved).div_ceil(blocks) * (blocks - busy)).min(rows);
        self.partitions = [RowPartition::new(rows - others, busy), RowPartition::new(others, blocks - busy)];
    }

    /// Partial results of a block: 8 rows for each run that a warp leaves.
    pub(super) fn partials(&self) -> usize {
        let most = self
            .partitions
            .iter()
            .map(|partition| partition.rows_per_block + i32::from(partition.extra_rows > 0))
            .max()
            .unwrap_or(0);
        let tiles = (most as usize).div_ceil(TILE_ROWS);
        let runs = if self.is(Mode::Apart) {
            1
        } else if self.is(Mode::Weighed) {
            MAX_CHOSEN
        } else {
            2
        };
        (tiles * runs + WARPS) * TILE_ROWS
    }

    fn is(&self, mode: Mode) -> bool {
        self.mode == mode as i32
    }

    /// Elements of all vectors' chunks.
    pub(super) fn padded(&self) -> usize {
        self.vectors() * self.inputs().iter().map(|input| input.padded as usize).sum::<usize>()
    }

    /// Vectors of each input: those of the chosen experts lie one behind the other.
    fn vectors(&self) -> usize {
        if self.is(Mode::Weighed) { self.chosen.count as usize } else { 1 }
    }

    /// Rows and columns of its matrices.
    pub(super) fn label(&self) -> String {
        let is_joined = self.is(Mode::Joined);
        let parts = self.parts.iter().filter(|part| part.first_row != NO_ROW).enumerate();
        let shapes = parts.map(|(at, part)| format!("{} x {}", part.n, self.inputs[if is_joined { at } else { 0 }].k));
        let shapes = shapes.collect::<Vec<_>>().join(" + ");
        if self.logits != 0 {
            format!("head {shapes}")
        } else if self.is(Mode::Gated) {
            format!("gated {shapes}")
        } else if self.is(Mode::Weighed) {
            format!("weighed {} times {shapes}", self.chosen.count)
        } else {
            shapes
        }
    }

    /// What it needs of its kernel.
    pub(super) fn features(&self) -> StepFeatures {
        let is_featured = self.inputs.iter().any(|input| input.norm == NORM_CAST)
            || self.output_type == OutputType::TaggedFloats as i32
            || self.parts.iter().any(|part| [ACT_CAP, ACT_CLAMPED].contains(&part.activation));
        match is_featured {
            _ if self.is_routed() || self.keeps_input != 0 => StepFeatures::Experts,
            true => StepFeatures::Featured,
            false => StepFeatures::Plain,
        }
    }

    /// Whether it reads the matrices of chosen experts.
    pub(super) fn is_routed(&self) -> bool {
        self.chosen.count > 0
    }

    /// Rows that it examines for outlier columns, and their elements.
    pub(super) fn examines(&self) -> (usize, usize) {
        let inputs = if self.threshold.is_nan() || self.reuses_input != 0 { &[][..] } else { self.inputs() };
        let rows = self.vectors() * inputs.len();
        (rows, self.vectors() * inputs.iter().map(|input| input.k as usize).sum::<usize>())
    }

    pub(super) fn inputs(&self) -> &[InputDesc] {
        &self.inputs[..self.n_inputs as usize]
    }

    /// Returns whether results go to `address`, which is not 0: those of a matrix may be several buffers in a row.
    pub(super) fn writes(&self, address: u64) -> bool {
        let word_bytes = if self.output_type == OutputType::TaggedFloats as i32 { 8 } else { 4 };
        let is_in = |part: &MatrixPart| (part.out..part.out + word_bytes * part.n as u64).contains(&address);
        self.residual == address || self.parts.iter().any(|part| part.out != 0 && is_in(part))
    }

    /// Links inputs to the instructions that write them.
    pub(super) fn link(&mut self, writer: impl Fn(u64) -> i32) -> Result<()> {
        for input in &mut self.inputs[..self.n_inputs as usize] {
            input.written_by = writer(input.x);
            if input.written_by >= 0 && input.norm == 0 && input.is_tagged == 0 {
                bail!("an input of fp16 without tags that instruction {} writes", input.written_by);
            }
        }
        Ok(())
    }
}
