//! Which buffers may share memory: a buffer lives from the first operation that writes it to the last that reads it, and
//! buffers whose lives do not meet take the same slot.

use super::{Plan, Rows};

/// Memory for the buffers of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Storage {
    /// Slot of each buffer.
    pub slot_of: Vec<usize>,
    pub slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slot {
    /// Elements a row: the widest buffer of the slot.
    pub width: usize,
    pub rows: Rows,
}

/// The moments between which a buffer holds its values. Operation `i` has two: at `2 i` it has read what it needs no more,
/// at `2 i + 1` it has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    pub first: usize,
    pub last: usize,
}

impl Lifetime {
    const NEVER: Self = Self { first: usize::MAX, last: 0 };

    /// The last operation that touches the buffer.
    pub fn last_op(self) -> usize {
        self.last / 2
    }
}

impl Plan {
    pub fn lifetimes(&self) -> Vec<Lifetime> {
        let mut lives = vec![Lifetime::NEVER; self.buffers.len()];
        for (index, op) in self.ops.iter().enumerate() {
            let early = op.reads_before_writing();
            for buffer in op.reads().into_iter().chain(op.writes()) {
                let moment = if early.contains(&buffer) { 2 * index } else { 2 * index + 1 };
                let Lifetime { first, last } = lives[buffer.0];
                lives[buffer.0] = Lifetime { first: first.min(moment), last: last.max(moment) };
            }
        }
        lives
    }

    /// Assigns slots first come, first served; the logits keep theirs to the end, since the session reads them later.
    pub fn storage(&self) -> Storage {
        let lives = self.lifetimes();
        let mut order: Vec<usize> = (0..self.buffers.len()).collect();
        order.sort_by_key(|&buffer| lives[buffer].first);
        let mut slots: Vec<(Slot, usize)> = Vec::new();
        let mut slot_of = vec![0; self.buffers.len()];
        for buffer in order {
            let Lifetime { first, last } = lives[buffer];
            let (width, rows) = (self.buffers[buffer].width, self.buffers[buffer].rows);
            let free = slots.iter().position(|(slot, busy_to)| slot.rows == rows && *busy_to < first);
            let index = free.unwrap_or_else(|| {
                slots.push((Slot { width, rows }, last));
                slots.len() - 1
            });
            let (slot, busy_to) = &mut slots[index];
            slot.width = slot.width.max(width);
            *busy_to = last;
            slot_of[buffer] = index;
        }
        Storage { slot_of, slots: slots.into_iter().map(|(slot, _)| slot).collect() }
    }
}
