//! One decode step: fused operations as the instructions of one launch, and the memory between these.

use anyhow::{Context, Result};

use super::{Addresses, ENCODED_BYTES, POSITION_BYTES, activation_number, padded_floats, token_output};
use crate::kernels::cuda::attention::{Attention, KvSplit};
use crate::kernels::cuda::launch::dimension;
use crate::kernels::cuda::matvec::{Epilogue, InputDesc, Mode, NORM_LAYER, NORM_RMS, OutputType, Product};
use crate::kernels::cuda::program::{COUNTERS, Instruction, PlannedLaunch, ProgramBuilder, TokenOutput};
use crate::plan::fuse::{FusedInput, FusedOp, FusedPart, Join, MatvecSpec, fuse};
use crate::plan::{
    ActivationKind, AttentionSpec, BufferId, KeyValue, Mask, MatrixId, Norm, NormKind, VectorId, feature, refuse,
};
use crate::quant::OutlierColumns;

/// The name in errors.
const EXECUTOR: &str = "the CUDA step";

/// The fused operations of one step.
///
/// # Errors
/// If the decoder's plan cannot be fused.
pub fn fused(on: &dyn Addresses) -> Result<Vec<FusedOp>> {
    let family_of = |id: MatrixId| on.matrix(id).family.name;
    Ok(fuse(&on.model().decoder, &family_of)?)
}

/// Everything that a step writes: as sizes, as memory, or as addresses.
#[derive(Debug, Clone)]
pub struct StepMemory<T> {
    /// By the plan's buffers, one row each: tagged fp32 where a residual lives, else tagged fp16. `None` where no instruction
    /// writes.
    pub buffers: Vec<Option<T>>,
    /// Partial results of attention.
    pub partials: T,
    /// Counters of attention.
    pub arrived: T,
    /// The LM head's largest logits, one for each block.
    pub best: T,
    /// [`COUNTERS`].
    pub counters: T,
}

/// Bytes, and whether they have to be zero before the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    pub bytes: usize,
    pub is_zeroed: bool,
}

impl StepMemory<Allocation> {
    /// The memory that these operations need.
    pub fn of(on: &dyn Addresses, fused: &[FusedOp]) -> Self {
        let model = on.model();
        let width = |id: BufferId| model.decoder.buffers[id.0].width;
        // No step has the tag 0.
        let zeros = |bytes: usize| Allocation { bytes, is_zeroed: true };
        let mut buffers = vec![None; model.decoder.buffers.len()];
        let (mut partials, mut counters) = (1, 1);
        for op in fused {
            match op {
                FusedOp::Embed(spec) => {
                    buffers[spec.out.0] = Some(zeros(size_of::<u64>() * padded_floats(width(spec.out))));
                }
                FusedOp::Attention(spec) => {
                    let Shape { split, heads, d, .. } = shape(on, spec);
                    partials = partials.max(split.partials(heads, d));
                    counters = counters.max(heads);
                    buffers[spec.out.0] = Some(zeros(size_of::<u32>() * width(spec.out)));
                }
                // A residual is an embedding's.
                FusedOp::Matvec(spec) if matches!(spec.join, Join::Residual { x: _ }) => {}
                FusedOp::Matvec(spec) => {
                    for id in spec.writes() {
                        buffers[id.0] = Some(zeros(size_of::<u32>() * width(id)));
                    }
                }
            }
        }
        Self {
            buffers,
            partials: Allocation { bytes: size_of::<f32>() * partials, is_zeroed: false },
            arrived: zeros(size_of::<i32>() * counters),
            best: zeros(size_of::<u64>() * on.properties().multiprocessors),
            counters: zeros(size_of::<u32>() * COUNTERS),
        }
    }
}

impl<T> StepMemory<T> {
    /// The same with each `T` turned into a `U`.
    ///
    /// # Errors
    /// The first of `make`.
    pub fn try_map<U, E>(&self, mut make: impl FnMut(&T) -> Result<U, E>) -> Result<StepMemory<U>, E> {
        let buffers = self.buffers.iter().map(|buffer| buffer.as_ref().map(&mut make).transpose());
        Ok(StepMemory {
            buffers: buffers.collect::<Result<_, E>>()?,
            partials: make(&self.partials)?,
            arrived: make(&self.arrived)?,
            best: make(&self.best)?,
            counters: make(&self.counters)?,
        })
    }

