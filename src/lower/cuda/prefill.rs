//! A call of many rows: prompts, encoders, pictures. One operation of the plan after the other, in memory that lives from the
//! operation that writes it to the last that reads it.

mod attend;
mod choose;

use anyhow::{Context, Result, bail};
use half::f16;

use super::call::{CallKind, CallResult, CallShape};
use super::range::rounded;
use super::{Addresses, activation_number, features_width, scales};
use crate::kernels::cuda::arena::{Arena, Region};
use crate::kernels::cuda::launch::Launcher;
use crate::kernels::cuda::matvec::{Epilogue, MatrixDesc};
use crate::kernels::cuda::program::{PlannedLaunch, TokenOutput};
use crate::kernels::cuda::rows::{Addend, RowKernels, Table};
use crate::kernels::cuda::shared_input::{ProductAt, SharedInput};
use crate::plan::{
    ActivationSpec, AddRowsSpec, AddSpec, AppendSpec, BufferId, EmbedSpec, EncoderInputKind, FeaturesSpec, Lifetime,
    LinearPart, LinearSpec, MatrixId, MatrixRows, Model, Norm, NormKind, NormSpec, Op, PatchesSpec, Plan, VectorId,
};
use crate::quant::OutlierColumns;

/// The name in errors.
const EXECUTOR: &str = "the CUDA prefill";

/// Launches a call. Of a batch that is all, and the tokens are chosen; of a single sequence the head of the last row is a launch of its own
/// ([`last_head`]). Its input lies at `input`, as [`super::CallInput`] says.
///
/// # Errors
/// If the plan holds an operation that no launch computes, by its name, or a launch fails.
pub fn run(
    on: &dyn Addresses,
    shape: CallShape,
    launcher: &dyn Launcher,
    arena: &Arena,
    input: Region,
) -> Result<CallResult> {
    let model = on.model();
    let (plan, len, kept) = match shape.kind {
        CallKind::Encoder => {
            let plan = &model.encoder.as_ref().context("this model has no encoder")?.plan;
            (plan, plan.ops.len(), None)
        }
        CallKind::Prompt | CallKind::Scored | CallKind::Step => {
            let head = model.decoder.head().context("this plan has no head")?;
            (&model.decoder, head.body_len, Some(head.x))
        }
    };
    let buffers = plan.buffers.iter().map(|_| None).collect();
    let (lives, examined) = (plan.lifetimes(), OutlierColumns::default());
    // Of the decoder's gates alone.
    let scales = match shape.kind {
        CallKind::Encoder => vec![1.0; plan.buffers.len()],
        CallKind::Prompt | CallKind::Scored | CallKind::Step => scales(model),
    };
    Prefill { on, plan, shape, launcher, arena, input: Some(input), buffers, lives, scales, examined }.run(len, kept)
}

/// The head of the last row of a session's only sequence, which finds the token of a prompt and puts it where `token` says.
///
/// # Errors
/// If the decoder has no head.
pub fn last_head(
    on: &dyn Addresses,
    shape: CallShape,
    done: CallResult,
    token: TokenOutput,
    counters: u64,
) -> Result<PlannedLaunch> {
    let head = on.model().decoder.head().context("this plan has no head")?;
    let x = row_at(on.model(), done, shape.rows() - 1)?;
    let epilogue = Epilogue { logits: on.session().logits, ..Epilogue::default() };
    Ok(super::head(on, head, x, 0, epilogue, token, counters)?)
}

/// The address of a row of a decoder's call, as the head reads it.
///
/// # Errors
/// If the decoder has no head.
pub fn row_at(model: &Model, done: CallResult, row: usize) -> Result<u64> {
    let head = model.decoder.head().context("this plan has no head")?;
    Ok(done.x + (row * size_of::<f16>() * model.matrices[head.weight.0].k) as u64)
}

/// A buffer in the call's memory, or in the session's. Additions to it are deferred to the kernel that reads it next, if that can
/// make them, and take a launch of their own otherwise.
struct Buffer<'a> {
    address: u64,
    is_float: bool,
    /// The bias of a product, not added yet; or 0.
    bias: u64,
    /// A power of two that values and bias are stored by, where that is not 1.
    scale: f32,
    /// Products that have not been added to a residual yet, in their order.
    addends: Vec<Buffer<'a>>,
    _region: Option<Region<'a>>,
}

