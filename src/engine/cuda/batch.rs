//! Several sequences: prompts and steps are calls of many rows. A step reads tokens and places from the device and leaves the next ones there, so
//! that steps are queued without waiting for one another, as one graph from the second on.

use std::ops::Range;

use anyhow::{Result, bail};
use half::f16;

use super::prefill_graphs::{PrefillCall, PrefillGraphs};
use super::times::StepTimes;
use super::weights::Weights;
use crate::call::{self, Batch};
use crate::engine::memory::MemoryPool;
use crate::engine::{EncoderInput, Footprint, OutlierColumns, Session};
use crate::kernels::cuda::place::DevicePlace;
use crate::lower::cuda::{self as lower, CallInput, CallKind, CallShape};
use crate::lower::prompt;
use crate::plan::EncoderInputKind;

/// A loaded model and the places of its sequences.
pub struct BatchSession {
    weights: Weights,
    graphs: PrefillGraphs,
    times: StepTimes,
    places: Vec<SequencePlace>,
    /// Sequences of the last call that chose tokens.
    called: Range<usize>,
    as_graph: bool,
    /// Longer calls are cut.
    rows_of_call: usize,
    /// Without the columns found, which the device counts.
    examined: OutlierColumns,
}

#[derive(Debug, Clone, Copy, Default)]
struct SequencePlace {
    /// Tokens in the decoder's caches.
    position: usize,
    /// Rows of the last encoder call.
    encoded: usize,
    /// Tokens that were asked of the device: the number of the last one.
    steps: u32,
}

impl BatchSession {
    pub fn new(weights: Weights, rows_of_call: usize, as_graph: bool) -> Self {
        Self {
            places: vec![SequencePlace::default(); weights.sequences],
            called: 0..0,
            weights,
            graphs: PrefillGraphs::default(),
            times: StepTimes::default(),
            as_graph,
            rows_of_call,
            examined: OutlierColumns::default(),
        }
    }

    fn all(&self) -> Range<usize> {
        0..self.places.len()
    }

    /// Puts places where the launches from now on find them.
    fn upload_places(&mut self) -> Result<()> {
        let place = |place: &SequencePlace| {
            DevicePlace::new(place.position as i32, place.encoded as i32, place.steps.cast_signed())
        };
        let places: Vec<DevicePlace> = self.places.iter().map(place).collect();
        Ok(self.weights.device.memcpy_htod(&places, &mut self.weights.places)?)
    }

    fn run(&mut self, shape: CallShape, input: &CallInput) -> Result<()> {
        let call = PrefillCall { weights: &self.weights, step: None, shape };
        let done = self.graphs.run(&call, input, self.as_graph)?;
        self.examined += done.examined;
        Ok(())
    }

    /// Checks that `tokens` of the sequences `which` fit behind their caches; returns the position of the longest.
    fn check_room(&self, which: &Range<usize>, tokens: &[u32]) -> Result<usize> {
        let (each, capacity) = (tokens.len() / which.len(), self.weights.capacity);
        let places = &self.places[which.clone()];
        let longest = places.iter().map(|place| place.position).max().unwrap_or(0);
        if tokens.is_empty() || longest + each > capacity {
            bail!("a call of {each} tokens at position {longest} does not fit a cache of {capacity}");
        }
        let differs = |of: fn(&SequencePlace) -> usize| places.iter().any(|place| of(place) != of(&places[0]));
        if each > 1 && (differs(|place| place.position) || differs(|place| place.encoded)) {
            let executor = lower::CALLS.executor;
            bail!("{executor} cannot run {each} tokens each behind sequences of different lengths in one call");
        }
        self.weights.check_tokens(tokens)?;
        Ok(longest)
    }

