//! One allocation for all buffers of a call. A dry run of the call, without a device, records the size and the lifetime of each buffer.
//! Buffers whose lifetimes overlap get disjoint bytes, others may share theirs. A call of the same shape finds each buffer at the same
//! offset.

use std::cell::{Cell, RefCell};

use candle_core::{Error, bail};

/// Alignment of the device's own allocations.
const ALIGNMENT: usize = 256;

/// The offsets of a call's buffers, in the order in which the call takes them.
#[derive(Debug, Default)]
pub struct Layout {
    places: Vec<Place>,
    bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    offset: usize,
    bytes: usize,
}

/// A buffer of a dry run, and the times at which it is taken and given back, by a clock that ticks at each.
#[derive(Debug, Clone, Copy)]
struct Life {
    bytes: usize,
    begin: usize,
    end: usize,
}

/// The allocation that a call takes its buffers from.
pub struct Arena<'a> {
    /// Address of the memory on the device.
    base: u64,
    /// `None` in a dry run.
    layout: Option<&'a Layout>,
    lives: RefCell<Vec<Life>>,
    taken: Cell<usize>,
    clock: Cell<usize>,
}

/// A buffer, until it is dropped.
pub struct Region<'a> {
    pub address: u64,
    number: usize,
    arena: &'a Arena<'a>,
}

impl Layout {
    /// The layout of the buffers that `dry_run` takes.
    ///
    /// # Errors
    /// If `dry_run` fails.
    pub fn of<E>(dry_run: impl FnOnce(&Arena) -> Result<(), E>) -> Result<Self, E> {
        let arena = Arena::new(0, None);
        dry_run(&arena)?;
        Ok(Self::placed(&arena.lives.borrow()))
    }

    /// The largest first, each at the lowest place that is free as long as it lives.
    fn placed(lives: &[Life]) -> Self {
        let mut order: Vec<usize> = (0..lives.len()).collect();
        order.sort_by_key(|&number| std::cmp::Reverse(lives[number].bytes));
        let mut places = vec![Place { offset: 0, bytes: 0 }; lives.len()];
        let mut placed: Vec<usize> = Vec::with_capacity(lives.len());
        for number in order {
            let Life { bytes, begin, end } = lives[number];
            let overlaps = |other: &usize| lives[*other].begin < end && begin < lives[*other].end;
            let mut beside: Vec<Place> =
                placed.iter().filter(|other| overlaps(other)).map(|other| places[*other]).collect();
            beside.sort_unstable_by_key(|place| place.offset);
            let mut offset = 0;
            for other in beside {
                if offset + bytes <= other.offset {
                    break;
                }
                offset = offset.max(other.offset + other.bytes);
            }
            places[number] = Place { offset, bytes };
            placed.push(number);
        }
        let bytes = places.iter().map(|place| place.offset + place.bytes).max().unwrap_or(0);
        Self { places, bytes }
    }

    /// Bytes of memory that such a call needs.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<'a> Arena<'a> {
    /// For a call of the same shape as the dry run, in [`Layout::bytes`] bytes at `base`.
    pub fn at(base: u64, layout: &'a Layout) -> Self {
        Self::new(base, Some(layout))
    }

    fn new(base: u64, layout: Option<&'a Layout>) -> Self {
        Self { base, layout, lives: RefCell::default(), taken: Cell::new(0), clock: Cell::new(0) }
    }

    /// Room for `len` values, which holds whatever was there before. In a dry run its address means nothing.
    ///
    /// # Errors
    /// If the call takes other buffers than the dry run.
    pub fn take<T>(&self, len: usize) -> Result<Region<'_>, Error> {
        let bytes = (len * size_of::<T>()).next_multiple_of(ALIGNMENT);
        let number = self.taken.replace(self.taken.get() + 1);
        let address = match self.layout {
            None => {
                self.lives.borrow_mut().push(Life { bytes, begin: self.tick(), end: usize::MAX });
                ALIGNMENT as u64
            }
            Some(layout) => match layout.places.get(number) {
                Some(place) if place.bytes == bytes => self.base + place.offset as u64,
                place => bail!("buffer {number} of a call has {bytes} bytes, planned was {place:?}"),
            },
        };
        Ok(Region { address, number, arena: self })
    }

    fn tick(&self) -> usize {
        self.clock.replace(self.clock.get() + 1)
    }
}

impl Drop for Region<'_> {
    fn drop(&mut self) {
        if let Some(life) = self.arena.lives.borrow_mut().get_mut(self.number) {
            life.end = self.arena.tick();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers as a plan has them: what the next one reads, a wide part of it, and room for a product.
    fn layers(arena: &Arena) -> Result<Vec<(u64, usize)>, Error> {
        let mut seen = Vec::new();
        let mut take = |bytes: usize| -> Result<Region, Error> {
            let region = arena.take::<u8>(bytes)?;
            seen.push((region.address, bytes));
            Ok(region)
        };
        let residual = take(40_000)?;
        for _ in 0..3 {
            let normed = take(20_000)?;
            let products = take(160_000)?;
            let wide = take(80_000)?;
            drop((products, normed));
            let activated = take(80_000)?;
            drop(wide);
            let products = take(40_000)?;
            drop((take(20_001)?, products, activated));
        }
        drop(residual);
        Ok(seen)
    }

    #[test]
    fn buffers_that_live_at_once_lie_apart_and_the_others_share() {
        let layout = Layout::of(|arena| layers(arena).map(|_| ())).unwrap();
        // The residual, the norm, the product and what it becomes, each in whole alignments.
        let most: usize =
            [40_000usize, 20_000, 160_000, 80_000].map(|bytes| bytes.next_multiple_of(ALIGNMENT)).iter().sum();
        assert_eq!(layout.bytes(), most);
        let arena = Arena::at(1 << 20, &layout);
        let (a, b, c) =
            (arena.take::<f32>(10_000).unwrap(), arena.take::<u8>(20_000).unwrap(), arena.take::<u8>(160_000));
        let mut places = [(a.address, 40_000), (b.address, 20_000), (c.unwrap().address, 160_000)];
        places.sort_unstable();
        assert!(places.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "{places:?}");
        assert!(places.iter().all(|(at, bytes)| *at >= 1 << 20 && at + bytes <= (1 << 20) + most as u64));
    }

    #[test]
    fn a_call_of_the_same_shape_finds_its_buffers_where_they_were() {
        let layout = Layout::of(|arena| layers(arena).map(|_| ())).unwrap();
        let run = || layers(&Arena::at(4096, &layout)).unwrap();
        assert_eq!(run(), run());
        let other = Arena::at(4096, &layout);
        assert!(other.take::<u8>(1).is_err(), "another buffer than the planned one");
    }

    #[test]
    fn a_call_without_buffers_needs_no_memory() {
        assert_eq!(Layout::of(|_| Ok::<(), Error>(())).unwrap().bytes(), 0);
    }
}
