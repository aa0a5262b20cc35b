//! The sequences of a call.

use std::fmt::{Display, Formatter};
use std::ops::Range;

/// Sequences that one call runs, and the positions that it adds to each. A row of the call is one position of one sequence;
/// the rows of a sequence lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Batch {
    pub sequences: usize,
    /// What the cache of the longest sequence holds before the call, up to what it holds after it. Each sequence is longer by as much after it.
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
        self.sequences * self.rows_each()
    }

    /// Rows of each sequence.
    pub fn rows_each(self) -> usize {
        self.positions.end - self.positions.start
    }

    /// `1 sequence`, `4 sequences`.
    pub(super) fn sequences_text(self) -> String {
        format!("{} sequence{}", self.sequences, if self.sequences == 1 { "" } else { "s" })
    }

    /// Positions that the last row of a sequence sees, itself included.
    pub fn keys(self) -> usize {
        self.positions.end
    }
}

impl Display for Batch {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        let Positions { start, end } = self.positions;
        write!(f, "a batch of {} at positions {start} to {}", self.sequences_text(), end.saturating_sub(1))
    }
}
