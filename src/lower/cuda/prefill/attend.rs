//! Attention of a call: norms of heads, rotation, cache write, and the product with the cache.

use anyhow::Result;
use half::f16;

use super::{Buffer, EXECUTOR, Prefill};
use crate::kernels::cuda::attend::{Bias, Heads, RowsAttention, RowsFeatures};
use crate::kernels::cuda::launch::dimension;
use crate::kernels::cuda::place::RowPlaces;
use crate::lower::cuda::{BiasAt, CacheAt, CallKind};
use crate::plan::{
    AttentionSpec, BiasId, BufferId, CacheId, CacheScope, KeyValue, Mask, Norm, NormKind, QkNorm, QkNormOver, RopeId,
    Sinks, Softcap, Window, feature, refuse,
};

impl<'a> Prefill<'a> {
    /// Norms queries and keys in place, their biases added.
    fn norm_heads(&mut self, (q, k): (BufferId, BufferId), cache: CacheId, norms: QkNorm) -> Result<()> {
        let d = self.on.model().caches[cache.0].head_dim;
        for (id, Norm { kind, weight, epsilon }) in [(q, norms.q), (k, norms.k)] {
            match kind {
                NormKind::Rms => {}
                NormKind::Layer { bias: _ } => {
                    refuse(EXECUTOR, "an attention", &[Some(&"layer norms of queries and keys")])?;
                }
            }
            let width = self.width(id);
            let parts = match norms.over {
                QkNormOver::Head => (width / d, d),
                QkNormOver::Projection => (1, width),
            };
            let ((at, bias), weight) = (self.product(id)?, self.vector(weight));
            // SAFETY: the buffer holds rows of these parts, the weight one of them, the bias a row.
            unsafe { self.kernels().norm_parts(self.shape.rows(), parts, at, bias, weight, epsilon) }?;
            self.buffer_mut(id)?.bias = 0;
        }
        Ok(())
    }

    /// Adds the biases of k, v and the queries that it rotates, rotates and writes to the cache.
    pub(super) fn append(
        &mut self,
        KeyValue { k, v }: KeyValue,
        cache: CacheId,
        rotate: Option<(RopeId, BufferId)>,
    ) -> Result<()> {
        let heads = self.heads(cache, rotate.map(|(_, q)| q));
        let (angles, rotary) = match rotate {
            Some((rope, _)) => (self.angles(rope), self.on.model().ropes[rope.0].rotary_dim),
            None => (0, 0),
        };
        let (q, q_bias) = rotate.map_or(Ok((0, 0)), |(_, q)| self.product(q))?;
        let ((k, k_bias), (v, v_bias)) = (self.product(k)?, self.product(v)?);
        let (places, at) = (self.places(cache), self.cache(cache));
        let (memory, biases) = ([at.keys, at.values], [q_bias, k_bias, v_bias]);
        // SAFETY: q, k and v hold the rows of their heads; the caller checked that the cache has room.
        unsafe { self.kernels().append(places, heads, [q, k, v], biases, memory, angles, rotary) }?;
        if let Some((_, q)) = rotate {
            self.buffer_mut(q)?.bias = 0;
        }
        Ok(())
    }

    pub(super) fn attention(&mut self, index: usize, spec: &AttentionSpec) -> Result<()> {
        let &AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = spec;
        match (append, qk_norm) {
            (Some(KeyValue { k, v: _ }), Some(norms)) => self.norm_heads((q, k), cache, norms)?,
            (None, Some(_)) => refuse(EXECUTOR, "an attention over an encoder", &[feature(&qk_norm)])?,
            (_, None) => {}
        }
        if mask != Mask::Causal {
            refuse(EXECUTOR, "an attention that sees what follows", &[feature(&window)])?;
        }
        let features = RowsFeatures {
            window: window.map_or(Ok(0), |Window(window)| dimension(window))?,
            softcap: softcap.map_or(0.0, |Softcap(cap)| cap),
            sinks: sinks.map_or(0, |Sinks(scores)| self.vector(scores)),
        };
        match (append, rope) {
            (Some(kv), rope) => self.append(kv, cache, rope.map(|rope| (rope, q)))?,
            (None, Some(_)) => refuse(EXECUTOR, "an attention", &[Some(&"a rope and no keys to append")])?,
            (None, None) => {}
        }
        // Keys and values are in the cache: what follows may have their memory.
        for id in append.into_iter().flat_map(|KeyValue { k, v }| [k, v]) {
            self.buffers[id.0].take_if(|_| self.lives[id.0].last == 2 * index);
        }
        self.buffers[out.0] = Some(self.attend(q, cache, scale, mask, bias, features)?);
        Ok(())
    }

    fn attend(
        &mut self,
        q: BufferId,
        cache: CacheId,
        scale: f32,
        mask: Mask,
        bias: Option<BiasId>,
        features: RowsFeatures,
    ) -> Result<Buffer<'a>> {
        let scope = self.on.model().caches[cache.0].scope;
        let (q_at, out, at) = (self.read(q)?, self.half(q)?, self.cache(cache));
        let call = RowsAttention {
            places: self.places(cache),
            heads: self.heads(cache, Some(q)),
            q: q_at,
            out: out.address,
            keys: at.keys,
            values: at.values,
            total: match scope {
                CacheScope::Decoder => self.shape.batch.keys(),
                CacheScope::Encoder => self.shape.encoded,
            },
            // A query of the decoder stands where the cache ended; cross-attention has no place and no bias.
            over_encoder: scope == CacheScope::Encoder,
            scale,
            is_causal: match mask {
                Mask::Causal => true,
                Mask::Full => false,
                Mask::Prefix => self.shape.position() > 0,
            },
            bias: bias.map_or(Bias::default(), |bias| {
                let BiasAt { address, reach } = self.on.bias(bias);
                Bias { address, reach }
            }),
            features,
        };
        // SAFETY: q and out hold rows of all heads, the cache as many keys.
        unsafe { call.run(self.launcher, self.arena, self.on.properties().multiprocessors) }?;
        Ok(out)
    }

    /// Where the call's rows stand in a cache.
    fn places(&self, cache: CacheId) -> RowPlaces {
        RowPlaces {
            sequences: self.shape.batch.sequences,
            rows: self.shape.batch.rows_each(),
            position: match self.on.model().caches[cache.0].scope {
                CacheScope::Decoder => self.shape.position(),
                CacheScope::Encoder => 0,
            },
            // Only those of a step differ.
            places: match self.shape.kind {
                CallKind::Step => self.on.session().places,
                CallKind::Encoder | CallKind::Prompt | CallKind::Scored => 0,
            },
        }
    }

    /// Steps have tables of their own where frequencies change with each position.
    fn angles(&self, rope: RopeId) -> u64 {
        match self.shape.kind {
            CallKind::Step => self.on.step_angles(rope),
            CallKind::Encoder | CallKind::Prompt | CallKind::Scored => self.on.call_angles(rope),
        }
    }

    /// A cache from the call's first sequence on.
    fn cache(&self, cache: CacheId) -> CacheAt {
        let at = self.on.cache(cache);
        let of_sequence = self.on.model().caches[cache.0].kv_heads * at.capacity * at.d_pad;
        let before = (self.shape.first * of_sequence * size_of::<f16>()) as u64;
        CacheAt { keys: at.keys + before, values: at.values + before, ..at }
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
