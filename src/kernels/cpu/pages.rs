//! Large buffers of zeros, straight from the operating system.

use std::alloc::{Layout, handle_alloc_error};
use std::io;
use std::ops::{Deref, DerefMut};

use half::f16;

/// A transparent huge page on x86-64 and most others.
const HUGE_PAGE_BYTES: usize = 2 << 20;
const CACHE_LINE_BYTES: usize = 64;

/// Zeroed bytes aligned to at least 64, and to 2 MiB from that size on, where huge pages are asked for: a matvec that
/// streams 4 KiB pages spends its time in the page tables. Memory comes with the first write, to the thread that writes.
pub struct Pages {
    mapping: system::Mapping,
    /// Offset of the first byte used, for alignment.
    start: usize,
    bytes: usize,
}

impl Pages {
    /// Fails where the system has no such memory to give.
    pub fn zeroed(bytes: usize) -> io::Result<Self> {
        let slack = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { 0 };
        let reserved = bytes.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = system::Mapping::new(reserved.max(1))?;
        let address = mapping.address();
        let start = if slack > 0 { address.next_multiple_of(HUGE_PAGE_BYTES) - address } else { 0 };
        if slack > 0 {
            // SAFETY: the mapping holds `start + bytes` bytes.
            unsafe { system::prefer_huge_pages(mapping.pointer().add(start), bytes) };
        }
        Ok(Self { mapping, start, bytes })
    }

    /// As [`Pages::zeroed`], for memory without which the program cannot go on: a failure ends it, as that of any allocation does.
    pub fn required(bytes: usize) -> Self {
        let layout =
            Layout::from_size_align(bytes, CACHE_LINE_BYTES).expect("a matrix is smaller than the address space");
        Self::zeroed(bytes).unwrap_or_else(|_| handle_alloc_error(layout))
    }

    /// The bytes as values; a rest too small for one is left out.
    pub fn as_values<T: PlainBits>(&self) -> &[T] {
        // SAFETY: `bytes` initialised bytes from `deref`, aligned to 64, and any bits are a value.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.bytes / size_of::<T>()) }
    }

    /// As [`Pages::as_values`].
    pub fn as_values_mut<T: PlainBits>(&mut self) -> &mut [T] {
        // SAFETY: as above; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.bytes / size_of::<T>()) }
    }
}

/// Asks for huge pages under memory that was allocated otherwise and not touched yet: what is filled once and soon freed costs
/// more in faults of 4 KiB pages than in filling.
pub fn prefer_huge_pages<T>(untouched: &mut [T]) {
    let bytes = size_of_val(untouched);
    let start = untouched.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - untouched.as_ptr().addr();
    let whole = bytes.saturating_sub(start) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if whole > 0 {
        let first = untouched.as_mut_ptr().cast::<u8>().wrapping_add(start);
        // SAFETY: `whole` bytes from `first` lie within the slice.
        unsafe { system::prefer_huge_pages(first, whole) };
    }
}

/// The bytes of `values` as they lie in memory.
pub fn bytes_of<T: PlainBits>(values: &[T]) -> &[u8] {
    // SAFETY: plain values have no padding, so that all of their bytes are initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// A type that bytes may be read as, and that may be read as bytes.
///
/// # Safety
/// Every bit pattern is a value, there is no padding, and the alignment is at most that of a cache line.
pub unsafe trait PlainBits: Copy {}

// SAFETY: every pair of bytes is an fp16 value.
unsafe impl PlainBits for f16 {}
// SAFETY: every four bytes are an fp32 value.
unsafe impl PlainBits for f32 {}
// SAFETY: every four bytes are an integer.
unsafe impl PlainBits for i32 {}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping holds `start + bytes` initialised (zero) bytes and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.mapping.pointer().add(self.start), self.bytes) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.pointer().add(self.start), self.bytes) }
    }
}

// SAFETY: the memory belongs to this value alone and is reached only through borrows of it.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

#[cfg(unix)]
mod system {
    //! Anonymous private mappings.

    use std::io;

    pub(super) struct Mapping {
        address: *mut libc::c_void,
        bytes: usize,
    }

    impl Mapping {
        /// `bytes` ≥ 1.
        pub(super) fn new(bytes: usize) -> io::Result<Self> {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
            // SAFETY: a new anonymous mapping at an address of the system's choice touches nothing else.
            let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
            if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { address, bytes }) }
        }

        pub(super) fn pointer(&self) -> *mut u8 {
            self.address.cast()
        }

        pub(super) fn address(&self) -> usize {
            self.address.addr()
        }
    }

    /// # Safety
    /// `bytes` bytes from `start`, which lies at the start of a page, are mapped.
    #[cfg(target_os = "linux")]
    pub(super) unsafe fn prefer_huge_pages(start: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise; advice changes no contents, and a refusal costs speed only.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
    }

    /// # Safety
    /// None is needed: there is no such advice.
    #[cfg(not(target_os = "linux"))]
    pub(super) unsafe fn prefer_huge_pages(_: *mut u8, _: usize) {}

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: the mapping is this value's own, and no borrow of it is left.
            unsafe { libc::munmap(self.address, self.bytes) };
        }
    }
}

#[cfg(not(unix))]
mod system {
    //! The allocator, where there is no mmap.

    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::io;

    pub(super) struct Mapping {
        pointer: *mut u8,
        layout: Layout,
    }

    impl Mapping {
        /// `bytes` ≥ 1.
        pub(super) fn new(bytes: usize) -> io::Result<Self> {
            let layout =
                Layout::from_size_align(bytes, super::CACHE_LINE_BYTES).map_err(|_| io::ErrorKind::OutOfMemory)?;
            // SAFETY: the layout is not empty.
            let pointer = unsafe { alloc_zeroed(layout) };
            if pointer.is_null() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(Self { pointer, layout }) }
        }

        pub(super) fn pointer(&self) -> *mut u8 {
            self.pointer
        }

        pub(super) fn address(&self) -> usize {
            self.pointer.addr()
        }
    }

    /// # Safety
    /// None is needed: there is no such advice.
    pub(super) unsafe fn prefer_huge_pages(_: *mut u8, _: usize) {}

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: allocated above with this layout.
            unsafe { dealloc(self.pointer, self.layout) };
        }
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
