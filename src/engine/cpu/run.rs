//! One call: the workers walk the steps together, each on its own part.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::alone::{Mode, windows};
use super::arena::SharedArena;
use super::partials::SharedParts;
use super::schedule::{Append, Attend, Step, must_meet};
use super::{Memory, Program, Scratch, Weights};
use crate::call::Batch;
use crate::engine::OutlierColumns;
use crate::kernels::cpu::pool::{Pool, Worker};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::cpu::{self as kernels, activation, rope, vector};
use crate::plan::{
    ActivationKind, ActivationSpec, AddRowsSpec, AddSpec, ArgmaxSpec, BufferId, CacheId, CacheScope, EmbedSpec,
    FeaturesSpec, KeyValue, LastRowSpec, LinearPart, MatrixId, Norm, NormKind, NormSpec, PatchesSpec, Plan, Storage,
};
use crate::quant::Prepared;

/// The rows of a call and their inputs.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Its positions begin behind the tokens in the decoder's caches; at 0 for an encoder.
    pub batch: Batch,
    /// One per row; none for a picture.
    pub tokens: &'a [u32],
    /// Patches of a picture, `[rows, channels · patch²]`.
    pub patches: &'a [f32],
    /// Rows in the encoder's caches once this call has appended.
    pub encoded: usize,
    pub mode: Mode<'a>,
}

impl Call<'_> {
    /// The position of the first row.
    pub fn position(&self) -> usize {
        self.batch.positions.start
    }
}

/// The results of a call, apart from its buffers.
pub struct Outcome {
    pub token: u32,
    /// Linear groups that looked for outlier columns, and the columns they found.
    pub outliers: OutlierColumns,
}

/// Replays `steps` of `program` for one call. Its slots must be large enough.
pub fn run(
    program: &mut Program,
    steps: &[Step],
    weights: &Weights,
    pool: &Pool,
    memory: &mut Memory,
    call: Call,
) -> Outcome {
    let runner = Runner {
        weights,
        plan: &program.plan,
        storage: &program.storage,
        call,
        slots: program.slots.share(),
        caches: memory.caches.share(),
        features: SharedSlice::new(std::slice::from_mut(&mut memory.features)),
        prepared: SharedSlice::new(std::slice::from_mut(&mut memory.prepared)),
        scratch: SharedSlice::new(&mut memory.scratch),
        parts: memory.parts.share(),
        token: AtomicU32::new(0),
        outlier_columns: AtomicU64::new(0),
        outlier_calls: AtomicU64::new(0),
        examined_columns: AtomicU64::new(0),
    };
    let single = call.batch.rows() == 1;
    pool.run(&|worker: &Worker| {
        for (index, step) in steps.iter().enumerate() {
            if index > 0 && must_meet(&steps[index - 1], step, single) {
                worker.barrier();
            }
            runner.step(index, step, worker);
        }
    });
    Outcome {
        token: runner.token.into_inner(),
        outliers: OutlierColumns {
            calls: runner.outlier_calls.into_inner(),
            columns: runner.outlier_columns.into_inner(),
            examined: runner.examined_columns.into_inner(),
        },
    }
}

/// Everything the workers share for one call. Who touches what follows from [`Step::split`].
pub(super) struct Runner<'a> {
    pub(super) weights: &'a Weights,
    plan: &'a Plan,
    storage: &'a Storage,
    pub(super) call: Call<'a>,
    slots: SharedArena<'a>,
    /// Keys and values of each cache.
    pub(super) caches: SharedArena<'a>,
    /// One element, written by worker 0 at the end of a vision encoder.
    features: SharedSlice<'a, Vec<f32>>,
    /// One element, written by worker 0.
    prepared: SharedSlice<'a, Prepared>,
    /// One element per worker.
    scratch: SharedSlice<'a, Scratch>,
    pub(super) parts: SharedParts<'a>,
    token: AtomicU32,
    outlier_columns: AtomicU64,
    outlier_calls: AtomicU64,
    examined_columns: AtomicU64,
}

