//! One decode step: fused operations as the instructions of one launch, and the memory between these.

mod experts;

use anyhow::{Context, Result};

use super::range::rounded;
use super::{Addresses, ENCODED_BYTES, POSITION_BYTES, activation_number, padded_floats, scales, token_output};
use crate::kernels::cuda::attention::{Attention, Features, KvSplit};
use crate::kernels::cuda::launch::dimension;
use crate::kernels::cuda::matvec::{
    ACT_CAP, Epilogue, InputDesc, MatrixDesc, Mode, NORM_CAST, NORM_LAYER, NORM_RMS, OutputType, PowersOfTwo, Product,
};
use crate::kernels::cuda::norm_add::NormAdd;
use crate::kernels::cuda::program::{COUNTERS, Instruction, PlannedLaunch, ProgramBuilder, TokenOutput};
use crate::kernels::cuda::route::ExpertParts;
use crate::plan::fuse::{FusedExperts, FusedInput, FusedOp, FusedPart, Join, MatvecSpec, NormAddSpec, fuse};
use crate::plan::{
    ActivationKind, AttentionSpec, BufferId, KeyValue, Mask, MatrixId, MatrixRows, Model, Norm, NormKind, QkNorm,
    QkNormOver, Sinks, Softcap, VectorId, Window, feature, refuse,
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
    /// By the plan's buffers, one row each: tagged fp32 where a residual lives or a norm reads, else tagged fp16. `None` where no
    /// instruction writes, and for [`Self::views`].
    pub buffers: Vec<Option<T>>,
    /// By the plan's buffers, those that lie in another one: products of one matrix lie behind each other.
    pub views: Vec<Option<View>>,
    /// Partial results of attention.
    pub partials: T,
    /// Counters of attention.
    pub arrived: T,
    /// The LM head's largest logits, one for each block.
    pub best: T,
    /// [`COUNTERS`].
    pub counters: T,
    /// Tables of all experts, one layer behind the other: [`StepProgram::experts`].
    pub experts: T,
}

/// The place of a buffer in another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    pub of: BufferId,
    pub first_byte: u64,
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
        let mut views = vec![None; model.decoder.buffers.len()];
        let (mut partials, mut counters, mut experts) = (1, 1, 1);
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
                // The result is added where it is made: its buffer is what the gates of the chosen experts write.
                FusedOp::Experts(FusedExperts { spec, .. }) => {
                    let rows = spec.experts.first().map_or(0, |expert| model.matrices[expert.gate.weight.0].n);
                    buffers[spec.out.0] = Some(zeros(size_of::<u32>() * spec.top_k * rows));
                    experts += size_of::<ExpertParts>() * spec.experts.len();
                }
                // A residual is an embedding's.
                FusedOp::NormAdd(_) => {}
                FusedOp::Matvec(spec) if matches!(spec.join, Join::Residual { x: _ }) => {}
                FusedOp::Matvec(spec) => {
                    let word_bytes = if spec.join == Join::Floats { size_of::<u64>() } else { size_of::<u32>() };
                    for id in spec.writes() {
                        buffers[id.0] = Some(zeros(word_bytes * width(id)));
                    }
                    // Rows of one matrix are one product, whose buffers lie behind each other.
                    for parts in of_one_matrix(spec).filter(|parts| parts.len() > 1) {
                        let (of, mut bytes) = (parts[0].out, 0);
                        for part in parts {
                            views[part.out.0] = Some(View { of, first_byte: bytes as u64 }).filter(|_| bytes > 0);
                            buffers[part.out.0] = None;
                            bytes += word_bytes * width(part.out);
                        }
                        buffers[of.0] = Some(zeros(bytes));
                    }
                }
            }
        }
        Self {
            buffers,
            views,
            partials: Allocation { bytes: size_of::<f32>() * partials, is_zeroed: false },
            arrived: zeros(size_of::<i32>() * counters),
            best: zeros(size_of::<u64>() * on.properties().multiprocessors),
            counters: zeros(size_of::<u32>() * COUNTERS),
            experts: Allocation { bytes: experts, is_zeroed: false },
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
            views: self.views.clone(),
            partials: make(&self.partials)?,
            arrived: make(&self.arrived)?,
            best: make(&self.best)?,
            counters: make(&self.counters)?,
            experts: make(&self.experts)?,
        })
    }

    /// [`Self::try_map`] where nothing fails.
    pub fn map<U>(&self, mut make: impl FnMut(&T) -> U) -> StepMemory<U> {
        let Self { buffers, views, partials, arrived, best, counters, experts } = self;
        StepMemory {
            buffers: buffers.iter().map(|buffer| buffer.as_ref().map(&mut make)).collect(),
            views: views.clone(),
            partials: make(partials),
            arrived: make(arrived),
            best: make(best),
            counters: make(counters),
            experts: make(experts),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let Self { buffers, views: _, partials, arrived, best, counters, experts } = self;
        buffers.iter().flatten().chain([partials, arrived, best, counters, experts])
    }
}

