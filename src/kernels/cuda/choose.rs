//! The next token of each sequence of a batch: the launch of `choose.cu`.

use candle_core::Result;

use super::launch::{Fatbin, Grid, Launcher, dimension};
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("choose");

/// As `THREADS` of instruction.cuh.
const THREADS: u32 = 512;

/// As `struct Choice` of choose.cu. Addresses where a launcher runs.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// `[sequences, n]`, fp32 or fp16; fp32 may lie where the logits do.
    pub products: u64,
    /// fp32 `[sequences, n]`
    pub logits: u64,
    /// fp32 `[n]`, or 0.
    pub bias: u64,
    /// int32 `[sequences]`
    pub tokens: u64,
    /// [`super::place::DevicePlace`] of each sequence, which stands `advance` positions further on then.
    pub places: u64,
    /// Words of 64 bits `[host_slots, host_sequences]`, from the call's first sequence on.
    pub host: u64,
    /// Of `softcap · tanh(logit / softcap)`; 0 for none.
    pub softcap: f32,
    pub is_float: i32,
    pub n: i32,
    pub advance: i32,
    /// A power of two.
    pub host_slots: i32,
    pub host_sequences: i32,
}

impl Choice {
    /// # Errors
    /// If the launch fails.
    ///
    /// # Safety
    /// Everything that it names is as large as it says for `sequences` where `on` runs, and good until its stream has come past this call.
    pub unsafe fn run(self, on: &dyn Launcher, sequences: usize) -> Result<()> {
        dimension(sequences)?;
        // SAFETY: the kernel takes one struct, which `Choice` mirrors; a block for each sequence.
        unsafe {
            on.launch(&KERNELS, "choose_tokens", Grid::new((sequences, 1), THREADS).overlapping(), parameters![self])
        }
    }
}