    /// Runs `tokens` of the sequences `which`, those of each together, and moves on behind them; they fit behind the caches.
    fn call(&mut self, kind: CallKind, which: Range<usize>, tokens: &[u32]) -> Result<()> {
        let SequencePlace { position, encoded, .. } = self.places[which.start];
        let each = tokens.len() / which.len();
        let batch = Batch { sequences: which.len(), positions: (position..position + each).into() };
        let input = CallInput::tokens(&self.weights.model, tokens, which.len(), encoded)?;
        self.upload_places()?;
        self.run(CallShape { kind, first: which.start, batch, encoded }, &input)?;
        for place in &mut self.places[which] {
            place.position += each;
            place.steps += u32::from(kind == CallKind::Prompt);
        }
        Ok(())
    }

    /// Runs a prompt of the sequences `which`, in calls of as many rows as may be.
    fn prompt(&mut self, which: Range<usize>, tokens: &[u32]) -> Result<()> {
        let longest = self.check_room(&which, tokens)?;
        let each = tokens.len() / which.len();
        self.times.restart();
        self.called = which.clone();
        self.weights.set_length(longest + each)?;
        if which == self.all() && each == 1 {
            self.weights.set_step_length(longest + 1)?;
            let tokens: Vec<i32> = tokens.iter().map(|token| token.cast_signed()).collect();
            self.upload_places()?;
            self.weights.device.memcpy_htod(&tokens, &mut self.weights.tokens)?;
            return self.step();
        }
        let (before, last) = prompt::parts(each, (self.rows_of_call / which.len()).max(1));
        let part_of = |part: Range<usize>| -> Vec<u32> {
            tokens.chunks(each).flat_map(|tokens| &tokens[part.clone()]).copied().collect()
        };
        for part in before {
            self.call(CallKind::Scored, which.clone(), &part_of(part))?;
        }
        self.call(CallKind::Prompt, which, &part_of(last))
    }

    /// Queues a step of all sequences; tokens and places are on the device.
    fn step(&mut self) -> Result<()> {
        let encoded = self.places.iter().map(|place| place.encoded).max().unwrap_or(0);
        let shape = CallShape::step(self.places.len(), self.weights.capacity, encoded);
        self.run(shape, &CallInput::OnDevice)?;
        for place in &mut self.places {
            place.position += 1;
            place.steps += 1;
        }
        Ok(())
    }

    /// Writes the last tokens of the sequences `which` to `next`, once they have arrived.
    fn wait(&self, which: Range<usize>, next: &mut [u32]) -> Result<()> {
        for (sequence, next) in which.zip(next) {
            *next = self.weights.token_ring.wait(self.places[sequence].steps, sequence, &self.weights.device)?;
        }
        Ok(())
    }

    fn encode_of(&mut self, which: Range<usize>, input: EncoderInput) -> Result<()> {
        let Some(encoder) = &self.weights.model.encoder else { bail!("this model has no encoder") };
        let each = input.of_each(which.len())?;
        let (rows, input) = match (encoder.input, input) {
            (EncoderInputKind::Tokens, EncoderInput::Tokens(tokens)) => {
                self.weights.check_tokens(tokens)?;
                (each, CallInput::tokens(&self.weights.model, tokens, which.len(), 0)?)
            }
            (EncoderInputKind::Picture(picture), EncoderInput::Pixels(pixels)) => {
                let rows = pixels.chunks(each.max(1)).map(|pixels| picture.patch_rows(pixels));
                let rows = rows.collect::<candle_core::Result<Vec<_>>>()?.concat();
                (picture.patches(), CallInput::Patches(rows.into_iter().map(f16::from_f32).collect()))
            }
            _ => bail!("this model's encoder reads another kind of input"),
        };
        let capacity = self.weights.encoder_capacity;
        if rows == 0 || rows > capacity {
            bail!("an encoder call of {rows} rows does not fit a cache of {capacity}");
        }
        let batch = Batch { sequences: which.len(), positions: (0..rows).into() };
        self.run(CallShape { kind: CallKind::Encoder, first: which.start, batch, encoded: rows }, &input)?;
        self.places[which].iter_mut().for_each(|place| place.encoded = rows);
        Ok(())
    }
}

