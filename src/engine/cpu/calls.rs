//! The calls of a session: prompts in pieces, decode steps, and the encoder's, of all sequences or of one.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};

use super::run::{Call, SequencePlace};
use super::schedule::Step;
use super::{CALLS, CpuSession, Weights};
use crate::engine::EncoderInput;
use crate::lower::prompt;
use crate::plan::EncoderInputKind;

impl CpuSession {
    /// Angles of `rows` positions from `start` on, where they depend on the length that the sequence will have.
    fn turn_angles(&mut self, start: usize, rows: usize) {
        let Self { weights: Weights { model, angles, .. }, frequencies, .. } = self;
        let end = start + rows;
        for (rope, angles) in model.ropes.iter().zip(angles).filter(|(rope, _)| rope.by_length.is_some()) {
            rope.frequencies_into(end, frequencies);
            angles.set(start, (start..end).flat_map(|position| rope.turns_by(frequencies, position)));
        }
    }

    /// Checks that `tokens` of the sequences `which` fit behind their caches.
    pub(super) fn check_room(&self, which: &Range<usize>, tokens: &[u32]) -> Result<()> {
        let (each, capacity) = (tokens.len() / which.len().max(1), self.weights.capacity);
        let places = &self.places[which.clone()];
        let longest = places.iter().map(|place| place.position).max().unwrap_or(0);
        if tokens.is_empty() || longest + each > capacity {
            bail!("a call of {each} tokens at position {longest} does not fit a cache of {capacity}");
        }
        if each > 1 && places.iter().any(|place| place.position != longest) {
            bail!("{} cannot run {each} tokens each behind sequences of different lengths in one call", CALLS.executor);
        }
        self.weights.check_tokens(tokens)
    }

    /// Runs `tokens` of the sequences `which`, those of each together, through the decoder, which chooses the next ones.
    pub(super) fn step(&mut self, which: Range<usize>, tokens: &[u32]) -> Result<()> {
        self.check_room(&which, tokens)?;
        let steps = Arc::clone(&self.decoder.steps);
        let each = tokens.len() / which.len();
        let (before, last) = prompt::parts(each, self.rows_of_sequence(which.len()));
        let part_of = |part: Range<usize>| -> Vec<u32> {
            tokens.chunks(each).flat_map(|tokens| &tokens[part.clone()]).copied().collect()
        };
        for part in before {
            self.call(which.clone(), &part_of(part), body(&steps));
        }
        match last.start {
            0 => self.call(which.clone(), tokens, &steps),
            _ => self.call(which.clone(), &part_of(last), &steps),
        }
        self.last_tokens[which.clone()].copy_from_slice(&self.memory.chosen[..which.len()]);
        Ok(())
    }

    /// Rows of a sequence in a call of `sequences` of them at most.
    fn rows_of_sequence(&self, sequences: usize) -> usize {
        (self.rows_of_call / sequences).max(1)
    }

    /// Runs `tokens` of the sequences `which` through the first operations of the decoder, which are `steps`. They fit behind the caches.
    pub(super) fn call(&mut self, which: Range<usize>, tokens: &[u32], steps: &[Step]) {
        let each = tokens.len() / which.len();
        let _pinned = self.pool.pin_caller();
        for sequence in which.clone() {
            if let Some(before) = self.rings[sequence].restart(self.places[sequence].position) {
                self.run_again(sequence, &before, steps);
            }
            self.turn_angles(self.places[sequence].position, each);
        }
        let Self { pool, weights, decoder, memory, places, rings, .. } = self;
        let call = Call::decoder(&places[which.clone()], tokens);
        let outcome = decoder.run(steps, weights, pool, memory, call);
        for (sequence, tokens) in which.clone().zip(tokens.chunks(each)) {
            rings[sequence].extend(places[sequence].position, tokens);
            places[sequence].position += each;
        }
        self.outliers += outcome.outliers;
        self.called = which.len();
    }

    /// Runs the tokens `before` the end of a sequence once more, whose rings hold nothing of use.
    fn run_again(&mut self, sequence: usize, before: &[u32], steps: &[Step]) {
        let place = self.places[sequence];
        for (at, part) in before.chunks(self.rows_of_call).enumerate() {
            let first = at * self.rows_of_call;
            self.turn_angles(first, part.len());
            let Self { pool, weights, decoder, memory, rings, .. } = self;
            decoder.run(
                steps,
                weights,
                pool,
                memory,
                Call::decoder(&[SequencePlace { position: first, ..place }], part),
            );
            rings[sequence].extend(first, part);
        }
    }

    /// Runs the encoder over `rows` rows of each of the sequences `which`.
    fn encoder_call(&mut self, which: Range<usize>, tokens: &[u32], patches: &[f32], rows: usize) -> Result<()> {
        let capacity = self.weights.encoder_capacity;
        if rows == 0 || rows > capacity {
            bail!("an encoder call of {rows} rows does not fit a cache of {capacity}");
        }
        self.weights.check_tokens(tokens)?;
        let Self { pool, weights, encoder, memory, places, .. } = self;
        let Some(encoder) = encoder else { bail!("this model has no encoder") };
        places[which.clone()].iter_mut().for_each(|place| place.encoded = rows);
        let _pinned = pool.pin_caller();
        let steps = Arc::clone(&encoder.steps);
        encoder.run(&steps, weights, pool, memory, Call::encoder(&places[which], rows, tokens, patches));
        Ok(())
    }

    /// The encoder over the input of the sequences `which`, one behind the other.
    pub(super) fn encode_of(&mut self, which: Range<usize>, input: EncoderInput) -> Result<()> {
        let kind = self.weights.model.encoder.as_ref().map(|encoder| encoder.input);
        match (kind, input) {
            (Some(EncoderInputKind::Tokens), EncoderInput::Tokens(tokens)) => {
                let rows = input.of_each(which.len())?;
                self.encoder_call(which, tokens, &[], rows)
            }
            (Some(EncoderInputKind::Picture(picture)), EncoderInput::Pixels(pixels)) => {
                let each = input.of_each(which.len())?;
                let patches = pixels.chunks(each.max(1)).map(|pixels| picture.patch_rows(pixels));
                let patches = patches.collect::<candle_core::Result<Vec<_>>>()?.concat();
                self.encoder_call(which, &[], &patches, picture.patches())
            }
            (Some(_), _) => bail!("this model's encoder reads another kind of input"),
            (None, _) => bail!("this model has no encoder"),
        }
    }

    pub(super) fn all(&self) -> Range<usize> {
        0..self.places.len()
    }

    /// Before a prompt of the sequences `which`.
    pub(super) fn save_rings(&mut self, which: Range<usize>) {
        for (rings, place) in self.rings[which.clone()].iter_mut().zip(&self.places[which]) {
            rings.save(place.position, &self.memory.caches);
        }
    }
}

/// Steps before those of the last row alone.
pub(super) fn body(steps: &[Step]) -> &[Step] {
    &steps[..steps.iter().position(|step| matches!(step, Step::LastRow(_))).unwrap_or(steps.len())]
}
