//! A call of many rows: prompts, encoders, pictures. One operation of the plan after the other, in memory that lives from the
//! operation that writes it to the last that reads it.

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use half::f16;

use super::prompt::Shape;
use super::{Weights, activation_number};
use crate::engine::OutlierColumns;
use crate::engine::score_tiles::{ScoreTile, ScoreTiles};
use crate::kernels::cuda::arena::{Arena, Region};
use crate::kernels::cuda::gemm::{Gemm, Operand, Type};
use crate::kernels::cuda::launch::{Launcher, address};
use crate::kernels::cuda::rows::{Addend, Bias, Heads, Rows, Table};
use crate::plan::{BiasId, BufferId, CacheId, Holds, LinearPart, Mask, MatrixId, NormKind, Op, Plan};
use crate::quant::cuda::RowsOf;

/// Rows whose attention is a launch of ours: cuBLAS takes several for each key/value head. More keys would not fit into shared memory.
const FEW_ROWS: usize = 32;
const FEW_KEYS: usize = 8192;

/// Where a buffer lies: in the call's memory, or in the session's. What is to be added to it is added by whatever reads it next, if that
/// can, and by a launch of its own otherwise.
struct Buffer<'a> {
    address: u64,
    is_float: bool,
    /// Of the product that it is, not added yet; or 0.
    bias: u64,
    /// Products that a residual has not been added yet, in their order.
    addends: Vec<Buffer<'a>>,
    _region: Option<Region<'a>>,
}

/// That a residual waits for at once.
const MOST_ADDENDS: usize = 2;

impl<'a> Buffer<'a> {
    fn new(address: u64, is_float: bool, region: Option<Region<'a>>) -> Self {
        Self { address, is_float, bias: 0, addends: Vec::new(), _region: region }
    }

    fn addend(&self) -> Addend {
        Addend { values: self.address, bias: self.bias, is_float: i32::from(self.is_float) }
    }
}

fn addends(buffers: &[Buffer]) -> [Addend; MOST_ADDENDS] {
    std::array::from_fn(|at| buffers.get(at).map_or(Addend::default(), Buffer::addend))
}

/// What a call has done.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Where the buffer lies that was to be kept; 0 without one.
    pub x: u64,
    /// What it has looked through for outlier columns; the device counts those it finds.
    pub examined: OutlierColumns,
}

/// A call under way.
pub struct Run<'a> {
    weights: &'a Weights,
    plan: &'a Plan,
    shape: Shape,
    on: &'a dyn Launcher,
    arena: &'a Arena<'a>,
    /// As [`super::prompt::Input`] says, until the first operation has read it.
    input: Option<Region<'a>>,
    buffers: Vec<Option<Buffer<'a>>>,
    /// First and last operation that touch each.
    lives: Vec<(usize, usize)>,
    examined: OutlierColumns,
}

impl<'a> Run<'a> {
    pub fn new(
        weights: &'a Weights,
        plan: &'a Plan,
        shape: Shape,
        on: &'a dyn Launcher,
        arena: &'a Arena<'a>,
        input: Region<'a>,
    ) -> Self {
        let buffers = plan.buffers.iter().map(|_| None).collect();
        let (lives, examined) = (plan.lifetimes(), OutlierColumns::default());
        Self { weights, plan, shape, on, arena, input: Some(input), buffers, lives, examined }
    }

    /// Runs the first `len` operations; `kept` outlives them.
    pub fn run(mut self, len: usize, kept: Option<BufferId>) -> Result<Done> {
        for (index, op) in self.plan.ops[..len].iter().enumerate() {
            self.step(index, op).with_context(|| format!("at {op:?}"))?;
            for (id, buffer) in self.buffers.iter_mut().enumerate() {
                if self.lives[id].1 == index && kept != Some(BufferId(id)) {
                    *buffer = None;
                }
            }
        }
        let x = kept.map_or(Ok(0), |kept| self.read(kept))?;
        Ok(Done { x, examined: self.examined })
    }

