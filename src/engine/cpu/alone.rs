//! The time that a decode step takes of arithmetic alone and of memory alone, measured beside real steps once all that counts is measured.
//!
//! *Arithmetic alone* is the real step, by the same kernels, threads and schedule, whose matrices stay in the cache: one matrix stands in for
//! all of its format and shape, and of it each worker multiplies as many rows as its cache holds, again and again, until it has multiplied
//! as many as the step asks for. Positions of the key/value cache are attended in the same way. The outputs of one real step are put in the
//! place of the products, so that every operation, outlier columns included, sees the activations that the real step has.
//!
//! *Memory alone* is a pass that reads what the real step reads, each worker its own rows, by the widest loads and multiplies nothing.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Result;
use bytemuck::cast_slice;

use super::experts;
use super::run::Call;
use super::schedule::{Attend, Step, product_rows};
use super::{CpuSession, Memory, Weights};
use crate::engine::Alone;
use crate::kernels::cpu::bandwidth::read_through;
use crate::kernels::cpu::pool::{Pool, Worker};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::cpu::topology::core_cache_bytes;
use crate::plan::{CacheId, CacheScope, ExpertMatrix, MatrixId, NormSpec, Plan};

/// Rounds of a real step, a reading pass and a step of arithmetic alone.
const MIN_ROUNDS: usize = 3;
const MAX_ROUNDS: usize = 25;
/// No round starts later, once [`MIN_ROUNDS`] are done.
const BUDGET: Duration = Duration::from_secs(1);

/// Assumed size of a core's own cache where the system does not report it: the smallest of a decade.
const SMALLEST_CACHE_BYTES: usize = 256 << 10;

/// Keys and values of a head that stay in the cache: a quarter of the smallest one.
const POSITION_BYTES: usize = 64 << 10;
/// Positions that attention takes at once.
const POSITIONS: usize = 64;

/// The weights that a call multiplies by.
#[derive(Clone, Copy)]
pub(super) enum StepMode<'a> {
    /// Its own.
    Real,
    /// Its own, and what every product gives is kept.
    Keeping(&'a Outputs, &'a SharedSlice<'a, f32>),
    /// Those that stand in for them; what was kept takes the place of what they give.
    StandingIn(&'a StandIns, &'a Outputs, &'a [f32]),
}

/// Places of the kept outputs of a step's products and attentions, one behind the other, row by row.
pub(super) struct Outputs {
    /// The place of each step's first output in a row.
    starts: Vec<usize>,
    /// Outputs of a row.
    len: usize,
}

impl Outputs {
    fn new(steps: &[Step], plan: &Plan) -> Self {
        let width = |step: &Step| -> usize {
            let attended = if let Step::Attend(attend) = step { plan.buffers[attend.out.0].width } else { 0 };
            let attended = if let Step::ExpertsOut(spec) = step { plan.buffers[spec.out.0].width } else { attended };
            attended + parts(step).iter().map(|part| product_rows(part, plan)).sum::<usize>()
        };
        let mut len = 0;
        let mut starts = Vec::with_capacity(steps.len());
        for step in steps {
            starts.push(len);
            len += width(step);
        }
        Self { starts, len }
    }

    /// The place of a row's outputs of step `index`.
    pub(super) fn start(&self, index: usize, row: usize) -> usize {
        row * self.len + self.starts[index]
    }
}

/// Rows of a matrix that stand in for those of another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StandIn {
    pub matrix: MatrixId,
    /// Rows that a worker multiplies before it begins again.
    pub rows: usize,
}

/// Matrices and caches that stay in the cache in a step of arithmetic alone.
pub(super) struct StandIns {
    /// The stand-in of each matrix of the model; those that no linear of the decoder reads stand for themselves.
    matrices: Vec<StandIn>,
    /// The first cache of the same spec, for each.
    caches: Vec<CacheId>,
}

impl StandIns {
    /// `cache_bytes` are each worker's own.
    fn new(weights: &Weights, steps: &[Step], cache_bytes: usize) -> Self {
        let all = &weights.matrices;
        let alike = |id: MatrixId| (all[id.0].format(), all[id.0].shape());
        let mut firsts: Vec<MatrixId> = Vec::new();
        for weight in steps.iter().flat_map(multiplied) {
            if !firsts.iter().any(|first| alike(*first) == alike(weight)) {
                firsts.push(weight);
            }
        }
        // Half of the cache, since activations and outputs need room as well.
        let each_bytes = cache_bytes / 2 / firsts.len().max(1);
        let stand_in = |id: MatrixId| {
            let matrix = firsts.iter().copied().find(|first| alike(*first) == alike(id)).unwrap_or(id);
            let row_bytes = all[matrix.0].resident_bytes().div_ceil(all[matrix.0].shape().0).max(1);
            let rows = each_bytes / row_bytes / weights.granule * weights.granule;
            StandIn { matrix, rows: rows.max(weights.granule) }
        };
        let specs = &weights.model.caches;
        let first = |spec| CacheId(specs.iter().position(|other| other == spec).unwrap_or_default());
        Self {
            matrices: (0..all.len()).map(|i| stand_in(MatrixId(i))).collect(),
            caches: specs.iter().map(first).collect(),
        }
    }

