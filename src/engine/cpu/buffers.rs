//! The buffers of a call, as its workers share them.

use std::ops::Range;

use super::arena::SharedArena;
use crate::call::Batch;
use crate::plan::{BufferId, Columns, Plan, Storage};

/// Rows of every buffer in the slots of a program.
pub(super) struct Buffers<'a> {
    pub plan: &'a Plan,
    pub storage: &'a Storage,
    pub slots: SharedArena<'a>,
    pub batch: Batch,
}

impl Buffers<'_> {
    pub fn width(&self, buffer: BufferId) -> usize {
        self.plan.buffers[buffer.0].width
    }

    /// Rows of this call.
    pub fn rows(&self, buffer: BufferId) -> usize {
        self.plan.rows(buffer, self.batch)
    }

    /// The index of a row's first element in the slots.
    fn start(&self, buffer: BufferId, row: usize) -> usize {
        let Columns { start, stride } = self.storage.columns[buffer.0];
        self.slots.start(self.storage.slot_of[buffer.0]) + row * stride + start
    }

    /// `columns` of a row, for reading.
    pub fn part(&self, buffer: BufferId, row: usize, columns: Range<usize>) -> &[f32] {
        let start = self.start(buffer, row);
        // SAFETY: a step reads what earlier steps wrote; `needs_barrier` put a barrier where the split changed, and
        // `Plan::storage` gives no two buffers that live at once the same slot.
        unsafe { self.slots.floats.range(start + columns.start..start + columns.end) }
    }

    /// `columns` of a row, for writing by the one worker whose share they are.
    #[allow(clippy::mut_from_ref)]
    pub fn part_mut(&self, buffer: BufferId, row: usize, columns: Range<usize>) -> &mut [f32] {
        let start = self.start(buffer, row);
        // SAFETY: the split of the step gives these columns of this row to one worker, and no other buffer that is read
        // in the step shares the slot.
        unsafe { self.slots.floats.range_mut(start + columns.start..start + columns.end) }
    }

    pub fn row_mut(&self, buffer: BufferId, row: usize) -> &mut [f32] {
        self.part_mut(buffer, row, 0..self.width(buffer))
    }

    /// All rows, in a step in which nobody writes them.
    pub fn whole(&self, buffer: BufferId) -> &[f32] {
        self.part(buffer, 0, 0..self.rows(buffer) * self.width(buffer))
    }

    /// All rows: for worker 0 in a step of its own.
    pub fn whole_mut(&self, buffer: BufferId) -> &mut [f32] {
        self.part_mut(buffer, 0, 0..self.rows(buffer) * self.width(buffer))
    }
}
