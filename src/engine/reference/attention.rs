//! Attention on candle tensors: norms, rotation, the cache, and the softmax over what the mask leaves.

use candle_core::{D, DType, Result, Tensor};

use super::call::{Sequence, SequenceCall};
use super::{Buffers, Reference, capped, missing};
use crate::plan::{
    AttentionSpec, BiasId, CacheId, CacheScope, KeyValue, Mask, Norm, QkNorm, QkNormOver, RopeId, Sinks, Window,
};

impl Reference {
    /// Appends keys and values, and attends, sequence by sequence: `[rows, h · d]`.
    pub(super) fn attention(&mut self, spec: &AttentionSpec, call: &SequenceCall, buffers: &Buffers) -> Result<Tensor> {
        let d = self.model.caches[spec.cache.0].head_dim;
        let mut outs = Vec::with_capacity(call.sequences.len());
        for (at, sequence) in call.sequences.clone().enumerate() {
            let own = |buffer| buffers.get(buffer)?.narrow(0, at * call.rows_each, call.rows_each);
            let start = self.sequences[sequence].position;
            if let Some(KeyValue { k, v }) = spec.append {
                let norm = spec.qk_norm.map(|norm| (norm.k, norm.over));
                let k = self.turned(&own(k)?, norm, spec.rope.map(|rope| (rope, start)), d)?;
                self.append(sequence, spec.cache, &k, &own(v)?)?;
            }
            let norm = spec.qk_norm.map(|QkNorm { q, over, .. }| (q, over));
            let q = self.turned(&own(spec.q)?, norm, spec.rope.map(|rope| (rope, start)), d)?;
            outs.push(self.attend(&self.sequences[sequence], &q, spec)?);
        }
        Tensor::cat(&outs, 0)
    }

    /// `rope(norm(x))` of queries or keys, `[t, heads · d]`.
    fn turned(
        &self,
        x: &Tensor,
        norm: Option<(Norm, QkNormOver)>,
        rope: Option<(RopeId, usize)>,
        d: usize,
    ) -> Result<Tensor> {
        let (t, width) = x.dims2()?;
        let normed = match norm {
            Some((norm, QkNormOver::Head)) => {
                self.norm(norm, &x.reshape((t, width / d, d))?.contiguous()?)?.reshape((t, width))?
            }
            Some((norm, QkNormOver::Projection)) => self.norm(norm, &x.contiguous()?)?,
            None => x.clone(),
        };
        match rope {
            Some(rope) => self.rotate(rope, &normed, d),
            None => Ok(normed),
        }
    }

    /// `x` is `[t, heads · d]`; each head's first `rotary_dim` elements turn by position, from `start` on.
    fn rotate(&self, (rope, start): (RopeId, usize), x: &Tensor, d: usize) -> Result<Tensor> {
        let rope = &self.model.ropes[rope.0];
        let (t, width) = x.dims2()?;
        let half = rope.rotary_dim / 2;
        let frequencies = rope.frequencies(start + t);
        let turns = (start..start + t).flat_map(|position| rope.turns_by(&frequencies, position));
        let (cos, sin): (Vec<f32>, Vec<f32>) = turns.unzip();
        let cos = Tensor::from_vec(cos, (t, 1, half), &self.device)?;
        let sin = Tensor::from_vec(sin, (t, 1, half), &self.device)?;
        let x = x.reshape((t, width / d, d))?.to_dtype(DType::F32)?;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rest = x.narrow(2, 2 * half, d - 2 * half)?;
        Tensor::cat(&[turned_a, turned_b, rest], 2)?.reshape((t, width))?.to_dtype(self.compute)
    }

    /// Keys and values of a sequence, `[t, g · d]`, rotated. The encoder's caches hold one call, the decoder's grow.
    pub(super) fn append(&mut self, sequence: usize, cache: CacheId, k: &Tensor, v: &Tensor) -> Result<()> {
        let spec = self.model.caches[cache.0];
        let (k, v) = (heads(k, spec.head_dim)?, heads(v, spec.head_dim)?);
        let held = &mut self.sequences[sequence].caches[cache.0];
        let old = held.take().filter(|_| spec.scope == CacheScope::Decoder);
        *held = Some(match old {
            Some((keys, values)) => (Tensor::cat(&[keys, k], 1)?, Tensor::cat(&[values, v], 1)?),
            None => (k, v),
        });
        Ok(())
    }

