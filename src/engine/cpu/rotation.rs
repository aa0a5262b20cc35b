//! Rotary angles of every position, as the length of the sequence makes them.

use crate::call::Batch;
use crate::kernels::cpu::rope::Angles;
use crate::plan::{Rope, RopeByLength};

/// The angles of one rope.
pub(super) struct Rotation {
    rope: Rope,
    /// Of each position in a call that ends with it: all that a decode step needs.
    steps: Angles,
    /// LongRoPE: of each position in a sequence beyond the original length.
    long: Option<Angles>,
    /// Dynamic NTK: of the rows of a call of several that ends beyond the original length, and the first one's position.
    call: Option<(usize, Angles)>,
}

impl Rotation {
    /// Tables for `capacity` positions.
    pub fn new(rope: &Rope, capacity: usize) -> Self {
        let half = rope.rotary_dim / 2;
        let table = |length: &dyn Fn(usize) -> usize| {
            let turns = (0..capacity).flat_map(|position| turns(rope, length(position), position));
            Angles::new(turns, half)
        };
        let (steps, long) = match &rope.by_length {
            None => (Angles::new((0..capacity).flat_map(|position| rope.turns(position)), half), None),
            Some(RopeByLength::Switch { original, .. }) => {
                let long = (capacity > *original).then(|| table(&|_| original + 1));
                (Angles::new((0..capacity).flat_map(|position| rope.turns(position)), half), long)
            }
            Some(RopeByLength::DynamicNtk { .. }) => (table(&|position| position + 1), None),
        };
        Self { rope: rope.clone(), steps, long, call: None }
    }

    /// Prepares for the rows of `batch`. Only calls of several rows allocate.
    pub fn begin(&mut self, batch: Batch) {
        self.call = match &self.rope.by_length {
            Some(RopeByLength::DynamicNtk { original, .. }) if batch.rows() > 1 && batch.keys() > *original => {
                let (rope, start) = (&self.rope, batch.positions.start);
                let frequencies = rope.frequencies(batch.keys());
                let turns = (start..batch.keys()).flat_map(|position| rope.turns_by(&frequencies, position));
                Some((start, Angles::new(turns, rope.rotary_dim / 2)))
            }
            Some(RopeByLength::DynamicNtk { .. } | RopeByLength::Switch { .. }) | None => None,
        };
    }

    /// Cosines and sines of a position in the call of `batch`.
    pub fn at(&self, batch: Batch, position: usize) -> (&[f32], &[f32]) {
        if let Some((start, angles)) = &self.call {
            return angles.at(position - start);
        }
        match (&self.rope.by_length, &self.long) {
            (Some(RopeByLength::Switch { original, .. }), Some(long)) if batch.keys() > *original => long.at(position),
            _ => self.steps.at(position),
        }
    }
}

/// Cosine and sine of each pair at `position` of a sequence of `length`.
fn turns(rope: &Rope, length: usize, position: usize) -> Vec<(f32, f32)> {
    rope.turns_by(&rope.frequencies(length), position).collect()
}
