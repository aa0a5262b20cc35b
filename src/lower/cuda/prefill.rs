//! A call of many rows: prompts, encoders, pictures. One operation of the plan after the other, in memory that lives from the
//! operation that writes it to the last that reads it.

use anyhow::{Context, Result, bail};
use half::f16;

use super::call::{CallKind, CallResult, CallShape};
use super::{Addresses, BiasAt, activation_number};
use crate::kernels::cuda::arena::{Arena, Region};
use crate::kernels::cuda::attend::{Bias, Heads, RowsAttention};
use crate::kernels::cuda::launch::Launcher;
use crate::kernels::cuda::matvec::Epilogue;
use crate::kernels::cuda::program::{PlannedLaunch, TokenOutput};
use crate::kernels::cuda::rows::{Addend, RowKernels, Table};
use crate::kernels::cuda::shared_input::SharedInput;
use crate::plan::{
    ActivationSpec, AddRowsSpec, AddSpec, AppendSpec, AttentionSpec, BiasId, BufferId, CacheId, CacheScope, EmbedSpec,
    FeaturesSpec, KeyValue, Lifetime, LinearPart, LinearSpec, Mask, MatrixId, Model, Norm, NormKind, NormSpec, Op,
    PatchesSpec, Plan, RopeId, VectorId, feature, refuse,
};
use crate::quant::OutlierColumns;

/// The name in errors.
const EXECUTOR: &str = "the CUDA prefill";

/// Launches a call, all but the head of its last row. Its input lies at `input`, as [`super::CallInput`] says.
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
        CallKind::Prompt | CallKind::Scored => {
            let head = model.decoder.head().context("this plan has no head")?;
            (&model.decoder, head.body_len, Some(head.x))
        }
    };
    let buffers = plan.buffers.iter().map(|_| None).collect();
    let (lives, examined) = (plan.lifetimes(), OutlierColumns::default());
    Prefill { on, plan, shape, launcher, arena, input: Some(input), buffers, lives, examined }.run(len, kept)
}

/// The head of the last row, which finds the token of a prompt and puts it where `token` says.
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
    /// Products that have not been added to a residual yet, in their order.
    addends: Vec<Buffer<'a>>,
    _region: Option<Region<'a>>,
}

/// Residual additions that are deferred to the next kernel.
const MAX_DEFERRED_ADDS: usize = 2;

impl<'a> Buffer<'a> {
    fn new(address: u64, is_float: bool, region: Option<Region<'a>>) -> Self {
        Self { address, is_float, bias: 0, addends: Vec::new(), _region: region }
    }

