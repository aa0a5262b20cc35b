//! Calls of many rows: prompts, encoders, pictures. One operation of the plan after the other, in memory that lives from the
//! operation that writes it to the last that reads it.

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::f16;

use super::{Weights, activation_number};
use crate::engine::OutlierColumns;
use crate::kernels::cuda::gemm::{Gemm, Operand, Type};
use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::rows::{Bias, Heads, Rows, Table};
use crate::plan::{BiasId, BufferId, CacheId, Holds, LinearPart, Mask, MatrixId, NormKind, Op, Plan};
use crate::quant::cuda::RowsOf;

/// Bytes of attention scores that a call may hold at once; one head at a time where a single one has more.
const SCORE_BYTES: usize = 64 << 20;

/// Rows whose attention is a launch of ours: cuBLAS takes several for each key/value head. More keys would not fit into shared memory.
const FEW_ROWS: usize = 32;
const FEW_KEYS: usize = 8192;

/// What a call is given.
pub struct Call<'a> {
    pub rows: usize,
    pub tokens: &'a [u32],
    /// `[rows, channels · patch²]`
    pub patches: &'a [f32],
    /// Tokens before it in the decoder's caches; 0 for an encoder.
    pub position: usize,
    /// Rows of the last encoder call, or of this one.
    pub encoded: usize,
}

/// The memory of a buffer.
pub enum Buffer {
    Half(CudaSlice<f16>),
    Float(CudaSlice<f32>),
}

impl Buffer {
    pub fn address(&self, device: &CudaDevice) -> u64 {
        match self {
            Buffer::Half(values) => address(values, device),
            Buffer::Float(values) => address(values, device),
        }
    }

    fn is_float(&self) -> bool {
        matches!(self, Buffer::Float(_))
    }
}

/// A call under way.
pub struct Run<'a> {
    weights: &'a Weights,
    plan: &'a Plan,
    call: Call<'a>,
    /// Features of the last picture, for rows of a prompt that stand for it.
    features: Option<&'a CudaSlice<f16>>,
    buffers: Vec<Option<Buffer>>,
    /// What [`Op::Features`] has read.
    pub found_features: Option<CudaSlice<f16>>,
    /// What it has looked through for outlier columns; the device counts those it finds.
    pub examined: OutlierColumns,
}

impl<'a> Run<'a> {
    pub fn new(weights: &'a Weights, plan: &'a Plan, call: Call<'a>, features: Option<&'a CudaSlice<f16>>) -> Self {
        let buffers = plan.buffers.iter().map(|_| None).collect();
        let (found_features, examined) = (None, OutlierColumns::default());
        Self { weights, plan, call, features, buffers, found_features, examined }
    }

    /// Runs the first `len` operations; `kept` outlives them.
    pub fn run(&mut self, len: usize, kept: Option<BufferId>) -> Result<()> {
        let lives = self.plan.lifetimes();
        for (index, op) in self.plan.ops[..len].iter().enumerate() {
            self.step(op).with_context(|| format!("at {op:?}"))?;
            for (id, buffer) in self.buffers.iter_mut().enumerate() {
                if lives[id].1 == index && kept != Some(BufferId(id)) {
                    *buffer = None;
                }
            }
        }
        Ok(())
    }

    pub fn buffer(&self, id: BufferId) -> Result<&Buffer> {
        self.buffers[id.0].as_ref().context("a buffer is read before it is written")
    }

