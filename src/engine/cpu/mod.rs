//! The CPU engine: a model's plans, lowered once, replayed for each call by a pool of workers that stay inside it from the
//! first operation to the last. fp32 activations and cache; a decode step allocates nothing.

mod alone;
mod append;
mod arena;
mod attend;
mod bias_table;
mod buffers;
mod calls;
mod experts;
mod partials;
mod rings;
mod run;
mod schedule;
mod score;
pub mod throughput;

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use self::arena::Arena;
use self::bias_table::BiasTable;
use self::calls::body;
use self::experts::Mixtures;
use self::partials::PartSums;
use self::rings::Rings;
use self::run::{Call, Outcome, SequencePlace};
use self::schedule::{Step, lower};
use super::load::stream;
use super::needs::cpu_rows_of_call;
use super::{Alone, EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup, recompute};
use crate::call::{self, Batch, KvFormat, Supported};
use crate::events::Listener;
use crate::kernels::cpu::norm;
use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::rope::Angles;
use crate::kernels::isa::Isa;
use crate::plan::{
    CacheId, CacheScope, CacheShape, Model, Norm, NormKind, Op, Plan, RelativeBias, Rope, Rows, Slot, Storage, Window,
};
use crate::quant::{CpuMatrix, FormatId, Prepared, Stored};
use crate::weights::spec::MatrixSpec;

/// Weights, caches and activations of one loaded model.
pub struct CpuSession {
    pool: Pool,
    weights: Weights,
    encoder: Option<Program>,
    decoder: Program,
    memory: Memory,
    /// Of each sequence, what its caches hold.
    places: Vec<SequencePlace>,
    /// Tokens that each sequence chose last.
    last_tokens: Vec<u32>,
    /// Memory of the tokens that a decode step reads.
    fed: Vec<u32>,
    /// Sequences of the last decoder call.
    called: usize,
    outliers: OutlierColumns,
    /// One a sequence.
    rings: Vec<Rings>,
    /// Longer prompts are cut.
    rows_of_call: usize,
    /// Rotary frequencies of a call, where they depend on its length.
    frequencies: Vec<f32>,
}

/// Memory that calls only read.
struct Weights {
    model: Model,
    isa: Isa,
    matrices: Vec<Box<dyn CpuMatrix>>,
    vectors: Vec<Vec<f32>>,
    angles: Vec<Angles>,
    biases: Vec<BiasTable>,
    /// Sequences that the caches hold.
    sequences: usize,
    /// Positions that the decoder's and the encoder's caches can hold of each sequence.
    capacity: usize,
    encoder_capacity: usize,
    /// Elements are handed to workers in multiples of this, whichever matrix they come from.
    granule: usize,
}

/// A plan, lowered, with the memory of its buffers.
struct Program {
    plan: Arc<Plan>,
    steps: Arc<[Step]>,
    storage: Arc<Storage>,
    /// A region per slot of the storage, `rows · width` elements.
    slots: Arena,
    /// Rows that the slots can hold: those of the longest call.
    rows: usize,
    /// Sequences of a call at most.
    sequences: usize,
}

/// Memory that calls write, beside a program's buffers.
struct Memory {
    /// Keys and values of each cache, `[sequences, g, capacity, d]` each, so that a head's positions lie together: the regions
    /// `2 · i` and `2 · i + 1`.
    caches: Arena,
    /// Image features, `[sequences, patches, hidden]`.
    features: Vec<f32>,
    /// The tokens that a call chooses, one a sequence.
    chosen: Vec<u32>,
    /// One per worker.
    prepared: Vec<Prepared>,
    /// One per worker.
    scratch: Vec<Scratch>,
    parts: PartSums,
    mixtures: Mixtures,
}

/// Memory that a worker keeps from call to call, only ever grown.
#[derive(Default)]
struct Scratch {
    kernel: Vec<f32>,
    /// Queries and outputs of one head, brought together.
    gathered: Vec<f32>,
    /// Keys and values of one head over a window.
    window: Vec<f32>,
}

const KV_FORMAT: KvFormat = KvFormat::Fp32;