    /// [`Self::try_map`] where nothing fails.
    pub fn map<U>(&self, mut make: impl FnMut(&T) -> U) -> StepMemory<U> {
        let Self { buffers, partials, arrived, best, counters } = self;
        StepMemory {
            buffers: buffers.iter().map(|buffer| buffer.as_ref().map(&mut make)).collect(),
            partials: make(partials),
            arrived: make(arrived),
            best: make(best),
            counters: make(counters),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let Self { buffers, partials, arrived, best, counters } = self;
        buffers.iter().flatten().chain([partials, arrived, best, counters])
    }
}

impl StepMemory<u64> {
    fn at(&self, id: BufferId) -> Result<u64> {
        self.buffers[id.0].context("an operation reads what no other writes")
    }

    /// 0 for a buffer that fusion has left out.
    fn optional(&self, id: BufferId) -> u64 {
        self.buffers[id.0].unwrap_or(0)
    }

    /// The destination of the token that a call finds, `advance` positions further on.
    ///
    /// # Errors
    /// If the decoder has no embedding.
    pub fn token_output(&self, on: &dyn Addresses, advance: usize) -> Result<TokenOutput> {
        let spec = on.model().decoder.embedding().context("a decoder without an embedding")?;
        Ok(token_output(on, self.best, self.at(spec.out)?, advance)?)
    }
}

/// A step's instructions, and the other parameters of its launch.
pub struct StepProgram {
    instructions: ProgramBuilder,
    counters: u64,
    token: TokenOutput,
}

impl StepProgram {
    /// Lowers `fused`, whose memory lies at `memory`.
    ///
    /// # Errors
    /// If no instruction computes an operation, by its name.
    pub fn new(on: &dyn Addresses, fused: &[FusedOp], memory: &StepMemory<u64>) -> Result<Self> {
        let mut lowering = Lowering { on, memory, instructions: ProgramBuilder::new(on.properties()) };
        for op in fused {
            lowering.add(op).with_context(|| format!("at {op:?}"))?;
        }
        // Without an LM head no token is found, and the last block writes none.
        let finds_token = fused.iter().any(|op| matches!(op, FusedOp::Matvec(spec) if spec.join == Join::Argmax));
        let token = if finds_token { memory.token_output(on, 1)? } else { TokenOutput::default() };
        Ok(Self { instructions: lowering.instructions, counters: memory.counters, token })
    }

    /// The instructions, which the launch reads at one address.
    pub fn instructions(&self) -> &[Instruction] {
        self.instructions.list()
    }

    /// The launch, which finds [`Self::instructions`] at `at`.
    ///
    /// # Errors
    /// If no kernel reads all matrices, or an instruction would overwrite what another one may not have read yet.
    pub fn plan(&self, at: u64) -> Result<PlannedLaunch> {
        let mut planned = self.instructions.plan(at)?;
        planned.program.counters = self.counters;
        planned.program.token_output = self.token;
        Ok(planned)
    }

    /// Columns that one step examines for outliers; the device counts those it finds.
    pub fn examined(&self) -> OutlierColumns {
        let mut examined = OutlierColumns::default();
        for (rows, elements) in self.instructions().iter().map(Instruction::examines) {
            examined += OutlierColumns { calls: rows as u64, columns: 0, examined: elements as u64 };
        }
        examined
    }
}

struct Lowering<'a> {
    on: &'a dyn Addresses,
    memory: &'a StepMemory<u64>,
    instructions: ProgramBuilder,
}