impl StepMemory<u64> {
    /// The address of a buffer.
    ///
    /// # Errors
    /// If no instruction writes it.
    pub fn at(&self, id: BufferId) -> Result<u64> {
        self.find(id).context("an operation reads what no other writes")
    }

    /// 0 for a buffer that fusion has left out.
    fn optional(&self, id: BufferId) -> u64 {
        self.find(id).unwrap_or(0)
    }

    fn find(&self, id: BufferId) -> Option<u64> {
        match self.views[id.0] {
            Some(View { of, first_byte }) => self.buffers[of.0].map(|address| address + first_byte),
            None => self.buffers[id.0],
        }
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
    experts: Vec<ExpertParts>,
    counters: u64,
    token: TokenOutput,
}

impl StepProgram {
    /// Lowers `fused`, whose memory lies at `memory`.
    ///
    /// # Errors
    /// If no instruction computes an operation, by its name.
    pub fn new(on: &dyn Addresses, fused: &[FusedOp], memory: &StepMemory<u64>) -> Result<Self> {
        check_residuals(fused)?;
        let instructions = ProgramBuilder::new(on.properties());
        let scales = scales(on.model());
        let mut lowering = Lowering { on, memory, scales, instructions, experts: Vec::new() };
        for op in fused {
            lowering.add(op).with_context(|| format!("at {op:?}"))?;
        }
        // Without an LM head no token is found, and the last block writes none.
        let finds_token = fused
            .iter()
            .any(|op| matches!(op, FusedOp::Matvec(spec) if matches!(spec.join, Join::Argmax { softcap: _ })));
        let token = if finds_token { memory.token_output(on, 1)? } else { TokenOutput::default() };
        let Lowering { instructions, experts, .. } = lowering;
        Ok(Self { instructions, experts, counters: memory.counters, token })
    }

    /// The instructions, which the launch reads at one address.
    pub fn instructions(&self) -> &[Instruction] {
        self.instructions.list()
    }

    /// Tables of experts, which the launch reads at [`StepMemory::experts`].
    pub fn experts(&self) -> &[ExpertParts] {
        &self.experts
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
    /// By the plan's buffers: [`scales`].
    scales: Vec<f32>,
    instructions: ProgramBuilder,
    experts: Vec<ExpertParts>,
}

impl Lowering<'_> {
    fn add(&mut self, op: &FusedOp) -> Result<()> {
        match op {
            // The operation that finds the token fetches its embedding.
            FusedOp::Embed(_) => Ok(()),
            FusedOp::Matvec(spec) => self.multiply(spec),
            FusedOp::Attention(spec) => self.attend(spec),
            FusedOp::NormAdd(spec) => self.add_norm(spec),
            FusedOp::Experts(spec) => self.choose(spec),
        }
    }