/// The calls that the engine runs.
const CALLS: Supported =
    Supported { executor: schedule::EXECUTOR, kv_formats: &[KV_FORMAT], most_sequences: call::ANY };

/// Refuses attention over a cache that holds other positions than the attention sees.
fn check_windows(model: &Model) -> Result<()> {
    let specs = model.plans().flat_map(|plan| &plan.ops);
    for spec in specs.filter_map(|op| if let Op::Attention(spec) = op { Some(spec) } else { None }) {
        let seen = spec.window.map(|Window(window)| window);
        if let Some(held) = model.caches[spec.cache.0].window.filter(|held| seen != Some(*held)) {
            let seen = seen.map_or("all".to_owned(), |seen| seen.to_string());
            let attention = format!("an attention over {seen} positions of a cache that holds {held}");
            bail!("{} cannot run {attention}", schedule::EXECUTOR);
        }
        if spec.window.is_some() && spec.bias.is_some() {
            bail!("{} cannot run an attention with a window and a relative bias", schedule::EXECUTOR);
        }
    }
    Ok(())
}

/// Loads `setup` for the kernels of `isa`.
pub fn load(setup: &Setup, isa: Isa, events: &dyn Listener) -> Result<Loaded> {
    // What no kernel computes is refused before any weight is read.
    CALLS.check(setup.sequences, setup.kv_format)?;
    setup.model.plans().try_for_each(|plan| lower(plan, |_| Some(setup.formats.precision())).map(|_| ()))?;
    check_windows(setup.model)?;
    let pool = Pool::try_new(setup.threads).with_context(|| format!("starting {} threads", setup.threads))?;
    let finish = |_: &MatrixSpec, stored: Box<dyn Stored>| Ok(stored.pack(isa));
    let tensors = stream(setup, events, &finish)?;
    let session = CpuSession::new(setup, isa, pool, tensors.matrices, tensors.vectors)?;
    let loaded = Loaded {
        session: Box::new(session),
        load: tensors.elapsed,
        quantize: tensors.quantize,
        fp16_overflow: tensors.fp16_overflow,
        isa: isa.name().to_owned(),
    };
    Ok(recompute::wrapped(setup, loaded))
}

impl CpuSession {
    fn new(
        setup: &Setup,
        isa: Isa,
        pool: Pool,
        matrices: Vec<Box<dyn CpuMatrix>>,
        vectors: Vec<Vec<f32>>,
    ) -> Result<Self> {
        let (model, sequences) = (setup.model.clone(), setup.sequences);
        let reach = setup.capacity.max(setup.encoder_capacity);
        let cache = |spec: &CacheShape| {
            let positions = positions(spec, setup.capacity, setup.encoder_capacity);
            [sequences * spec.kv_heads * positions * spec.head_dim; 2]
        };
        let angles = |rope: &Rope| {
            Angles::new((0..setup.capacity).flat_map(|position| rope.turns(position)), rope.rotary_dim / 2)
        };
        let bias = |bias: &RelativeBias| BiasTable::new(bias, matrices[bias.table.0].as_ref(), reach);
        let encoder = model.encoder.as_ref().map(|encoder| Program::new(&encoder.plan, &matrices, sequences));
        Ok(Self {
            pool,
            encoder: encoder.transpose()?,
            decoder: Program::new(&model.decoder, &matrices, sequences)?,
            memory: Memory {
                caches: Arena::new(model.caches.iter().flat_map(cache)),
                features: Vec::new(),
                chosen: vec![0; sequences],
                prepared: (0..setup.threads).map(|_| Prepared::default()).collect(),
                scratch: (0..setup.threads).map(|_| Scratch::default()).collect(),
                parts: PartSums::new(&model, setup.threads),
                mixtures: Mixtures::default(),
            },
            places: (0..sequences).map(|cache| SequencePlace { cache, position: 0, encoded: 0 }).collect(),
            last_tokens: vec![0; sequences],
            fed: vec![0; sequences],
            called: 1,
            outliers: OutlierColumns::default(),
            rings: (0..sequences).map(|sequence| Rings::new(&model, setup.capacity, (sequence, sequences))).collect(),
            rows_of_call: cpu_rows_of_call(&model),
            frequencies: Vec::new(),
            weights: Weights {
                angles: model.ropes.iter().map(angles).collect(),
                biases: model.biases.iter().map(bias).collect(),
                granule: matrices.iter().map(|m| m.row_granule()).max().unwrap_or(1),
                sequences,
                capacity: setup.capacity,
                encoder_capacity: setup.encoder_capacity,
                isa,
                model,
                matrices,
                vectors,
            },
        })
    }
}

