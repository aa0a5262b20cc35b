//! Staging of data for a device: threads fill pinned buffers, a stream of its own copies them to the chunks of a slab, and kernels on the
//! device's stream read the chunks that have arrived.
//!
//! ```text
//! take ─► fill ─► send ─┬─ copies:   [copy to the slab]──┐
//!   ▲                   └─ device:      (waits for it) [kernel]──┐
//!   └────────────── the buffer sent first, when its kernel has run
//! ```

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DriverError, result, sys};
use candle_core::{CudaDevice, Result};
use half::f16;

use super::launch::address;
use super::memory::driver_error;

/// Bytes of a buffer: a copy of 80 to 350 µs, far above what it costs to start one.
pub const BUFFER_BYTES: usize = 4 << 20;
/// Enough for a copy, a kernel and a dozen threads that fill.
pub const BUFFERS: usize = 16;
/// Most bytes that staging takes, of the device's memory and of pinned memory each.
pub const SLAB_BYTES: usize = BUFFERS * BUFFER_BYTES;

/// Buffers come as they are needed; all go when this is dropped.
pub struct Staging {
    device: CudaDevice,
    copies: Arc<CudaStream>,
    buffers: Mutex<Buffers>,
    given_back: Condvar,
    /// Held while a buffer's kernels are queued, so that the time between their events is theirs alone.
    turn: Mutex<()>,
    kernel_ns: AtomicU64,
}

/// In the order in which they were sent.
struct Buffers {
    waiting: VecDeque<Memory>,
    made: usize,
}

/// A buffer and its place on the device.
struct Memory {
    pinned: Pinned,
    slab: CudaSlice<u8>,
    copied: CudaEvent,
    /// Around the kernels that read the slab.
    begin: CudaEvent,
    end: CudaEvent,
    ran_kernels: bool,
}