    fn device(&self) -> &'a CudaDevice {
        &self.weights.device
    }

    fn kernels(&self) -> Rows<'a> {
        Rows { on: self.device() }
    }

    fn at(&self, id: BufferId) -> Result<u64> {
        Ok(self.buffer(id)?.address(self.device()))
    }

    fn width(&self, id: BufferId) -> usize {
        self.plan.buffers[id.0].width
    }

    fn half(&self, id: BufferId) -> Result<CudaSlice<f16>> {
        // SAFETY: the operation that asks for it writes all of it before anything reads.
        Ok(unsafe { self.device().alloc(self.call.rows * self.width(id)) }?)
    }

    fn float(&self, id: BufferId) -> Result<CudaSlice<f32>> {
        // SAFETY: as above.
        Ok(unsafe { self.device().alloc(self.call.rows * self.width(id)) }?)
    }

    fn vector(&self, id: crate::plan::VectorId) -> u64 {
        address(&self.weights.vectors[id.0], self.device())
    }

    fn table(&self, id: MatrixId) -> Table {
        let streamed = self.weights.matrices[id.0].streamed();
        Table { address: streamed.weight, stride: streamed.stride_bytes / size_of::<f16>(), width: streamed.k }
    }

    /// Makes the buffer fp32, where it is not.
    fn widen(&mut self, id: BufferId) -> Result<()> {
        if self.buffer(id)?.is_float() {
            return Ok(());
        }
        let wide = self.float(id)?;
        let (from, to) = (self.at(id)?, address(&wide, self.device()));
        // SAFETY: both hold rows · width values.
        unsafe { self.kernels().widen(self.call.rows * self.width(id), from, to) }?;
        self.buffers[id.0] = Some(Buffer::Float(wide));
        Ok(())
    }

    fn step(&mut self, op: &Op) -> Result<()> {
        let (rows, kernels) = (self.call.rows, self.kernels());
        match op {
            Op::Embed { table, scale, image, out } => {
                let buffer = self.embed(*table, *scale, *image, *out)?;
                self.buffers[out.0] = Some(Buffer::Float(buffer));
            }
            Op::Patches { out } => {
                let halves: Vec<f16> = self.call.patches.iter().map(|value| f16::from_f32(*value)).collect();
                self.buffers[out.0] = Some(Buffer::Half(self.device().clone_htod(&halves)?));
            }
            Op::AddRows { x, table } => {
                self.widen(*x)?;
                // SAFETY: x holds a row for each of the table's.
                unsafe { kernels.add_table(rows, self.at(*x)?, self.table(*table)) }?;
            }
            Op::Features { x } => match self.buffers[x.0].take() {
                Some(Buffer::Half(features)) => self.found_features = Some(features),
                _ => bail!("image features must be products"),
            },
            Op::Norm { kind, weight, epsilon, x, out } => {
                self.widen(*x)?;
                let y = self.half(*out)?;
                let bias = match kind {
                    NormKind::Rms => 0,
                    NormKind::Layer { bias } => self.vector(*bias),
                };
                let to = address(&y, self.device());
                // SAFETY: x and y hold rows · width values, the vectors width.
                unsafe { kernels.norm(rows, self.width(*x), self.at(*x)?, self.vector(*weight), bias, *epsilon, to) }?;
                self.buffers[out.0] = Some(Buffer::Half(y));
            }
            Op::Linear { x, parts } => {
                let Buffer::Half(_) = self.buffer(*x)? else { bail!("a matrix reads fp16 activations") };
                let outlier_columns = address(&self.weights.outlier_columns, self.device());
                let x = RowsOf::new(self.at(*x)?, rows, outlier_columns);
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
                let q = rotate.map_or(Ok(0), |rotate| self.at(rotate.q))?;
                let position = self.first_position(*cache);
                let cache = &self.weights.caches[cache.0];
                let memory = [address(&cache.keys, self.device()), address(&cache.values, self.device())];
                let rotated = [q, self.at(*k)?, self.at(*v)?];
                // SAFETY: q, k and v hold `rows` rows of their heads; the caller checked that the cache has room.
                unsafe { kernels.append(rows, position, heads, rotated, memory, angles, rotary) }?;
            }
            Op::Attention { q, cache, out, scale, mask, bias } => {
                let y = self.attention(*q, *cache, *scale, *mask, *bias)?;
                self.buffers[out.0] = Some(Buffer::Half(y));
            }
            Op::Activate { kind, gate, up, out } => {
                let y = self.half(*out)?;
                let up = up.map_or(Ok(0), |up| self.at(up))?;
                let (gate, to) = (self.at(*gate)?, address(&y, self.device()));
                // SAFETY: all hold rows · width values.
                unsafe { kernels.activate(rows * self.width(*out), activation_number(*kind), gate, up, to) }?;
                self.buffers[out.0] = Some(Buffer::Half(y));
            }
            Op::Add { a, b, out } => {
                self.widen(*a)?;
                let count = rows * self.width(*a);
                let is_float = self.buffer(*b)?.is_float();
                if a == out {
                    // SAFETY: both hold rows · width values; each thread reads what it writes.
                    unsafe { kernels.add(count, self.at(*a)?, self.at(*b)?, is_float, self.at(*a)?) }?;
                } else {
                    let y = self.float(*out)?;
                    // SAFETY: as above.
                    unsafe { kernels.add(count, self.at(*a)?, self.at(*b)?, is_float, address(&y, self.device())) }?;
                    self.buffers[out.0] = Some(Buffer::Float(y));
                }
            }
            Op::LastRow { .. } | Op::Argmax { .. } => bail!("the head is a launch of its own"),
        }
        Ok(())
    }

    fn embed(&self, table: MatrixId, scale: f32, image: Option<u32>, out: BufferId) -> Result<CudaSlice<f32>> {
        let (device, Call { rows, tokens, .. }) = (self.device(), &self.call);
        let mut n_image = 0;
        let feature_of_row = tokens.iter().map(|token| {
            n_image += i32::from(Some(*token) == image);
            n_image - 1
        });
        let feature_of_row: Vec<i32> = feature_of_row.collect();
        if n_image > 0 && self.features.is_none_or(|features| features.len() < n_image as usize * self.width(out)) {
            bail!("the prompt has {n_image} image tokens, more than the picture has features");
        }
        let ids: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        let (ids, feature_of_row) = (device.clone_htod(&ids)?, device.clone_htod(&feature_of_row)?);
        let y = self.float(out)?;
        let features = self.features.map_or(0, |features| address(features, device));
        let (ids, rows_of) = (address(&ids, device), address(&feature_of_row, device));
        // SAFETY: tokens are below the vocabulary, as the session checked; there is a feature for each image token; what is
        // freed here is freed on the stream, behind the launch.
        unsafe {
            self.kernels().embed(*rows, ids, rows_of, self.table(table), features, image, scale, address(&y, device))
        }?;
        Ok(y)
    }

    fn linear(&mut self, x: &RowsOf, part: &LinearPart) -> Result<()> {
        let (matrix, rows) = (&self.weights.matrices[part.weight.0], self.call.rows);
        let y = match matrix.product_is_float() {
            true => Buffer::Float(self.float(part.out)?),
            false => Buffer::Half(self.half(part.out)?),
        };
        let to = y.address(self.device());
        // SAFETY: x holds rows of k, y rows of n; both stay until the stream has come past, and the counter does.
        unsafe { matrix.multiply_rows(x, to) }?;
        if let Some(bias) = part.bias {
            // SAFETY: as above; the bias holds n values.
            unsafe { self.kernels().add_bias(rows, self.width(part.out), to, y.is_float(), self.vector(bias)) }?;
        }
        self.buffers[part.out.0] = Some(y);
        Ok(())
    }

    fn first_position(&self, cache: CacheId) -> usize {
        match self.weights.model.caches[cache.0].holds {
            Holds::Decoder => self.call.position,
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

    /// Scores, softmax and values through cuBLAS, some heads at a time.
    fn attention(
        &self,
        q: BufferId,
        cache: CacheId,
        scale: f32,
        mask: Mask,
        bias: Option<BiasId>,
    ) -> Result<CudaSlice<f16>> {
        let (device, rows) = (self.device(), self.call.rows);
        let heads = self.heads(cache, Some(q));
        let group = heads.heads / heads.kv_heads;
        let holds = self.weights.model.caches[cache.0].holds;
        let total = match holds {
            Holds::Decoder => self.call.position + rows,
            Holds::Encoder => self.call.encoded,
        };
        let is_causal = match mask {
            Mask::Causal => true,
            Mask::Full => false,
            Mask::Prefix => self.call.position > 0,
        };
        let out = self.half(q)?;
        let memory = &self.weights.caches[cache.0];
        let (keys, values) = (address(&memory.keys, device), address(&memory.values, device));
        // A query of the decoder stands where the cache ended; cross-attention has no place and no bias.
        let position = if holds == Holds::Decoder { self.call.position } else { 0 };
        let bias_of = |first_head| match bias {
            Some(bias) => Bias {
                address: self.weights.biases[bias.0].address(device),
                reach: self.weights.biases[bias.0].reach,
                first_head,
            },
            None => Bias::default(),
        };
        if rows <= FEW_ROWS && total <= FEW_KEYS {
            let (q, cache, out_at) = (self.at(q)?, [keys, values], address(&out, device));
            let (kernels, shape) = (self.kernels(), (rows, total));
            // SAFETY: q and out hold rows of all heads, the cache `total` positions.
            unsafe { kernels.attend(shape, heads, q, cache, out_at, scale, is_causal, position, bias_of(0)) }?;
            return Ok(out);
        }
        // Heads of one call to cuBLAS either share a key/value head or have one each.
        let bytes_a_head = rows * total * (size_of::<f32>() + size_of::<f16>());
        let at_once = match group {
            1 => (SCORE_BYTES / bytes_a_head).clamp(1, heads.heads),
            group => group,
        };
        // SAFETY: cuBLAS and the softmax write both before they are read.
        let (scores, probabilities) =
            unsafe { (device.alloc::<f32>(at_once * rows * total)?, device.alloc::<f16>(at_once * rows * total)?) };
        let (scores, probabilities) = (address(&scores, device), address(&probabilities, device));
        let (q_at, out_at) = (self.at(q)?, address(&out, device));
        let width = self.width(q);
        let mut first = 0;
        while first < heads.heads {
            let count = at_once.min(heads.heads - first);
            let shared = group > 1;
            let cache_head = if shared { first / group } else { first };
            let cache_at = |base: u64| base + (2 * cache_head * heads.capacity * heads.d_pad) as u64;
            let cache_operand = |base| Operand {
                address: cache_at(base),
                stride: heads.d_pad,
                batch_stride: if shared { 0 } else { heads.capacity * heads.d_pad },
            };
            let rows_operand = |base: u64| Operand {
                address: base + (2 * first * heads.d) as u64,
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
            // SAFETY: scores and probabilities hold `at_once` heads; q and out hold all heads; the cache `total` positions.
            unsafe {
                to_scores.run(device)?;
                let shape = (count, rows, total);
                self.kernels().softmax(shape, scores, probabilities, scale, is_causal, position, bias_of(first))?;
                to_values.run(device)?;
            }
            first += count;
        }
        Ok(out)
    }
}