/// The format whose form of activations a matrix reads; `None` for fp32.
fn form(matrix: &dyn CpuMatrix) -> Option<FormatId> {
    matrix.quantizes_activations().then(|| matrix.format())
}

/// Positions that a cache holds: no more than its window.
fn positions(shape: &CacheShape, capacity: usize, encoder_capacity: usize) -> usize {
    match shape.scope {
        CacheScope::Decoder => shape.window.map_or(capacity, |window| window.min(capacity)),
        CacheScope::Encoder => encoder_capacity,
    }
}

impl Weights {
    /// Positions that a cache can hold.
    fn positions(&self, cache: CacheId) -> usize {
        positions(&self.model.caches[cache.0], self.capacity, self.encoder_capacity)
    }

    /// Returns whether a cache holds the positions of a window in turn.
    fn is_ring(&self, cache: CacheId) -> bool {
        self.model.caches[cache.0].window.is_some_and(|window| window < self.capacity)
    }

    /// The slot of a position in a cache.
    fn slot(&self, cache: CacheId, position: usize) -> usize {
        if self.is_ring(cache) { position % self.positions(cache) } else { position }
    }

    /// `out = norm(x)`
    fn normalise(&self, Norm { kind, weight, epsilon }: Norm, x: &[f32], out: &mut [f32]) {
        let Self { isa, vectors, .. } = self;
        let weight = &vectors[weight.0];
        match kind {
            NormKind::Rms => norm::rms(*isa, x, weight, epsilon, out),
            NormKind::Layer { bias } => norm::layer(*isa, x, weight, &vectors[bias.0], epsilon, out),
        }
    }

    /// `x = norm(x)`
    fn normalise_in_place(&self, norm: Norm, x: &mut [f32], copy: &mut Vec<f32>) {
        copy.clear();
        copy.extend_from_slice(x);
        self.normalise(norm, copy, x);
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token as usize >= self.model.vocab) {
            Some(token) => bail!("token {token} is outside the vocabulary of {}", self.model.vocab),
            None => Ok(()),
        }
    }
}

impl Program {
    fn new(plan: &Plan, matrices: &[Box<dyn CpuMatrix>], sequences: usize) -> Result<Self> {
        let storage = plan.storage();
        Ok(Self {
            steps: lower(plan, |matrix| form(matrices[matrix.0].as_ref()))?.into(),
            slots: Arena::default(),
            rows: 0,
            sequences,
            storage: Arc::new(storage),
            plan: Arc::new(plan.clone()),
        })
    }

    /// Replays `steps`, which are this program's from the first on.
    fn run(&mut self, steps: &[Step], weights: &Weights, pool: &Pool, memory: &mut Memory, call: Call) -> Outcome {
        if self.rows < call.batch.rows() {
            let rows = |slot: &Slot| if slot.rows == Rows::Tokens { call.batch.rows() } else { self.sequences };
            self.slots = Arena::new(self.storage.slots.iter().map(|slot| rows(slot) * slot.width));
            self.rows = call.batch.rows();
        }
        run::run(self, steps, weights, pool, memory, call)
    }

    /// The logits of the last call, which was of so many sequences, where one was run.
    fn logits(&self, sequences: usize) -> Option<&[f32]> {
        let argmax = self.plan.ops.iter().find_map(|op| if let Op::Argmax(spec) = op { Some(spec) } else { None })?;
        let logits = argmax.logits.0;
        let len = sequences * self.plan.buffers[logits].width;
        (self.rows > 0).then(|| &self.slots.region(self.storage.slot_of[logits])[..len])
    }
}

