//! The oracle: one operation at a time on candle tensors, on any device.
//!
//! On the CPU everything is fp32 and a linear is its format's plain reference; on CUDA activations are fp16, sums and
//! norms fp32, and a linear is the format's device kernel. Speed is no aim here.

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, IndexOp, Tensor};

use super::load::{Streamed, stream};
use super::{Footprint, Loaded, OutlierColumns, Session, Setup};
use crate::events::Listener;
use crate::plan::{ActivationKind, Mask, Model, NormKind, Op, Rope};
use crate::quant::Stored;
use crate::weights::spec::MatrixSpec;

/// A linear layer on candle tensors.
pub trait Linear: Send + Sync {
    /// `y = x · Wᵀ`: `x` is `[m, k]` in the session's compute dtype, `y` `[m, n]` in the same.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor>;

    /// Rows of the weight, `[tokens, k]` in its own dtype.
    fn rows(&self, tokens: &[u32]) -> candle_core::Result<Tensor>;

    fn stored_bytes(&self) -> usize;
}

/// The format's plain reference on the CPU.
struct Oracle(Box<dyn Stored>);

impl Linear for Oracle {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (m, _) = x.dims2()?;
        let (n, _) = self.0.shape();
        let y = self.0.multiply(&x.flatten_all()?.to_vec1::<f32>()?, m);
        Tensor::from_vec(y, (m, n), x.device())
    }

    fn rows(&self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        let (n, k) = self.0.shape();
        let table = Tensor::from_vec(self.0.dequantize(), (n, k), &Device::Cpu)?;
        table.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)
    }

    fn stored_bytes(&self) -> usize {
        self.0.parts().iter().map(|part| part.bytes.len()).sum()
    }
}

/// Runs a model's plan on candle tensors.
pub struct Reference {
    model: Model,
    device: Device,
    compute: DType,
    matrices: Vec<Box<dyn Linear>>,
    vectors: Vec<Tensor>,
    /// Keys and values of each cache, `[g, t, d]`; empty before the first token.
    caches: Vec<Option<(Tensor, Tensor)>>,
    position: usize,
    logits: Option<Tensor>,
    last_token: u32,
}

/// Loads the oracle on the CPU.
pub fn load(setup: &Setup, events: &dyn Listener) -> Result<Loaded> {
    let finish = |_: &MatrixSpec, stored: Box<dyn Stored>| Ok(Box::new(Oracle(stored)) as Box<dyn Linear>);
    let streamed = stream(setup, events, &finish)?;
    Reference::loaded(setup, streamed, Device::Cpu, DType::F32, "candle".to_owned())
}

impl Reference {
    /// A session from streamed linears.
    pub fn loaded(
        setup: &Setup,
        streamed: Streamed<Box<dyn Linear>>,
        device: Device,
        compute: DType,
        isa: String,
    ) -> Result<Loaded> {
        let vectors = streamed.vectors.into_iter().map(|v| Tensor::new(v, &device)).collect::<Result<_, _>>()?;
        let session = Self {
            model: setup.model.clone(),
            device,
            compute,
            matrices: streamed.matrices,
            vectors,
            caches: vec![None; setup.model.caches.len()],
            position: 0,
            logits: None,
            last_token: 0,
        };
        Ok(Loaded {
            session: Box::new(session),
            load: streamed.elapsed,
            quantize: streamed.quantize,
            fp16_overflow: streamed.fp16_overflow,
            isa,
        })
    }

    /// Runs `tokens` through the plan and returns the next one.
    fn run(&mut self, tokens: &[u32]) -> Result<u32> {
        let mut buffers: Vec<Option<Tensor>> = vec![None; self.model.decoder.buffers.len()];
        let ops = self.model.decoder.ops.clone();
        for op in &ops {
            self.step(op, tokens, &mut buffers).with_context(|| format!("reference executor at {op:?}"))?;
        }
        self.position += tokens.len();
        Ok(self.last_token)
    }