impl Session for BatchSession {
    fn position(&self) -> usize {
        self.places.iter().map(|place| place.position).max().unwrap_or(0)
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.position(), "cannot rewind from {} to {position}", self.position());
        self.places.iter_mut().for_each(|place| place.position = place.position.min(position));
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        self.encode_of(self.all(), input)
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        lower::CALLS.check_batch(batch, tokens.len(), (self.places.len(), self.position()))?;
        self.prompt(self.all(), tokens)?;
        self.wait(self.all(), next)
    }

    fn prefill_one(&mut self, sequence: usize, input: Option<EncoderInput>, tokens: &[u32]) -> Result<u32> {
        let which = call::check_sequence(sequence, self.places.len())?;
        input.map_or(Ok(()), |input| self.encode_of(which.clone(), input))?;
        self.prompt(which.clone(), tokens)?;
        let mut next = [0];
        self.wait(which, &mut next)?;
        Ok(next[0])
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        let (position, capacity) = (self.position(), self.weights.capacity);
        if position + n > capacity {
            bail!("{n} steps at position {position} do not fit a cache of {capacity}");
        }
        self.weights.set_step_length(position + n)?;
        self.upload_places()?;
        self.called = self.all();
        let first: Vec<u32> = self.places.iter().map(|place| place.steps).collect();
        let mut tokens = vec![0; self.places.len()];
        let mut arrived = 0;
        for queued in 1..=n {
            // The times are taken out while the step runs, which needs all else.
            let mut times = std::mem::take(&mut self.times);
            let device = self.weights.device.clone();
            let stepped = times.around(&device, || self.step());
            self.times = times;
            stepped?;
            // Steps are queued at once; tokens are stamped as those of all sequences have arrived, and the ring buffer must not overflow.
            while arrived < queued && self.arrived(&first, arrived as u32 + 1, &mut tokens) {
                on_tokens(&tokens);
                arrived += 1;
            }
            if queued - arrived >= self.weights.token_ring.slots() / 2 {
                self.wait_step(&first, arrived as u32 + 1, &mut tokens)?;
                on_tokens(&tokens);
                arrived += 1;
            }
        }
        while arrived < n {
            self.wait_step(&first, arrived as u32 + 1, &mut tokens)?;
            on_tokens(&tokens);
            arrived += 1;
        }
        Ok(())
    }

    fn score(&mut self, _: &[u32], _: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        call::check_scored(self.places.len())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        if self.called.is_empty() {
            bail!("no token was run yet");
        }
        let vocab = self.weights.model.vocab;
        let called = self.called.start * vocab..self.called.end * vocab;
        Ok(self.weights.device.clone_dtoh(&self.weights.logits.slice(called))?)
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(self.weights.device.cuda_stream().synchronize()?)
    }

    fn device_step_ns(&mut self) -> Result<Vec<u64>> {
        self.synchronize()?;
        self.times.ns()
    }

    fn pool(&self) -> Option<&dyn MemoryPool> {
        Some(&self.weights.device)
    }

    fn footprint(&self) -> Footprint {
        self.weights.footprint(self.graphs.bytes(), self.places[0].encoded)
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        self.weights.outlier_columns(self.examined)
    }
}

impl BatchSession {
    /// Whether the tokens of step `step` behind `first` have all arrived; they are in `tokens` then.
    fn arrived(&self, first: &[u32], step: u32, tokens: &mut [u32]) -> bool {
        first.iter().zip(tokens).enumerate().all(|(sequence, (first, token))| {
            let arrived = self.weights.token_ring.token(first + step, sequence);
            *token = arrived.unwrap_or(*token);
            arrived.is_some()
        })
    }

    /// Waits for them.
    fn wait_step(&self, first: &[u32], step: u32, tokens: &mut [u32]) -> Result<()> {
        for (sequence, (first, token)) in first.iter().zip(tokens).enumerate() {
            *token = self.weights.token_ring.wait(first + step, sequence, &self.weights.device)?;
        }
        Ok(())
    }
}
