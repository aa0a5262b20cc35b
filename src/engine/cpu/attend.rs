//! Attention of a call: by heads, by heads and blocks of rows, or by positions, as the call has one row or several and a
//! short context or a long one.

use std::ops::Range;

use super::Scratch;
use super::alone::Mode;
use super::run::Runner;
use super::schedule::Attend;
use crate::kernels::cpu::attention::{self, Partial};
use crate::kernels::cpu::pool::Worker;
use crate::plan::{CacheId, CacheScope, Mask};

/// A prefill hands out attention in blocks of this many query rows of one key/value head.
const QUERY_BLOCK: usize = 16;

/// Positions are handed out in multiples of this, which is what attention takes at once.
const POSITIONS: usize = 64;

/// Bytes of keys and values that a worker must be spared to read before positions are split. Splitting costs two more meetings,
/// each 1 to 3 µs, in which a core reads about as much.
const SPARED_BYTES: usize = 128 << 10;

impl Runner<'_> {
    /// One row: by key/value heads, as they were appended, or by positions where heads would leave workers idle for long.
    /// Several: by heads and blocks of rows, dealt out in turn since later rows see more.
    pub(super) fn attend(&self, attend: &Attend, worker: &Worker) {
        let heads = self.weights.model.caches[attend.cache.0].kv_heads;
        let rows = self.rows(attend.q);
        if rows == 1 {
            if self.splits_positions(attend, worker.count()) {
                return self.attend_positions(attend, worker);
            }
            worker.share(heads, 1).for_each(|head| self.attend_row(attend, head, 0, worker));
            return;
        }
        let blocks = rows.div_ceil(QUERY_BLOCK);
        for item in (worker.index()..heads * blocks).step_by(worker.count()) {
            let (block, head) = (item / heads, item % heads);
            let rows = block * QUERY_BLOCK..rows.min((block + 1) * QUERY_BLOCK);
            match attend.bias {
                Some(_) => rows.for_each(|row| self.attend_row(attend, head, row, worker)),
                None => self.attend_block(attend, head, rows, worker),
            }
        }
    }

    /// Rows of one head together, so that keys and values are read once for the block.
    fn attend_block(&self, attend: &Attend, head: usize, rows: Range<usize>, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let d = spec.head_dim;
        let width = self.width(attend.q) / spec.kv_heads;
        let columns = head * width..(head + 1) * width;
        let Scratch { kernel, gathered } = self.scratch(worker);
        gathered.resize(2 * rows.len() * width, 0.0);
        let (queries, outs) = gathered.split_at_mut(rows.len() * width);
        for (row, query) in rows.clone().zip(queries.chunks_exact_mut(width)) {
            query.copy_from_slice(self.part(attend.q, row, columns.clone()));
        }
        let (first, last) = (self.seen(attend, rows.start), self.seen(attend, rows.end - 1));
        let (keys, values) = self.keys_and_values(attend.cache, head, 0..last);
        if first == last {
            attention::attend(self.weights.isa, queries, keys, values, d, attend.scale, None, outs, kernel);
        } else {
            let context = attention::Context { keys, values, d, scale: attend.scale, softcap: None, window: None };
            attention::attend_rows(self.weights.isa, queries, width / d, &context, first, outs, kernel);
        }
        for (row, out) in rows.zip(outs.chunks_exact(width)) {
            self.part_mut(attend.out, row, columns.clone()).copy_from_slice(out);
        }
    }

    fn attend_row(&self, attend: &Attend, head: usize, row: usize, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let seen = self.seen(attend, row);
        let width = self.width(attend.q) / spec.kv_heads;
        let columns = head * width..(head + 1) * width;
        let query = self.part(attend.q, row, columns.clone());
        let out = self.part_mut(attend.out, row, columns);
        // One query head a key/value head wherever there is a bias (T5): its biases lie together.
        let bias = attend.bias.map(|bias| self.weights.biases[bias.0].of(head, self.call.position() + row, seen));
        let scratch = &mut self.scratch(worker).kernel;
        for (positions, keys, values) in self.windows(attend.cache, head, 0..seen, worker) {
            let (isa, d, bias) = (self.weights.isa, spec.head_dim, bias.map(|bias| &bias[positions]));
            attention::attend(isa, query, keys, values, d, attend.scale, bias, out, scratch);
        }
    }

    /// Whether the worker with the most heads would read so much more than its part that sharing positions pays.
    fn splits_positions(&self, attend: &Attend, workers: usize) -> bool {
        let spec = self.weights.model.caches[attend.cache.0];
        let head_bytes = self.seen(attend, 0) * 2 * spec.head_dim * size_of::<f32>();
        let most = spec.kv_heads.div_ceil(workers) * head_bytes;
        most - spec.kv_heads * head_bytes / workers >= SPARED_BYTES
    }

    /// Every worker takes an equal part of all heads' positions, one head after the other; then the parts of each head are put
    /// together. All workers come here or none does.
    fn attend_positions(&self, attend: &Attend, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let (heads, d) = (spec.kv_heads, spec.head_dim);
        let (width, seen) = (self.width(attend.q) / heads, self.seen(attend, 0));
        let tiles = seen.div_ceil(POSITIONS);
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
            let positions = first * POSITIONS..(end * POSITIONS).min(seen);
            let query = self.part(attend.q, 0, head * width..(head + 1) * width);
            // As in `attend_row`.
            let bias = attend.bias.map(|bias| self.weights.biases[bias.0].of(head, self.call.position(), seen));
            let scratch = &mut self.scratch(worker).kernel;
            for (positions, keys, values) in self.windows(attend.cache, head, positions, worker) {
                let context = attention::Context { keys, values, d, scale: attend.scale, softcap: None, window: None };
                let bias = bias.map(|bias| &bias[positions]);
                attention::attend_part(self.weights.isa, query, &context, bias, out, partials, scratch);
            }
        }
        worker.barrier();
        for head in worker.share(heads, 1) {
            self.merge_parts(attend, head, worker);
        }
    }

    /// The output of one head from all workers' parts.
    fn merge_parts(&self, attend: &Attend, head: usize, worker: &Worker) {
        let spec = self.weights.model.caches[attend.cache.0];
        let (isa, d, all) = (self.weights.isa, spec.head_dim, self.width(attend.q));
        let columns = head * all / spec.kv_heads..(head + 1) * all / spec.kv_heads;
        let queries = columns.start / d..columns.end / d;
        let out = self.part_mut(attend.out, 0, columns.clone());
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
        attention::finish(isa, out, sums, d);
    }

    /// Keys and values of a head at `positions`, in one piece. Where others stand in for them, those of as many positions as stay in the
    /// cache, as often as it takes to attend over equally many; of a head that this worker appends to, and nobody else.
    fn windows(
        &self,
        cache: CacheId,
        head: usize,
        positions: Range<usize>,
        worker: &Worker,
    ) -> impl Iterator<Item = (Range<usize>, &[f32], &[f32])> {
        let spec = self.weights.model.caches[cache.0];
        let (cache, head, start, most) = match self.call.mode {
            Mode::StandingIn(stand_ins, ..) => {
                let (cache, most) = stand_ins.of_cache(cache, spec.head_dim);
                (cache, worker.share(spec.kv_heads, 1).start.min(spec.kv_heads - 1), 0, most)
            }
            Mode::Real | Mode::Keeping(..) => (cache, head, positions.start, usize::MAX),
        };
        (0..positions.len()).step_by(most).map(move |done| {
            let len = most.min(positions.len() - done);
            let (keys, values) = self.keys_and_values(cache, head, start..start + len);
            (positions.start + done..positions.start + done + len, keys, values)
        })
    }

    /// Keys and values of a head at `positions`.
    fn keys_and_values(&self, cache: CacheId, head: usize, positions: Range<usize>) -> (&[f32], &[f32]) {
        let d = self.weights.model.caches[cache.0].head_dim;
        let at = head * self.capacity(cache) * d;
        let [keys, values] = [2 * cache.0, 2 * cache.0 + 1].map(|region| self.caches.start(region) + at);
        let of = |start: usize| start + positions.start * d..start + positions.end * d;
        let floats = &self.caches.floats;
        // SAFETY: appended by this worker, or by others before a barrier; nothing appends while a step attends.
        unsafe { (floats.range(of(keys)), floats.range(of(values))) }
    }

    /// Positions of the cache that a row sees.
    fn seen(&self, attend: &Attend, row: usize) -> usize {
        if self.weights.model.caches[attend.cache.0].scope == CacheScope::Encoder {
            return self.call.encoded;
        }
        let full = match attend.mask {
            Mask::Causal => false,
            Mask::Full => true,
            Mask::Prefix => self.call.position() == 0,
        };
        self.call.position() + if full { self.call.batch.rows() } else { row + 1 }
    }
}