    fn step(&mut self, op: &Op, tokens: &[u32], buffers: &mut [Option<Tensor>]) -> candle_core::Result<()> {
        let read = |buffers: &[Option<Tensor>], id: crate::plan::BufferId| {
            buffers[id.0]
                .clone()
                .ok_or_else(|| candle_core::Error::Msg(format!("buffer {} is read before it is written", id.0)))
        };
        match op {
            Op::Embed { table, out } => {
                buffers[out.0] = Some(self.matrices[table.0].rows(tokens)?.to_dtype(self.compute)?);
            }
            Op::Norm { kind, weight, epsilon, x, out } => {
                let x = read(buffers, *x)?;
                buffers[out.0] = Some(self.norm(*kind, &self.vectors[weight.0], *epsilon, &x)?);
            }
            Op::Linear { x, parts } => {
                let x = read(buffers, *x)?;
                for part in parts {
                    let y = self.matrices[part.weight.0].forward(&x.contiguous()?)?;
                    buffers[part.out.0] = Some(match part.bias {
                        Some(bias) => y.broadcast_add(&self.vectors[bias.0].to_dtype(self.compute)?)?,
                        None => y,
                    });
                }
            }
            Op::RopeAppend { q, k, v, cache, rope } => {
                let d = self.model.caches[cache.0].head_dim;
                let rope = self.model.ropes[rope.0].clone();
                buffers[q.0] = Some(self.rotate(&rope, &read(buffers, *q)?, d)?);
                let k = heads(&self.rotate(&rope, &read(buffers, *k)?, d)?, d)?;
                self.append(cache.0, k, heads(&read(buffers, *v)?, d)?)?;
            }
            Op::Attention { q, cache, out, scale, mask: Mask::Causal } => {
                buffers[out.0] = Some(self.attend(&read(buffers, *q)?, cache.0, *scale)?);
            }
            Op::Activate { kind, gate, up, out } => {
                let gate = read(buffers, *gate)?;
                let y = match kind {
                    ActivationKind::Silu => gate.silu()?,
                    ActivationKind::GeluTanh => gate.gelu()?,
                };
                buffers[out.0] = Some(match up {
                    Some(up) => (y * read(buffers, *up)?)?,
                    None => y,
                });
            }
            Op::Add { a, b, out } => buffers[out.0] = Some((read(buffers, *a)? + read(buffers, *b)?)?),
            Op::LastRow { x, out } => {
                let x = read(buffers, *x)?;
                buffers[out.0] = Some(x.narrow(0, x.dim(0)? - 1, 1)?);
            }
            Op::Argmax { logits } => {
                let logits = read(buffers, *logits)?.to_dtype(DType::F32)?.flatten_all()?;
                self.last_token = first_largest(&logits.to_vec1::<f32>()?);
                self.logits = Some(logits);
            }
        }
        Ok(())
    }

    /// Row by row in fp32, back in the compute dtype.
    fn norm(&self, kind: NormKind, weight: &Tensor, epsilon: f32, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = x.to_dtype(DType::F32)?;
        let centred = match kind {
            NormKind::Rms => x,
            NormKind::Layer { .. } => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(variance + epsilon as f64)?.sqrt()?)?.broadcast_mul(weight)?;
        let normed = match kind {
            NormKind::Rms => normed,
            NormKind::Layer { bias } => normed.broadcast_add(&self.vectors[bias.0])?,
        };
        normed.to_dtype(self.compute)
    }

    /// `x` is `[t, heads · d]`; each head's first `rotary_dim` elements turn by position.
    fn rotate(&self, rope: &Rope, x: &Tensor, d: usize) -> candle_core::Result<Tensor> {
        let (t, width) = x.dims2()?;
        let half = rope.rotary_dim / 2;
        let angles: Vec<f32> = (self.position..self.position + t)
            .flat_map(|position| rope.inverse_frequencies.iter().map(move |f| f * position as f32))
            .collect();
        let angles = Tensor::from_vec(angles, (t, 1, half), &self.device)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let x = x.reshape((t, width / d, d))?.to_dtype(DType::F32)?;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rest = x.narrow(2, 2 * half, d - 2 * half)?;
        Tensor::cat(&[turned_a, turned_b, rest], 2)?.reshape((t, width))?.to_dtype(self.compute)
    }

