//! Programs of the step kernel: the instructions of one launch in order, as in instruction.cuh.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, Result, bail};

use super::attention::Attention;
use super::launch::{Grid, Kernel, Launcher, dimension, launch};
use super::matvec::{Epilogue, Family, InputDesc, Matvec, Mode, Product};
use super::norm_add::NormAdd;
use super::route::Route;
use super::step_kernel::{DeviceProperties, StepFeatures, StepKernel, WARPS, WeightDecoder};
use crate::parameters;

/// `written_by` of values that were there before the launch.
const NONE: i32 = -1;
/// The gate of a program, or of its end, without a router's choice.
const NO_GATE: i32 = i32::MAX;
/// Tags of fp16 values have 16 bits, and those of two steps must differ.
const MAX_INSTRUCTIONS: usize = (1 << 16) / 2 - 1;
/// Time that attention and the wait in front of it take of a block, beside reading keys and values (docs/benchmarks.md).
const ATTENTION_US: usize = 5;

/// As `struct Instruction`; numbered as `enum Opcode` of instruction.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C, i32)]
pub enum Instruction {
    Half(Matvec),
    Float(Matvec),
    Format(Matvec),
    Attention(Attention),
    FeaturedAttention(Attention),
    NormAdd(NormAdd),
    Route(Route),
}

// SAFETY: laid out as the kernels' struct, and made of numbers and of addresses that are the caller's promise at each launch.
unsafe impl DeviceRepr for Instruction {}

/// The destination of the next token, as `struct TokenOutput`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct TokenOutput {
    /// `[blocks]` of 8 bytes; 0 where the program has no LM head.
    pub best: u64,
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

/// The parameter of a launch, as `struct Program`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Program {
    only: Instruction,
    instructions: u64,
    constants: u64,
    /// Two counters of 32 bits: [`COUNTERS`], zero at first; 0 for a single instruction without an LM head.
    pub counters: u64,
    /// Words of [`super::trace`], for a launch of the traced kernel; 0 for none.
    pub trace: u64,
    pub token_output: TokenOutput,
    n_instructions: i32,
    stages: i32,
    gate: i32,
}

/// Blocks that have ended the launch, zero between launches, and launches of several instructions.
pub const COUNTERS: usize = 2;

/// An fp32 value as the step kernel stores it, with the tag of a value that was there before the launch.
pub fn tagged_float(value: f32) -> u64 {
    u64::from(value.to_bits())
}

impl Instruction {
    /// Shared memory beside the warps' pipelines.
    fn shared_bytes(&self, kernel: &StepKernel) -> usize {
        let (matvec, converted_eighths) = match self {
            Self::Half(matvec) => (matvec, 0),
            Self::Float(matvec) => (matvec, 8 * size_of::<f32>()),
            Self::Format(matvec) => (matvec, kernel.converted_eighths),
            Self::Attention(attention) | Self::FeaturedAttention(attention) => return attention.shared_bytes(),
            // A float a warp.
            Self::NormAdd(_) => return WARPS * size_of::<f32>(),
            Self::Route(_) => return 0,
        };
        let x_eighths = 8 * size_of::<half::f16>() + converted_eighths;
        matvec.partials() * kernel.partial_bytes + matvec.padded() * x_eighths / 8
    }

