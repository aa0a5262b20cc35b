//! A session on a scripted clock: the harness's arithmetic is tested to the last digit without timing anything.

use crate::call::{ANY, Batch, KvFormat, Supported};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;

use super::{Alone, EncoderInput, Footprint, OutlierColumns, Session};

/// Nanoseconds that only a [`FakeSession`] and tests move. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct FakeTime(Arc<AtomicU64>);

impl FakeTime {
    pub fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

/// Any cache of any number of sequences.
const CALLS: Supported =
    Supported { executor: "the fake", kv_formats: &[KvFormat::Fp32, KvFormat::Fp16], most_sequences: ANY };

/// Times and results of one sequence of calls: prefill and decode.
#[derive(Debug, Clone, PartialEq)]
pub struct FakeRun {
    pub prefill_ns: u64,
    /// Time of the encoder call before it, if there is one.
    pub encode_ns: u64,
    /// Duration of each decode step; the last one repeats.
    pub step_ns: Vec<u64>,
    /// Tokens, the prefill's first; the last one repeats.
    pub tokens: Vec<u32>,
    /// The run's last logits.
    pub logits: Vec<f32>,
    /// Fails the prefill with this message.
    pub failure: Option<String>,
    /// Time of a wait for the device.
    pub synchronize_ns: u64,
    /// Decode steps by the device's clock.
    pub device_step_ns: Vec<u64>,
}

impl Default for FakeRun {
    fn default() -> Self {
        Self {
            prefill_ns: 1000,
            encode_ns: 200,
            step_ns: vec![100],
            tokens: vec![5, 6, 7],
            logits: vec![0.0, 1.0],
            failure: None,
            synchronize_ns: 0,
            device_step_ns: Vec::new(),
        }
    }
}

/// Plays its runs in order, one for each prefill; the last one repeats.
pub struct FakeSession {
    time: FakeTime,
    runs: VecDeque<FakeRun>,
    current: FakeRun,
    /// Tokens given since the last prefill.
    given: usize,
    position: usize,
    alone: Option<Alone>,
    /// All choose the same tokens.
    sequences: usize,
}

impl FakeSession {
    pub fn new(time: FakeTime, runs: impl IntoIterator<Item = FakeRun>) -> Self {
        let (runs, current) = (runs.into_iter().collect(), FakeRun::default());
        Self { time, runs, current, given: 0, position: 0, alone: None, sequences: 1 }
    }

    /// The same with a batch of sequences.
    pub fn with_sequences(self, sequences: usize) -> Self {
        Self { sequences, ..self }
    }

    /// The same with times of the parts of its steps alone.
    pub fn with_alone(self, alone: Option<Alone>) -> Self {
        Self { alone, ..self }
    }

    fn token(&mut self) -> u32 {
        self.given += 1;
        held(&self.current.tokens, self.given - 1)
    }
}

/// Element `i`, or the last one beyond the end; the default of an empty script.
fn held<T: Copy + Default>(script: &[T], i: usize) -> T {
    script.get(i).or(script.last()).copied().unwrap_or_default()
}

impl Session for FakeSession {
    fn position(&self) -> usize {
        self.position
    }

    fn rewind(&mut self, position: usize) {
        self.position = position;
    }

    /// Takes the time of the run that the next prefill begins.
    fn encode(&mut self, _input: EncoderInput) -> Result<()> {
        self.time.advance(self.runs.front().unwrap_or(&self.current).encode_ns);
        Ok(())
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        CALLS.check_batch(batch, tokens.len(), (self.sequences, self.position))?;
        if let Some(run) = self.runs.pop_front() {
            self.current = run;
        }
        if let Some(message) = &self.current.failure {
            anyhow::bail!("{message}");
        }
        self.given = 0;
        self.position += batch.rows_each();
        self.time.advance(self.current.prefill_ns);
        next.fill(self.token());
        Ok(())
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.prefill(tokens)?;
        (0..tokens.len()).for_each(|row| on_row(row, &self.current.logits));
        Ok(())
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        for _ in 0..n {
            self.time.advance(held(&self.current.step_ns, self.given - 1));
            self.position += 1;
            let token = self.token();
            on_tokens(&vec![token; self.sequences]);
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        Ok(self.current.logits.clone())
    }

    fn synchronize(&mut self) -> Result<()> {
        self.time.advance(self.current.synchronize_ns);
        Ok(())
    }

    fn device_step_ns(&mut self) -> Result<Vec<u64>> {
        Ok(self.current.device_step_ns.clone())
    }

    fn footprint(&self) -> Footprint {
        Footprint {
            weights_bytes: 1000,
            weights_resident_bytes: 1200,
            kv_cache_bytes: 500,
            scratch_bytes: 60,
            weight_bytes_per_token: 900,
            kv_bytes_per_position: 10,
            ..Footprint::default()
        }
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        Ok(OutlierColumns::default())
    }

    fn alone(&mut self, position: usize) -> Result<Option<Alone>> {
        self.position = position;
        Ok(self.alone.clone())
    }
}
