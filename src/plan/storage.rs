//! Memory that buffers share: a buffer lives from the first operation that writes it to the last that reads it, and
//! buffers whose lives do not meet take the same slot.

use super::{LinearSpec, Op, Plan, Rows};

/// Memory for the buffers of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Storage {
    /// Slot of each buffer.
    pub slot_of: Vec<usize>,
    pub slots: Vec<Slot>,
    /// The place of each buffer in a row of its slot.
    pub columns: Vec<Columns>,
}

/// Columns of a slot that a buffer takes: all of them, or those that its part of a fused matrix gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    pub start: usize,
    /// Elements from one row of the buffer to the next.
    pub stride: usize,
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

    /// Buffers that lie side by side, since one matrix gives them all, and each other buffer by itself.
    fn groups(&self) -> Vec<Vec<(usize, Columns)>> {
        let mut groups: Vec<Vec<(usize, Columns)>> = Vec::new();
        let mut grouped = vec![false; self.buffers.len()];
        for op in &self.ops {
            let Op::Linear(LinearSpec { x: _, parts }) = op else { continue };
            let fused = parts.iter().filter_map(|part| part.rows.map(|rows| (part, rows)));
            let stride = fused.clone().map(|(_, rows)| rows.start + rows.len).max().unwrap_or(0);
            let group: Vec<_> = fused.map(|(part, rows)| (part.out.0, Columns { start: rows.start, stride })).collect();
            group.iter().for_each(|(buffer, _)| grouped[*buffer] = true);
            groups.extend((!group.is_empty()).then_some(group));
        }
        let alone = (0..self.buffers.len()).filter(|buffer| !grouped[*buffer]);
        groups.extend(alone.map(|buffer| vec![(buffer, Columns { start: 0, stride: self.buffers[buffer].width })]));
        groups
    }

    /// Lifetimes where threads share each operation and meet only where one needs what others wrote. A thread that is done with its rows of a
    /// product goes on to the activation or the addition behind it while others still read what is multiplied, which therefore lives on. So do
    /// keys and values that are appended: a thread that has appended its heads attends while others still append theirs.
    fn lifetimes_over_threads(&self) -> Vec<Lifetime> {
        let mut lives = self.lifetimes();
        for (index, op) in self.ops.iter().enumerate() {
            for buffer in op.reads_before_writing() {
                let last = &mut lives[buffer.0].last;
                *last = (*last).max(2 * index + 1);
            }
            let Op::Linear(spec) = op else { continue };
            let by_element = |op: &&Op| matches!(op, Op::Activation(_) | Op::Add(_));
            let end = index + self.ops[index + 1..].iter().take_while(by_element).count();
            let last = &mut lives[spec.x.0].last;
            *last = (*last).max(2 * end + 1);
        }
        lives
    }

    /// Assigns slots first come, first served; the logits keep theirs to the end, since the session reads them later.
    pub fn storage(&self) -> Storage {
        let lives = self.lifetimes_over_threads();
        let life = |group: &[(usize, Columns)]| {
            let lives = group.iter().map(|(buffer, _)| lives[*buffer]);
            lives.fold(Lifetime::NEVER, |all, one| Lifetime {
                first: all.first.min(one.first),
                last: all.last.max(one.last),
            })
        };
        let mut groups = self.groups();
        groups.sort_by_key(|group| (life(group).first, group[0].0));
        let mut slots: Vec<(Slot, usize)> = Vec::new();
        let mut slot_of = vec![0; self.buffers.len()];
        let mut columns = vec![Columns { start: 0, stride: 0 }; self.buffers.len()];
        for group in groups {
            let Lifetime { first, last } = life(&group);
            let (width, rows) = (group[0].1.stride, self.buffers[group[0].0].rows);
            let free = slots.iter().position(|(slot, busy_to)| slot.rows == rows && *busy_to < first);
            let index = free.unwrap_or_else(|| {
                slots.push((Slot { width, rows }, last));
                slots.len() - 1
            });
            let (slot, busy_to) = &mut slots[index];
            slot.width = slot.width.max(width);
            *busy_to = last;
            for (buffer, of_buffer) in group {
                (slot_of[buffer], columns[buffer]) = (index, of_buffer);
            }
        }
        Storage { slot_of, slots: slots.into_iter().map(|(slot, _)| slot).collect(), columns }
    }
}
