//! Regions of floats in one allocation, so that a call shares all of them with its workers without allocating.

use std::ops::Range;

use crate::kernels::cpu::pages::Pages;
use crate::kernels::cpu::shared::SharedSlice;

/// Zeroed regions, one behind the other, in huge pages: attention streams caches as products stream weights.
pub struct Arena {
    memory: Pages,
    /// The end of each region.
    ends: Vec<usize>,
}

impl Arena {
    pub fn new(lens: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let ends: Vec<usize> = lens
            .into_iter()
            .map(|len| {
                end += len;
                end
            })
            .collect();
        Self { memory: Pages::required(end * size_of::<f32>()), ends }
    }

    /// Floats of all regions.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn region(&self, index: usize) -> &[f32] {
        &self.memory.as_values()[region(&self.ends, index)]
    }

    pub fn region_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.memory.as_values_mut()[region(&self.ends, index)]
    }

    pub fn share(&mut self) -> SharedArena<'_> {
        SharedArena { floats: SharedSlice::new(self.memory.as_values_mut()), ends: &self.ends }
    }
}

impl Default for Arena {
    /// No region.
    fn default() -> Self {
        Self::new([])
    }
}

/// An arena that the workers of a call write in disjoint parts.
pub struct SharedArena<'a> {
    /// All regions.
    pub floats: SharedSlice<'a, f32>,
    ends: &'a [usize],
}

impl SharedArena<'_> {
    /// The start of a region in `floats`.
    pub fn start(&self, index: usize) -> usize {
        region(self.ends, index).start
    }

    pub fn region(&self, index: usize) -> SharedSlice<'_, f32> {
        self.floats.part(region(self.ends, index))
    }
}

fn region(ends: &[usize], index: usize) -> Range<usize> {
    let start = if index == 0 { 0 } else { ends[index - 1] };
    start..ends[index]
}
