//! Where the sequences of a batch stand, for kernels: `place.cuh`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

/// As `struct Place` of place.cuh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DevicePlace {
    /// That the next row of the sequence has.
    pub position: i32,
    /// Rows that the encoder has made of it.
    pub encoded: i32,
    /// Tokens that were chosen, the number of the last one.
    pub step: i32,
    unused: i32,
}

// SAFETY: four ints and no padding.
unsafe impl DeviceRepr for DevicePlace {}

impl DevicePlace {
    pub fn new(position: i32, encoded: i32, step: i32) -> Self {
        Self { position, encoded, step, unused: 0 }
    }
}

/// Where the rows of a call stand, those of a sequence together.
#[derive(Debug, Clone, Copy)]
pub struct RowPlaces {
    pub sequences: usize,
    /// Rows of each sequence.
    pub rows: usize,
    /// The first row's of each sequence; the most that it may be where there are `places`.
    pub position: usize,
    /// [`DevicePlace`] of each sequence; 0 where all are at `position`.
    pub places: u64,
}

impl RowPlaces {
    /// Rows of all sequences.
    pub fn all_rows(self) -> usize {
        self.sequences * self.rows
    }
}
