//! One call: the workers walk the steps together, each on its own part.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::schedule::{Step, must_meet};
use super::{Angles, CpuSession};
use crate::kernels::cpu::pool::{Pool, Worker};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::cpu::{activation, attention, norm, rope, vector};
use crate::kernels::isa::Isa;
use crate::plan::{
    ActivationKind, BufferId, CacheId, LinearPart, MatrixId, Model, NormKind, RopeId, Rows, Storage, VectorId,
};
use crate::quant::{CpuMatrix, Prepared};

/// A prefill hands out attention in blocks of this many query rows of one key/value head.
const QUERY_BLOCK: usize = 16;

/// Everything the workers share for one call. Who touches what follows from [`Step::split`].
pub struct Runner<'a> {
    model: &'a Model,
    isa: Isa,
    pool: &'a Pool,
    steps: &'a [Step],
    storage: &'a Storage,
    matrices: &'a [Box<dyn CpuMatrix>],
    vectors: &'a [Vec<f32>],
    angles: &'a [Angles],
    capacity: usize,
    granule: usize,
    position: usize,
    tokens: &'a [u32],
    slots: Vec<SharedSlice<'a, f32>>,
    /// Keys and values of each cache.
    caches: Vec<(SharedSlice<'a, f32>, SharedSlice<'a, f32>)>,
    /// One element, written by worker 0.
    prepared: SharedSlice<'a, Prepared>,
    /// One element per worker.
    scratch: SharedSlice<'a, Vec<f32>>,
    next_token: AtomicU32,
    outlier_columns: AtomicU64,
    outlier_calls: AtomicU64,
}

/// What a call leaves behind, apart from its buffers.
pub struct Outcome {
    pub token: u32,
    /// Calls of linear groups that look for outlier columns, and the columns they found.
    pub outlier_calls: u64,
    pub outlier_columns: u64,
}

impl<'a> Runner<'a> {
    pub fn new(session: &'a mut CpuSession, tokens: &'a [u32]) -> Self {
        Self {
            model: &session.model,
            isa: session.isa,
            pool: &session.pool,
            steps: &session.steps,
            storage: &session.storage,
            matrices: &session.matrices,
            vectors: &session.vectors,
            angles: &session.angles,
            capacity: session.capacity,
            granule: session.granule,
            position: session.position,
            tokens,
            slots: session.slots.iter_mut().map(|slot| SharedSlice::new(slot)).collect(),
            caches: session
                .caches
                .iter_mut()
                .map(|c| (SharedSlice::new(&mut c.keys), SharedSlice::new(&mut c.values)))
                .collect(),
            prepared: SharedSlice::new(std::slice::from_mut(&mut session.prepared)),
            scratch: SharedSlice::new(&mut session.scratch),
            next_token: AtomicU32::new(0),
            outlier_columns: AtomicU64::new(0),
            outlier_calls: AtomicU64::new(0),
        }
    }

    pub fn run(self) -> Outcome {
        let single = self.tokens.len() == 1;
        self.pool.run(&|worker: &Worker| {
            for (index, step) in self.steps.iter().enumerate() {
                if index > 0 && must_meet(&self.steps[index - 1], step, single) {
                    worker.barrier();
                }
                self.step(step, worker);
            }
        });
        Outcome {
            token: self.next_token.into_inner(),
            outlier_calls: self.outlier_calls.into_inner(),
            outlier_columns: self.outlier_columns.into_inner(),
        }
    }

    fn step(&self, step: &Step, worker: &Worker) {
        let first = worker.index() == 0;
        match step {
            Step::Embed { table, out } => self.embed(*table, *out, worker),
            Step::Norm { kind, weight, epsilon, x, out } => self.norm(*kind, *weight, *epsilon, *x, *out, worker),
            Step::LastRow { x, out } if first => self.last_row(*x, *out),
            Step::Prepare { x, matrix } if first => self.prepare(*x, *matrix),
            Step::Argmax { logits } if first => {
                let token = vector::argmax(self.isa, self.row(*logits, 0));
                self.next_token.store(token as u32, Ordering::Relaxed);
            }
            Step::LastRow { .. } | Step::Prepare { .. } | Step::Argmax { .. } => {}
            Step::Linear { parts } => parts.iter().for_each(|part| self.linear(part, worker)),
            Step::Activate { kind, gate, up, out } => self.activate(*kind, *gate, *up, *out, worker),
            Step::Add { a, b, out } => self.add(*a, *b, *out, worker),
            Step::RopeAppend { q, k, v, cache, rope } => self.rope_append([*q, *k, *v], *cache, *rope, worker),
            Step::Attend { q, cache, out, scale } => self.attend(*q, *cache, *out, *scale, worker),
        }
    }