/// Residual additions that are deferred to the next kernel.
const MAX_DEFERRED_ADDS: usize = 2;

impl<'a> Buffer<'a> {
    fn new(address: u64, is_float: bool, region: Option<Region<'a>>) -> Self {
        Self { address, is_float, bias: 0, scale: 1.0, addends: Vec::new(), _region: region }
    }

    fn addend(&self) -> Addend {
        let is_float = i32::from(self.is_float);
        Addend { values: self.address, bias: self.bias, is_float, scale: 1.0 / self.scale }
    }
}

/// The matrix as it multiplies what was stored by `scale`: LLM.int8's outliers are at least that part of the threshold.
fn scaled(matrix: MatrixDesc, scale: f32) -> MatrixDesc {
    MatrixDesc { threshold: matrix.threshold * scale, ..matrix }
}

fn addends(buffers: &[Buffer]) -> [Addend; MAX_DEFERRED_ADDS] {
    std::array::from_fn(|at| buffers.get(at).map_or(Addend::default(), Buffer::addend))
}

/// A call under way.
struct Prefill<'a> {
    on: &'a dyn Addresses,
    plan: &'a Plan,
    shape: CallShape,
    launcher: &'a dyn Launcher,
    arena: &'a Arena<'a>,
    /// The memory of [`super::CallInput`], until the first operation has read it.
    input: Option<Region<'a>>,
    buffers: Vec<Option<Buffer<'a>>>,
    lives: Vec<Lifetime>,
    /// By the decoder's buffers: [`scales`].
    scales: Vec<f32>,
    examined: OutlierColumns,
}

impl<'a> Prefill<'a> {
    /// Runs the first `len` operations; `kept` outlives them.
    fn run(mut self, len: usize, kept: Option<BufferId>) -> Result<CallResult> {
        for (index, op) in self.plan.ops[..len].iter().enumerate() {
            self.step(index, op).with_context(|| format!("at {op:?}"))?;
            for (id, buffer) in self.buffers.iter_mut().enumerate() {
                if self.lives[id].last_op() == index && kept != Some(BufferId(id)) {
                    *buffer = None;
                }
            }
        }
        let x = kept.map_or(Ok(0), |kept| self.read(kept))?;
        // As long as x has its memory.
        if self.on.session().sequences > 1 && matches!(self.shape.kind, CallKind::Prompt | CallKind::Step) {
            self.choose(x)?;
        }
        Ok(CallResult { x, examined: self.examined })
    }

