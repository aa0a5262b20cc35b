//! The time that repeats are stamped with.

use std::time::Instant;

use crate::engine::fake::FakeTime;

/// Monotonic nanoseconds since some fixed moment.
pub trait Clock {
    fn now_ns(&self) -> u64;
}

/// The machine's monotonic clock.
pub struct Monotonic(Instant);

impl Monotonic {
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now_ns(&self) -> u64 {
        // 2⁶⁴ ns are 584 years.
        self.0.elapsed().as_nanos() as u64
    }
}

impl Clock for FakeTime {
    fn now_ns(&self) -> u64 {
        FakeTime::now_ns(self)
    }
}
