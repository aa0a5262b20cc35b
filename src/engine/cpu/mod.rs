//! The CPU engine: a model's plan, lowered once, replayed for each call by a pool of workers that stay inside it from the
//! first operation to the last. fp32 activations and cache; a decode step allocates nothing.

mod run;
mod schedule;

use anyhow::{Result, bail};

use self::run::Runner;
use self::schedule::{Step, lower};
use super::load::stream;
use super::{Footprint, Loaded, OutlierColumns, Session, Setup};
use crate::events::Listener;
use crate::kernels::cpu::pool::Pool;
use crate::kernels::cpu::rope;
use crate::kernels::isa::Isa;
use crate::plan::{Model, Rows, Storage};
use crate::quant::{CpuMatrix, Prepared, Stored};
use crate::weights::spec::MatrixSpec;

/// Weights, cache and activations of one loaded model.
pub struct CpuSession {
    model: Model,
    isa: Isa,
    pool: Pool,
    steps: Vec<Step>,
    storage: Storage,
    matrices: Vec<Box<dyn CpuMatrix>>,
    vectors: Vec<Vec<f32>>,
    angles: Vec<Angles>,
    caches: Vec<Cache>,
    capacity: usize,
    /// One per slot of the storage, `rows · width` elements; grown by the longest call.
    slots: Vec<Vec<f32>>,
    prepared: Prepared,
    /// One per worker.
    scratch: Vec<Vec<f32>>,
    /// Elements are handed to workers in multiples of this, whichever matrix they come from.
    granule: usize,
    position: usize,
    last_token: u32,
    outliers: OutlierColumns,
}

/// Keys and values of one layer, `[g, capacity, d]` each, so that a head's positions lie together.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Cosines and sines of a rope for every position of the cache.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    fn new(inverse_frequencies: &[f32], capacity: usize) -> Self {
        let (cos, sin) = rope::tables(inverse_frequencies, capacity);
        Self { cos, sin, half: inverse_frequencies.len() }
    }

    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Loads `setup` for the best instruction set of this machine.
pub fn load(setup: &Setup, isa: Isa, events: &dyn Listener) -> Result<Loaded> {
    let finish = |_: &MatrixSpec, stored: Box<dyn Stored>| Ok(stored.pack(isa));
    let streamed = stream(setup, events, &finish)?;
    let session = CpuSession::new(setup, isa, streamed.matrices, streamed.vectors);
    Ok(Loaded {
        session: Box::new(session),
        load: streamed.elapsed,
        quantize: streamed.quantize,
        fp16_overflow: streamed.fp16_overflow,
        isa: isa.name().to_owned(),
    })
}

impl CpuSession {
    fn new(setup: &Setup, isa: Isa, matrices: Vec<Box<dyn CpuMatrix>>, vectors: Vec<Vec<f32>>) -> Self {
        let model = setup.model.clone();
        let storage = model.decoder.storage();
        let steps = lower(&model.decoder, |matrix| matrices[matrix.0].format());
        let cache = |spec: &crate::plan::CacheSpec| {
            let len = spec.kv_heads * setup.capacity * spec.head_dim;
            Cache { keys: vec![0.0; len], values: vec![0.0; len] }
        };
        Self {
            caches: model.caches.iter().map(cache).collect(),
            angles: model.ropes.iter().map(|r| Angles::new(&r.inverse_frequencies, setup.capacity)).collect(),
            slots: vec![Vec::new(); storage.slots.len()],
            granule: matrices.iter().map(|m| m.row_granule()).max().unwrap_or(1),
            scratch: vec![Vec::new(); setup.threads],
            pool: Pool::new(setup.threads),
            capacity: setup.capacity,
            prepared: Prepared::default(),
            position: 0,
            last_token: 0,
            outliers: OutlierColumns::default(),
            isa,
            model,
            storage,
            steps,
            matrices,
            vectors,
        }
    }

    /// Runs `tokens` through the plan in one call.
    fn call(&mut self, tokens: &[u32]) -> Result<u32> {
        let end = self.position + tokens.len();
        if tokens.is_empty() || end > self.capacity {
            bail!(
                "a call of {} tokens at position {} does not fit a cache of {}",
                tokens.len(),
                self.position,
                self.capacity
            );
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.model.vocab) {
            bail!("token {token} is outside the vocabulary of {}", self.model.vocab);
        }
        for (slot, memory) in self.storage.slots.iter().zip(&mut self.slots) {
            let rows = if slot.rows == Rows::Tokens { tokens.len() } else { 1 };
            if memory.len() < rows * slot.width {
                memory.resize(rows * slot.width, 0.0);
            }
        }
        let outcome = Runner::new(self, tokens).run();
        self.last_token = outcome.token;
        self.position = end;
        self.outliers.calls += outcome.outlier_calls;
        self.outliers.columns += outcome.outlier_columns;
        Ok(self.last_token)
    }

    fn logits_slot(&self) -> Option<(usize, usize)> {
        self.steps.iter().find_map(|step| match step {
            Step::Argmax { logits } => {
                let width = self.model.decoder.buffers[logits.0].width;
                Some((self.storage.slot_of[logits.0], width))
            }
            _ => None,
        })
    }
}

impl Session for CpuSession {
    fn position(&self) -> usize {
        self.position
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.position, "cannot rewind from {} to {position}", self.position);
        self.position = position;
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        self.call(tokens)
    }

    fn decode(&mut self, n: usize, on_token: &mut dyn FnMut(u32)) -> Result<()> {
        for _ in 0..n {
            let token = self.call(&[self.last_token])?;
            on_token(token);
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        match self.logits_slot() {
            Some((slot, width)) if self.slots[slot].len() >= width => Ok(self.slots[slot][..width].to_vec()),
            _ => bail!("no token was run yet"),
        }
    }

    /// Calls return when their workers are done.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn footprint(&self) -> Footprint {
        let stored: Vec<usize> = self.matrices.iter().map(|m| m.stored_bytes()).collect();
        let resident: usize = self.matrices.iter().map(|m| m.resident_bytes()).sum();
        let vectors = self.model.vector_bytes();
        let floats = |vecs: &mut dyn Iterator<Item = usize>| 4 * vecs.sum::<usize>() as u64;
        let slots = floats(&mut self.slots.iter().chain(&self.scratch).map(Vec::capacity));
        let prepared = &self.prepared;
        Footprint {
            weights_bytes: (stored.iter().sum::<usize>() + vectors) as u64,
            // Vectors are held in fp32.
            weights_resident_bytes: (resident + 2 * vectors) as u64,
            kv_cache_bytes: floats(&mut self.caches.iter().map(|c| c.keys.len() + c.values.len())),
            scratch_bytes: slots
                + floats(&mut [prepared.f32s.capacity(), prepared.scales.capacity()].into_iter())
                + (prepared.i8s.capacity() + 2 * prepared.i16s.capacity()) as u64,
            weight_bytes_per_token: self.model.weight_bytes_per_token(&stored) as u64,
            kv_bytes_per_position: self.model.kv_bytes_per_position(4) as u64,
        }
    }

    fn outlier_columns(&self) -> OutlierColumns {
        self.outliers
    }
}