    fn attend(&mut self, spec: &AttentionSpec) -> Result<()> {
        let &AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = spec;
        if append.is_none() {
            refuse(EXECUTOR, "an attention over an encoder", &[feature(&window), feature(&qk_norm)])?;
        }
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
            features: Features {
                window: window.map_or(Ok(0), |Window(window)| dimension(window))?,
                softcap: softcap.map_or(0.0, |Softcap(cap)| cap),
                sinks: sinks.map_or(0, |Sinks(scores)| self.on.vector(scores)),
                ..self.norms(qk_norm)?
            },
            ..Attention::default()
        };
        let appending = match append {
            Some(KeyValue { k, v }) => Attention { k: self.memory.at(k)?, v: self.memory.at(v)?, ..plain },
            None => plain,
        };
        let rotating = match (rope, append) {
            (Some(rope), Some(_)) => {
                let rotary = dimension(self.on.model().ropes[rope.0].rotary_dim)?;
                Attention { angles: self.on.step_angles(rope), rotary, ..appending }
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

    /// The features that norms of queries and keys are.
    fn norms(&self, qk_norm: Option<QkNorm>) -> Result<Features> {
        let Some(QkNorm { q, k, over }) = qk_norm else { return Ok(Features::default()) };
        let is_rms = |norm: Norm| norm.kind == NormKind::Rms && norm.epsilon == q.epsilon;
        if !is_rms(q) || !is_rms(k) {
            let others = "norms of queries and keys that are no rms norms of one epsilon";
            refuse(EXECUTOR, "an attention", &[Some(&others)])?;
        }
        let norms_all_heads = i32::from(over == QkNormOver::Projection);
        let [q_norm, k_norm] = [q, k].map(|norm| self.on.vector(norm.weight));
        Ok(Features { q_norm, k_norm, epsilon: q.epsilon, norms_all_heads, ..Features::default() })
    }

    fn add_norm(&mut self, &NormAddSpec { x, y, norm: Norm { kind, weight, epsilon } }: &NormAddSpec) -> Result<()> {
        match kind {
            NormKind::Rms => {}
            NormKind::Layer { bias: _ } => refuse(EXECUTOR, "a residual", &[Some(&"a layer norm behind a product")])?,
        }
        let n = dimension(self.on.model().decoder.buffers[x.0].width)?;
        let (x, y, weight) = (self.memory.at(x)?, self.memory.at(y)?, self.on.vector(weight));
        Ok(self.instructions.add_norm(NormAdd { x, y, weight, epsilon, n, ..NormAdd::default() })?)
    }

    fn multiply(&mut self, spec @ MatvecSpec { inputs, parts, join }: &MatvecSpec) -> Result<()> {
        let session = self.on.session();
        let read = inputs.first().map_or(1.0, |input| self.scales[input.x.0]);
        if inputs.iter().any(|input| self.scales[input.x.0] != read) {
            refuse(EXECUTOR, "a matvec", &[Some(&"inputs of several scales")])?;
        }
        let rounded = rounded(&self.scales, read, parts.iter().map(|part| part.out));
        let range = PowersOfTwo { read, rounded, ..PowersOfTwo::default() };
        let (output_type, outlier_columns) = (OutputType::TaggedHalves, session.outlier_columns);
        let plain = Epilogue { outlier_columns, output_type, range, ..Epilogue::default() };
        let (mode, products, epilogue) = match *join {
            Join::Apart => (Mode::Apart, self.products(spec)?, plain),
            Join::Floats => {
                (Mode::Apart, self.products(spec)?, Epilogue { output_type: OutputType::TaggedFloats, ..plain })
            }
            Join::Gated { kind, out } => {
                let range = PowersOfTwo { stored: self.scales[out.0], ..plain.range };
                (Mode::Gated, self.gated(spec, kind, out)?, Epilogue { range, ..plain })
            }
            Join::Residual { x } => {
                let residual = self.memory.at(x)?;
                (Mode::Joined, self.products(spec)?, Epilogue { residual, ..plain })
            }
            Join::Argmax { softcap } => {
                let (logits, mut products) = (session.logits, self.products(spec)?);
                if softcap.is_some() {
                    products.iter_mut().for_each(|product| product.activation = ACT_CAP);
                }
                let softcap = softcap.map_or(0.0, |Softcap(cap)| cap);
                (Mode::Apart, products, Epilogue { logits, softcap, ..plain })
            }
        };
        let inputs = inputs.iter().map(|input| self.input(input)).collect::<Result<_>>()?;
        Ok(self.instructions.multiply(mode, inputs, &products, epilogue)?)
    }

    /// The matrices, all rows of each.
    fn products(&self, spec: &MatvecSpec) -> Result<Vec<Product>> {
        let model = self.on.model();
        let product = |parts: &[FusedPart]| {
            // The first buffer is followed by the others.
            let FusedPart { weight, rows, bias, out, activation } = parts[0];
            if rows.is_some() && !is_whole(parts, model) {
                refuse(EXECUTOR, "a linear", &[feature(&rows)])?;
            }
            Ok(Product {
                matrix: self.on.matrix(weight),
                first_row: 0,
                bias: bias.map_or(0, |bias| self.on.vector(bias)),
                out: self.memory.optional(out),
                activation: activation.map_or(0, activation_number),
            })
        };
        of_one_matrix(spec).map(product).collect()
    }

    /// A gate and what it gates: two matrices, or rows of one.
    fn gated(&self, spec: &MatvecSpec, kind: ActivationKind, out: BufferId) -> Result<Vec<Product>> {
        let product = |&FusedPart { weight, rows, bias, out: _, activation: _ }: &FusedPart| {
            let matrix = self.on.matrix(weight);
            let MatrixRows { start, len } = rows.unwrap_or(MatrixRows { start: 0, len: matrix.n });
            if start > 0 && bias.is_some() {
                refuse(EXECUTOR, "a bias", &[feature(&rows)])?;
            }
            Ok(Product {
                matrix: MatrixDesc { n: len, ..matrix },
                first_row: start,
                bias: bias.map_or(0, |bias| self.on.vector(bias)),
                out: self.memory.optional(out),
                activation: activation_number(kind),
            })
        };
        spec.parts.iter().map(product).collect()
    }

    fn input(&self, &FusedInput { x, norm, scale }: &FusedInput) -> Result<InputDesc> {
        let vector = |id: VectorId| self.on.vector(id);
        let plain = InputDesc { x: self.memory.at(x)?, scale, is_tagged: 1, ..InputDesc::default() };
        let Some(Norm { kind, weight, epsilon }) = norm else {
            // The residual is fp32, and products read fp16.
            let is_residual = self.on.model().decoder.embedding().is_some_and(|spec| spec.out == x);
            return Ok(if is_residual { InputDesc { norm: NORM_CAST, ..plain } } else { plain });
        };
        let (norm, norm_bias) = match kind {
            NormKind::Rms => (NORM_RMS, self.on.session().zeros),
            NormKind::Layer { bias } => (NORM_LAYER, vector(bias)),
        };
        Ok(InputDesc { norm_weight: vector(weight), norm_bias, epsilon, norm, ..plain })
    }
}

/// A product that is added to a residual reads what its own threads have added before; behind a norm's addition others have.
fn check_residuals(fused: &[FusedOp]) -> Result<()> {
    let normed = fused.iter().filter_map(|op| if let FusedOp::NormAdd(spec) = op { Some(spec.x) } else { None });
    let normed: Vec<BufferId> = normed.collect();
    let adds_to = |op: &FusedOp| matches!(op, FusedOp::Matvec(MatvecSpec { join: Join::Residual { x }, .. }) if normed.contains(x));
    let both = "products that are added with a norm and without";
    Ok(refuse(EXECUTOR, "a residual", &[fused.iter().any(adds_to).then_some(&both)])?)
}

/// The parts in runs of rows of one matrix.
fn of_one_matrix(spec: &MatvecSpec) -> impl Iterator<Item = &[FusedPart]> {
    let is_gated = matches!(spec.join, Join::Gated { .. });
    let are_one =
        move |a: &FusedPart, b: &FusedPart| !is_gated && a.rows.is_some() && b.rows.is_some() && a.weight == b.weight;
    spec.parts.chunk_by(are_one)
}

/// Whether the parts are all rows of their matrix, in order, and each as it is.
fn is_whole(parts: &[FusedPart], model: &Model) -> bool {
    let mut end = 0;
    let follows = |part: &FusedPart| {
        let MatrixRows { start, len } = part.rows.unwrap_or(MatrixRows { start: 0, len: 0 });
        let follows = start == end && part.bias.is_none() && part.activation.is_none();
        end = start + len;
        follows
    };
    parts.iter().all(follows) && end == model.matrices[parts[0].weight.0].n
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
    let keys = spec.window.map_or(at.capacity, |Window(window)| window.min(at.capacity));
    let is_plain = spec.window.is_none() && spec.softcap.is_none() && spec.qk_norm.is_none() && spec.sinks.is_none();
    let split = match is_plain {
        true => KvSplit::new(keys, kv_heads, heads / kv_heads, at.d_pad, on.properties()),
        false => KvSplit::featured(keys, heads, at.d_pad, on.properties()),
    };
    Shape { split, kv_heads, heads, d }
}