    fn append(&mut self, cache: usize, k: Tensor, v: Tensor) -> candle_core::Result<()> {
        self.caches[cache] = Some(match self.caches[cache].take() {
            Some((keys, values)) => (Tensor::cat(&[keys, k], 1)?, Tensor::cat(&[values, v], 1)?),
            None => (k, v),
        });
        Ok(())
    }

    /// `q` is `[t, h · d]`; softmax in fp32.
    fn attend(&self, q: &Tensor, cache: usize, scale: f32) -> candle_core::Result<Tensor> {
        let spec = self.model.caches[cache];
        let Some((keys, values)) = &self.caches[cache] else {
            candle_core::bail!("attention reads a cache that nothing was appended to");
        };
        let (t, width) = q.dims2()?;
        let (g, d) = (spec.kv_heads, spec.head_dim);
        let group = width / d / g;
        // [t, g · group, d] → [g, group · t, d]: the heads of a group read the same keys.
        let q = q.reshape((t, g, group, d))?.permute((1, 2, 0, 3))?.reshape((g, group * t, d))?;
        let (q, keys, values) = (q.to_dtype(DType::F32)?, keys.to_dtype(DType::F32)?, values.to_dtype(DType::F32)?);
        let scores = (q.matmul(&keys.transpose(1, 2)?.contiguous()?)? * scale as f64)?;
        let total = keys.dim(1)?;
        let mask: Vec<f32> = (0..group * t)
            .flat_map(|row| {
                let last_seen = total - t + row % t;
                (0..total).map(move |column| if column <= last_seen { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (1, group * t, total), &self.device)?)?;
        let weights = (scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?).exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights.matmul(&values.contiguous()?)?.reshape((g, group, t, d))?;
        out.permute((2, 0, 1, 3))?.reshape((t, width))?.to_dtype(self.compute)
    }
}

/// `[t, heads · d]` → `[heads, t, d]`
fn heads(x: &Tensor, d: usize) -> candle_core::Result<Tensor> {
    let (t, width) = x.dims2()?;
    x.reshape((t, width / d, d))?.transpose(0, 1)?.contiguous()
}

/// The lowest index among the largest values, as torch.argmax gives it on a CPU.
fn first_largest(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (1..logits.len()).fold(0, better) as u32
}

impl Session for Reference {
    fn position(&self) -> usize {
        self.position
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.position, "cannot rewind from {} to {position}", self.position);
        for cache in &mut self.caches {
            *cache = match cache.take() {
                Some((k, v)) if position > 0 => match (k.i((.., ..position)), v.i((.., ..position))) {
                    (Ok(k), Ok(v)) => Some((k, v)),
                    _ => None,
                },
                _ => None,
            };
        }
        self.position = position;
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        if tokens.is_empty() {
            bail!("a prefill needs at least one token");
        }
        self.run(tokens)
    }

    fn decode(&mut self, n: usize, on_token: &mut dyn FnMut(u32)) -> Result<()> {
        for _ in 0..n {
            let token = self.run(&[self.last_token])?;
            on_token(token);
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let logits = self.logits.as_ref().context("no token was run yet")?;
        Ok(logits.to_vec1::<f32>()?)
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    fn footprint(&self) -> Footprint {
        let stored: Vec<usize> = self.matrices.iter().map(|m| m.stored_bytes()).collect();
        let kv_per_position = self.model.kv_bytes_per_position(self.compute.size_in_bytes());
        let weights_bytes = (stored.iter().sum::<usize>() + self.model.vector_bytes()) as u64;
        Footprint {
            weights_bytes,
            weights_resident_bytes: weights_bytes,
            kv_cache_bytes: (kv_per_position * self.position) as u64,
            scratch_bytes: 0,
            weight_bytes_per_token: self.model.weight_bytes_per_token(&stored) as u64,
            kv_bytes_per_position: kv_per_position as u64,
        }
    }

    fn outlier_columns(&self) -> OutlierColumns {
        OutlierColumns::default()
    }
}
