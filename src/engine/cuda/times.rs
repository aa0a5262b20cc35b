//! Device time of each step.

use anyhow::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::result::event;
use candle_core::cuda_backend::cudarc::driver::sys;

/// Two events around each step since the last prefill. Waits for the host between steps are not counted. Events are created once and
/// reused.
#[derive(Default)]
pub struct StepTimes {
    events: Vec<(sys::CUevent, sys::CUevent)>,
    n_steps: usize,
}

// SAFETY: an event is an opaque handle of the driver, which may be used from every thread.
unsafe impl Send for StepTimes {}

impl StepTimes {
    /// Forgets all steps.
    pub fn restart(&mut self) {
        self.n_steps = 0;
    }

    /// Queues `step` on the device's stream between its two events.
    pub fn around(&mut self, device: &CudaDevice, step: impl FnOnce() -> Result<()>) -> Result<()> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread()?;
        if self.n_steps == self.events.len() {
            let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
            self.events.push((event::create(flags)?, event::create(flags)?));
        }
        let (begin, end) = self.events[self.n_steps];
        // SAFETY: both events were created above or by an earlier call, and are destroyed with `self` alone.
        unsafe { event::record(begin, stream.cu_stream()) }?;
        step()?;
        // SAFETY: as above.
        unsafe { event::record(end, stream.cu_stream()) }?;
        self.n_steps += 1;
        Ok(())
    }

    /// Nanoseconds of each step, once the device has done them all.
    pub fn ns(&self) -> Result<Vec<u64>> {
        let of_step = |&(begin, end): &(sys::CUevent, sys::CUevent)| -> Result<u64> {
            // SAFETY: both were recorded on one stream.
            let ms = unsafe { event::elapsed(begin, end) }?;
            Ok((f64::from(ms) * 1e6) as u64)
        };
        self.events[..self.n_steps].iter().map(of_step).collect()
    }
}

impl Drop for StepTimes {
    fn drop(&mut self) {
        for &(begin, end) in &self.events {
            for event in [begin, end] {
                // SAFETY: created by `around`, destroyed once. A failure leaves it to the end of the process.
                let _ = unsafe { event::destroy(event) };
            }
        }
    }
}
