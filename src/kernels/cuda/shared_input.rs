//! Activations of many rows, which several matrices read, and where their products go.

use std::any::Any;
use std::cell::{OnceCell, RefCell};

use candle_core::Result;

use super::arena::{Arena, Region};

/// Activations, fp16 `[m, k]`, that several matrices read one after the other, and what the first of them has made of these for
/// the others.
pub struct SharedInput<'a> {
    pub at: u64,
    pub m: usize,
    /// A count of 64 bits that LLM.int8's outlier columns are added to, or 0.
    pub outlier_columns: u64,
    pub arena: &'a Arena<'a>,
    made: OnceCell<Box<dyn Any>>,
    /// The memory of it.
    kept: RefCell<Vec<Region<'a>>>,
}

impl<'a> SharedInput<'a> {
    pub fn new(at: u64, m: usize, outlier_columns: u64, arena: &'a Arena<'a>) -> Self {
        Self { at, m, outlier_columns, arena, made: OnceCell::new(), kept: RefCell::default() }
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

/// Where a product `[m, n]` of many rows goes, and as what.
#[derive(Debug, Clone, Copy)]
pub struct ProductAt {
    pub address: u64,
    /// fp32 if set, fp16 otherwise. Products of fp32 matrices are, LLM.int8's are not.
    pub is_float: bool,
    /// A power of two that it is multiplied by before it is rounded.
    pub scale: f32,
}

impl ProductAt {
    /// As it is.
    pub fn new(address: u64, is_float: bool) -> Self {
        Self { address, is_float, scale: 1.0 }
    }
}