impl Session for CpuSession {
    fn position(&self) -> usize {
        self.places.iter().map(|place| place.position).max().unwrap_or(0)
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.position(), "cannot rewind from {} to {position}", self.position());
        for (place, rings) in self.places.iter_mut().zip(&mut self.rings) {
            if position < place.position {
                rings.rewind(position, &mut self.memory.caches);
                place.position = position;
            }
        }
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        self.encode_of(self.all(), input)
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        CALLS.check_batch(batch, tokens.len(), (self.places.len(), self.position()))?;
        // A token by itself begins no prompt.
        if batch.rows_each() > 1 {
            self.save_rings(self.all());
        }
        self.step(self.all(), tokens)?;
        next.copy_from_slice(&self.last_tokens);
        Ok(())
    }

    fn prefill_one(&mut self, sequence: usize, input: Option<EncoderInput>, tokens: &[u32]) -> Result<u32> {
        let which = call::check_sequence(sequence, self.places.len())?;
        input.map_or(Ok(()), |input| self.encode_of(which.clone(), input))?;
        if tokens.len() > 1 {
            self.save_rings(which.clone());
        }
        self.step(which, tokens)?;
        Ok(self.last_tokens[sequence])
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        let mut tokens = std::mem::take(&mut self.fed);
        let mut stepped = Ok(());
        for _ in 0..n {
            tokens.clone_from(&self.last_tokens);
            stepped = self.step(self.all(), &tokens);
            if stepped.is_err() {
                break;
            }
            on_tokens(&self.last_tokens);
        }
        self.fed = tokens;
        stepped
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let Some(head) = self.decoder.plan.head() else { bail!("this plan has no head") };
        call::check_scored(self.places.len())?;
        let steps = Arc::clone(&self.decoder.steps);
        self.check_room(&(0..1), tokens)?;
        let rows_of_call = self.rows_of_call;
        for (at, part) in tokens.chunks(rows_of_call).enumerate() {
            self.call(0..1, part, body(&steps));
            self.score_rows(head, part.len(), &mut |row, logits| on_row(at * rows_of_call + row, logits));
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        match self.decoder.logits(self.called) {
            Some(logits) => Ok(logits.to_vec()),
            None => bail!("no token was run yet"),
        }
    }

    /// Calls return when their workers are done.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn footprint(&self) -> Footprint {
        let Weights { model, matrices, .. } = &self.weights;
        let stored: Vec<usize> = matrices.iter().map(|m| m.stored_bytes()).collect();
        let resident: usize = matrices.iter().map(|m| m.resident_bytes()).sum();
        let vectors = model.vector_bytes();
        let cache_floats = self.memory.caches.len();
        Footprint {
            weights_bytes: (stored.iter().sum::<usize>() + vectors) as u64,
            // Vectors are held in fp32.
            weights_resident_bytes: (resident + 2 * vectors) as u64,
            kv_cache_bytes: 4 * cache_floats as u64,
            scratch_bytes: self.scratch_bytes() as u64,
            weight_bytes_per_token: model.weight_bytes_per_step(&stored, self.places.len()) as u64,
            ..Footprint::of_caches(model, KV_FORMAT, self.places[0].encoded)
        }
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        Ok(self.outliers)
    }

    fn alone(&mut self, position: usize) -> Result<Option<Alone>> {
        self.measure_alone(position).map(Some)
    }
}

impl CpuSession {
    fn scratch_bytes(&self) -> usize {
        let Memory { features, prepared, scratch, parts, mixtures, chosen, caches: _ } = &self.memory;
        let programs = self.encoder.iter().chain([&self.decoder]);
        let buffers = programs.map(|program| program.slots.len()).sum::<usize>()
            + scratch.iter().map(|s| s.kernel.capacity() + s.gathered.capacity() + s.window.capacity()).sum::<usize>();
        let floats = buffers + parts.floats() + features.capacity() + chosen.len();
        let prepared: usize = prepared.iter().map(Prepared::capacity_bytes).sum();
        4 * floats + prepared + mixtures.bytes() + self.rings.iter().map(Rings::bytes).sum::<usize>()
    }
}