    fn addend(&self) -> Addend {
        Addend { values: self.address, bias: self.bias, is_float: i32::from(self.is_float) }
    }
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
            Buffer { address, is_float: false, bias, .. } => Ok((*address, *bias)),
            _ => bail!("an fp32 buffer where fp16 is read"),
        }
    }

    fn width(&self, id: BufferId) -> usize {
        self.plan.buffers[id.0].width
    }

    /// Room for an fp16 buffer, which the operation that asks for it writes before anything reads; the session's own for a picture's
    /// features.
    fn half(&self, id: BufferId) -> Result<Buffer<'a>> {
        let features = self.on.session().features;
        if let Some(Op::Features(FeaturesSpec { x })) = self.plan.ops.last()
            && (*x, features != 0) == (id, true)
        {
            return Ok(Buffer::new(features, false, None));
        }
        let region = self.arena.take::<f16>(self.shape.rows() * self.width(id))?;
        Ok(Buffer::new(region.address, false, Some(region)))
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
        let from = self.read(id)?;
        if !is_float {
            let wide = self.float(id)?;
            // SAFETY: both hold rows · width values.
            unsafe { self.kernels().widen(self.shape.rows() * self.width(id), from, wide.address) }?;
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
                // SAFETY: x holds a row for each of the table's.
                unsafe { kernels.add_table(rows, x, table) }?;
            }
            Op::Features(FeaturesSpec { x }) => {
                let features = self.on.session().features;
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
        let y = self.float(out)?;
        let features = self.on.session().features;
        let (tokens, feature_of_row) = (input.address, input.address + (size_of::<i32>() * rows) as u64);
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
        let (x, deferred) = (x.address, std::mem::take(&mut x.addends));
        // SAFETY: x, its deferred additions and y hold rows · width values, the vectors width.
        unsafe { kernels.norm(rows, width, x, addends(&deferred), weight, bias, epsilon, y.address) }?;
        self.buffers[out.0] = Some(y);
        Ok(())
    }

    fn linear(&mut self, LinearSpec { x, parts }: &LinearSpec) -> Result<()> {
        if self.buffer(*x)?.is_float {
            bail!("a matrix reads fp16 activations");
        }
        let outlier_columns = self.on.session().outlier_columns;
        let x = SharedInput::new(self.read(*x)?, self.shape.rows(), outlier_columns, self.arena);
        for &LinearPart { weight, rows, bias, out } in parts {
            refuse(EXECUTOR, "a linear", &[feature(&rows)])?;
            let matrix = self.on.matrix(weight);
            let y = match matrix.family.product_is_float {
                true => self.float(out)?,
                false => self.half(out)?,
            };
            // SAFETY: x holds rows of k, y rows of n; both stay until the stream has come past, and the counter does.
            unsafe { matrix.multiply_rows(self.launcher, &x, y.address) }?;
            let bias = bias.map_or(0, |bias| self.vector(bias));
            self.buffers[out.0] = Some(Buffer { bias, ..y });
        }
        // The first matrix that has outlier columns finds them for all parts.
        let mut matrices = parts.iter().map(|part| self.on.matrix(part.weight));
        if let Some(matrix) = matrices.find(|matrix| !matrix.threshold.is_nan()) {
            self.examined += OutlierColumns { calls: 1, columns: 0, examined: matrix.k as u64 };
        }
        Ok(())
    }

    /// Adds the biases of k, v and the queries that it rotates, rotates and writes to the cache.
    fn append(
        &mut self,
        KeyValue { k, v }: KeyValue,
        cache: CacheId,
        rotate: Option<(RopeId, BufferId)>,
    ) -> Result<()> {
        let heads = self.heads(cache, rotate.map(|(_, q)| q));
        let (angles, rotary) = match rotate {
            Some((rope, _)) => (self.on.angles(rope), self.on.model().ropes[rope.0].rotary_dim),
            None => (0, 0),
        };
        let (q, q_bias) = rotate.map_or(Ok((0, 0)), |(_, q)| self.product(q))?;
        let ((k, k_bias), (v, v_bias)) = (self.product(k)?, self.product(v)?);
        let (rows, position, at) = (self.shape.rows(), self.first_position(cache), self.on.cache(cache));
        let (memory, biases) = ([at.keys, at.values], [q_bias, k_bias, v_bias]);
        // SAFETY: q, k and v hold `rows` rows of their heads; the caller checked that the cache has room.
        unsafe { self.kernels().append(rows, position, heads, [q, k, v], biases, memory, angles, rotary) }?;
        if let Some((_, q)) = rotate {
            self.buffer_mut(q)?.bias = 0;
        }
        Ok(())
    }

    fn attention(&mut self, index: usize, spec: &AttentionSpec) -> Result<()> {
        let &AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = spec;
        let features = [feature(&window), feature(&softcap), feature(&qk_norm), feature(&sinks)];
        refuse(EXECUTOR, "an attention", &features)?;
        match (append, rope) {
            (Some(kv), rope) => self.append(kv, cache, rope.map(|rope| (rope, q)))?,
            (None, Some(_)) => refuse(EXECUTOR, "an attention", &[Some(&"a rope and no keys to append")])?,
            (None, None) => {}
        }
        // Keys and values are in the cache: what follows may have their memory.
        for id in append.into_iter().flat_map(|KeyValue { k, v }| [k, v]) {
            self.buffers[id.0].take_if(|_| self.lives[id.0].last == 2 * index);
        }
        self.buffers[out.0] = Some(self.attend(q, cache, scale, mask, bias)?);
        Ok(())
    }

    fn attend(
        &mut self,
        q: BufferId,
        cache: CacheId,
        scale: f32,
        mask: Mask,
        bias: Option<BiasId>,
    ) -> Result<Buffer<'a>> {
        let scope = self.on.model().caches[cache.0].scope;
        let (q_at, out, at) = (self.read(q)?, self.half(q)?, self.on.cache(cache));
        let call = RowsAttention {
            rows: self.shape.rows(),
            heads: self.heads(cache, Some(q)),
            q: q_at,
            out: out.address,
            keys: at.keys,
            values: at.values,
            total: match scope {
                CacheScope::Decoder => self.shape.position() + self.shape.rows(),
                CacheScope::Encoder => self.shape.encoded,
            },
            scale,
            is_causal: match mask {
                Mask::Causal => true,
                Mask::Full => false,
                Mask::Prefix => self.shape.position() > 0,
            },
            // A query of the decoder stands where the cache ended; cross-attention has no place and no bias.
            position: if scope == CacheScope::Decoder { self.shape.position() } else { 0 },
            bias: bias.map_or(Bias::default(), |bias| {
                let BiasAt { address, reach } = self.on.bias(bias);
                Bias { address, reach }
            }),
        };
        // SAFETY: q and out hold rows of all heads, the cache as many keys.
        unsafe { call.run(self.launcher, self.arena, self.on.properties().multiprocessors) }?;
        Ok(out)
    }

    fn activate(&mut self, index: usize, ActivationSpec { kind, gate, up, out }: ActivationSpec) -> Result<()> {
        let up = up.map_or(Ok(0), |up| self.read(up))?;
        let ((from, bias), width, rows) = (self.product(gate)?, self.width(out), self.shape.rows());
        // In its place, if nobody reads it again.
        let is_last = self.lives[gate.0].last_op() == index && self.width(gate) == width;
        let y = match self.buffers[gate.0].take_if(|_| is_last) {
            Some(gate) => Buffer { bias: 0, ..gate },
            None => self.half(out)?,
        };
        // SAFETY: all hold rows · width values, the bias width; each thread reads what it writes.
        unsafe { self.kernels().activate(rows, width, activation_number(kind), from, bias, up, y.address) }?;
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

    fn first_position(&self, cache: CacheId) -> usize {
        match self.on.model().caches[cache.0].scope {
            CacheScope::Decoder => self.shape.position(),
            CacheScope::Encoder => 0,
        }
    }

    fn heads(&self, cache: CacheId, q: Option<BufferId>) -> Heads {
        let spec = self.on.model().caches[cache.0];
        let at = self.on.cache(cache);
        Heads {
            heads: q.map_or(0, |q| self.width(q) / spec.head_dim),
            kv_heads: spec.kv_heads,
            d: spec.head_dim,
            d_pad: at.d_pad,
            capacity: at.capacity,
        }
    }
}
