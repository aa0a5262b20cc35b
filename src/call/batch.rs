//! The sequences of a call.

use std::fmt::{Display, Formatter};
use std::ops::Range;

/// Sequences that one call runs, and the positions that it adds to each. A row of the call is one position of one sequence;
/// the rows of a sequence lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Batch {
    pub sequences: usize,
    /// The same for every sequence: what its cache holds before the call, up to what it holds after it.
    pub positions: Positions,
}

/// Positions of a sequence, from `start` up to `end`, which is not included. As [`Range`], but `Copy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Positions {
    pub start: usize,
    pub end: usize,
}

impl From<Range<usize>> for Positions {
    fn from(Range { start, end }: Range<usize>) -> Self {
        Self { start, end }
    }
}

impl Batch {
    /// One sequence.
    pub fn one(positions: Range<usize>) -> Self {
        Self { sequences: 1, positions: positions.into() }
    }

    /// A decode step of one sequence behind `position` tokens.
    pub fn step(position: usize) -> Self {
        Self::one(position..position + 1)
    }

    /// Rows of all sequences.
    pub fn rows(self) -> usize {
        self.sequences * (self.positions.end - self.positions.start)
    }

    /// Positions that the last row of a sequence sees, itself included.
    pub fn keys(self) -> usize {
        self.positions.end
    }
}

impl Display for Batch {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        let Self { sequences, positions: Positions { start, end } } = self;
        let plural = if *sequences == 1 { "" } else { "s" };
        write!(f, "a batch of {sequences} sequence{plural} at positions {start} to {}", end.saturating_sub(1))
    }
}