    pub(super) fn of_matrix(&self, matrix: MatrixId) -> StandIn {
        self.matrices[matrix.0]
    }

    /// The cache that stands in for another, and of how many positions of it.
    pub(super) fn of_cache(&self, cache: CacheId, head_dim: usize) -> (CacheId, usize) {
        let positions = POSITION_BYTES / (2 * head_dim * size_of::<f32>()) / POSITIONS * POSITIONS;
        (self.caches[cache.0], positions.max(POSITIONS))
    }
}

/// Matrices that a step multiplies by, or may choose.
fn multiplied(step: &Step) -> Vec<MatrixId> {
    let of_mixture = if let Step::Route(spec) = step { experts::matrices(spec).collect() } else { Vec::new() };
    parts(step).iter().map(|part| part.weight).chain(of_mixture).collect()
}

fn parts(step: &Step) -> &[crate::plan::LinearPart] {
    if let Step::Linear { input: _, parts } = step { parts } else { &[] }
}

/// `range` as windows that all begin where it does, of `most` at a time: as many in all.
pub(super) fn windows(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = range;
    (start..end).step_by(most).map(move |done| start..start + most.min(end - done))
}

impl CpuSession {
    /// See [`crate::engine::Session::alone`].
    pub(super) fn measure_alone(&mut self, position: usize) -> Result<Alone> {
        self.measure_alone_within(position, core_cache_bytes().unwrap_or(SMALLEST_CACHE_BYTES))
    }

    fn measure_alone_within(&mut self, position: usize, cache_bytes: usize) -> Result<Alone> {
        for (place, rings) in self.places.iter_mut().zip(&mut self.rings) {
            if position < place.position {
                rings.rewind(position, &mut self.memory.caches);
            }
            place.position = position;
        }
        self.check_room(&self.all(), &self.last_tokens)?;
        self.rings.iter_mut().for_each(|rings| rings.touch(position));
        let Self { pool, weights, decoder, memory, places, last_tokens, .. } = self;
        let call = Call::decoder(places, last_tokens);
        let steps = decoder.steps.clone();
        let (stand_ins, outputs) = (StandIns::new(weights, &steps, cache_bytes), Outputs::new(&steps, &decoder.plan));
        // A worker that may allocate no more has measured what counts.
        let mut kept = Vec::new();
        kept.try_reserve_exact(outputs.len * places.len())?;
        kept.resize(outputs.len * places.len(), 0.0);
        let mut step = |mode: StepMode, memory: &mut Memory| {
            let _pinned = pool.pin_caller();
            decoder.run(&steps, weights, pool, memory, Call { mode, ..call });
        };
        step(StepMode::Keeping(&outputs, &SharedSlice::new(&mut kept)), memory);
        let (mut alone, began) = (Alone::default(), Instant::now());
        while alone.step_ns.len() < MIN_ROUNDS || (alone.step_ns.len() < MAX_ROUNDS && began.elapsed() < BUDGET) {
            alone.step_ns.push(second_ns(|| step(StepMode::Real, memory)));
            alone.memory_ns.push(second_ns(|| read(&steps, weights, pool, memory, call)));
            alone.arithmetic_ns.push(second_ns(|| step(StepMode::StandingIn(&stand_ins, &outputs, &kept), memory)));
        }
        Ok(alone)
    }
}

/// Times the second of two runs: the first one finds in the caches what something else has left there.
fn second_ns(mut run: impl FnMut()) -> u64 {
    run();
    let began = Instant::now();
    run();
    began.elapsed().as_nanos() as u64
}

