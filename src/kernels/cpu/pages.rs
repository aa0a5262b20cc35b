//! Large buffers of zeros, straight from the operating system.

use std::alloc::{Layout, handle_alloc_error};
use std::io;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// A transparent huge page on x86-64 and most others.
const HUGE_PAGE_BYTES: usize = 2 << 20;
const CACHE_LINE_BYTES: usize = 64;

/// Zeroed bytes aligned to at least 64, and to 2 MiB from that size on, where huge pages are asked for: a matvec that
/// streams 4 KiB pages spends its time in the page tables. Memory comes with the first write, to the thread that writes.
pub struct Pages {
    mapping: MmapMut,
    /// Offset of the first byte used, for alignment.
    start: usize,
    bytes: usize,
}

impl Pages {
    /// Fails where the system has no such memory to give.
    pub fn zeroed(bytes: usize) -> io::Result<Self> {
        let slack = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let reserved = bytes.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut mapping = MmapMut::map_anon(reserved.max(1))?;
        let address = mapping.as_ptr().addr();
        let start = if slack > 0 { address.next_multiple_of(HUGE_PAGE_BYTES) - address } else { 0 };
        prefer_huge_pages(&mut mapping[start..][..bytes]);
        Ok(Self { mapping, start, bytes })
    }

    /// Allocates as [`Pages::zeroed`] does, for memory without which the program cannot go on: a failure ends it, as that of any allocation does.
    pub fn required(bytes: usize) -> Self {
        let layout =
            Layout::from_size_align(bytes, CACHE_LINE_BYTES).expect("a matrix is smaller than the address space");
        Self::zeroed(bytes).unwrap_or_else(|_| handle_alloc_error(layout))
    }

    /// The bytes as values, whose alignment is at most that of a cache line; a rest too small for one is left out.
    pub fn as_values<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self[..self.bytes / size_of::<T>() * size_of::<T>()])
    }

    /// [`Pages::as_values`] for writing.
    pub fn as_values_mut<T: Pod>(&mut self) -> &mut [T] {
        let whole = self.bytes / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut self[..whole])
    }
}

/// Asks for huge pages under whole ones of memory that was not touched yet: what is filled once and soon freed costs more in
/// faults of 4 KiB pages than in filling.
pub fn prefer_huge_pages<T>(untouched: &mut [T]) {
    let bytes = size_of_val(untouched);
    let start = untouched.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - untouched.as_ptr().addr();
    let whole = bytes.saturating_sub(start) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if whole > 0 {
        advise_huge_pages(untouched.as_mut_ptr().cast::<u8>().wrapping_add(start), whole);
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(start: *mut u8, bytes: usize) {
    // SAFETY: the caller gives whole pages of a slice; advice changes no contents, and a refusal costs speed only.
    unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
}

/// There is no such advice.
#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: *mut u8, _: usize) {}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.mapping[self.start..][..self.bytes]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.mapping[self.start..][..self.bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_writable() {
        for (bytes, alignment) in [(0, 64), (1, 64), (4097, 64), (2 << 20, 2 << 20), ((6 << 20) + 5, 2 << 20)] {
            let mut pages = Pages::zeroed(bytes).unwrap();
            assert_eq!((pages.len(), pages.as_ptr().addr() % alignment), (bytes, 0));
            assert!(pages.iter().all(|byte| *byte == 0));
            pages.fill(7);
            assert!(pages.iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn too_much_is_an_error() {
        assert!(Pages::zeroed(usize::MAX).is_err());
        assert!(Pages::zeroed(usize::MAX / 4).is_err());
    }
}
