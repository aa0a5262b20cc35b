//! The time that repeats are stamped with.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::engine::fake::FakeTime;

/// Monotonic nanoseconds since some fixed moment, the same one for all processes.
pub trait Clock {
    fn now_ns(&self) -> u64;
}

/// CLOCK_MONOTONIC, whose zero all processes of a machine share.
#[derive(Clone, Copy)]
pub struct Monotonic {
    anchor: Instant,
    anchor_ns: u64,
}

impl Monotonic {
    /// The standard library reads the same clock and does not tell its value, so the value is read once between two of its readings that
    /// lie close together. This process may lose its processor in between, therefore the closest of several.
    pub fn start() -> Self {
        let read = || {
            let anchor = Instant::now();
            let now = clock_gettime(ClockId::Monotonic);
            let apart = anchor.elapsed();
            // 2⁶⁴ ns are 584 years.
            let anchor_ns = (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64);
            (apart, Self { anchor, anchor_ns })
        };
        let mut best = read();
        for _ in 0..MOST_READINGS {
            if best.0 < ANCHOR_WITHIN {
                break;
            }
            let next = read();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }
}

/// The anchor's value is off by no more than this.
const ANCHOR_WITHIN: Duration = Duration::from_micros(10);

const MOST_READINGS: usize = 1000;

impl Clock for Monotonic {
    fn now_ns(&self) -> u64 {
        self.anchor_ns + self.anchor.elapsed().as_nanos() as u64
    }
}

impl Clock for FakeTime {
    fn now_ns(&self) -> u64 {
        FakeTime::now_ns(self)
    }
}