/// Reads what a step of one row of each sequence reads: the rows of its matrices as they are split over the workers, vectors, and the positions of its caches in
/// equal parts.
fn read(steps: &[Step], weights: &Weights, pool: &Pool, memory: &Memory, call: Call) {
    let _pinned = pool.pin_caller();
    pool.run(&|worker: &Worker| {
        let mut folded = 0;
        let mut piece = |bytes: &[u8]| folded ^= read_through(weights.isa, bytes);
        for step in steps {
            match step {
                Step::Linear { input: _, parts } => {
                    for part in parts {
                        let matrix = &weights.matrices[part.weight.0];
                        let rows = worker.share(matrix.shape().0, weights.granule);
                        matrix.memory_of(rows.clone(), &mut piece);
                        part.bias.iter().for_each(|bias| piece(cast_slice(&weights.vectors[bias.0][rows.clone()])));
                    }
                }
                Step::Norm(NormSpec { norm, x: _, out: _ }) => {
                    let own = norm.vectors().filter(|_| worker.index() == 0);
                    own.for_each(|vector| piece(cast_slice(&weights.vectors[vector.0])));
                }
                Step::Attend(attend) => read_cache(attend, weights, memory, call, worker, &mut piece),
                // As many as the tokens choose; which ones makes no difference to the bytes.
                Step::Route(spec) => {
                    let chosen = memory.mixtures.chosen();
                    for expert in spec.experts.iter().take(chosen.max(spec.top_k)) {
                        for ExpertMatrix { weight, bias } in expert.matrices() {
                            let matrix = &weights.matrices[weight.0];
                            let rows = worker.share(matrix.shape().0, weights.granule);
                            matrix.memory_of(rows.clone(), &mut piece);
                            bias.iter()
                                .for_each(|bias| piece(bytemuck::cast_slice(&weights.vectors[bias.0][rows.clone()])));
                        }
                    }
                }
                Step::ExpertsIn(_) | Step::ExpertsBetween(_) | Step::ExpertsOut(_) => {}
                Step::Embed(_) | Step::Patches(_) | Step::AddRows(_) | Step::Features(_) | Step::LastRow(_) => {}
                Step::Prepare { .. } | Step::Activate(_) | Step::Add(_) | Step::Append(_) | Step::Argmax(_) => {}
                Step::NormInPlace { .. } | Step::Cap { .. } => {}
            }
        }
        std::hint::black_box(folded);
    });
}

