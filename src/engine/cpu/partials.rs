//! Partial results of an attention whose positions are split over the workers.

use std::ops::Range;

use crate::kernels::cpu::attention::Partial;
use crate::kernels::cpu::shared::SharedSlice;
use crate::plan::{Model, Op};

/// [`PartSums`] that the workers of a call share: each writes its own, and all read all behind a barrier.
pub(super) struct SharedParts<'a> {
    outs: SharedSlice<'a, f32>,
    partials: SharedSlice<'a, Partial>,
    sums: SharedSlice<'a, Partial>,
    workers: usize,
}

/// Partial attention of each worker over its part of the positions, before these are merged.
pub(super) struct PartSums {
    /// `[workers][width]`
    outs: Vec<f32>,
    /// `[workers][queries]`
    partials: Vec<Partial>,
    /// Sums of one head on each worker, where its parts are merged: `[workers][queries]`.
    sums: Vec<Partial>,
    workers: usize,
}

impl PartSums {
    /// Room for the widest attention of the model's plans.
    pub fn new(model: &Model, workers: usize) -> Self {
        let (mut width, mut queries) = (0, 0);
        for plan in model.plans() {
            for op in &plan.ops {
                if let Op::Attention(spec) = op {
                    let columns = plan.buffers[spec.q.0].width;
                    width = width.max(columns);
                    queries = queries.max(columns / model.caches[spec.cache.0].head_dim);
                }
            }
        }
        let partials = vec![Partial::EMPTY; workers * queries];
        Self { outs: vec![0.0; workers * width], sums: partials.clone(), partials, workers }
    }

    pub fn floats(&self) -> usize {
        self.outs.len() + (size_of::<Partial>() / size_of::<f32>()) * (self.partials.len() + self.sums.len())
    }

    pub(super) fn share(&mut self) -> SharedParts<'_> {
        SharedParts {
            outs: SharedSlice::new(&mut self.outs),
            partials: SharedSlice::new(&mut self.partials),
            sums: SharedSlice::new(&mut self.sums),
            workers: self.workers,
        }
    }
}

impl SharedParts<'_> {
    /// The ranges of a worker's part of attention over `width` elements in heads of `d` lies.
    fn ranges(&self, worker: usize, width: usize, d: usize) -> (Range<usize>, Range<usize>) {
        let (outs, partials) = (self.outs.len() / self.workers, self.partials.len() / self.workers);
        (worker * outs..worker * outs + width, worker * partials..worker * partials + width / d)
    }

    /// # Safety
    /// Until the borrow ends no other thread may touch this worker's part.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn of_worker_mut(&self, worker: usize, width: usize, d: usize) -> (&mut [f32], &mut [Partial]) {
        let (outs, partials) = self.ranges(worker, width, d);
        // SAFETY: the caller's promise.
        unsafe { (self.outs.range_mut(outs), self.partials.range_mut(partials)) }
    }

    /// # Safety
    /// See [`SharedParts::of_worker_mut`].
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn sums_mut(&self, worker: usize, queries: usize) -> &mut [Partial] {
        let start = worker * (self.sums.len() / self.workers);
        // SAFETY: the caller's promise.
        unsafe { self.sums.range_mut(start..start + queries) }
    }

    /// # Safety
    /// Until the borrow ends no thread may write this worker's part.
    pub(super) unsafe fn of_worker(&self, worker: usize, width: usize, d: usize) -> (&[f32], &[Partial]) {
        let (outs, partials) = self.ranges(worker, width, d);
        // SAFETY: the caller's promise.
        unsafe { (self.outs.range(outs), self.partials.range(partials)) }
    }
}