    /// Name of the instruction in a trace: `2048 x 8192` outputs and inputs of a matrix, several of them joined by `+`.
    pub fn label(&self) -> String {
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Format(matvec) => matvec.label(),
            Self::Attention(_) | Self::FeaturedAttention(_) => "attention".to_owned(),
            Self::NormAdd(_) => "norm and addition".to_owned(),
            Self::Route(_) => "router's choice".to_owned(),
        }
    }

    /// The instructions that write what it reads.
    pub fn writers(&self) -> Vec<usize> {
        self.reads().into_iter().filter_map(|(_, writer)| writer).collect()
    }

    /// Rows that it examines for outlier columns, and their elements.
    pub fn examines(&self) -> (usize, usize) {
        self.matvec().map_or((0, 0), Matvec::examines)
    }

    fn matvec(&self) -> Option<&Matvec> {
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Format(matvec) => Some(matvec),
            Self::Attention(_) | Self::FeaturedAttention(_) | Self::NormAdd(_) | Self::Route(_) => None,
        }
    }

    fn matvec_mut(&mut self) -> Option<&mut Matvec> {
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Format(matvec) => Some(matvec),
            Self::Attention(_) | Self::FeaturedAttention(_) | Self::NormAdd(_) | Self::Route(_) => None,
        }
    }

    /// Returns what it needs of its kernel.
    fn features(&self) -> StepFeatures {
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Format(matvec) => matvec.features(),
            Self::Attention(_) => StepFeatures::Plain,
            Self::FeaturedAttention(_) | Self::NormAdd(_) => StepFeatures::Featured,
            Self::Route(_) => StepFeatures::Experts,
        }
    }

    /// Returns whether it writes to `address`.
    fn writes(&self, address: u64) -> bool {
        address != 0
            && match self {
                Self::Half(matvec) | Self::Float(matvec) | Self::Format(matvec) => matvec.writes(address),
                Self::Attention(attention) | Self::FeaturedAttention(attention) => attention.out == address,
                Self::NormAdd(norm) => norm.x == address,
                // The choice stays in each block.
                Self::Route(_) => false,
            }
    }

    /// The addresses that it reads, and the instruction that writes each, if one does.
    fn reads(&self) -> Vec<(u64, Option<usize>)> {
        let of = |address: u64, writer: i32| (address, usize::try_from(writer).ok());
        match self {
            Self::Half(matvec) | Self::Float(matvec) | Self::Format(matvec) => {
                matvec.inputs().iter().map(|input| of(input.x, input.written_by)).collect()
            }
            Self::Attention(attention) | Self::FeaturedAttention(attention) => {
                let addresses = [attention.q, attention.k, attention.v].into_iter();
                addresses.zip(attention.written_by).map(|(address, writer)| of(address, writer)).collect()
            }
            // Of x a thread reads what it alone writes.
            Self::NormAdd(norm) => vec![of(norm.y, norm.written_by[0])],
            Self::Route(route) => vec![of(route.scores, route.written_by)],
        }
    }

    fn of(decoder: WeightDecoder, matvec: Matvec) -> Self {
        match decoder {
            WeightDecoder::Half => Self::Half(matvec),
            WeightDecoder::Float => Self::Float(matvec),
            WeightDecoder::Format => Self::Format(matvec),
        }
    }

    fn decoder(&self) -> Option<WeightDecoder> {
        match self {
            Self::Half(_) => Some(WeightDecoder::Half),
            Self::Float(_) => Some(WeightDecoder::Float),
            Self::Format(_) => Some(WeightDecoder::Format),
            Self::Attention(_) | Self::FeaturedAttention(_) | Self::NormAdd(_) | Self::Route(_) => None,
        }
    }
}

/// Collects the instructions of a program in order.
pub struct ProgramBuilder {
    properties: DeviceProperties,
    list: Vec<Instruction>,
    families: Vec<&'static Family>,
    /// Constants of the kernel's format, 0 without.
    constants: u64,
}

impl ProgramBuilder {
    pub fn new(properties: DeviceProperties) -> Self {
        Self { properties, list: Vec::new(), families: Vec::new(), constants: 0 }
    }

    /// As [`Matvec::new`].
    pub fn multiply(
        &mut self,
        mode: Mode,
        mut inputs: Vec<InputDesc>,
        parts: &[Product],
        epilogue: Epilogue,
    ) -> Result<()> {
        let mut parts = parts.to_vec();
        // Kernels read one input after the other: the one that is ready first comes first.
        if let [first, second] = &inputs[..]
            && self.writer(first.x) > self.writer(second.x)
        {
            inputs.reverse();
            parts.reverse();
        }
        let matvec = Matvec::new(self.properties, mode, inputs, &parts, epilogue)?;
        for matrix in parts.iter().map(|part| part.matrix) {
            self.families.push(matrix.family);
            self.constants = self.constants.max(matrix.constants);
        }
        self.push(Instruction::of(parts[0].matrix.family.decoder, matvec))
    }

    /// A launch of one matvec alone.
    pub fn single(
        properties: DeviceProperties,
        mode: Mode,
        inputs: Vec<InputDesc>,
        products: &[Product],
        epilogue: Epilogue,
    ) -> Result<PlannedLaunch> {
        let mut program = Self::new(properties);
        program.multiply(mode, inputs, products, epilogue)?;
        program.plan(0)
    }

    /// Adds an attention. Matrices of the instruction before it that make neither q, k nor v become an instruction of their own between the
    /// two, if they take long enough; blocks that attend get fewer of its rows.
    pub fn attend(&mut self, attention: Attention) -> Result<()> {
        attention.check()?;
        let outs = [attention.q, attention.k, attention.v];
        if let Some(before) = self.list.last_mut()
            && let Some(decoder) = before.decoder()
            && let Instruction::Half(matvec) | Instruction::Float(matvec) | Instruction::Format(matvec) = before
            && let Some(mut beside) =
                matvec.split_off(&outs, ATTENTION_US * self.properties.bytes_per_us, self.properties)
        {
            let bytes_per_block = ATTENTION_US * self.properties.bytes_per_us / self.properties.multiprocessors;
            beside.rebalance(attention.units(), bytes_per_block + attention.unit_bytes(), self.properties);
            self.list.push(Instruction::of(decoder, beside));
        }
        match attention.is_featured() {
            true => self.push(Instruction::FeaturedAttention(attention)),
            false => self.push(Instruction::Attention(attention)),
        }
    }

