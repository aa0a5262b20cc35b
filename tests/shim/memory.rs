//! Memory that kernels are given: every buffer ends before a page that nobody may touch.

use std::cell::RefCell;
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};
use std::slice::{from_raw_parts, from_raw_parts_mut};

use half::f16;

const PAGE_BYTES: usize = 64 << 10;
/// What kernels may rely on, less than a device gives: whatever it leaves behind a buffer could be read unseen.
const ALIGNMENT: usize = 16;
/// NaN in every type that has one.
const POISON: u8 = 0xff;

/// Types of which every pattern of bits is a value.
pub trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for i32 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for f16 {}
impl Plain for f32 {}

/// The buffers of a case.
#[derive(Default)]
pub struct Memory {
    buffers: RefCell<Vec<Buffer>>,
}

struct Buffer {
    mapped: *mut libc::c_void,
    mapped_bytes: usize,
    address: usize,
    /// What was asked for, and that with what is left up to the alignment.
    asked_bytes: usize,
    bytes: usize,
}

impl Memory {
    pub fn hold<T: Copy>(&self, values: &[T]) -> u64 {
        let address = self.room::<T>(values.len());
        self.write(address, values);
        address
    }

    pub fn write<T: Copy>(&self, address: u64, values: &[T]) {
        let at = self.checked(address, size_of_val(values));
        // SAFETY: within a buffer, which lives as long as `self`, and no slice of it is about.
        unsafe { with_exposed_provenance_mut::<T>(at).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }

    /// For `len` values, poison until they are written.
    pub fn room<T>(&self, len: usize) -> u64 {
        let buffer = Buffer::new(len * size_of::<T>());
        let address = buffer.address as u64;
        self.buffers.borrow_mut().push(buffer);
        address
    }

    pub fn read<T: Plain>(&self, address: u64, len: usize) -> Vec<T> {
        let at = self.checked(address, len * size_of::<T>());
        // SAFETY: within a buffer, which lives as long as `self`; every pattern of bits is a value.
        unsafe { from_raw_parts(with_exposed_provenance::<T>(at), len) }.to_vec()
    }

    /// An address of which `bytes` bytes are in one buffer.
    fn checked(&self, address: u64, bytes: usize) -> usize {
        let address = address as usize;
        let holds = |buffer: &Buffer| buffer.address <= address && address + bytes <= buffer.address + buffer.bytes;
        assert!(self.buffers.borrow().iter().any(holds), "{bytes} bytes are in no buffer");
        address
    }

    /// All bytes of all buffers.
    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.buffers.borrow_mut().iter_mut().map(|buffer| buffer.contents().to_vec()).collect()
    }

    /// Whether nothing was written behind the buffers, as far as the page does not see it.
    pub fn is_kept(&self) -> bool {
        let is_poison = |bytes: &[u8]| bytes.iter().all(|byte| *byte == POISON);
        self.buffers.borrow_mut().iter_mut().all(|buffer| {
            let asked_bytes = buffer.asked_bytes;
            is_poison(&buffer.contents()[asked_bytes..])
        })
    }

    pub fn restore(&self, snapshot: &[Vec<u8>]) {
        self.buffers.borrow_mut().iter_mut().zip(snapshot).for_each(|(b, bytes)| b.contents().copy_from_slice(bytes));
    }
}

impl Buffer {
    fn new(asked_bytes: usize) -> Self {
        let bytes = asked_bytes.next_multiple_of(ALIGNMENT);
        let inside = bytes.next_multiple_of(PAGE_BYTES);
        let mapped_bytes = inside + 2 * PAGE_BYTES;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory, wherever the system puts it.
        let mapped = unsafe { libc::mmap(null_mut(), mapped_bytes, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED, "{mapped_bytes} bytes");
        let first = mapped.expose_provenance() + PAGE_BYTES;
        if inside > 0 {
            // SAFETY: pages of the mapping above.
            let opened = unsafe {
                libc::mprotect(with_exposed_provenance_mut(first), inside, libc::PROT_READ | libc::PROT_WRITE)
            };
            assert_eq!(opened, 0, "{inside} bytes");
        }
        let mut buffer = Self { mapped, mapped_bytes, address: first + inside - bytes, asked_bytes, bytes };
        buffer.contents().fill(POISON);
        buffer
    }

    fn contents(&mut self) -> &mut [u8] {
        // SAFETY: mapped as long as `self`, and no kernel runs while a caller has it.
        unsafe { from_raw_parts_mut(with_exposed_provenance_mut(self.address), self.bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and addresses end with their `Memory`.
        unsafe { libc::munmap(self.mapped, self.mapped_bytes) };
    }
}