impl Runner<'_> {
    fn step(&self, index: usize, step: &Step, worker: &Worker) {
        let first = worker.index() == 0;
        match step {
            Step::Embed(spec) => self.embed(*spec, worker),
            Step::AddRows(spec) => self.add_rows(*spec, worker),
            Step::Norm(spec) => self.norm(*spec, worker),
            Step::Patches(PatchesSpec { out }) if first => self.whole_mut(*out).copy_from_slice(self.call.patches),
            Step::Features(FeaturesSpec { x }) if first => self.keep_features(*x),
            Step::LastRow(spec) if first => self.last_row(*spec),
            Step::Prepare { x, matrix } if first => self.prepare(*x, *matrix),
            Step::Argmax(ArgmaxSpec { logits, softcap: _ }) if first => {
                let token = vector::argmax(self.weights.isa, self.part(*logits, 0, 0..self.width(*logits)));
                self.token.store(token as u32, Ordering::Relaxed);
            }
            Step::Patches(_) | Step::Features(_) | Step::LastRow(_) | Step::Prepare { .. } | Step::Argmax(_) => {}
            Step::Linear { parts } => self.linears(index, parts, worker),
            Step::Activate(spec) => self.activate(*spec, worker),
            Step::Add(spec) => self.add(*spec, worker),
            Step::Append(append) => self.append(*append, worker),
            Step::Attend(attend) => {
                self.attend(attend, worker);
                self.keep_attended(index, attend, worker);
            }
        }
    }

    pub(super) fn width(&self, buffer: BufferId) -> usize {
        self.plan.buffers[buffer.0].width
    }

    /// Rows of this call.
    pub(super) fn rows(&self, buffer: BufferId) -> usize {
        self.plan.rows(buffer, self.call.batch)
    }

    /// `columns` of a row, for reading.
    pub(super) fn part(&self, buffer: BufferId, row: usize, columns: Range<usize>) -> &[f32] {
        let start = self.slots.start(self.storage.slot_of[buffer.0]) + row * self.width(buffer);
        // SAFETY: a step reads what earlier steps wrote; `must_meet` put a barrier where the split changed, and
        // `Plan::storage` gives no two buffers that live at once the same slot.
        unsafe { self.slots.floats.range(start + columns.start..start + columns.end) }
    }

    /// `columns` of a row, for writing by the one worker whose share they are.
    #[allow(clippy::mut_from_ref)]
    pub(super) fn part_mut(&self, buffer: BufferId, row: usize, columns: Range<usize>) -> &mut [f32] {
        let start = self.slots.start(self.storage.slot_of[buffer.0]) + row * self.width(buffer);
        // SAFETY: the split of the step gives these columns of this row to one worker, and no other buffer that is read
        // in the step shares the slot.
        unsafe { self.slots.floats.range_mut(start + columns.start..start + columns.end) }
    }

    fn row_mut(&self, buffer: BufferId, row: usize) -> &mut [f32] {
        self.part_mut(buffer, row, 0..self.width(buffer))
    }

    /// All rows: for worker 0 in a step of its own.
    fn whole(&self, buffer: BufferId) -> &[f32] {
        self.part(buffer, 0, 0..self.rows(buffer) * self.width(buffer))
    }

    fn whole_mut(&self, buffer: BufferId) -> &mut [f32] {
        self.part_mut(buffer, 0, 0..self.rows(buffer) * self.width(buffer))
    }

    #[allow(clippy::mut_from_ref)]
    pub(super) fn scratch(&self, worker: &Worker) -> &mut Scratch {
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

    fn embed(&self, EmbedSpec { table, scale, image, out }: EmbedSpec, worker: &Worker) {
        let is_image = |token: &u32| Some(*token) == image;
        for row in self.own_rows(out, worker) {
            let (token, out) = (self.call.tokens[row], self.row_mut(out, row));
            if is_image(&token) {
                let nth = self.call.tokens[..row].iter().filter(|token| is_image(token)).count();
                // SAFETY: written by the encoder's call, only read by the decoder's.
                let features = unsafe { &self.features.range(0..1)[0] };
                out.copy_from_slice(&features[nth * out.len()..(nth + 1) * out.len()]);
                continue;
            }
            self.weights.matrices[table.0].dequantize_rows(token as usize..token as usize + 1, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }

    fn add_rows(&self, AddRowsSpec { x, table }: AddRowsSpec, worker: &Worker) {
        let learned = &mut self.scratch(worker).gathered;
        learned.resize(self.width(x), 0.0);
        for row in self.own_rows(x, worker) {
            self.weights.matrices[table.0].dequantize_rows(row..row + 1, learned);
            vector::add_to(self.weights.isa, self.row_mut(x, row), learned);
        }
    }

    fn keep_features(&self, x: BufferId) {
        // SAFETY: worker 0 alone touches the features in an encoder's call.
        let features = unsafe { &mut self.features.range_mut(0..1)[0] };
        features.clear();
        features.extend_from_slice(self.whole(x));
    }

    fn norm(&self, NormSpec { norm, x, out }: NormSpec, worker: &Worker) {
        let Norm { kind, weight, epsilon } = norm;
        let Weights { isa, vectors, .. } = self.weights;
        let weight = &vectors[weight.0];
        for row in self.own_rows(out, worker) {
            let (x, out) = (self.part(x, row, 0..self.width(x)), self.row_mut(out, row));
            match kind {
                NormKind::Rms => kernels::norm::rms(*isa, x, weight, epsilon, out),
                NormKind::Layer { bias } => kernels::norm::layer(*isa, x, weight, &vectors[bias.0], epsilon, out),
            }
        }
    }

    fn last_row(&self, LastRowSpec { x, out, scale }: LastRowSpec) {
        let last = self.part(x, self.rows(x) - 1, 0..self.width(x));
        for (out, value) in self.row_mut(out, 0).iter_mut().zip(last) {
            *out = scale * value;
        }
    }

    fn prepare(&self, x: BufferId, matrix: MatrixId) {
        let matrix = &self.weights.matrices[matrix.0];
        // SAFETY: only worker 0 prepares, and the linears that read the last preparation lie behind a barrier.
        let prepared = unsafe { &mut self.prepared.range_mut(0..1)[0] };
        prepared.outlier_columns.clear();
        matrix.prepare(self.whole(x), self.rows(x), prepared);
        if matrix.finds_outliers() {
            self.outlier_calls.fetch_add(1, Ordering::Relaxed);
            self.examined_columns.fetch_add(matrix.shape().1 as u64, Ordering::Relaxed);
            self.outlier_columns.fetch_add(prepared.outlier_columns.len() as u64, Ordering::Relaxed);
        }
    }

    fn linears(&self, index: usize, parts: &[LinearPart], worker: &Worker) {
        let mut before = 0;
        for part in parts {
            let columns = worker.share(self.width(part.out), self.weights.granule);
            self.linear(part, columns.clone(), worker);
            self.keep(index, before, part.out, columns);
            before += self.width(part.out);
        }
    }

    fn linear(&self, part: &LinearPart, columns: Range<usize>, worker: &Worker) {
        let bias = part.bias.map(|bias| self.weights.vectors[bias.0].as_slice());
        let y = &self.slots.region(self.storage.slot_of[part.out.0]);
        let scratch = &mut self.scratch(worker).kernel;
        let multiply = |matrix: MatrixId, rows: Range<usize>, scratch: &mut Vec<f32>| {
            self.weights.matrices[matrix.0].multiply(self.prepared(), rows, bias, y, scratch);
        };
        match self.call.mode {
            Mode::StandingIn(stand_ins, ..) => {
                let stand_in = stand_ins.of_matrix(part.weight);
                windows(columns, stand_in.rows).for_each(|rows| multiply(stand_in.matrix, rows, scratch));
            }
            Mode::Real | Mode::Keeping(..) => multiply(part.weight, columns, scratch),
        }
    }

    /// Attention's output, whose heads are split as [`Step::Append`]'s.
    fn keep_attended(&self, index: usize, attend: &Attend, worker: &Worker) {
        let heads = self.weights.model.caches[attend.cache.0].kv_heads;
        let (own, width) = (worker.share(heads, 1), self.width(attend.out) / heads);
        self.keep(index, 0, attend.out, own.start * width..own.end * width);
    }

    /// Keeps a worker's `columns` of the step's output that has `before` elements before it, or puts back what was kept.
    fn keep(&self, index: usize, before: usize, out: BufferId, columns: Range<usize>) {
        let kept = |start: usize| start + before + columns.start..start + before + columns.end;
        match self.call.mode {
            Mode::Real => {}
            Mode::Keeping(outputs, values) => {
                // SAFETY: as `out`'s, these columns are this worker's alone in this step.
                let values = unsafe { values.range_mut(kept(outputs.start(index))) };
                values.copy_from_slice(self.part(out, 0, columns));
            }
            Mode::StandingIn(_, outputs, values) => {
                self.part_mut(out, 0, columns.clone()).copy_from_slice(&values[kept(outputs.start(index))]);
            }
        }
    }

    fn activate(&self, spec: ActivationSpec, worker: &Worker) {
        let ActivationSpec { kind, gate, up, out } = spec;
        let columns = worker.share(self.width(out), self.weights.granule);
        for row in 0..self.rows(out) {
            let gate = self.part(gate, row, columns.clone());
            let up = up.map(|up| self.part(up, row, columns.clone()));
            let out = self.part_mut(out, row, columns.clone());
            match kind {
                ActivationKind::Silu => activation::silu(self.weights.isa, gate, up, out),
                ActivationKind::GeluTanh => activation::gelu_tanh(self.weights.isa, gate, up, out),
                ActivationKind::Relu => activation::relu(self.weights.isa, gate, up, out),
            }
        }
    }

    /// `out` is `a`: the plan's only sums are residuals.
    fn add(&self, AddSpec { a, b, out }: AddSpec, worker: &Worker) {
        assert_eq!(a, out, "the CPU engine adds in place");
        let columns = worker.share(self.width(out), self.weights.granule);
        for row in 0..self.rows(out) {
            let b = self.part(b, row, columns.clone());
            vector::add_to(self.weights.isa, self.part_mut(out, row, columns.clone()), b);
        }
    }

    /// Positions that a cache can hold.
    pub(super) fn capacity(&self, cache: CacheId) -> usize {
        match self.weights.model.caches[cache.0].scope {
            CacheScope::Decoder => self.weights.capacity,
            CacheScope::Encoder => self.weights.encoder_capacity,
        }
    }

    /// Each worker takes whole key/value heads with the query heads that read them.
    fn append(&self, append: Append, worker: &Worker) {
        let Append { kv: KeyValue { k, v }, cache, rotate } = append;
        let spec = self.weights.model.caches[cache.0];
        let d = spec.head_dim;
        let (keys, values) = (self.caches.region(2 * cache.0), self.caches.region(2 * cache.0 + 1));
        for head in worker.share(spec.kv_heads, 1) {
            let columns = head * d..(head + 1) * d;
            for row in 0..self.rows(k) {
                let position = self.call.position() + row;
                let key = self.part_mut(k, row, columns.clone());
                if let Some((rope, q)) = rotate {
                    let (cos, sin) = self.weights.angles[rope.0].at(position);
                    let group = self.width(q) / spec.kv_heads;
                    let queries = self.part_mut(q, row, head * group..(head + 1) * group);
                    queries.chunks_exact_mut(d).for_each(|query| rope::rotate(query, cos, sin));
                    rope::rotate(key, cos, sin);
                }
                let at = (head * self.capacity(cache) + position) * d;
                // SAFETY: this head's positions are this worker's alone in this step.
                unsafe { keys.range_mut(at..at + d) }.copy_from_slice(key);
                // SAFETY: as above.
                unsafe { values.range_mut(at..at + d) }.copy_from_slice(self.part(v, row, columns.clone()));
            }
        }
    }
}
