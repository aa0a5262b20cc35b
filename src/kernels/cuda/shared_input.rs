//! Activations of many rows, which several matrices read.

use std::any::Any;
use std::cell::{Cell, OnceCell, RefCell};

use candle_core::Result;

use super::arena::{Arena, Region};

/// Activations, fp16 `[m, k]`, that several matrices read one after the other, and what the first of them has made of these for
/// the others.
pub struct SharedInput<'a> {
    pub at: u64,
    pub m: usize,
    /// A count of 64 bits that LLM.int8's outlier columns are added to, or 0.
    pub outlier_columns: u64,
    /// Whether the next product is fp32, of a family that has such.
    pub to_floats: Cell<bool>,
    pub arena: &'a Arena<'a>,
    made: OnceCell<Box<dyn Any>>,
    /// The memory of it.
    kept: RefCell<Vec<Region<'a>>>,
}

impl<'a> SharedInput<'a> {
    pub fn new(at: u64, m: usize, outlier_columns: u64, arena: &'a Arena<'a>) -> Self {
        let (to_floats, made, kept) = (Cell::new(false), OnceCell::new(), RefCell::default());
        Self { at, m, outlier_columns, to_floats, arena, made, kept }
    }

    /// Room that stays as long as these rows.
    pub fn keep<T>(&self, len: usize) -> Result<u64> {
        let region = self.arena.take::<T>(len)?;
        let address = region.address;
        self.kept.borrow_mut().push(region);
        Ok(address)
    }

    /// The result of the first `make`; `None` where that was of another type.
    pub fn made<T: 'static>(&self, make: impl FnOnce() -> Result<T>) -> Result<Option<&T>> {
        if self.made.get().is_none() {
            let _ = self.made.set(Box::new(make()?));
        }
        Ok(self.made.get().and_then(|made| made.downcast_ref()))
    }
}
