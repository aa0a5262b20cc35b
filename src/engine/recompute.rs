//! Computes a cache anew where its keys have another rotation than the next call needs.
//!
//! LongRoPE rotates every position of a sequence by the frequencies of its length ([`RopeByLength::Switch`]). As transformers'
//! `generate` does, the call that first exceeds the original length runs all tokens from the first on. The step at which that
//! happens takes as long as a prefill of so many tokens.

use anyhow::Result;

use super::{Alone, EncoderInput, Footprint, Loaded, OutlierColumns, Session, memory};
use crate::plan::{Rope, RopeByLength};

/// `loaded`, as it is where no length changes the rotation of keys that are in the cache.
pub fn wrapped(ropes: &[Rope], loaded: Loaded) -> Loaded {
    let original = ropes.iter().find_map(|rope| match rope.by_length {
        Some(RopeByLength::Switch { original, .. }) => Some(original),
        Some(RopeByLength::DynamicNtk { .. }) | None => None,
    });
    match original {
        Some(original) => {
            let inner = loaded.session;
            let session = Recompute { inner, original, tokens: Vec::new(), next: 0, is_long: false };
            Loaded { session: Box::new(session), ..loaded }
        }
        None => loaded,
    }
}

struct Recompute {
    inner: Box<dyn Session>,
    /// Longest sequence that the short frequencies hold for.
    original: usize,
    /// Those in the cache.
    tokens: Vec<u32>,
    /// Chosen last.
    next: u32,
    /// Whether keys in the cache have the rotation of long sequences.
    is_long: bool,
}

impl Recompute {
    /// Takes `tokens` behind those in the cache. Returns what the next call must run, and how many rows of it were run before.
    fn extend(&mut self, tokens: &[u32]) -> (Vec<u32>, usize) {
        let before = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        let is_long = self.tokens.len() > self.original;
        if is_long == self.is_long || before == 0 {
            self.is_long = is_long;
            return (tokens.to_vec(), 0);
        }
        self.is_long = is_long;
        self.inner.rewind(0);
        (self.tokens.clone(), before)
    }
}

impl Session for Recompute {
    fn position(&self) -> usize {
        self.inner.position()
    }

    fn rewind(&mut self, position: usize) {
        self.inner.rewind(position);
        self.tokens.truncate(position);
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        self.inner.encode(input)
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        let (call, _) = self.extend(tokens);
        self.next = self.inner.prefill(&call)?;
        Ok(self.next)
    }

    fn decode(&mut self, n: usize, on_token: &mut dyn FnMut(u32)) -> Result<()> {
        let mut left = n;
        while left > 0 {
            let position = self.tokens.len();
            let steps = match self.is_long {
                true => left,
                false => left.min(self.original.saturating_sub(position)),
            };
            if steps == 0 {
                let token = self.prefill(&[self.next])?;
                on_token(token);
                left -= 1;
                continue;
            }
            let Self { inner, tokens, next, .. } = self;
            inner.decode(steps, &mut |token| {
                tokens.push(*next);
                *next = token;
                on_token(token);
            })?;
            left -= steps;
        }
        Ok(())
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let (call, before) = self.extend(tokens);
        self.inner.score(&call, &mut |row, logits| {
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

    fn pool(&self) -> Option<&dyn memory::Pool> {
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
