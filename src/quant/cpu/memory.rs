//! Memory for packed weights.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use half::f16;

/// Size of a huge page on x86-64 and on arm64 with 4 KiB pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;
const CACHE_LINE_BYTES: usize = 64;

/// Bytes aligned to cache lines and, from 2 MiB up, to huge pages, which the kernel is asked to use: streaming a matrix
/// through 4 KiB pages costs a page walk every 64 cache lines.
pub struct WeightBytes {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its memory like a `Box<[u8]>`.
unsafe impl Send for WeightBytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for WeightBytes {}

impl WeightBytes {
    /// `len` zero bytes, `len` ≥ 1.
    pub fn zeroed(len: usize) -> Self {
        assert!(len > 0, "a matrix has at least one byte");
        let align = if len < HUGE_PAGE_BYTES { CACHE_LINE_BYTES } else { HUGE_PAGE_BYTES };
        let layout = Layout::from_size_align(len, align).expect("the alignment is a power of two");
        // SAFETY: the layout is not empty.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        // The last, partial huge page is left alone: it would count as resident in full.
        advise_huge_pages(start, len / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
        // SAFETY: `len` bytes were allocated. Zeroed after the advice, so that the first touch finds it.
        unsafe { start.as_ptr().write_bytes(0, len) };
        Self { start, layout }
    }
}

/// A type that weights may be read as.
///
/// # Safety
/// Every bit pattern is a value, and the alignment is at most that of a cache line.
pub unsafe trait WeightValue: Copy {}

// SAFETY: every pair of bytes is an fp16 value.
unsafe impl WeightValue for f16 {}
// SAFETY: every four bytes are an fp32 value.
unsafe impl WeightValue for f32 {}

impl WeightBytes {
    /// The bytes as values.
    pub fn as_values<T: WeightValue>(&self) -> &[T] {
        // SAFETY: aligned to a cache line and initialized; any bits are a value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.layout.size() / size_of::<T>()) }
    }

    /// As [`Self::as_values`].
    pub fn as_values_mut<T: WeightValue>(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.layout.size() / size_of::<T>()) }
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(start: NonNull<u8>, len: usize) {
    if len > 0 {
        // SAFETY: whole pages inside one allocation; the advice changes no content. A refusal costs speed only.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_start: NonNull<u8>, _len: usize) {}

impl Drop for WeightBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

impl Deref for WeightBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `size` initialized bytes, owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for WeightBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}