    /// `q` is `[t, h · d]` of one sequence, rotated; softmax in fp32.
    fn attend(&self, sequence: &Sequence, q: &Tensor, attend: &AttentionSpec) -> Result<Tensor> {
        // The caller has appended, normed and rotated; `bias` takes the rest.
        let &AttentionSpec {
            q: _,
            append: _,
            rope: _,
            qk_norm: _,
            mask: _,
            bias: _,
            window: _,
            out: _,
            cache,
            scale,
            softcap,
            sinks,
        } = attend;
        let spec = self.model.caches[cache.0];
        let (keys, values) = sequence.caches[cache.0].as_ref().ok_or_else(|| missing("keys and values"))?;
        let (t, width) = q.dims2()?;
        let (g, d, total) = (spec.kv_heads, spec.head_dim, keys.dim(1)?);
        let group = width / d / g;
        // [t, g · group, d] → [g, group · t, d]: the heads of a group read the same keys.
        let q = q.reshape((t, g, group, d))?.permute((1, 2, 0, 3))?.reshape((g, group * t, d))?;
        let (q, keys, values) = (q.to_dtype(DType::F32)?, keys.to_dtype(DType::F32)?, values.to_dtype(DType::F32)?);
        let scores = capped((q.matmul(&keys.transpose(1, 2)?.contiguous()?)? * scale as f64)?, softcap)?;
        let bias = Tensor::from_vec(
            self.bias(g * group, (sequence.position, t), total, attend)?,
            (g, group * t, total),
            &self.device,
        )?;
        let mut scores = (scores + bias)?;
        if let Some(Sinks(vector)) = sinks {
            let sinks = self.vectors[vector.0].reshape((g, group, 1, 1))?.broadcast_as((g, group, t, 1))?;
            scores = Tensor::cat(&[&scores, &sinks.reshape((g, group * t, 1))?], 2)?;
        }
        let weights = (scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?).exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let weights = weights.narrow(2, 0, total)?.contiguous()?;
        let out = weights.matmul(&values.contiguous()?)?.reshape((g, group, t, d))?;
        out.permute((2, 0, 1, 3))?.reshape((t, width))?.to_dtype(self.compute)
    }

    /// Terms that are added to the scores, `[h, t, total]`: the relative bias, and −∞ where mask or window hides a key.
    fn bias(&self, h: usize, (start, t): (usize, usize), total: usize, attend: &AttentionSpec) -> Result<Vec<f32>> {
        let causal = match attend.mask {
            Mask::Causal => true,
            Mask::Full => false,
            Mask::Prefix => start > 0,
        };
        let first_seen = |query: i64| attend.window.map_or(i64::MIN, |Window(window)| query - window as i64 + 1);
        let table = attend.bias.map(|bias| self.relative_bias(bias)).transpose()?;
        let mut out = Vec::with_capacity(h * t * total);
        for head in 0..h {
            for row in 0..t {
                // Below 0 where a long prompt attends to a short encoding.
                let query = (total + row) as i64 - t as i64;
                out.extend((0..total as i64).map(|key| match (&table, attend.bias) {
                    _ if (causal && key > query) || key < first_seen(query) => f32::NEG_INFINITY,
                    (Some(rows), Some(bias)) => rows[self.model.biases[bias.0].bucket(key - query, rows.len())][head],
                    _ => 0.0,
                }));
            }
        }
        Ok(out)
    }

    /// `[buckets][h]`
    fn relative_bias(&self, bias: BiasId) -> Result<Vec<Vec<f32>>> {
        let table = self.model.biases[bias.0].table;
        let ids: Vec<u32> = (0..self.model.matrices[table.0].n as u32).collect();
        self.matrices[table.0].rows(&ids)?.to_dtype(DType::F32)?.to_vec2::<f32>()
    }
}

/// `[t, heads · d]` → `[heads, t, d]`
fn heads(x: &Tensor, d: usize) -> Result<Tensor> {
    let (t, width) = x.dims2()?;
    x.reshape((t, width / d, d))?.transpose(0, 1)?.contiguous()
}