    fn width(&self, buffer: BufferId) -> usize {
        self.model.decoder.buffers[buffer.0].width
    }

    /// Rows of this call.
    fn rows(&self, buffer: BufferId) -> usize {
        match self.model.decoder.buffers[buffer.0].rows {
            Rows::Tokens => self.tokens.len(),
            Rows::Last => 1,
        }
    }

    /// `columns` of a row, for reading.
    fn part(&self, buffer: BufferId, row: usize, columns: Range<usize>) -> &[f32] {
        let start = row * self.width(buffer);
        // SAFETY: a step reads what earlier steps wrote; `must_meet` put a barrier between where the split changed, and
        // `Plan::storage` gives no two buffers that live at once the same slot.
        unsafe { self.slots[self.storage.slot_of[buffer.0]].range(start + columns.start..start + columns.end) }
    }

    fn row(&self, buffer: BufferId, row: usize) -> &[f32] {
        self.part(buffer, row, 0..self.width(buffer))
    }

    /// `columns` of a row, for writing by the one worker whose share they are.
    #[allow(clippy::mut_from_ref)]
    fn part_mut(&self, buffer: BufferId, row: usize, columns: Range<usize>) -> &mut [f32] {
        let start = row * self.width(buffer);
        // SAFETY: the split of the step gives these columns of this row to one worker, and no other buffer that is read
        // in the step shares the slot.
        unsafe { self.slots[self.storage.slot_of[buffer.0]].range_mut(start + columns.start..start + columns.end) }
    }

    fn row_mut(&self, buffer: BufferId, row: usize) -> &mut [f32] {
        self.part_mut(buffer, row, 0..self.width(buffer))
    }

    #[allow(clippy::mut_from_ref)]
    fn scratch(&self, worker: &Worker) -> &mut Vec<f32> {
        // SAFETY: each worker takes the element of its own index.
        unsafe { &mut self.scratch.range_mut(worker.index()..worker.index() + 1)[0] }
    }

    fn prepared(&self) -> &Prepared {
        // SAFETY: written by worker 0 in `prepare` only, with a barrier before any linear reads it.
        unsafe { &self.prepared.range(0..1)[0] }
    }

    /// Rows of a call with several are split over the workers; a single row is worker 0's.
    fn own_rows(&self, buffer: BufferId, worker: &Worker) -> Range<usize> {
        match (self.rows(buffer), worker.index()) {
            (1, 0) => 0..1,
            (1, _) => 0..0,
            (rows, _) => worker.share(rows, 1),
        }
    }

    fn embed(&self, table: MatrixId, out: BufferId, worker: &Worker) {
        for row in self.own_rows(out, worker) {
            let token = self.tokens[row] as usize;
            self.matrices[table.0].dequantize_rows(token..token + 1, self.row_mut(out, row));
        }
    }

    fn norm(&self, kind: NormKind, weight: VectorId, epsilon: f32, x: BufferId, out: BufferId, worker: &Worker) {
        let weight = &self.vectors[weight.0];
        for row in self.own_rows(out, worker) {
            let (x, out) = (self.row(x, row), self.row_mut(out, row));
            match kind {
                NormKind::Rms => norm::rms(self.isa, x, weight, epsilon, out),
                NormKind::Layer { bias } => norm::layer(self.isa, x, weight, &self.vectors[bias.0], epsilon, out),
            }
        }
    }

    fn last_row(&self, x: BufferId, out: BufferId) {
        self.row_mut(out, 0).copy_from_slice(self.row(x, self.rows(x) - 1));
    }

    fn prepare(&self, x: BufferId, matrix: MatrixId) {
        let (rows, width) = (self.rows(x), self.width(x));
        // SAFETY: the norm or epilogue that wrote `x` lies behind a barrier; see `part`.
        let x = unsafe { self.slots[self.storage.slot_of[x.0]].range(0..rows * width) };
        // SAFETY: only worker 0 prepares, and the linears that read the last preparation lie behind a barrier.
        let prepared = unsafe { &mut self.prepared.range_mut(0..1)[0] };
        prepared.outlier_columns.clear();
        self.matrices[matrix.0].prepare(x, rows, prepared);
        if self.matrices[matrix.0].finds_outliers() {
            self.outlier_calls.fetch_add(1, Ordering::Relaxed);
            self.outlier_columns.fetch_add(prepared.outlier_columns.len() as u64, Ordering::Relaxed);
        }
    }

