//! The ring buffer of tokens: host memory that the device writes to.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};

/// Tokens of a sequence in flight at most, and where there are very many sequences at least: powers of two.
const MOST_SLOTS: usize = 4096;
const LEAST_SLOTS: usize = 64;
/// Words that the ring has at most while there are more slots than the least: 32 MiB.
const MOST_WORDS: usize = 1 << 22;

/// Polls of a slot between two queries of the driver.
const POLLS: usize = 1 << 14;

/// Pinned memory that the device sees under the same address: words `[slots, sequences]`, of which that at slot `step % slots` holds the step and
/// its token.
pub struct TokenRing {
    words: *mut u64,
    slots: usize,
    sequences: usize,
}

// SAFETY: the memory belongs to the ring alone, and every access is a volatile read.
unsafe impl Send for TokenRing {}

/// Slots of a ring for so many sequences.
fn slots_for(sequences: usize) -> usize {
    let fitting = (MOST_WORDS / sequences.max(1)).max(1);
    (1 << fitting.ilog2()).clamp(LEAST_SLOTS, MOST_SLOTS)
}

impl TokenRing {
    pub fn new(device: &CudaDevice, sequences: usize) -> Result<Self> {
        device.cuda_stream().context().bind_to_thread()?;
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let slots = slots_for(sequences);
        // SAFETY: the size is not zero; the memory is initialised right below.
        let words: *mut u64 = unsafe { result::malloc_host(slots * sequences * size_of::<u64>(), flags) }?.cast();
        // SAFETY: freshly allocated, of this size, and nobody else knows it yet.
        unsafe { words.write_bytes(0, slots * sequences) };
        Ok(Self { words, slots, sequences })
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.words as u64
    }

    /// Tokens of a sequence that are in flight at most.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// The token of a sequence's `step`, if it has arrived.
    pub fn token(&self, step: u32, sequence: usize) -> Option<u32> {
        assert!(sequence < self.sequences, "a sequence of the session");
        // SAFETY: the index is below slots * sequences. The device stores whole words.
        let word = unsafe { self.words.add(step as usize % self.slots * self.sequences + sequence).read_volatile() };
        (word >> 32 == u64::from(step)).then_some(word as u32)
    }

    /// Waits for the token of a sequence's `step`, which was launched on the device's stream.
    pub fn wait(&self, step: u32, sequence: usize, device: &CudaDevice) -> Result<u32> {
        loop {
            for _ in 0..POLLS {
                if let Some(token) = self.token(step, sequence) {
                    return Ok(token);
                }
                std::hint::spin_loop();
            }
            let stream = device.cuda_stream();
            // SAFETY: the stream lives as long as the device.
            let status = unsafe { sys::cuStreamQuery(stream.cu_stream()) };
            if status == sys::cudaError_enum::CUDA_SUCCESS {
                // A store may still be in flight on the bus.
                std::thread::sleep(Duration::from_millis(1));
                return self
                    .token(step, sequence)
                    .with_context(|| format!("the device ended step {step} without a token"));
            }
            if status != sys::cudaError_enum::CUDA_ERROR_NOT_READY {
                bail!(DriverError(status));
            }
        }
    }
}

impl Drop for TokenRing {
    fn drop(&mut self) {
        // SAFETY: allocated by `malloc_host`, freed once. A failure leaves it to the end of the process.
        let _ = unsafe { result::free_host(self.words.cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_powers_of_two_and_few_where_sequences_are_many() {
        let slots = [0, 1, 64, 1024, 1025, 3000, 65_536, 1_000_000].map(slots_for);
        assert_eq!(slots, [4096, 4096, 4096, 4096, 2048, 1024, 64, 64]);
    }
}