    /// Adds a normed product to a residual.
    pub fn add_norm(&mut self, norm: NormAdd) -> Result<()> {
        self.push(Instruction::NormAdd(norm))
    }

    /// Adds a router's choice, which the matvecs of chosen experts behind it read.
    pub fn route(&mut self, route: Route) -> Result<()> {
        let gate = dimension(self.list.len() + 1)?;
        let before =
            self.list.iter_mut().rev().find_map(|i| if let Instruction::Route(route) = i { Some(route) } else { None });
        before.into_iter().for_each(|before| before.next_gate = gate);
        self.push(Instruction::Route(route))
    }

    /// The last instruction that writes to `address`.
    fn writer(&self, address: u64) -> i32 {
        self.list.iter().rposition(|instruction| instruction.writes(address)).map_or(NONE, |at| at as i32)
    }

    /// Adds an instruction and links its inputs to the instructions that write them.
    fn push(&mut self, mut instruction: Instruction) -> Result<()> {
        let writer = |address| self.writer(address);
        match &mut instruction {
            Instruction::Half(matvec) | Instruction::Float(matvec) | Instruction::Format(matvec) => {
                matvec.link(writer)?
            }
            Instruction::Attention(attention) | Instruction::FeaturedAttention(attention) => {
                attention.written_by = [attention.q, attention.k, attention.v].map(writer)
            }
            Instruction::NormAdd(norm) => norm.written_by = [norm.y, norm.x].map(writer),
            Instruction::Route(route) => {
                (route.written_by, route.next_gate) = (writer(route.scores), NO_GATE);
            }
        }
        // The gates of experts read what their router has read.
        if let [.., router, Instruction::Route(_)] = &mut self.list[..]
            && router.decoder() == instruction.decoder()
            && let (Some(router), Some(gates)) = (router.matvec_mut(), instruction.matvec_mut())
        {
            gates.reuse_input_of(router);
        }
        self.list.push(instruction);
        Ok(())
    }

    /// Checks for write-after-read hazards. The kernel has no grid barrier, so that a buffer may be overwritten only by an instruction that
    /// depends on all its readers. A matvec reads all results of the instructions that write its inputs, and depends on theirs in turn.
    fn check_hazards(&self) -> Result<()> {
        let n = self.list.len();
        if n > MAX_INSTRUCTIONS {
            bail!("a program of {n} instructions, allowed are {MAX_INSTRUCTIONS}");
        }
        let reads: Vec<_> = self.list.iter().map(Instruction::reads).collect();
        // By instruction, those that it depends on.
        let mut depends = vec![vec![false; n]; n];
        let mut route = None;
        for at in 0..n {
            if matches!(self.list[at], Instruction::Route(_)) {
                route = Some(at);
            }
            // A block reads the matrices that it has chosen before.
            let chosen = route.filter(|_| self.list[at].matvec().is_some_and(Matvec::is_routed));
            for writer in reads[at].iter().filter_map(|(_, writer)| *writer).chain(chosen) {
                let of_writer = depends[writer].clone();
                depends[at].iter_mut().zip(of_writer).for_each(|(depends, of_writer)| *depends |= of_writer);
                depends[at][writer] = true;
            }
        }
        for (writer, instruction) in self.list.iter().enumerate() {
            // A unit of attention has a part of what it reads, and all that this was made of.
            let reads_part = |reader: usize| {
                instruction.matvec().is_none() && reads[writer].iter().any(|(_, of)| *of == Some(reader))
            };
            let is_overwritten =
                |reader: &usize| reads[*reader].iter().any(|(address, _)| instruction.writes(*address));
            let misses = |reader: &usize| !depends[writer][*reader] || reads_part(*reader);
            if let Some(reader) = (0..writer).filter(is_overwritten).find(misses) {
                bail!("instruction {writer} may overwrite what instruction {reader} has not read yet");
            }
        }
        Ok(())
    }

    /// The instructions, which the launch reads from memory.
    pub fn list(&self) -> &[Instruction] {
        &self.list
    }