impl Staging {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let copies = device.cuda_stream().context().new_stream().map_err(driver_error)?;
        Ok(Self {
            device: device.clone(),
            copies,
            buffers: Mutex::new(Buffers { waiting: VecDeque::new(), made: 0 }),
            given_back: Condvar::new(),
            turn: Mutex::new(()),
            kernel_ns: AtomicU64::new(0),
        })
    }

    /// A buffer that the device has finished with. Waits where all are in flight.
    pub fn take(&self) -> Result<StagingBuffer<'_>> {
        self.copies.context().bind_to_thread().map_err(driver_error)?;
        let mut buffers = self.lock();
        // One that the device still reads is worth waiting for only where no other may be made.
        while buffers.waiting.is_empty() && buffers.made == BUFFERS {
            buffers = self.given_back.wait(buffers).unwrap_or_else(PoisonError::into_inner);
        }
        let is_done = |memory: &Memory| memory.copied.is_complete() && memory.end.is_complete();
        let may_make = buffers.made < BUFFERS;
        let memory = match buffers.waiting.pop_front_if(|memory| !may_make || is_done(memory)) {
            Some(memory) => memory,
            None => {
                buffers.made += 1;
                drop(buffers);
                // Counted even where it fails: loading ends then.
                self.make()?
            }
        };
        let mut buffer = StagingBuffer { staging: self, memory: Some(memory) };
        buffer.wait()?;
        Ok(buffer)
    }

    /// Lets copies write to all that has been allocated on the device's stream so far.
    pub fn admit_allocations(&self) -> Result<()> {
        self.copies.join(&self.device.cuda_stream()).map_err(driver_error)
    }

    /// Waits for all copies and kernels. Returns the time of the kernels by the device's clock.
    pub fn finish(&self) -> Result<Duration> {
        self.drain()?;
        self.lock().waiting.iter_mut().try_for_each(|memory| self.count(memory)).map_err(driver_error)?;
        Ok(Duration::from_nanos(self.kernel_ns.load(Ordering::Relaxed)))
    }

    fn drain(&self) -> Result<()> {
        self.copies.synchronize().and_then(|()| self.device.cuda_stream().synchronize()).map_err(driver_error)
    }

    fn count(&self, memory: &mut Memory) -> std::result::Result<(), DriverError> {
        if std::mem::take(&mut memory.ran_kernels) {
            let ns = f64::from(memory.begin.elapsed_ms(&memory.end)?) * 1e6;
            self.kernel_ns.fetch_add(ns as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn make(&self) -> Result<Memory> {
        let stream = self.device.cuda_stream();
        let event = |flags| stream.context().new_event(Some(flags)).map_err(driver_error);
        let timed = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        // SAFETY: a copy writes what a kernel reads.
        let slab = unsafe { self.device.alloc(BUFFER_BYTES) }?;
        self.admit_allocations()?;
        Ok(Memory {
            pinned: Pinned::new(BUFFER_BYTES, &self.device)?,
            slab,
            copied: event(timed)?,
            begin: event(timed)?,
            end: event(timed)?,
            ran_kernels: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Staging {
    /// Nothing may read pinned memory that is gone, or write a slab that belongs to others.
    fn drop(&mut self) {
        // A device that fails here fails the next call too, which reports it.
        let _ = self.drain();
    }
}

/// A buffer that the host may fill; it goes back when it is sent or dropped.
pub struct StagingBuffer<'a> {
    staging: &'a Staging,
    /// Always there until the drop.
    memory: Option<Memory>,
}

impl StagingBuffer<'_> {
    /// The first `len` bytes, [`BUFFER_BYTES`] at most.
    pub fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.memory().pinned.bytes()[..len]
    }

    /// The same as fp16.
    pub fn halves(&mut self, len: usize) -> &mut [f16] {
        &mut self.memory().pinned.halves()[..len]
    }

    /// The same as fp32.
    pub fn floats(&mut self, len: usize) -> &mut [f32] {
        &mut self.memory().pinned.floats()[..len]
    }

    /// Queues a copy of the first `len` bytes to `to`.
    ///
    /// # Safety
    /// `to` begins as much memory of the device, which was there at the last [`Staging::admit_allocations`] and stays until
    /// [`Staging::finish`].
    pub unsafe fn place(mut self, len: usize, to: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy(len, to) }
    }

    /// Queues a copy of the first `len` bytes into the slab, and what `launch` queues on the device's stream to read them from the
    /// address that it is given.
    pub fn send(mut self, len: usize, launch: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let staging = self.staging;
        let slab = address(&self.memory().slab, &staging.device);
        // SAFETY: `len` is at most the slab's length, which is that of the buffer; `take` waited for its last readers.
        unsafe { self.copy(len, slab) }?;
        let stream = staging.device.cuda_stream();
        let _turn = staging.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = self.memory();
        stream.wait(&memory.copied).and_then(|()| memory.begin.record(&stream)).map_err(driver_error)?;
        let launched = launch(slab);
        // Recorded even after a failure: part of it may have been queued.
        memory.ran_kernels = true;
        memory.end.record(&stream).map_err(driver_error).and(launched)
    }

    /// # Safety
    /// See [`Self::place`].
    unsafe fn copy(&mut self, len: usize, to: u64) -> Result<()> {
        let copies = self.staging.copies.clone();
        copies.context().bind_to_thread().map_err(driver_error)?;
        let memory = self.memory();
        let from = &memory.pinned.bytes()[..len];
        // SAFETY: nobody writes the buffer before `take` has waited for `copied`; the caller vouches for `to`.
        unsafe { result::memcpy_htod_async(to, from, copies.cu_stream()) }
            .and_then(|()| memory.copied.record(&copies))
            .map_err(driver_error)
    }

    fn wait(&mut self) -> Result<()> {
        let staging = self.staging;
        let memory = self.memory();
        let waited = memory.copied.synchronize().and_then(|()| memory.end.synchronize());
        waited.and_then(|()| staging.count(memory)).map_err(driver_error)
    }

    fn memory(&mut self) -> &mut Memory {
        self.memory.as_mut().expect("only a drop takes it")
    }
}

impl Drop for StagingBuffer<'_> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.staging.lock().waiting.push_back(memory);
            self.staging.given_back.notify_one();
        }
    }
}

/// Pinned memory of the host.
struct Pinned {
    start: *mut u8,
    len: usize,
    /// Keeps the context that it belongs to.
    device: CudaDevice,
}

// SAFETY: the memory belongs to this value alone and is reached only through exclusive borrows of it.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(len: usize, device: &CudaDevice) -> Result<Self> {
        device.cuda_stream().context().bind_to_thread().map_err(driver_error)?;
        // SAFETY: the size is not zero; the memory is initialised right below.
        let start: *mut u8 = unsafe { result::malloc_host(len, 0) }.map_err(driver_error)?.cast();
        // SAFETY: freshly allocated, of this size, and nobody else knows it yet.
        unsafe { start.write_bytes(0, len) };
        Ok(Self { start, len, device: device.clone() })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes, borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    fn halves(&mut self) -> &mut [f16] {
        // SAFETY: as above; page-aligned, and any two bytes are a half.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len / size_of::<f16>()) }
    }

    fn floats(&mut self) -> &mut [f32] {
        // SAFETY: as above, any four bytes are a float.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len / size_of::<f32>()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A failure to bind shows in the call below, whose own failure leaks the memory and nothing else.
        let _ = self.device.cuda_stream().context().bind_to_thread();
        // SAFETY: allocated by `malloc_host`; whoever copied from it has been waited for.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}
