//! A slice that the threads of one region write in disjoint parts.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice shared by the threads of a [`super::pool::Pool`] region, who agree on who writes what.
pub struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer comes from an exclusive borrow that outlives this value; every access goes through `range` or
// `range_mut`, whose callers promise disjointness.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part `range` as a shared slice of its own. Panics if it is out of bounds.
    pub fn part(&self, range: Range<usize>) -> SharedSlice<'_, T> {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
        // SAFETY: in bounds by the assert.
        let start = unsafe { self.start.add(range.start) };
        SharedSlice { start, len: range.len(), owner: PhantomData }
    }

    /// The part `range` for writing. Panics if it is out of bounds.
    ///
    /// # Safety
    /// Until the borrow ends no other thread may read or write any element of `range`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
        // SAFETY: in bounds by the assert; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The part `range` for reading. Panics if it is out of bounds.
    ///
    /// # Safety
    /// Until the borrow ends no thread may write any element of `range`.
    pub unsafe fn range(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
        // SAFETY: in bounds by the assert; not written meanwhile by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }
}