    /// The launch, which reads [`Self::list`] at `at`: 0 for a single instruction.
    pub fn plan(&self, at: u64) -> Result<PlannedLaunch> {
        self.plan_on(self.kernel()?, at)
    }

    /// As [`Self::plan`], by a kernel that reads all matrices.
    pub fn plan_on(&self, kernel: &'static StepKernel, at: u64) -> Result<PlannedLaunch> {
        let Some(&only) = self.list.first().filter(|_| self.list.len() == 1 || at != 0) else {
            bail!("{} instructions at no address", self.list.len())
        };
        self.check_hazards()?;
        let data_bytes = self.list.iter().map(|instruction| instruction.shared_bytes(kernel)).max().unwrap_or(0);
        let data_bytes = data_bytes.next_multiple_of(16);
        let features = self.list.iter().map(Instruction::features).max().unwrap_or(StepFeatures::Plain);
        let (stages, stage_bytes) = self.properties.pipeline(kernel, data_bytes + features.static_bytes());
        let grid = Grid {
            shared_bytes: WARPS * stages * stage_bytes + data_bytes,
            cooperative: self.list.len() > 1,
            ..Grid::new((self.properties.multiprocessors, 1), self.properties.threads(kernel) as u32)
        };
        let (n_instructions, stages) = (dimension(self.list.len())?, dimension(stages)?);
        let route = self.list.iter().position(|instruction| matches!(instruction, Instruction::Route(_)));
        let program = Program {
            only,
            instructions: at,
            constants: self.constants,
            counters: 0,
            trace: 0,
            token_output: TokenOutput::default(),
            n_instructions,
            stages,
            gate: route.map_or(Ok(NO_GATE), |route| dimension(route + 1))?,
        };
        Ok(PlannedLaunch { kernel, features, grid, program })
    }

    /// The first kernel that reads all matrices.
    fn kernel(&self) -> Result<&'static StepKernel> {
        let own = || self.families.iter().filter(|family| family.decoder == WeightDecoder::Format);
        let Some(first) = own().next().or(self.families.first()) else { bail!("a launch of no matrices") };
        let reads = |kernel: &StepKernel, family: &Family| family.kernels.iter().any(|other| other.name == kernel.name);
        match first.kernels.iter().find(|kernel| own().all(|family| reads(kernel, family))) {
            Some(kernel) => Ok(kernel),
            None => bail!("no kernel reads the matrices of all instructions"),
        }
    }
}

/// A launch made of shapes and addresses alone, for a device or a host.
#[derive(Clone, Copy)]
pub struct PlannedLaunch {
    kernel: &'static StepKernel,
    features: StepFeatures,
    grid: Grid,
    pub program: Program,
}

impl PlannedLaunch {
    /// Loads the kernel onto a device, which must have the shared memory for it.
    pub fn load(self, device: &CudaDevice) -> Result<LoadedLaunch> {
        let Self { kernel: StepKernel { fatbins, name, .. }, features, grid, program } = self;
        let fatbin = match (program.trace == 0, features) {
            (true, _) => features.fatbin(fatbins),
            (false, StepFeatures::Plain) => &fatbins.traced,
            (false, _) => {
                bail!("QUANTBENCH_TRACE: no build of the step kernel has both stamps and this model's instructions")
            }
        };
        let kernel = fatbin.kernel(device, name)?;
        kernel.allow_shared(grid.shared_bytes)?;
        if kernel.blocks_per_multiprocessor(grid.threads, grid.shared_bytes)? == 0 {
            bail!(
                "`{name}` needs {} bytes of shared memory for its longest row, more than this device has",
                grid.shared_bytes
            );
        }
        Ok(LoadedLaunch { kernel, grid, program })
    }

    /// # Safety
    /// Every address that this launch was made of is still valid.
    pub unsafe fn launch_on(&self, launcher: &dyn Launcher) -> Result<()> {
        let StepKernel { fatbins, name, .. } = self.kernel;
        let fatbin = self.features.fatbin(fatbins);
        // SAFETY: steps' kernels take one struct, which `Program` mirrors; the caller vouches for the addresses.
        unsafe { launcher.launch(fatbin, name, self.grid, parameters![self.program]) }
    }
}

/// A launch whose kernel is loaded: it may be repeated.
pub struct LoadedLaunch {
    kernel: Kernel,
    grid: Grid,
    program: Program,
}

impl LoadedLaunch {
    /// # Safety
    /// Every address that this launch was made of is still valid.
    pub unsafe fn launch(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: as [`PlannedLaunch::launch_on`].
        unsafe { launch(device, self.kernel, self.grid, parameters![self.program]) }
    }
}

#[cfg(test)]
mod tests;