fn read_cache(
    attend: &Attend,
    weights: &Weights,
    memory: &Memory,
    call: Call,
    worker: &Worker,
    piece: &mut impl FnMut(&[u8]),
) {
    let cache = attend.cache;
    let spec = weights.model.caches[cache.0];
    let capacity = weights.positions(cache);
    for place in call.places {
        let seen = match spec.scope {
            // All slots of a ring, once they are filled.
            CacheScope::Decoder if weights.is_ring(cache) => capacity.min(place.position + 1),
            CacheScope::Decoder => place.position + 1,
            CacheScope::Encoder => place.encoded,
        };
        let hidden = attend.window.map_or(0, |window| seen.saturating_sub(window));
        let positions = worker.share(seen - hidden, 1);
        let positions = hidden + positions.start..hidden + positions.end;
        for head in 0..spec.kv_heads {
            let of_head =
                |position: usize| ((place.cache * spec.kv_heads + head) * capacity + position) * spec.head_dim;
            for region in [2 * cache.0, 2 * cache.0 + 1] {
                piece(cast_slice(&memory.caches.region(region)[of_head(positions.start)..of_head(positions.end)]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;
    use crate::call::Batch;
    use crate::engine::load::stream;
    use crate::engine::{Device, EncoderInput, Session, Setup};
    use crate::events::Silent;
    use crate::kernels::isa::Isa;
    use crate::plan::Op;
    use crate::quant::{Activations, CpuMatrix, FORMATS, FormatId, FormatOptions, Prepared, Stored};
    use crate::weights::policy::Formats;
    use crate::weights::{self, ModelRequest};

    /// Products of an element by an element, and which rows of which matrix they were of.
    #[derive(Debug, Default, Clone, PartialEq)]
    struct Multiplied {
        products: usize,
        outputs: usize,
        rows: HashSet<(usize, usize)>,
        /// Bytes handed out for reading.
        read: usize,
    }

    type Log = Arc<Mutex<Multiplied>>;

    /// A matrix that counts what is done with it.
    struct Counted {
        id: usize,
        inner: Box<dyn CpuMatrix>,
        log: Log,
    }

    impl CpuMatrix for Counted {
        fn format(&self) -> FormatId {
            self.inner.format()
        }
        fn shape(&self) -> (usize, usize) {
            self.inner.shape()
        }
        fn stored_bytes(&self) -> usize {
            self.inner.stored_bytes()
        }
        fn resident_bytes(&self) -> usize {
            self.inner.resident_bytes()
        }
        fn unpack(&self) -> Box<dyn Stored> {
            self.inner.unpack()
        }
        fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
            self.inner.dequantize_rows(rows, out);
        }
        fn quantizes_activations(&self) -> bool {
            self.inner.quantizes_activations()
        }
        fn prepare<'a>(&self, x: &'a [f32], m: usize, room: &'a mut Prepared) -> Activations<'a> {
            self.inner.prepare(x, m, room)
        }
        fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            self.inner.memory_of(rows, &mut |bytes| {
                log.read += bytes.len();
                piece(bytes);
            });
        }
        fn finds_outliers(&self) -> bool {
            self.inner.finds_outliers()
        }
        fn row_granule(&self) -> usize {
            self.inner.row_granule()
        }
        fn multiply(
            &self,
            x: Activations,
            rows: Range<usize>,
            bias: Option<&[f32]>,
            y: &SharedSlice<'_, f32>,
            scratch: &mut Vec<f32>,
        ) {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            log.products += rows.len() * self.shape().1;
            log.outputs += rows.len();
            log.rows.extend(rows.clone().map(|row| (self.id, row)));
            drop(log);
            self.inner.multiply(x, rows, bias, y, scratch);
        }
    }

    /// A session of a golden model whose sequences are each behind three tokens and two steps.
    fn session(model: &str, precision: &str, threads: usize, sequences: usize) -> (CpuSession, Log) {
        let request = ModelRequest::of(format!("{}/tests/golden/models/{model}", env!("CARGO_MANIFEST_DIR")));
        let checkpoint = weights::open(&request, &Silent).unwrap();
        let plan = crate::models::build(&checkpoint.config).unwrap();
        let source = checkpoint.source(&plan.matrices, &plan.vectors).unwrap();
        let setup = Setup {
            model: &plan,
            source: source.as_ref(),
            formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
            device: Device::Cpu,
            threads,
            sequences,
            kv_format: Device::Cpu.kv_format(),
            capacity: 64,
            encoder_capacity: 8,
            cuda_graph: true,
        };
        let isa = Isa::detect();
        let log = Log::default();
        let streamed = stream(&setup, &Silent, &|_, stored: Box<dyn Stored>| Ok(stored.pack(isa))).unwrap();
        let counted = |(id, inner)| Box::new(Counted { id, inner, log: log.clone() }) as Box<dyn CpuMatrix>;
        let matrices = streamed.matrices.into_iter().enumerate().map(counted).collect();
        let mut session = CpuSession::new(&setup, isa, Pool::new(threads), matrices, streamed.vectors).unwrap();
        if plan.encoder.is_some() {
            session.encode(EncoderInput::Tokens(&[1, 2, 3, 4].repeat(sequences))).unwrap();
        }
        let batch = Batch { sequences, positions: (0..3).into() };
        session.prefill_batch(batch, &[1, 2, 3].repeat(sequences), &mut vec![0; sequences]).unwrap();
        session.decode_batch(2, &mut |_| {}).unwrap();
        (session, log)
    }

    fn taken(log: &Log) -> Multiplied {
        std::mem::take(&mut *log.lock().unwrap())
    }

    /// The step in each mode: what it multiplied, the logits, and the outlier columns that it found.
    fn compare(session: &mut CpuSession, log: &Log, cache_bytes: usize) -> [(Multiplied, Vec<f32>, usize); 2] {
        let steps = session.decoder.steps.clone();
        let outputs = Outputs::new(&steps, &session.decoder.plan);
        let stand_ins = StandIns::new(&session.weights, &steps, cache_bytes);
        let mut kept = vec![0.0; outputs.len * session.places.len()];
        let mut run = |mode: StepMode| {
            taken(log);
            let CpuSession { pool, weights, decoder, memory, places, last_tokens, .. } = &mut *session;
            let call = Call { mode, ..Call::decoder(places, last_tokens) };
            let outcome = decoder.run(&steps, weights, pool, memory, call);
            (taken(log), session.logits().unwrap(), outcome.outliers.columns as usize)
        };
        let real = run(StepMode::Keeping(&outputs, &SharedSlice::new(&mut kept)));
        [real, run(StepMode::StandingIn(&stand_ins, &outputs, &kept))]
    }

    #[test]
    fn arithmetic_alone_multiplies_as_much_of_fewer_rows() {
        for model in ["llama-tiny", "llama-odd", "phi-odd", "t5-tiny"] {
            let splits = [(1, 1), (2, 1), (2, 3)];
            for (format, (threads, sequences)) in FORMATS.iter().flat_map(|format| splits.map(|split| (format, split)))
            {
                let (mut session, log) = session(model, format.name, threads, sequences);
                let [real, alone] = compare(&mut session, &log, 0);
                let what = format!("{model} {} on {threads}, {sequences} sequences", format.name);
                assert!(real.0.products > 0, "{what}");
                assert_eq!((alone.0.products, alone.0.outputs), (real.0.products, real.0.outputs), "{what}");
                assert_eq!((&alone.1, alone.2), (&real.1, real.2), "{what}: the activations are the real step's");
                // Without a cache each worker keeps one granule of rows of every format and shape, where there are as many.
                let shapes: HashSet<_> = session.weights.matrices.iter().map(|m| (m.format(), m.shape())).collect();
                let most = shapes.len() * threads * session.weights.granule;
                assert!(alone.0.rows.len() <= most, "{what}: {} rows stay, not {most}", alone.0.rows.len());
                assert!(alone.0.rows.len() < real.0.rows.len(), "{what}");
            }
        }
    }

    #[test]
    fn a_large_cache_keeps_one_whole_matrix_of_each_shape() {
        let (mut session, log) = session("llama-tiny", "nf4", 2, 1);
        let [real, alone] = compare(&mut session, &log, 1 << 30);
        assert_eq!(alone.0.products, real.0.products);
        let of: HashSet<_> = alone.0.rows.iter().map(|(id, _)| *id).collect();
        let shapes: HashSet<_> = of.iter().map(|id| session.weights.matrices[*id].shape()).collect();
        assert_eq!(of.len(), shapes.len(), "one of each");
        let rows: usize = of.iter().map(|id| session.weights.matrices[*id].shape().0).sum();
        assert_eq!(alone.0.rows.len(), rows, "and all of it");
    }

    #[test]
    fn memory_alone_reads_the_bytes_of_every_product() {
        for precision in FORMATS.iter().map(|format| format.name) {
            let (session, log) = session("llama-tiny", precision, 2, 1);
            let call = Call::decoder(&session.places, &session.last_tokens);
            taken(&log);
            read(&session.decoder.steps, &session.weights, &session.pool, &session.memory, call);
            let read = taken(&log);
            assert_eq!(read.products, 0);
            let mut multiplied = Vec::new();
            for op in &session.decoder.plan.ops {
                if let Op::Linear(spec) = op {
                    multiplied.extend_from_slice(&spec.parts);
                }
            }
            let matrices: Vec<_> = multiplied.iter().map(|part| &session.weights.matrices[part.weight.0]).collect();
            let stored: usize = matrices.iter().map(|matrix| matrix.stored_bytes()).sum();
            // All that is stored but NF4's offset, up to what pads rows to strips and columns to groups; statistics at the seam of two
            // workers' rows are read by both.
            let resident: usize = matrices.iter().map(|matrix| matrix.resident_bytes()).sum();
            let slack = 8 * matrices.len();
            let range = stored.min(resident) - slack..=stored.max(resident) + slack;
            assert!(range.contains(&read.read), "{precision}: {} bytes of {range:?}", read.read);
        }
    }

    #[test]
    fn a_long_context_is_attended_within_a_window() {
        assert_eq!(windows(3..10, 3).collect::<Vec<_>>(), [3..6, 3..6, 3..4]);
        assert!(windows(3..10, usize::MAX).eq(std::iter::once(3..10)));
        assert_eq!(windows(3..3, 4).count(), 0);
        let stand_ins = StandIns { matrices: Vec::new(), caches: vec![CacheId(0), CacheId(0)] };
        assert_eq!(stand_ins.of_cache(CacheId(1), 64), (CacheId(0), 128));
        assert_eq!(stand_ins.of_cache(CacheId(1), 256), (CacheId(0), 64));
    }

    #[test]
    fn rounds_leave_the_session_where_it_was() {
        let (mut session, _) = session("llama-tiny", "int8", 2, 1);
        let (position, outliers) = (session.position(), session.outliers);
        let alone = session.measure_alone(position - 1).unwrap();
        let rounds = alone.step_ns.len();
        assert!((MIN_ROUNDS..=MAX_ROUNDS).contains(&rounds));
        assert_eq!((alone.arithmetic_ns.len(), alone.memory_ns.len()), (rounds, rounds));
        assert_eq!((session.position(), session.outliers), (position - 1, outliers));
        assert!(session.measure_alone(64).is_err(), "the cache has no room behind its end");
    }
}
