//! Caches with a sliding window after a rewind. A ring holds the window of the last position alone: going back takes the rings
//! that were kept where a prompt began, or runs the tokens up to there again.

use std::ops::Range;

use super::arena::Arena;
use crate::plan::{CacheId, Model};

/// The state of a sequence's rings, and the positions that they can go back to.
pub(super) struct Rings {
    /// The caches that are rings.
    caches: Vec<CacheId>,
    /// The sequence, and how many there are: each has an equal part of a region.
    sequence: (usize, usize),
    /// The narrowest ring's positions, the first to be written over; 0 without one.
    window: usize,
    /// Tokens in the caches, and those behind them that a rewind has forgotten.
    history: Vec<u32>,
    /// The position behind the last one that the rings were written at.
    written: usize,
    /// The position that `saved` belongs to.
    mark: Option<usize>,
    /// Keys and values of each ring.
    saved: Vec<Vec<f32>>,
    /// The rings hold nothing of use: the history has to be run again.
    is_stale: bool,
}

impl Rings {
    /// Rings of a sequence of `capacity` positions.
    pub fn new(model: &Model, capacity: usize, sequence: (usize, usize)) -> Self {
        let caches: Vec<CacheId> = (0..model.caches.len()).map(CacheId).collect();
        let is_ring = |id: &CacheId| model.caches[id.0].window.is_some_and(|window| window < capacity);
        let caches: Vec<CacheId> = caches.into_iter().filter(is_ring).collect();
        let window = caches.iter().filter_map(|id| model.caches[id.0].window).min().unwrap_or(0);
        let history = Vec::with_capacity(if caches.is_empty() { 0 } else { capacity });
        Self { caches, sequence, window, history, written: 0, mark: None, saved: Vec::new(), is_stale: false }
    }

    pub fn bytes(&self) -> usize {
        4 * self.history.capacity() + 4 * self.saved.iter().map(Vec::len).sum::<usize>()
    }

    /// Before a prompt at `position`: keeps the rings, to which a later rewind may go back.
    pub fn save(&mut self, position: usize, memory: &Arena) {
        if self.caches.is_empty() || self.is_stale || position == 0 || self.mark == Some(position) {
            return;
        }
        let regions = regions(&self.caches);
        self.saved.resize(2 * self.caches.len(), Vec::new());
        for (saved, region) in self.saved.iter_mut().zip(regions) {
            saved.clear();
            let region = memory.region(region);
            saved.extend_from_slice(&region[own(self.sequence, region.len())]);
        }
        self.mark = Some(position);
    }

    /// After a call of `tokens` at `position`.
    pub fn extend(&mut self, position: usize, tokens: &[u32]) {
        if self.caches.is_empty() {
            return;
        }
        self.history.truncate(position);
        self.history.extend_from_slice(tokens);
        self.written = self.written.max(position + tokens.len());
    }

    /// After a step at `position` that the history does not know.
    pub fn touch(&mut self, position: usize) {
        self.written = self.written.max(position + 1);
    }

    /// Goes back to `position`.
    pub fn rewind(&mut self, position: usize, memory: &mut Arena) {
        self.mark = self.mark.filter(|mark| *mark <= position);
        if self.caches.is_empty() || self.is_stale {
            return;
        }
        // Position p reads from p − window + 1 on, whose slot is written again at p + 1.
        let is_whole = position == 0 || self.written <= self.window.max(position + 1);
        if position == 0 {
            self.written = 0;
        } else if !is_whole && self.mark == Some(position) {
            for (saved, region) in self.saved.iter().zip(regions(&self.caches)) {
                let region = memory.region_mut(region);
                let own = own(self.sequence, region.len());
                region[own].copy_from_slice(saved);
            }
            self.written = position;
        } else if !is_whole {
            self.is_stale = true;
        }
    }

    /// The tokens that have to be run from the first position on, before a call at `position`; takes the rings for empty.
    pub fn restart(&mut self, position: usize) -> Option<Vec<u32>> {
        if !std::mem::take(&mut self.is_stale) {
            return None;
        }
        (self.written, self.mark) = (0, None);
        Some(self.history[..position].to_vec()).filter(|tokens| !tokens.is_empty())
    }
}

/// The part of a region of `len` floats that is a sequence's.
fn own((sequence, sequences): (usize, usize), len: usize) -> Range<usize> {
    let each = len / sequences;
    sequence * each..(sequence + 1) * each
}

/// Regions of the caches' keys and values.
fn regions(caches: &[CacheId]) -> impl Iterator<Item = usize> {
    caches.iter().flat_map(|cache| [2 * cache.0, 2 * cache.0 + 1])
}
