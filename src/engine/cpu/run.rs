//! One call: the workers walk the steps together, each on its own part.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::alone::{StepMode, windows};
use super::arena::SharedArena;
use super::attend::CallAttention;
use super::buffers::Buffers;
use super::experts::SharedMixtures;
use super::partials::SharedParts;
use super::schedule::{Attend, LinearInput, RowShape, Step, needs_barrier, product_rows};
use super::{Memory, Program, Scratch, Weights};
use crate::call::Batch;
use crate::engine::OutlierColumns;
use crate::kernels::cpu::pool::{Pool, Worker};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::cpu::{activation, vector};
use crate::plan::{
    ActivationKind, ActivationSpec, AddRowsSpec, AddSpec, ArgmaxSpec, BufferId, EmbedSpec, FeaturesSpec, LastRowSpec,
    LinearPart, MatrixId, Norm, NormSpec, PatchesSpec, VectorId,
};
use crate::quant::{Activations, Prepared};

/// A sequence: its part of the caches, and what that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequencePlace {
    /// The sequence's number among those of the session.
    pub cache: usize,
    /// Tokens in the decoder's caches before the call.
    pub position: usize,
    /// Rows in the encoder's caches.
    pub encoded: usize,
}

/// The rows of a call and their inputs. The rows of a sequence lie together.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Its positions are those of the longest sequence.
    pub batch: Batch,
    /// One per sequence.
    pub places: &'a [SequencePlace],
    /// The rows are an encoder's, whose positions begin at 0.
    pub is_encoder: bool,
    /// One per row; none for a picture.
    pub tokens: &'a [u32],
    /// Patches of pictures, `[rows, channels · patch²]`.
    pub patches: &'a [f32],
    pub mode: StepMode<'a>,
}

impl<'a> Call<'a> {
    /// `tokens` of all `places` behind what their caches hold.
    pub fn decoder(places: &'a [SequencePlace], tokens: &'a [u32]) -> Self {
        let start = places.iter().map(|place| place.position).max().unwrap_or(0);
        let positions = (start..start + tokens.len() / places.len().max(1)).into();
        let batch = Batch { sequences: places.len(), positions };
        Self { batch, places, is_encoder: false, tokens, patches: &[], mode: StepMode::Real }
    }

    /// `rows` rows of each of `places`, from the first position on: `tokens` or `patches`.
    pub fn encoder(places: &'a [SequencePlace], rows: usize, tokens: &'a [u32], patches: &'a [f32]) -> Self {
        let batch = Batch { sequences: places.len(), positions: (0..rows).into() };
        Self { batch, places, is_encoder: true, tokens, patches, mode: StepMode::Real }
    }

    /// Rows of each sequence.
    pub fn rows_each(&self) -> usize {
        self.batch.rows_each()
    }

    /// The first position of the call's `sequence`.
    pub fn start(&self, sequence: usize) -> usize {
        if self.is_encoder { 0 } else { self.places[sequence].position }
    }

    /// The sequence of the call that a row belongs to, and the row's number in it.
    pub fn place(&self, row: usize) -> (usize, usize) {
        (row / self.rows_each(), row % self.rows_each())
    }
}

