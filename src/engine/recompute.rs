//! Computes a cache anew where its keys have another rotation than the next call needs.
//!
//! LongRoPE rotates every position of a sequence by the frequencies of its length ([`RopeByLength::Switch`]). As transformers'
//! `generate` does, the call that first exceeds the original length runs all tokens from the first on. The step at which that
//! happens takes as long as a prefill of so many tokens.

use anyhow::{Result, bail};

use super::{Alone, EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup, memory};
use crate::call::Batch;
use crate::plan::RopeByLength;

/// `loaded`, as it is where no length changes the rotation of keys that are in the cache.
pub fn wrapped(setup: &Setup, loaded: Loaded) -> Loaded {
    let original = setup.model.ropes.iter().find_map(|rope| match rope.by_length {
        Some(RopeByLength::Switch { original, .. }) => Some(original),
        Some(RopeByLength::DynamicNtk { .. }) | None => None,
    });
    match original {
        Some(original) => {
            let inner = loaded.session;
            // Room for all: a decode step allocates nothing.
            let tokens = (0..setup.sequences).map(|_| Vec::with_capacity(setup.capacity)).collect();
            let session = Recompute { inner, original, tokens, next: Vec::new(), is_long: false };
            Loaded { session: Box::new(session), ..loaded }
        }
        None => loaded,
    }
}

struct Recompute {
    inner: Box<dyn Session>,
    /// Longest sequence that the short frequencies hold for.
    original: usize,
    /// Those in the cache, of each sequence.
    tokens: Vec<Vec<u32>>,
    /// Chosen last, of each sequence.
    next: Vec<u32>,
    /// Set where keys in the cache have the rotation of long sequences.
    is_long: bool,
}

/// A call in the place of the one that was asked for.
struct Instead {
    batch: Batch,
    tokens: Vec<u32>,
    /// Rows of each sequence that were run before.
    before: usize,
}

impl Recompute {
    /// Takes `tokens`, those of a sequence together, behind the ones in the cache, and gives what must be run.
    fn extend(&mut self, batch: Batch, tokens: &[u32]) -> Instead {
        let before = self.inner.position();
        let each = batch.rows() / batch.sequences.max(1);
        self.tokens.resize(batch.sequences, Vec::new());
        for (known, new) in self.tokens.iter_mut().zip(tokens.chunks(each.max(1))) {
            known.extend_from_slice(new);
        }
        let is_long = before + each > self.original;
        let is_same = is_long == self.is_long || before == 0;
        self.is_long = is_long;
        if is_same {
            return Instead { batch, tokens: tokens.to_vec(), before: 0 };
        }
        self.inner.rewind(0);
        let batch = Batch { positions: (0..before + each).into(), ..batch };
        Instead { batch, tokens: self.tokens.concat(), before }
    }
}

impl Session for Recompute {
    fn position(&self) -> usize {
        self.inner.position()
    }

    fn rewind(&mut self, position: usize) {
        self.inner.rewind(position);
        self.tokens.iter_mut().for_each(|tokens| tokens.truncate(position));
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        self.inner.encode(input)
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        let Instead { batch, tokens, before: _ } = self.extend(batch, tokens);
        self.inner.prefill_batch(batch, &tokens, next)?;
        self.next = next.to_vec();
        Ok(())
    }

    /// As transformers does, all sequences have the frequencies of the longest: those of one alone are not known while the others follow.
    fn prefill_one(&mut self, sequence: usize, input: Option<EncoderInput>, tokens: &[u32]) -> Result<u32> {
        let before = self.tokens.get(sequence).map_or(0, Vec::len);
        if self.is_long || before + tokens.len() > self.original {
            bail!("sequences of different lengths beyond {} positions rotate by other frequencies", self.original);
        }
        let next = self.inner.prefill_one(sequence, input, tokens)?;
        self.tokens[sequence].extend_from_slice(tokens);
        self.next.resize(self.tokens.len(), 0);
        self.next[sequence] = next;
        Ok(next)
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        let mut left = n;
        while left > 0 {
            let position = self.inner.position();
            let steps = match self.is_long {
                true => left,
                false => left.min(self.original.saturating_sub(position)),
            };
            if steps == 0 {
                if self.tokens.iter().any(|tokens| tokens.len() != position) {
                    bail!(
                        "sequences of different lengths beyond {} positions rotate by other frequencies",
                        self.original
                    );
                }
                let mut next = self.next.clone();
                let batch = Batch { sequences: next.len(), positions: (position..position + 1).into() };
                self.prefill_batch(batch, &self.next.clone(), &mut next)?;
                on_tokens(&next);
                left -= 1;
                continue;
            }
            let Self { inner, tokens, next, .. } = self;
            inner.decode_batch(steps, &mut |chosen| {
                tokens.iter_mut().zip(next.iter()).for_each(|(tokens, next)| tokens.push(*next));
                next.copy_from_slice(chosen);
                on_tokens(chosen);
            })?;
            left -= steps;
        }
        Ok(())
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let position = self.inner.position();
        let Instead { tokens, before, .. } = self.extend(Batch::one(position..position + tokens.len()), tokens);
        self.inner.score(&tokens, &mut |row, logits| {
            if row >= before {
                on_row(row - before, logits);
            }
        })
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        self.inner.logits()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }

    fn device_step_ns(&mut self) -> Result<Vec<u64>> {
        self.inner.device_step_ns()
    }

    fn pool(&self) -> Option<&dyn memory::MemoryPool> {
        self.inner.pool()
    }

    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        self.inner.outlier_columns()
    }

    fn alone(&mut self, position: usize) -> Result<Option<Alone>> {
        self.inner.alone(position)
    }
}