    fn linear(&self, part: &LinearPart, worker: &Worker) {
        let matrix = &self.matrices[part.weight.0];
        let columns = worker.share(matrix.shape().0, self.granule);
        let bias = part.bias.map(|bias| &self.vectors[bias.0][columns.clone()]);
        let y = &self.slots[self.storage.slot_of[part.out.0]];
        matrix.multiply(self.prepared(), columns, bias, y, self.scratch(worker));
    }

    fn activate(&self, kind: ActivationKind, gate: BufferId, up: Option<BufferId>, out: BufferId, worker: &Worker) {
        let columns = worker.share(self.width(out), self.granule);
        for row in 0..self.rows(out) {
            let gate = self.part(gate, row, columns.clone());
            let up = up.map(|up| self.part(up, row, columns.clone()));
            let out = self.part_mut(out, row, columns.clone());
            match kind {
                ActivationKind::Silu => activation::silu(self.isa, gate, up, out),
                ActivationKind::GeluTanh => activation::gelu_tanh(self.isa, gate, up, out),
            }
        }
    }

    /// `out` is `a`: the plan's only sums are residuals.
    fn add(&self, a: BufferId, b: BufferId, out: BufferId, worker: &Worker) {
        assert_eq!(a, out, "the CPU engine adds in place");
        let columns = worker.share(self.width(out), self.granule);
        for row in 0..self.rows(out) {
            let b = self.part(b, row, columns.clone());
            vector::add_to(self.isa, self.part_mut(out, row, columns.clone()), b);
        }
    }

    /// Each worker takes whole key/value heads with the query heads that read them.
    fn rope_append(&self, [q, k, v]: [BufferId; 3], cache: CacheId, rope: RopeId, worker: &Worker) {
        let spec = self.model.caches[cache.0];
        let d = spec.head_dim;
        let group = self.width(q) / d / spec.kv_heads;
        let angles = &self.angles[rope.0];
        for head in worker.share(spec.kv_heads, 1) {
            for row in 0..self.rows(q) {
                let position = self.position + row;
                let (cos, sin) = angles.at(position);
                for query in head * group..(head + 1) * group {
                    rope::rotate(self.part_mut(q, row, query * d..(query + 1) * d), cos, sin);
                }
                let key = self.part_mut(k, row, head * d..(head + 1) * d);
                rope::rotate(key, cos, sin);
                let at = (head * self.capacity + position) * d;
                let (keys, values) = &self.caches[cache.0];
                // SAFETY: this head's positions are this worker's alone in this step.
                unsafe { keys.range_mut(at..at + d) }.copy_from_slice(key);
                // SAFETY: as above.
                unsafe { values.range_mut(at..at + d) }.copy_from_slice(self.part(v, row, head * d..(head + 1) * d));
            }
        }
    }

    /// One row: by key/value heads, as they were appended. Several: by heads and blocks of rows, dealt out in turn since
    /// later rows see more.
    fn attend(&self, q: BufferId, cache: CacheId, out: BufferId, scale: f32, worker: &Worker) {
        let heads = self.model.caches[cache.0].kv_heads;
        let rows = self.rows(q);
        if rows == 1 {
            for head in worker.share(heads, 1) {
                self.attend_row(q, cache, out, scale, head, 0, worker);
            }
            return;
        }
        let blocks = rows.div_ceil(QUERY_BLOCK);
        for item in (worker.index()..heads * blocks).step_by(worker.count()) {
            let (block, head) = (item / heads, item % heads);
            for row in block * QUERY_BLOCK..rows.min((block + 1) * QUERY_BLOCK) {
                self.attend_row(q, cache, out, scale, head, row, worker);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_row(
        &self,
        q: BufferId,
        cache: CacheId,
        out: BufferId,
        scale: f32,
        head: usize,
        row: usize,
        worker: &Worker,
    ) {
        let spec = self.model.caches[cache.0];
        let d = spec.head_dim;
        let group = self.width(q) / d / spec.kv_heads;
        let seen = self.position + row + 1;
        let at = head * self.capacity * d;
        let (keys, values) = &self.caches[cache.0];
        // SAFETY: appended by this worker, or by others before a barrier; nothing appends in this step.
        let (keys, values) = unsafe { (keys.range(at..at + seen * d), values.range(at..at + seen * d)) };
        let columns = head * group * d..(head + 1) * group * d;
        let query = self.part(q, row, columns.clone());
        let out = self.part_mut(out, row, columns);
        attention::attend(self.isa, query, keys, values, d, scale, None, out, self.scratch(worker));
    }
}