/// The results of a call, apart from its buffers and the tokens that it chooses.
pub struct Outcome {
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
    memory.mixtures.grow(steps, weights, call.batch.rows());
    let runner = Runner {
        weights,
        call,
        buffers: Buffers {
            plan: &program.plan,
            storage: &program.storage,
            slots: program.slots.share(),
            batch: call.batch,
        },
        caches: memory.caches.share(),
        features: SharedSlice::new(std::slice::from_mut(&mut memory.features)),
        prepared: SharedSlice::new(&mut memory.prepared),
        scratch: SharedSlice::new(&mut memory.scratch),
        parts: memory.parts.share(),
        mixtures: memory.mixtures.share(),
        chosen: SharedSlice::new(&mut memory.chosen),
        outlier_columns: AtomicU64::new(0),
        outlier_calls: AtomicU64::new(0),
        examined_columns: AtomicU64::new(0),
    };
    let shape = RowShape::of(call.batch);
    pool.run(&|worker: &Worker| {
        for (index, step) in steps.iter().enumerate() {
            if index > 0 && needs_barrier(&steps[index - 1], step, shape) {
                worker.barrier();
            }
            runner.step(index, step, worker);
        }
    });
    Outcome {
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
    call: Call<'a>,
    pub(super) buffers: Buffers<'a>,
    /// Keys and values of each cache.
    caches: SharedArena<'a>,
    /// One element, written by worker 0 at the end of a vision encoder.
    features: SharedSlice<'a, Vec<f32>>,
    /// One element per worker.
    prepared: SharedSlice<'a, Prepared>,
    /// One element per worker.
    scratch: SharedSlice<'a, Scratch>,
    parts: SharedParts<'a>,
    pub(super) mixtures: SharedMixtures<'a>,
    /// One a sequence of the call.
    chosen: SharedSlice<'a, u32>,
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
            Step::NormInPlace { norm, x } => self.norm_in_place(*norm, *x, worker),
            Step::Patches(PatchesSpec { out }) if first => {
                self.buffers.whole_mut(*out).copy_from_slice(self.call.patches)
            }
            Step::Features(FeaturesSpec { x }) if first => self.keep_features(*x),
            Step::LastRow(spec) if first => self.last_row(*spec),
            Step::Prepare { x, matrix } if first || self.is_single() => self.prepare(*x, *matrix, worker),
            Step::Route(spec) if first => self.route(spec),
            Step::Argmax(spec) => self.argmax(*spec, worker),
            Step::Patches(_) | Step::Features(_) | Step::LastRow(_) | Step::Prepare { .. } | Step::Route(_) => {}
            Step::ExpertsIn(spec) => self.experts_in(spec, worker),
            Step::ExpertsBetween(spec) => self.experts_between(spec, worker),
            Step::ExpertsOut(spec) => self.experts_out(index, spec, worker),
            Step::Cap { x, cap } => {
                let columns = worker.share(self.buffers.width(*x), self.weights.granule);
                (0..self.buffers.rows(*x)).for_each(|row| {
                    vector::cap(self.weights.isa, self.buffers.part_mut(*x, row, columns.clone()), *cap);
                });
            }
            Step::Linear { input, parts } => self.linears(index, self.input(*input, worker), parts, worker),
            Step::Activate(spec) => self.activate(*spec, worker),
            Step::Add(spec) => self.add(*spec, worker),
            Step::Append(append) => self.attention().append(*append, worker),
            Step::Attend(attend) => {
                self.attention().attend(attend, worker);
                self.keep_attended(index, attend, worker);
            }
        }
    }

    fn attention(&self) -> CallAttention<'_> {
        let Self { weights, call, buffers, caches, parts, scratch, .. } = self;
        CallAttention { weights, call: *call, buffers, caches, parts, scratch }
    }

    #[allow(clippy::mut_from_ref)]
    pub(super) fn scratch(&self, worker: &Worker) -> &mut Scratch {
        // SAFETY: each worker takes the element of its own index.
        unsafe { &mut self.scratch.range_mut(worker.index()..worker.index() + 1)[0] }
    }

    fn is_single(&self) -> bool {
        self.call.batch.rows() == 1
    }

    fn input(&self, input: LinearInput, worker: &Worker) -> Activations<'_> {
        let x = match input {
            LinearInput::Plain(x) => {
                Activations::plain(self.buffers.whole(x), self.buffers.rows(x), self.buffers.width(x))
            }
            LinearInput::Prepared => {
                let own = if self.is_single() { worker.index() } else { 0 };
                // SAFETY: written in `prepare` by this worker itself, or by worker 0 with a barrier before any linear reads it.
                unsafe { &self.prepared.range(own..own + 1)[0] }.view()
            }
        };
        self.of_call(x)
    }

    pub(super) fn of_call<'x>(&self, x: Activations<'x>) -> Activations<'x> {
        Activations { of_batch: self.call.places.len() > 1, ..x }
    }

    /// Rows of a call with several are split over the workers; a single row is worker 0's.
    fn own_rows(&self, buffer: BufferId, worker: &Worker) -> Range<usize> {
        match (self.buffers.rows(buffer), worker.index()) {
            (1, 0) => 0..1,
            (1, _) => 0..0,
            (rows, _) => worker.share(rows, 1),
        }
    }

    fn embed(&self, EmbedSpec { table, scale, image, out }: EmbedSpec, worker: &Worker) {
        let is_image = |token: &u32| Some(*token) == image;
        for row in self.own_rows(out, worker) {
            let (token, out) = (self.call.tokens[row], self.buffers.row_mut(out, row));
            if is_image(&token) {
                let (sequence, own) = self.call.place(row);
                let nth = self.call.tokens[row - own..row].iter().filter(|token| is_image(token)).count();
                // SAFETY: written by the encoder's call, only read by the decoder's.
                let features = unsafe { &self.features.range(0..1)[0] };
                let start = self.features_of(sequence, features.len()).start + nth * out.len();
                out.copy_from_slice(&features[start..start + out.len()]);
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
        learned.resize(self.buffers.width(x), 0.0);
        for row in self.own_rows(x, worker) {
            let (_, own) = self.call.place(row);
            self.weights.matrices[table.0].dequantize_rows(own..own + 1, learned);
            vector::add_to(self.weights.isa, self.buffers.row_mut(x, row), learned);
        }
    }

    fn keep_features(&self, x: BufferId) {
        // SAFETY: worker 0 alone touches the features in an encoder's call.
        let features = unsafe { &mut self.features.range_mut(0..1)[0] };
        let all = self.buffers.whole(x);
        let each = all.len() / self.call.places.len();
        features.resize(self.weights.sequences * each, 0.0);
        for (sequence, of_one) in all.chunks_exact(each).enumerate() {
            features[self.features_of(sequence, self.weights.sequences * each)].copy_from_slice(of_one);
        }
    }

    /// The part of the features, `len` elements of all sequences, that is one's of the call.
    fn features_of(&self, sequence: usize, len: usize) -> Range<usize> {
        let (each, cache) = (len / self.weights.sequences, self.call.places[sequence].cache);
        cache * each..(cache + 1) * each
    }

    fn norm(&self, NormSpec { norm, x, out }: NormSpec, worker: &Worker) {
        for row in self.own_rows(out, worker) {
            let x = self.buffers.part(x, row, 0..self.buffers.width(x));
            self.weights.normalise(norm, x, self.buffers.row_mut(out, row));
        }
    }

    fn norm_in_place(&self, norm: Norm, x: BufferId, worker: &Worker) {
        for row in self.own_rows(x, worker) {
            self.weights.normalise_in_place(norm, self.buffers.row_mut(x, row), &mut self.scratch(worker).gathered);
        }
    }

    fn last_row(&self, LastRowSpec { x, out, scale }: LastRowSpec) {
        let each = self.call.rows_each();
        for sequence in 0..self.buffers.rows(out) {
            let last = self.buffers.part(x, (sequence + 1) * each - 1, 0..self.buffers.width(x));
            for (out, value) in self.buffers.row_mut(out, sequence).iter_mut().zip(last) {
                *out = scale * value;
            }
        }
    }

    fn argmax(&self, ArgmaxSpec { logits, softcap: _ }: ArgmaxSpec, worker: &Worker) {
        for row in self.own_rows(logits, worker) {
            let token = vector::argmax(self.weights.isa, self.buffers.part(logits, row, 0..self.buffers.width(logits)));
            // SAFETY: a row is one worker's.
            unsafe { self.chosen.range_mut(row..row + 1)[0] = token as u32 };
        }
    }

    /// In a call of one row each worker prepares it for itself, which takes less than to wait for one that does; otherwise worker 0 for all.
    fn prepare(&self, x: BufferId, matrix: MatrixId, worker: &Worker) {
        let own = worker.index();
        // SAFETY: each worker takes the element of its own index; linears of others read worker 0's behind a barrier.
        let prepared = unsafe { &mut self.prepared.range_mut(own..own + 1)[0] };
        self.keep_form(matrix, self.buffers.whole(x), self.buffers.rows(x), prepared);
        if own == 0 {
            self.count_outliers(matrix, prepared);
        }
    }

    /// [`Self::keep_form`], with its outlier columns counted.
    pub(super) fn prepare_into(&self, matrix: MatrixId, x: &[f32], rows: usize, prepared: &mut Prepared) {
        self.keep_form(matrix, x, rows, prepared);
        self.count_outliers(matrix, prepared);
    }

    /// Keeps `rows` rows of `x` in the form that the kernel of `matrix` reads.
    fn keep_form(&self, matrix: MatrixId, x: &[f32], rows: usize, prepared: &mut Prepared) {
        let matrix = &self.weights.matrices[matrix.0];
        match matrix.quantizes_activations() {
            true => drop(matrix.prepare(x, rows, prepared)),
            false => prepared.copy(x, rows, matrix.shape().1),
        }
    }

    fn count_outliers(&self, matrix: MatrixId, prepared: &Prepared) {
        let matrix = &self.weights.matrices[matrix.0];
        if matrix.finds_outliers() {
            self.outlier_calls.fetch_add(1, Ordering::Relaxed);
            self.examined_columns.fetch_add(matrix.shape().1 as u64, Ordering::Relaxed);
            self.outlier_columns.fetch_add(prepared.outlier_columns.len() as u64, Ordering::Relaxed);
        }
    }

    fn linears(&self, index: usize, x: Activations, parts: &[LinearPart], worker: &Worker) {
        let mut before = 0;
        for part in parts {
            let n = product_rows(part, self.buffers.plan);
            let columns = worker.share(n, self.weights.granule);
            self.linear(part, x, columns.clone(), worker);
            self.keep(index, before, part.out, columns);
            before += n;
        }
    }

    fn linear(&self, part: &LinearPart, x: Activations, columns: Range<usize>, worker: &Worker) {
        let y = &self.buffers.slots.region(self.buffers.storage.slot_of[part.out.0]);
        let scratch = &mut self.scratch(worker).kernel;
        self.multiply(part.weight, x, columns, part.bias, y, scratch);
    }

    /// `rows` of a matrix times `x`, or of the one that stands in for it.
    pub(super) fn multiply(
        &self,
        weight: MatrixId,
        x: Activations,
        rows: Range<usize>,
        bias: Option<VectorId>,
        y: &SharedSlice<f32>,
        scratch: &mut Vec<f32>,
    ) {
        let bias = bias.map(|bias| self.weights.vectors[bias.0].as_slice());
        match self.call.mode {
            StepMode::StandingIn(stand_ins, ..) => {
                let stand_in = stand_ins.of_matrix(weight);
                let matrix = &self.weights.matrices[stand_in.matrix.0];
                windows(rows, stand_in.rows).for_each(|rows| matrix.multiply(x, rows, bias, y, scratch));
            }
            StepMode::Real | StepMode::Keeping(..) => {
                self.weights.matrices[weight.0].multiply(x, rows, bias, y, scratch)
            }
        }
    }

    /// Attention's output, whose heads are split as [`Step::Append`]'s, or sequence by sequence where positions were.
    fn keep_attended(&self, index: usize, attend: &Attend, worker: &Worker) {
        if let StepMode::Real = self.call.mode {
            return;
        }
        let heads = self.weights.model.caches[attend.cache.0].kv_heads;
        let width = self.buffers.width(attend.out) / heads;
        let keep = |(row, head)| self.keep_row(index, 0, attend.out, row, head * width..(head + 1) * width);
        let attention = self.attention();
        // As they were put together.
        match attention.splits_positions(attend, worker.count()) {
            true => {
                (0..self.call.places.len()).for_each(|row| worker.share(heads, 1).for_each(|head| keep((row, head))))
            }
            false => attention.own_heads(heads, worker).for_each(keep),
        }
    }

    /// Keeps a worker's `columns` of the step's output that has `before` elements before it, or puts back what was kept.
    pub(super) fn keep(&self, index: usize, before: usize, out: BufferId, columns: Range<usize>) {
        if let StepMode::Real = self.call.mode {
            return;
        }
        (0..self.buffers.rows(out)).for_each(|row| self.keep_row(index, before, out, row, columns.clone()));
    }

    fn keep_row(&self, index: usize, before: usize, out: BufferId, row: usize, columns: Range<usize>) {
        let kept = |start: usize| start + before + columns.start..start + before + columns.end;
        match self.call.mode {
            StepMode::Real => {}
            StepMode::Keeping(outputs, values) => {
                // SAFETY: as `out`'s, these columns are this worker's alone in this step.
                let values = unsafe { values.range_mut(kept(outputs.start(index, row))) };
                values.copy_from_slice(self.buffers.part(out, row, columns));
            }
            StepMode::StandingIn(_, outputs, values) => {
                let values = &values[kept(outputs.start(index, row))];
                self.buffers.part_mut(out, row, columns.clone()).copy_from_slice(values);
            }
        }
    }

    fn activate(&self, spec: ActivationSpec, worker: &Worker) {
        let ActivationSpec { kind, gate, up, out } = spec;
        let columns = worker.share(self.buffers.width(out), self.weights.granule);
        for row in 0..self.buffers.rows(out) {
            let gate = self.buffers.part(gate, row, columns.clone());
            let up = up.map(|up| self.buffers.part(up, row, columns.clone()));
            let out = self.buffers.part_mut(out, row, columns.clone());
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
        let columns = worker.share(self.buffers.width(out), self.weights.granule);
        for row in 0..self.buffers.rows(out) {
            let b = self.buffers.part(b, row, columns.clone());
            vector::add_to(self.weights.isa, self.buffers.part_mut(out, row, columns.clone()), b);
        }
    }
}
