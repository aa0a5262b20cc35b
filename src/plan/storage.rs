//! Which buffers may share memory: a buffer lives from the first operation that writes it to the last that reads it, and
//! buffers whose lives do not meet take the same slot.

use super::{BufferId, Op, Plan, Rows};

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

impl Op {
    /// Buffers that the operation reads or writes; in-place ones are listed once.
    pub fn buffers(&self) -> Vec<BufferId> {
        match self {
            Op::Embed { out, .. } | Op::Patches { out } => vec![*out],
            Op::AddRows { x, .. } | Op::Features { x } => vec![*x],
            Op::Norm { x, out, .. } | Op::LastRow { x, out, .. } => vec![*x, *out],
            Op::Linear { x, parts } => std::iter::once(*x).chain(parts.iter().map(|part| part.out)).collect(),
            Op::Append { k, v, rotate, .. } => {
                [Some(*k), Some(*v), rotate.map(|r| r.q)].into_iter().flatten().collect()
            }
            Op::Attention { q, out, .. } => vec![*q, *out],
            Op::Activate { gate, up, out, .. } => [Some(*gate), *up, Some(*out)].into_iter().flatten().collect(),
            Op::Add { a, b, out } => vec![*a, *b, *out],
            Op::Argmax { logits } => vec![*logits],
        }
    }
}

impl Plan {
    /// First and last operation that touch each buffer.
    pub fn lifetimes(&self) -> Vec<(usize, usize)> {
        let mut lives = vec![(usize::MAX, 0); self.buffers.len()];
        for (index, op) in self.ops.iter().enumerate() {
            for buffer in op.buffers() {
                let life = &mut lives[buffer.0];
                *life = (life.0.min(index), index);
            }
        }
        lives
    }

    /// Assigns slots first come, first served; the logits keep theirs to the end, since the session reads them later.
    pub fn storage(&self) -> Storage {
        let lives = self.lifetimes();
        let mut order: Vec<usize> = (0..self.buffers.len()).collect();
        order.sort_by_key(|&buffer| lives[buffer].0);
        let mut slots: Vec<(Slot, usize)> = Vec::new();
        let mut slot_of = vec![0; self.buffers.len()];
        for buffer in order {
            let (first, last) = lives[buffer];
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
