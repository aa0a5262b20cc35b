//! Attention of a call: by heads, by heads and blocks of rows, or by positions, as the call has one row or several and a
//! short context or a long one.

use std::ops::Range;

use super::alone::StepMode;
use super::arena::SharedArena;
use super::buffers::Buffers;
use super::partials::SharedParts;
use super::run::Call;
use super::schedule::Attend;
use super::{Scratch, Weights};
use crate::kernels::cpu::attention::{self, Partial};
use crate::kernels::cpu::pool::Worker;
use crate::kernels::cpu::shared::SharedSlice;
use crate::plan::{CacheId, CacheScope, CacheShape, Mask};

/// A prefill hands out attention in blocks of at least this many query rows of one key/value head.
const QUERY_BLOCK: usize = 16;

/// The same where the keys of a block are brought together first: a window of 512 then costs an eighth more to copy than to read.
const GATHERED_QUERY_BLOCK: usize = 64;

/// Positions are handed out in multiples of this, which is what attention takes at once.
const POSITIONS: usize = 64;

/// Bytes of keys and values that a worker must be spared to read before positions are split. Splitting costs two more barriers,
/// each 1 to 3 µs, in which a core reads about as much.
const SPARED_BYTES: usize = 128 << 10;

/// The parts of a call that attention touches.
pub(super) struct CallAttention<'a> {
    pub weights: &'a Weights,
    pub call: Call<'a>,
    pub buffers: &'a Buffers<'a>,
    /// Keys and values of each cache.
    pub caches: &'a SharedArena<'a>,
    pub parts: &'a SharedParts<'a>,
    /// One element per worker.
    pub scratch: &'a SharedSlice<'a, Scratch>,
}