    fn buffer(&self, id: BufferId) -> Result<&Buffer<'a>> {
        self.buffers[id.0].as_ref().context("a buffer is read before it is written")
    }

    fn kernels(&self) -> RowKernels<'a> {
        RowKernels { on: self.launcher }
    }

    fn buffer_mut(&mut self, id: BufferId) -> Result<&mut Buffer<'a>> {
        self.buffers[id.0].as_mut().context("a buffer is read before it is written")
    }

    /// The buffer's address, with all deferred additions made.
    fn read(&mut self, id: BufferId) -> Result<u64> {
        let (rows, width, kernels) = (self.shape.rows(), self.width(id), self.kernels());
        let buffer = self.buffer_mut(id)?;
        let (at, is_float) = (buffer.address, buffer.is_float);
        let (bias, waiting) = (std::mem::take(&mut buffer.bias), std::mem::take(&mut buffer.addends));
        // SAFETY: all hold rows · width values, the bias width; each thread reads what it writes.
        unsafe {
            if bias != 0 {
                kernels.add_bias(rows, width, at, is_float, bias)?;
            }
            if !waiting.is_empty() {
                kernels.add(rows, width, at, addends(&waiting), at)?;
            }
        }
        Ok(at)
    }

    /// The address of an fp16 product, and the bias that is not added to it yet.
    fn product(&self, id: BufferId) -> Result<(u64, u64)> {
        match self.buffer(id)? {
            Buffer { address, is_float: false, bias, scale: 1.0, .. } => Ok((*address, *bias)),
            _ => bail!("an fp32 or a scaled buffer where fp16 is read"),
        }
    }

    fn width(&self, id: BufferId) -> usize {
        self.plan.buffers[id.0].width
    }

    /// Room for an fp16 buffer, which the operation that asks for it writes before anything reads; the session's own for a picture's
    /// features.
    fn half(&self, id: BufferId) -> Result<Buffer<'a>> {
        let features = self.features();
        if let Some(Op::Features(FeaturesSpec { x })) = self.plan.ops.last()
            && (*x, features != 0) == (id, true)
        {
            return Ok(Buffer::new(features, false, None));
        }
        let region = self.arena.take::<f16>(self.shape.rows() * self.width(id))?;
        Ok(Buffer::new(region.address, false, Some(region)))
    }

    /// The features of the pictures of the call's sequences, where the model reads any.
    fn features(&self) -> u64 {
        let (features, model) = (self.on.session().features, self.on.model());
        match (model.encoder.as_ref().map(|encoder| encoder.input), features_width(model)) {
            (Some(EncoderInputKind::Picture(picture)), Some(width)) if features != 0 => {
                features + (self.shape.first * picture.patches() * width * size_of::<f16>()) as u64
            }
            _ => 0,
        }
    }

    /// [`Self::half`] in fp32.
    fn float(&self, id: BufferId) -> Result<Buffer<'a>> {
        let region = self.arena.take::<f32>(self.shape.rows() * self.width(id))?;
        Ok(Buffer::new(region.address, true, Some(region)))
    }

    fn vector(&self, id: VectorId) -> u64 {
        self.on.vector(id)
    }

    fn table(&self, id: MatrixId) -> Table {
        let desc = self.on.matrix(id);
        Table { address: desc.weight, stride: desc.stride_bytes / size_of::<f16>(), width: desc.k }
    }

    /// Makes the buffer fp32, where it is not, and adds its bias.
    fn widen(&mut self, id: BufferId) -> Result<()> {
        let Buffer { is_float, bias, .. } = *self.buffer(id)?;
        if is_float && bias == 0 {
            return Ok(());
        }
        let (scale, from) = (self.buffer(id)?.scale, self.read(id)?);
        if !is_float {
            let wide = self.float(id)?;
            // SAFETY: both hold rows · width values.
            unsafe { self.kernels().widen(self.shape.rows() * self.width(id), from, 1.0 / scale, wide.address) }?;
            self.buffers[id.0] = Some(wide);
        }
        Ok(())
    }

    fn step(&mut self, index: usize, op: &Op) -> Result<()> {
        let (rows, kernels) = (self.shape.rows(), self.kernels());
        match op {
            Op::Embed(spec) => self.embed(*spec)?,
            Op::Patches(PatchesSpec { out }) => {
                let input = self.input.take().context("a call has one input")?;
                self.buffers[out.0] = Some(Buffer::new(input.address, false, Some(input)));
            }
            Op::AddRows(AddRowsSpec { x, table }) => {
                self.widen(*x)?;
                let (x, table) = (self.read(*x)?, self.table(*table));
                // SAFETY: x holds a row for each of the table's, of each sequence.
                unsafe { kernels.add_table(rows, self.shape.batch.rows_each(), x, table) }?;
            }
            Op::Features(FeaturesSpec { x }) => {
                let features = self.features();
                if features == 0 || self.read(*x)? != features {
                    bail!("image features must be products");
                }
            }
            Op::Norm(spec) => self.norm(*spec)?,
            Op::Linear(spec) => self.linear(spec)?,
            Op::Append(AppendSpec { kv, cache }) => self.append(*kv, *cache, None)?,
            Op::Attention(spec) => self.attention(index, spec)?,
            Op::Activation(spec) => self.activate(index, *spec)?,
            Op::Experts(spec) => bail!("{EXECUTOR} cannot run {spec}"),
            Op::Add(spec) => self.add(index, *spec)?,
            Op::LastRow(_) | Op::Argmax(_) => bail!("the head is a launch of its own"),
        }
        Ok(())
    }

    fn embed(&mut self, EmbedSpec { table, scale, image, out }: EmbedSpec) -> Result<()> {
        let rows = self.shape.rows();
        let input = self.input.take().context("a call has one input")?;
        let (y, features) = (self.float(out)?, self.features());
        // A token that was generated stands for itself, never for a part of a picture.
        let (tokens, image) = match self.shape.kind {
            CallKind::Step => (self.on.session().tokens, None),
            CallKind::Prompt | CallKind::Scored | CallKind::Encoder => (input.address, image),
        };
        let feature_of_row = tokens + (size_of::<i32>() * rows) as u64;
        let (table, kernels) = (self.table(table), self.kernels());
        // SAFETY: tokens are below the vocabulary, and there is a feature for each image token, as the session checked.
        unsafe { kernels.embed(rows, tokens, feature_of_row, table, features, image, scale, y.address) }?;
        self.buffers[out.0] = Some(y);
        Ok(())
    }

    fn norm(&mut self, NormSpec { norm: Norm { kind, weight, epsilon }, x, out }: NormSpec) -> Result<()> {
        self.widen(x)?;
        let y = self.half(out)?;
        let bias = match kind {
            NormKind::Rms => 0,
            NormKind::Layer { bias } => self.vector(bias),
        };
        let (rows, kernels) = (self.shape.rows(), self.kernels());
        let (width, weight) = (self.width(x), self.vector(weight));
        let x = self.buffer_mut(x)?;
        // A norm of values by a power of two is that of the values, with an epsilon by its square.
        let epsilon = epsilon * x.scale * x.scale;
        let (x, deferred) = (x.address, std::mem::take(&mut x.addends));
        // SAFETY: x, its deferred additions and y hold rows · width values, the vectors width.
        unsafe {
            kernels.norm(rows, width, x, addends(&deferred), weight, bias, epsilon, self.scales[out.0], y.address)
        }?;
        self.buffers[out.0] = Some(Buffer { scale: self.scales[out.0], ..y });
        Ok(())
    }

    fn linear(&mut self, LinearSpec { x, parts }: &LinearSpec) -> Result<()> {
        // Matrices read fp16: a residual is cast.
        let (at, count) = (self.read(*x)?, self.shape.rows() * self.width(*x));
        let cast = if self.buffer(*x)?.is_float { Some(self.arena.take::<f16>(count)?) } else { None };
        if let Some(cast) = &cast {
            // SAFETY: both hold as many values.
            unsafe { self.kernels().narrow(count, at, cast.address) }?;
        }
        let outlier_columns = self.on.session().outlier_columns;
        let at = cast.as_ref().map_or(at, |cast| cast.address);
        let (x, scale) = (SharedInput::new(at, self.shape.rows(), outlier_columns, self.arena), self.buffer(*x)?.scale);
        let is_cut = |part: &LinearPart| part.rows.is_some();
        for parts in parts.chunk_by(|a, b| is_cut(a) == is_cut(b) && (!is_cut(a) || a.weight == b.weight)) {
            if is_cut(&parts[0]) {
                self.cut(&x, scale, parts)?;
            } else {
                self.whole(&x, scale, parts)?;
            }
        }
        // The first matrix that has outlier columns finds them for all parts.
        let mut matrices = parts.iter().map(|part| self.on.matrix(part.weight));
        if let Some(matrix) = matrices.find(|matrix| !matrix.threshold.is_nan()) {
            self.examined += OutlierColumns { calls: 1, columns: 0, examined: matrix.k as u64 };
        }
        Ok(())
    }

    /// Room for the product of a part, whose bias is deferred.
    fn room(&self, &LinearPart { weight, rows: _, bias, out }: &LinearPart) -> Result<Buffer<'a>> {
        let family = self.on.matrix(weight).family;
        // Values of a product that a norm alone reads may exceed fp16.
        let is_normed = || {
            let has = |reads: &dyn Fn(&Op) -> bool| self.plan.ops.iter().any(reads);
            has(&|op| matches!(op, Op::Norm(spec) if spec.x == out))
                && !has(&|op| matches!(op, Op::Add(spec) if spec.a == out))
        };
        let is_float = family.product_is_float || (!family.rounds_products && is_normed());
        let y = if is_float { self.float(out)? } else { self.half(out)? };
        Ok(Buffer { bias: bias.map_or(0, |bias| self.vector(bias)), ..y })
    }

    /// The products of whole matrices with rows that are stored by `scale`.
    fn whole(&mut self, x: &SharedInput<'a>, scale: f32, parts: &[LinearPart]) -> Result<()> {
        let mut products = Vec::with_capacity(parts.len());
        for part in parts {
            let y = self.room(part)?;
            let by = if y.is_float { 1.0 } else { rounded(&self.scales, scale, [part.out].into_iter()) };
            let at = ProductAt { address: y.address, is_float: y.is_float, scale: by };
            products.push((scaled(self.on.matrix(part.weight), scale), at));
            self.buffers[part.out.0] = Some(Buffer { scale: scale * by, ..y });
        }
        // SAFETY: x holds rows of k, each y rows of n; all stay until the stream has come past, and the counter does.
        Ok(unsafe { MatrixDesc::multiply_all(&products, self.launcher, x) }?)
    }

    /// The product of one matrix with rows that are stored by `scale`, cut into parts.
    fn cut(&mut self, x: &SharedInput<'a>, scale: f32, parts: &[LinearPart]) -> Result<()> {
        let (m, matrix) = (self.shape.rows(), scaled(self.on.matrix(parts[0].weight), scale));
        // Values of 16 bits that one product takes.
        let of_value = if matrix.family.product_is_float { 2 } else { 1 };
        let whole = self.arena.take::<f16>(m * matrix.n * of_value)?;
        let at = ProductAt::new(whole.address, matrix.family.product_is_float);
        // SAFETY: as in `linear`.
        unsafe { matrix.multiply_rows(self.launcher, x, at) }?;
        for part in parts {
            let MatrixRows { start, len } = part.rows.context("parts of a matrix")?;
            let (y, columns) = (self.room(part)?, (start * of_value, len * of_value));
            // SAFETY: `whole` holds m rows of all columns, y those of the part.
            unsafe { self.kernels().copy_columns(m, matrix.n * of_value, columns, whole.address, y.address) }?;
            self.buffers[part.out.0] = Some(Buffer { scale, ..y });
        }
        Ok(())
    }

    fn activate(&mut self, index: usize, ActivationSpec { kind, gate, up, out }: ActivationSpec) -> Result<()> {
        let up_scale = up.map_or(Ok(1.0), |up| self.buffer(up).map(|up| up.scale))?;
        let up = up.map_or(Ok(0), |up| self.read(up))?;
        let ((from, bias), width, rows) = (self.product(gate)?, self.width(out), self.shape.rows());
        // In its place, if nobody reads it again.
        let is_last = self.lives[gate.0].last_op() == index && self.width(gate) == width;
        let y = match self.buffers[gate.0].take_if(|_| is_last) {
            Some(gate) => Buffer { bias: 0, scale: self.scales[out.0], ..gate },
            None => Buffer { scale: self.scales[out.0], ..self.half(out)? },
        };
        let (kind, scale) = (activation_number(kind), y.scale / up_scale);
        // SAFETY: all hold rows · width values, the bias width; each thread reads what it writes.
        unsafe { self.kernels().activate(rows, width, kind, from, bias, up, scale, y.address) }?;
        self.buffers[out.0] = Some(y);
        Ok(())
    }

    fn add(&mut self, index: usize, AddSpec { a, b, out }: AddSpec) -> Result<()> {
        self.widen(a)?;
        if !self.buffer(b)?.addends.is_empty() {
            self.read(b)?;
        }
        if self.buffer(a)?.addends.len() == MAX_DEFERRED_ADDS || a != out {
            self.read(a)?;
        }
        let is_deferred = a == out && a != b && self.lives[b.0].last_op() == index;
        if let Some(b) = self.buffers[b.0].take_if(|_| is_deferred) {
            self.buffer_mut(a)?.addends.push(b);
            return Ok(());
        }
        let (from, b) = (self.read(a)?, self.buffer(b)?.addend());
        let to = if a == out { None } else { Some(self.float(out)?) };
        let at = to.as_ref().map_or(from, |to| to.address);
        // SAFETY: all hold rows · width values; each thread reads what it writes.
        unsafe { self.kernels().add(self.shape.rows(), self.width(a), from, [b, Addend::default()], at) }?;
        if to.is_some() {
            self.buffers[out.0] = to;
        }
        Ok(())
    }
}