impl Lowering<'_> {
    fn add(&mut self, op: &FusedOp) -> Result<()> {
        match op {
            // The operation that finds the token fetches its embedding.
            FusedOp::Embed(_) => Ok(()),
            FusedOp::Matvec(spec) => self.multiply(spec),
            FusedOp::Attention(spec) => self.attend(spec),
        }
    }

    fn attend(&mut self, spec: &AttentionSpec) -> Result<()> {
        let &AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = spec;
        let features = [feature(&window), feature(&softcap), feature(&qk_norm), feature(&sinks)];
        refuse(EXECUTOR, "an attention", &features)?;
        match mask {
            // One row, the last, sees all that its cache holds.
            Mask::Causal | Mask::Full | Mask::Prefix => {}
        }
        let Shape { split, kv_heads, heads, d } = shape(self.on, spec);
        let (at, session) = (self.on.cache(cache), self.on.session());
        let plain = Attention {
            q: self.memory.at(q)?,
            keys: at.keys,
            values: at.values,
            out: self.memory.at(out)?,
            position: session.state + POSITION_BYTES,
            length: session.state + ENCODED_BYTES,
            partials: self.memory.partials,
            arrived: self.memory.arrived,
            scale,
            kv_heads: dimension(kv_heads)?,
            group: dimension(heads / kv_heads)?,
            d: dimension(d)?,
            d_pad: dimension(at.d_pad)?,
            capacity: dimension(at.capacity)?,
            span: dimension(split.span)?,
            splits: dimension(split.splits)?,
            ..Attention::default()
        };
        let appending = match append {
            Some(KeyValue { k, v }) => Attention { k: self.memory.at(k)?, v: self.memory.at(v)?, ..plain },
            None => plain,
        };
        let rotating = match (rope, append) {
            (Some(rope), Some(_)) => {
                let rotary = dimension(self.on.model().ropes[rope.0].rotary_dim)?;
                Attention { angles: self.on.angles(rope), rotary, ..appending }
            }
            (Some(_), None) => return Ok(refuse(EXECUTOR, "an attention", &[Some(&"a rope and no keys to append")])?),
            (None, _) => appending,
        };
        let biased = match bias.map(|bias| self.on.bias(bias)) {
            Some(bias) => Attention { bias: bias.address, reach: dimension(bias.reach)?, ..rotating },
            None => rotating,
        };
        Ok(self.instructions.attend(biased)?)
    }

    fn multiply(&mut self, MatvecSpec { inputs, parts, join }: &MatvecSpec) -> Result<()> {
        let session = self.on.session();
        let plain = Epilogue {
            outlier_columns: session.outlier_columns,
            output_type: OutputType::TaggedHalves,
            ..Epilogue::default()
        };
        let (mode, products, epilogue) = match *join {
            Join::Apart => (Mode::Apart, self.products(parts, None, None), plain),
            Join::Gated { kind, out } => (Mode::Gated, self.products(parts, Some(kind), Some(out)), plain),
            Join::Residual { x } => {
                let residual = self.memory.at(x)?;
                (Mode::Joined, self.products(parts, None, None), Epilogue { residual, ..plain })
            }
            Join::Argmax => {
                let logits = session.logits;
                (Mode::Apart, self.products(parts, None, None), Epilogue { logits, ..plain })
            }
        };
        let inputs = inputs.iter().map(|input| self.input(input)).collect::<Result<_>>()?;
        Ok(self.instructions.multiply(mode, inputs, &products, epilogue)?)
    }

    /// The matrices, with an activation and a buffer for all of them where there is one.
    fn products(&self, parts: &[FusedPart], gate: Option<ActivationKind>, into: Option<BufferId>) -> Vec<Product> {
        let product = |&FusedPart { weight, bias, out, activation }: &FusedPart| Product {
            matrix: self.on.matrix(weight),
            bias: bias.map_or(0, |bias| self.on.vector(bias)),
            out: self.memory.optional(into.unwrap_or(out)),
            activation: gate.or(activation).map_or(0, activation_number),
        };
        parts.iter().map(product).collect()
    }

    fn input(&self, &FusedInput { x, norm, scale }: &FusedInput) -> Result<InputDesc> {
        let vector = |id: VectorId| self.on.vector(id);
        let plain = InputDesc { x: self.memory.at(x)?, scale, is_tagged: 1, ..InputDesc::default() };
        let Some(Norm { kind, weight, epsilon }) = norm else { return Ok(plain) };
        let (norm, norm_bias) = match kind {
            NormKind::Rms => (NORM_RMS, self.on.session().zeros),
            NormKind::Layer { bias } => (NORM_LAYER, vector(bias)),
        };
        Ok(InputDesc { norm_weight: vector(weight), norm_bias, epsilon, norm, ..plain })
    }
}

/// Heads of an attention, and how their positions are split over blocks.
struct Shape {
    split: KvSplit,
    kv_heads: usize,
    heads: usize,
    d: usize,
}

fn shape(on: &dyn Addresses, spec: &AttentionSpec) -> Shape {
    let model = on.model();
    let (cache, at) = (model.caches[spec.cache.0], on.cache(spec.cache));
    let (kv_heads, d) = (cache.kv_heads, cache.head_dim);
    let heads = model.decoder.buffers[spec.q.0].width / d;
    let split = KvSplit::new(at.capacity, kv_heads, heads / kv_heads, at.d_pad, on.properties());
    Shape { split, kv_heads, heads, d }
}