impl CallAttention<'_> {
    /// One row of each sequence: by key/value heads, as they were appended, or by positions where heads would leave workers idle for long.
    /// Several: by sequences, heads and blocks of rows, dealt out in turn since later rows see more.
    pub fn attend(&self, attend: &Attend, worker: &Worker) {
        let heads = self.weights.model.caches[attend.cache.0].kv_heads;
        let (rows, sequences) = (self.call.rows_each(), self.call.places.len());
        if rows == 1 {
            match self.splits_positions(attend, worker.count()) {
                true => (0..sequences).for_each(|sequence| self.attend_positions(attend, sequence, worker)),
                false => {
                    self.own_heads(heads, worker).for_each(|(row, head)| self.attend_row(attend, head, row, worker));
                }
            }
            return;
        }
        let reads_ring = self.reads_ring_of_several(attend.cache);
        let group = self.buffers.width(attend.q) / heads / self.weights.model.caches[attend.cache.0].head_dim;
        let least = if reads_ring { GATHERED_QUERY_BLOCK } else { QUERY_BLOCK };
        let block_rows = (attention::QUERIES / group).max(least);
        let (blocks, all_heads) = (rows.div_ceil(block_rows), sequences * heads);
        for item in (worker.index()..all_heads * blocks).step_by(worker.count()) {
            let (block, sequence, head) = (item / all_heads, item % all_heads / heads, item % heads);
            let first = sequence * rows;
            let rows = first + block * block_rows..first + rows.min((block + 1) * block_rows);
            match attend.bias {
                Some(_) => rows.for_each(|row| self.attend_row(attend, head, row, worker)),
                None => self.attend_block(attend, head, rows, worker),
            }
        }
        if let (true, Some(kv)) = (reads_ring, attend.kv) {
            // All have read the positions that the call's own take the place of.
            worker.barrier();
            self.store(kv, attend.cache, worker);
        }
    }

    /// Sequences of the call and key/value heads that are a worker's.
    pub fn own_heads(&self, heads: usize, worker: &Worker) -> impl Iterator<Item = (usize, usize)> + use<> {
        worker.share(self.call.places.len() * heads, 1).map(move |item| (item / heads, item % heads))
    }

    #[allow(clippy::mut_from_ref)]
    pub fn scratch(&self, worker: &Worker) -> &mut Scratch {
        // SAFETY: each worker takes the element of its own index.
        unsafe { &mut self.scratch.range_mut(worker.index()..worker.index() + 1)[0] }
    }

    /// Rows of one head of a sequence together, so that keys and values are read once for the block.
    fn attend_block(&self, attend: &Attend, head: usize, rows: Range<usize>, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let d = spec.head_dim;
        let width = self.buffers.width(attend.q) / spec.kv_heads;
        let columns = head * width..(head + 1) * width;
        let Scratch { kernel, gathered, window } = self.scratch(worker);
        gathered.resize(2 * rows.len() * width, 0.0);
        let (queries, outs) = gathered.split_at_mut(rows.len() * width);
        for (row, query) in rows.clone().zip(queries.chunks_exact_mut(width)) {
            query.copy_from_slice(self.buffers.part(attend.q, row, columns.clone()));
        }
        let (first, last) = (self.visible(attend, rows.start), self.visible(attend, rows.end - 1));
        let (sequence, _) = self.call.place(rows.start);
        let (keys, values) = match self.reads_ring_of_several(attend.cache) {
            true => self.gather(attend, (sequence, head), first.start..last.end, window),
            false => self.keys_and_values(attend.cache, (sequence, head), first.start..last.end),
        };
        let context = self.context(attend, head, keys, values);
        if first == last {
            attention::attend_within(self.weights.isa, queries, &context, None, outs, kernel);
        } else {
            let seen = first.end - first.start;
            attention::attend_rows(self.weights.isa, queries, width / d, &context, seen, outs, kernel);
        }
        for (row, out) in rows.zip(outs.chunks_exact(width)) {
            self.buffers.part_mut(attend.out, row, columns.clone()).copy_from_slice(out);
        }
    }

    /// Keys and values of a sequence's head at `positions`: the call's own from their buffers, those before it from the ring.
    fn gather<'w>(
        &self,
        attend: &Attend,
        (sequence, head): (usize, usize),
        positions: Range<usize>,
        window: &'w mut Vec<f32>,
    ) -> (&'w [f32], &'w [f32]) {
        let d = self.weights.model.caches[attend.cache.0].head_dim;
        let columns = head * d..(head + 1) * d;
        window.resize(2 * positions.len() * d, 0.0);
        let (keys, values) = window.split_at_mut(positions.len() * d);
        let targets = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
        for (position, (key, value)) in positions.zip(targets) {
            let (from_key, from_value) = match (position.checked_sub(self.call.start(sequence)), attend.kv) {
                (Some(own), Some(kv)) => {
                    let row = sequence * self.call.rows_each() + own;
                    (self.buffers.part(kv.k, row, columns.clone()), self.buffers.part(kv.v, row, columns.clone()))
                }
                _ => {
                    let slot = self.weights.slot(attend.cache, position);
                    self.keys_and_values(attend.cache, (sequence, head), slot..slot + 1)
                }
            };
            key.copy_from_slice(from_key);
            value.copy_from_slice(from_value);
        }
        (keys, values)
    }

    fn attend_row(&self, attend: &Attend, head: usize, row: usize, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let visible = self.held(attend, row);
        let width = self.buffers.width(attend.q) / spec.kv_heads;
        let columns = head * width..(head + 1) * width;
        let query = self.buffers.part(attend.q, row, columns.clone());
        let out = self.buffers.part_mut(attend.out, row, columns);
        // One query head a key/value head wherever there is a bias (T5): its biases lie together.
        let (sequence, own) = self.call.place(row);
        let position = self.call.start(sequence) + own;
        let bias = attend.bias.map(|bias| self.weights.biases[bias.0].of(head, position, visible.end));
        let scratch = &mut self.scratch(worker).kernel;
        for (positions, keys, values) in self.windows(attend.cache, (sequence, head), visible.clone(), worker) {
            let context = self.context(attend, head, keys, values);
            let bias = bias.map(|bias| &bias[positions]);
            attention::attend_within(self.weights.isa, query, &context, bias, out, scratch);
        }
    }

    /// Returns whether the worker with the most heads would read so much more than its part that sharing positions pays.
    pub fn splits_positions(&self, attend: &Attend, workers: usize) -> bool {
        let (spec, sequences) = (self.weights.model.caches[attend.cache.0], self.call.places.len());
        let positions = (0..sequences).map(|row| self.held(attend, row).len()).max().unwrap_or(0);
        let head_bytes = positions * 2 * spec.head_dim * size_of::<f32>();
        let heads = sequences * spec.kv_heads;
        let most = heads.div_ceil(workers) * head_bytes;
        // The barriers are each sequence's.
        most - heads * head_bytes / workers >= sequences * SPARED_BYTES
    }

    /// Every worker takes an equal part of all positions of a sequence's heads, one head after the other; then the parts of each head are put
    /// together. All workers come here or none does.
    fn attend_positions(&self, attend: &Attend, row: usize, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let (heads, d) = (spec.kv_heads, spec.head_dim);
        let (width, visible) = (self.buffers.width(attend.q) / heads, self.held(attend, row));
        let tiles = visible.len().div_ceil(POSITIONS);
        // Heads were appended by one worker each.
        worker.barrier();
        // SAFETY: a worker's own region, until the barrier below.
        let (outs, partials) = unsafe { self.parts.of_worker_mut(worker.index(), heads * width, d) };
        partials.fill(Partial::EMPTY);
        let own = worker.share(heads * tiles, 1);
        let parts = outs.chunks_exact_mut(width).zip(partials.chunks_exact_mut(width / d));
        for (head, (out, partials)) in parts.enumerate() {
            let first = own.start.clamp(head * tiles, (head + 1) * tiles) - head * tiles;
            let end = own.end.clamp(head * tiles, (head + 1) * tiles) - head * tiles;
            if first == end {
                continue;
            }
            let positions = visible.start + first * POSITIONS..(visible.start + end * POSITIONS).min(visible.end);
            let query = self.buffers.part(attend.q, row, head * width..(head + 1) * width);
            // As in `attend_row`.
            let bias = attend.bias.map(|bias| self.weights.biases[bias.0].of(head, self.call.start(row), visible.end));
            let scratch = &mut self.scratch(worker).kernel;
            for (positions, keys, values) in self.windows(attend.cache, (row, head), positions, worker) {
                let context = self.context(attend, head, keys, values);
                let bias = bias.map(|bias| &bias[positions]);
                attention::attend_part(self.weights.isa, query, &context, bias, out, partials, scratch);
            }
        }
        worker.barrier();
        for head in worker.share(heads, 1) {
            self.merge_parts(attend, (row, head), worker);
        }
    }

    /// The output of one head of a row from all workers' parts.
    fn merge_parts(&self, attend: &Attend, (row, head): (usize, usize), worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let (isa, d, all) = (self.weights.isa, spec.head_dim, self.buffers.width(attend.q));
        let columns = head * all / spec.kv_heads..(head + 1) * all / spec.kv_heads;
        let queries = columns.start / d..columns.end / d;
        let out = self.buffers.part_mut(attend.out, row, columns.clone());
        out.fill(0.0);
        // SAFETY: a worker's own region.
        let sums = unsafe { self.parts.sums_mut(worker.index(), queries.len()) };
        sums.fill(Partial::EMPTY);
        for other in 0..worker.count() {
            // SAFETY: all parts were written before the barrier, and nothing writes them before the next one.
            let (outs, partials) = unsafe { self.parts.of_worker(other, all, d) };
            let partials = &partials[queries.clone()];
            // A worker that had none of this head's positions has left its output as it was.
            if partials.iter().any(|partial| *partial != Partial::EMPTY) {
                attention::merge(isa, out, sums, &outs[columns.clone()], partials, d);
            }
        }
        let group = queries.len();
        attention::add_sinks(sums, self.sinks(attend, columns.start / d..columns.start / d + group), 0);
        attention::finish(isa, out, sums, d);
    }

    /// Keys and values of a key/value head, and what attention makes of them.
    fn context<'a>(
        &'a self,
        attend: &Attend,
        head: usize,
        keys: &'a [f32],
        values: &'a [f32],
    ) -> attention::Context<'a> {
        let spec = self.weights.model.caches[attend.cache.0];
        let group = self.buffers.width(attend.q) / spec.kv_heads / spec.head_dim;
        attention::Context {
            keys,
            values,
            d: spec.head_dim,
            scale: attend.scale,
            softcap: attend.softcap,
            window: attend.window,
            sinks: self.sinks(attend, head * group..(head + 1) * group),
        }
    }

    /// The sinks of some query heads.
    fn sinks(&self, attend: &Attend, heads: Range<usize>) -> Option<&[f32]> {
        attend.sinks.map(|vector| &self.weights.vectors[vector.0][heads])
    }

    /// Keys and values of a sequence's head at `positions`, in one piece. Where others stand in for them, those of as many positions as stay in the
    /// cache, as often as it takes to attend over equally many; of a head that this worker appends to, and nobody else.
    fn windows(
        &self,
        cache: CacheId,
        of: (usize, usize),
        positions: Range<usize>,
        worker: &Worker,
    ) -> impl Iterator<Item = (Range<usize>, &[f32], &[f32])> {
        let spec = self.weights.model.caches[cache.0];
        let (cache, of, start, most) = match self.call.mode {
            StepMode::StandingIn(stand_ins, ..) => {
                let (cache, most) = stand_ins.of_cache(cache, spec.head_dim);
                (cache, self.own_heads(spec.kv_heads, worker).next().unwrap_or((0, spec.kv_heads - 1)), 0, most)
            }
            StepMode::Real | StepMode::Keeping(..) => (cache, of, positions.start, usize::MAX),
        };
        (0..positions.len()).step_by(most).map(move |done| {
            let len = most.min(positions.len() - done);
            let (keys, values) = self.keys_and_values(cache, of, start..start + len);
            (positions.start + done..positions.start + done + len, keys, values)
        })
    }

    /// Keys and values of a sequence's head in some slots of its cache.
    fn keys_and_values(
        &self,
        cache: CacheId,
        (sequence, head): (usize, usize),
        positions: Range<usize>,
    ) -> (&[f32], &[f32]) {
        let CacheShape { kv_heads, head_dim: d, .. } = self.weights.model.caches[cache.0];
        let at = (self.call.places[sequence].cache * kv_heads + head) * self.weights.positions(cache) * d;
        let [keys, values] = [2 * cache.0, 2 * cache.0 + 1].map(|region| self.caches.start(region) + at);
        let of = |start: usize| start + positions.start * d..start + positions.end * d;
        let floats = &self.caches.floats;
        // SAFETY: appended by this worker, or by others before a barrier; nothing appends while a step attends.
        unsafe { (floats.range(of(keys)), floats.range(of(values))) }
    }

    /// Positions of the cache that a row sees.
    fn visible(&self, attend: &Attend, row: usize) -> Range<usize> {
        let end = self.seen(attend, row);
        attend.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The slots of the cache that hold what a single row sees. Their order in a ring does not matter to it.
    fn held(&self, attend: &Attend, row: usize) -> Range<usize> {
        match self.weights.is_ring(attend.cache) {
            true => 0..self.seen(attend, row).min(self.weights.positions(attend.cache)),
            false => self.visible(attend, row),
        }
    }

    /// Positions of the cache up to the last one that a row sees.
    fn seen(&self, attend: &Attend, row: usize) -> usize {
        let (sequence, own) = self.call.place(row);
        if self.weights.model.caches[attend.cache.0].scope == CacheScope::Encoder {
            return self.call.places[sequence].encoded;
        }
        let start = self.call.start(sequence);
        let full = match attend.mask {
            Mask::Causal => false,
            Mask::Full => true,
            Mask::Prefix => start == 0,
        };
        start + if full { self.call.rows_each() } else { own + 1 }
    }
}