    fn buffer(&self, id: BufferId) -> Result<&Buffer<'a>> {
        self.buffers[id.0].as_ref().context("a buffer is read before it is written")
    }

    fn device(&self) -> &'a CudaDevice {
        &self.weights.device
    }

    fn kernels(&self) -> Rows<'a> {
        Rows { on: self.on }
    }

    fn buffer_mut(&mut self, id: BufferId) -> Result<&mut Buffer<'a>> {
        self.buffers[id.0].as_mut().context("a buffer is read before it is written")
    }

    /// Where the buffer lies, once all is added that it waits for.
    fn read(&mut self, id: BufferId) -> Result<u64> {
        let (rows, width, kernels) = (self.shape.rows, self.width(id), self.kernels());
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

    /// Where an fp16 product lies, and the bias that it waits for.
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
        if let (Some(Op::Features { x }), Some(features)) = (self.plan.ops.last(), &self.weights.features)
            && *x == id
        {
            return Ok(Buffer::new(address(features, self.device()), false, None));
        }
        let region = self.arena.take::<f16>(self.shape.rows * self.width(id))?;
        Ok(Buffer::new(region.address, false, Some(region)))
    }

    /// As [`Self::half`], fp32.
    fn float(&self, id: BufferId) -> Result<Buffer<'a>> {
        let region = self.arena.take::<f32>(self.shape.rows * self.width(id))?;
        Ok(Buffer::new(region.address, true, Some(region)))
    }

    fn vector(&self, id: crate::plan::VectorId) -> u64 {
        address(&self.weights.vectors[id.0], self.device())
    }

    fn table(&self, id: MatrixId) -> Table {
        let streamed = self.weights.matrices[id.0].streamed();
        Table { address: streamed.weight, stride: streamed.stride_bytes / size_of::<f16>(), width: streamed.k }
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
            unsafe { self.kernels().widen(self.shape.rows * self.width(id), from, wide.address) }?;
            self.buffers[id.0] = Some(wide);
        }
        Ok(())
    }

    fn step(&mut self, index: usize, op: &Op) -> Result<()> {
        let (rows, kernels) = (self.shape.rows, self.kernels());
        match op {
            Op::Embed { table, scale, image, out } => {
                self.buffers[out.0] = Some(self.embed(*table, *scale, *image, *out)?);
            }
            Op::Patches { out } => {
                let input = self.input.take().context("a call has one input")?;
                self.buffers[out.0] = Some(Buffer::new(input.address, false, Some(input)));
            }
            Op::AddRows { x, table } => {
                self.widen(*x)?;
                let (x, table) = (self.read(*x)?, self.table(*table));
                // SAFETY: x holds a row for each of the table's.
                unsafe { kernels.add_table(rows, x, table) }?;
            }
            Op::Features { x } => {
                let features = self.weights.features.as_ref().context("a picture's features have no place")?;
                if self.read(*x)? != address(features, &self.weights.device) {
                    bail!("image features must be products");
                }
            }
            Op::Norm { kind, weight, epsilon, x, out } => {
                self.widen(*x)?;
                let y = self.half(*out)?;
                let bias = match kind {
                    NormKind::Rms => 0,
                    NormKind::Layer { bias } => self.vector(*bias),
                };
                let (width, weight) = (self.width(*x), self.vector(*weight));
                let x = self.buffer_mut(*x)?;
                let (x, waiting) = (x.address, std::mem::take(&mut x.addends));
                // SAFETY: x, what it waits for and y hold rows · width values, the vectors width.
                unsafe { kernels.norm(rows, width, x, addends(&waiting), weight, bias, *epsilon, y.address) }?;
                self.buffers[out.0] = Some(y);
            }
            Op::Linear { x, parts } => {
                if self.buffer(*x)?.is_float {
                    bail!("a matrix reads fp16 activations");
                }
                let outlier_columns = address(&self.weights.outlier_columns, self.device());
                let x = RowsOf::new(self.read(*x)?, rows, outlier_columns, self.arena);
                for part in parts {
                    self.linear(&x, part)?;
                }
                // The first that looks for outliers finds them for all parts.
                let mut matrices = parts.iter().map(|part| &self.weights.matrices[part.weight.0]);
                if let Some(matrix) = matrices.find(|matrix| !matrix.streamed().threshold.is_nan()) {
                    self.examined += OutlierColumns { calls: 1, columns: 0, examined: matrix.shape().1 as u64 };
                }
            }
            Op::Append { k, v, cache, rotate } => {
                let heads = self.heads(*cache, rotate.map(|rotate| rotate.q));
                let (angles, rotary) = match rotate {
                    Some(rotate) => {
                        let rope = &self.weights.model.ropes[rotate.rope.0];
                        (address(&self.weights.angles[rotate.rope.0], self.device()), rope.rotary_dim)
                    }
                    None => (0, 0),
                };
                let (q, q_bias) = rotate.map_or(Ok((0, 0)), |rotate| self.product(rotate.q))?;
                let ((k, k_bias), (v, v_bias)) = (self.product(*k)?, self.product(*v)?);
                let position = self.first_position(*cache);
                let cache = &self.weights.caches[cache.0];
                let memory = [address(&cache.keys, self.device()), address(&cache.values, self.device())];
                let biases = [q_bias, k_bias, v_bias];
                // SAFETY: q, k and v hold `rows` rows of their heads; the caller checked that the cache has room.
                unsafe { kernels.append(rows, position, heads, [q, k, v], biases, memory, angles, rotary) }?;
                if let Some(rotate) = rotate {
                    self.buffer_mut(rotate.q)?.bias = 0;
                }
            }
            Op::Attention { q, cache, out, scale, mask, bias } => {
                self.buffers[out.0] = Some(self.attention(*q, *cache, *scale, *mask, *bias)?);
            }
            Op::Activate { kind, gate, up, out } => {
                let up = up.map_or(Ok(0), |up| self.read(up))?;
                let ((from, bias), width) = (self.product(*gate)?, self.width(*out));
                // In its place, if nobody reads it again.
                let is_last = self.lives[gate.0].1 == index && self.width(*gate) == width;
                let y = match self.buffers[gate.0].take_if(|_| is_last) {
                    Some(gate) => Buffer { bias: 0, ..gate },
                    None => self.half(*out)?,
                };
                // SAFETY: all hold rows · width values, the bias width; each thread reads what it writes.
                unsafe { kernels.activate(rows, width, activation_number(*kind), from, bias, up, y.address) }?;
                self.buffers[out.0] = Some(y);
            }
            Op::Add { a, b, out } => {
                self.widen(*a)?;
                if !self.buffer(*b)?.addends.is_empty() {
                    self.read(*b)?;
                }
                if self.buffer(*a)?.addends.len() == MOST_ADDENDS || a != out {
                    self.read(*a)?;
                }
                let waits = a == out && a != b && self.lives[b.0].1 == index;
                if let Some(b) = self.buffers[b.0].take_if(|_| waits) {
                    self.buffer_mut(*a)?.addends.push(b);
                } else {
                    let (from, b) = (self.read(*a)?, self.buffer(*b)?.addend());
                    let to = if a == out { None } else { Some(self.float(*out)?) };
                    let at = to.as_ref().map_or(from, |to| to.address);
                    // SAFETY: all hold rows · width values; each thread reads what it writes.
                    unsafe { kernels.add(rows, self.width(*a), from, [b, Addend::default()], at) }?;
                    if to.is_some() {
                        self.buffers[out.0] = to;
                    }
                }
            }
            Op::LastRow { .. } | Op::Argmax { .. } => bail!("the head is a launch of its own"),
        }
        Ok(())
    }

    fn embed(&mut self, table: MatrixId, scale: f32, image: Option<u32>, out: BufferId) -> Result<Buffer<'a>> {
        let rows = self.shape.rows;
        let input = self.input.take().context("a call has one input")?;
        let y = self.float(out)?;
        let features = self.weights.features.as_ref().map_or(0, |features| address(features, self.device()));
        let (tokens, feature_of_row) = (input.address, input.address + (size_of::<i32>() * rows) as u64);
        let (table, kernels) = (self.table(table), self.kernels());
        // SAFETY: tokens are below the vocabulary, and there is a feature for each image token, as the session checked.
        unsafe { kernels.embed(rows, tokens, feature_of_row, table, features, image, scale, y.address) }?;
        Ok(y)
    }

    fn linear(&mut self, x: &RowsOf, part: &LinearPart) -> Result<()> {
        let matrix = &self.weights.matrices[part.weight.0];
        let y = match matrix.product_is_float() {
            true => self.float(part.out)?,
            false => self.half(part.out)?,
        };
        // SAFETY: x holds rows of k, y rows of n; both stay until the stream has come past, and the counter does.
        unsafe { matrix.multiply_rows(self.on, x, y.address) }?;
        let bias = part.bias.map_or(0, |bias| self.vector(bias));
        self.buffers[part.out.0] = Some(Buffer { bias, ..y });
        Ok(())
    }

    fn first_position(&self, cache: CacheId) -> usize {
        match self.weights.model.caches[cache.0].holds {
            Holds::Decoder => self.shape.position,
            Holds::Encoder => 0,
        }
    }

    fn heads(&self, cache: CacheId, q: Option<BufferId>) -> Heads {
        let spec = self.weights.model.caches[cache.0];
        let cache = &self.weights.caches[cache.0];
        Heads {
            heads: q.map_or(0, |q| self.width(q) / spec.head_dim),
            kv_heads: spec.kv_heads,
            d: spec.head_dim,
            d_pad: cache.d_pad,
            capacity: cache.capacity,
        }
    }

    /// Scores, softmax and values through cuBLAS, some heads or some rows of a head at a time.
    fn attention(
        &mut self,
        q: BufferId,
        cache: CacheId,
        scale: f32,
        mask: Mask,
        bias: Option<BiasId>,
    ) -> Result<Buffer<'a>> {
        let (device, rows) = (self.device(), self.shape.rows);
        let heads = self.heads(cache, Some(q));
        let group = heads.heads / heads.kv_heads;
        let holds = self.weights.model.caches[cache.0].holds;
        let total = match holds {
            Holds::Decoder => self.shape.position + rows,
            Holds::Encoder => self.shape.encoded,
        };
        let is_causal = match mask {
            Mask::Causal => true,
            Mask::Full => false,
            Mask::Prefix => self.shape.position > 0,
        };
        let (q_at, out) = (self.read(q)?, self.half(q)?);
        let memory = &self.weights.caches[cache.0];
        let (keys, values) = (address(&memory.keys, device), address(&memory.values, device));
        // A query of the decoder stands where the cache ended; cross-attention has no place and no bias.
        let position = if holds == Holds::Decoder { self.shape.position } else { 0 };
        let bias_of = |first_head| match bias {
            Some(bias) => Bias {
                address: self.weights.biases[bias.0].address(device),
                reach: self.weights.biases[bias.0].reach,
                first_head,
            },
            None => Bias::default(),
        };
        if rows <= FEW_ROWS && total <= FEW_KEYS {
            let (cache, out_at) = ([keys, values], out.address);
            let (kernels, shape) = (self.kernels(), (rows, total));
            // SAFETY: q and out hold rows of all heads, the cache `total` positions.
            unsafe { kernels.attend(shape, heads, q_at, cache, out_at, scale, is_causal, position, bias_of(0)) }?;
            return Ok(out);
        }
        // Heads of one call to cuBLAS either share a key/value head or have one each.
        let tiles = ScoreTiles::new(heads.heads, group, rows, total);
        // cuBLAS and the softmax write both before they are read.
        let count = tiles.heads * tiles.rows * total;
        let held = (self.arena.take::<f32>(count)?, self.arena.take::<f16>(count)?);
        let (scores, probabilities) = (held.0.address, held.1.address);
        let out_at = out.address;
        let width = self.width(q);
        for ScoreTile { first_head, heads: count, first_row, rows } in tiles.tiles(heads.heads, group, rows) {
            let shared = group > 1;
            let cache_head = first_head / group;
            let cache_at = |base: u64| base + (2 * cache_head * heads.capacity * heads.d_pad) as u64;
            let cache_operand = |base| Operand {
                address: cache_at(base),
                stride: heads.d_pad,
                batch_stride: if shared { 0 } else { heads.capacity * heads.d_pad },
            };
            let rows_operand = |base: u64| Operand {
                address: base + (2 * (first_row * width + first_head * heads.d)) as u64,
                stride: width,
                batch_stride: heads.d,
            };
            let of_scores = |address| Operand { address, stride: total, batch_stride: rows * total };
            let to_scores = Gemm {
                m: rows,
                n: total,
                k: heads.d,
                batch: count,
                a: rows_operand(q_at),
                b: cache_operand(keys),
                b_is_transposed: true,
                out: of_scores(scores),
                from: Type::Half,
                to: Type::Float,
            };
            let to_values = Gemm {
                m: rows,
                n: heads.d,
                k: total,
                batch: count,
                a: of_scores(probabilities),
                b: cache_operand(values),
                b_is_transposed: false,
                out: rows_operand(out_at),
                from: Type::Half,
                to: Type::Half,
            };
            let (shape, bias) = ((count, rows, total), bias_of(first_head));
            // SAFETY: scores and probabilities hold a tile; q and out hold all heads of all rows; the cache `total` positions.
            unsafe {
                self.on.multiply(&to_scores)?;
                let position = position + first_row;
                self.kernels().softmax(shape, scores, probabilities, scale, is_causal, position, bias)?;
                self.on.multiply(&to_values)?;
            }
        }
        Ok(out)
    }
}
