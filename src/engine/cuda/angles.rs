//! Tables of rotary angles on the device, at addresses that stay.

use anyhow::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use crate::lower::cuda as lower;
use crate::plan::{Rope, RopeByLength};

/// The angles of a rope.
pub struct DeviceAngles {
    /// Laid out by [`lower::step_angles`].
    pub steps: CudaSlice<f32>,
    /// Laid out by [`lower::call_angles`], where these are others.
    pub calls: Option<CudaSlice<f32>>,
    /// [`lower::length_class`] of the sequence that the tables are for.
    class: usize,
}

impl DeviceAngles {
    pub fn new(rope: &Rope, capacity: usize, device: &CudaDevice) -> Result<Self> {
        let steps = device.clone_htod(&lower::step_angles(rope, capacity, 0))?;
        let calls = match rope.by_length {
            Some(RopeByLength::DynamicNtk { .. }) => Some(device.clone_htod(&lower::call_angles(rope, capacity, 0))?),
            Some(RopeByLength::Switch { .. }) | None => None,
        };
        Ok(Self { steps, calls, class: lower::length_class(rope, 0) })
    }

    /// Sets the tables, at the same addresses, to those of a call after which the sequence has `length` positions.
    pub fn set_length(&mut self, rope: &Rope, capacity: usize, length: usize, device: &CudaDevice) -> Result<()> {
        let class = lower::length_class(rope, length);
        if class == self.class {
            return Ok(());
        }
        match &mut self.calls {
            Some(calls) => {
                let angles = lower::call_angles(rope, length, length);
                device.memcpy_htod(&angles, &mut calls.slice_mut(..angles.len()))?;
            }
            None => device.memcpy_htod(&lower::step_angles(rope, capacity, length), &mut self.steps)?,
        }
        self.class = class;
        Ok(())
    }
}
