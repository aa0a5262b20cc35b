//! Keys and values on their way to a cache: norms and rotation in place, then the copy. A cache with a sliding window is a
//! ring: position `p` lies in slot `p mod window`.

use super::attend::CallAttention;
use super::schedule::Append;
use crate::kernels::cpu::pool::Worker;
use crate::kernels::cpu::rope;
use crate::plan::{CacheId, KeyValue, Norm};

impl CallAttention<'_> {
    /// Each worker takes whole key/value heads of sequences with the query heads that read them.
    pub fn append(&self, append: Append, worker: &Worker) {
        if append.rope.is_some() || append.norms.is_some() {
            self.turn(append, worker);
        }
        // Rows of a longer call still read what the ring holds: `attend` stores behind them.
        if !self.reads_ring_of_several(append.cache) {
            self.store(append.kv, append.cache, worker);
        }
    }

    /// Returns whether rows of the call read positions whose slots the call's own would take.
    pub fn reads_ring_of_several(&self, cache: CacheId) -> bool {
        self.weights.is_ring(cache) && self.call.rows_each() > 1
    }

    /// Normalises and rotates keys and the queries that read them, in place.
    fn turn(&self, Append { kv: KeyValue { k, v: _ }, cache, q, rope, norms }: Append, worker: &Worker) {
        let spec = self.weights.model.caches[cache.0];
        let d = spec.head_dim;
        for (sequence, head) in self.own_heads(spec.kv_heads, worker) {
            for own in 0..self.call.rows_each() {
                let row = sequence * self.call.rows_each() + own;
                let turned = |x: &mut [f32], norm: Option<Norm>| {
                    if let Some(norm) = norm {
                        self.weights.normalise_in_place(norm, x, &mut self.scratch(worker).gathered);
                    }
                    if let Some(rope) = rope {
                        let (cos, sin) = self.weights.angles[rope.0].at(self.call.start(sequence) + own);
                        rope::rotate(x, cos, sin);
                    }
                };
                if let Some(q) = q {
                    let group = self.buffers.width(q) / spec.kv_heads;
                    let queries = self.buffers.part_mut(q, row, head * group..(head + 1) * group);
                    queries.chunks_exact_mut(d).for_each(|query| turned(query, norms.map(|[of_q, _]| of_q)));
                }
                let key = self.buffers.part_mut(k, row, head * d..(head + 1) * d);
                turned(key, norms.map(|[_, of_k]| of_k));
            }
        }
    }

    /// Copies the rows that the cache has room for: all of them, and the last ones to a ring.
    pub fn store(&self, KeyValue { k, v }: KeyValue, cache: CacheId, worker: &Worker) {
        let spec = self.weights.model.caches[cache.0];
        let (d, capacity) = (spec.head_dim, self.weights.positions(cache));
        let (keys, values) = (self.caches.region(2 * cache.0), self.caches.region(2 * cache.0 + 1));
        let rows = self.call.rows_each();
        let first = if self.weights.is_ring(cache) { rows.saturating_sub(capacity) } else { 0 };
        for (sequence, head) in self.own_heads(spec.kv_heads, worker) {
            let columns = head * d..(head + 1) * d;
            let of_head = (self.call.places[sequence].cache * spec.kv_heads + head) * capacity;
            for own in first..rows {
                let row = sequence * rows + own;
                let at = (of_head + self.weights.slot(cache, self.call.start(sequence) + own)) * d;
                // SAFETY: this head's positions are this worker's alone in this step.
                unsafe { keys.range_mut(at..at + d) }.copy_from_slice(self.buffers.part(k, row, columns.clone()));
                // SAFETY: as above.
                unsafe { values.range_mut(at..at + d) }.copy_from_slice(self.buffers.part(v, row, columns.clone()));
            }
        }
    }
}
