//! Signals and barriers that the threads of a pool wait at.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A counter that threads wait on: they spin a while, then sleep.
#[derive(Default)]
pub(super) struct Signal {
    value: AtomicU32,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    stepped: Condvar,
}

impl Signal {
    pub(super) fn value(&self) -> u32 {
        self.value.load(Ordering::SeqCst)
    }

    pub(super) fn step(&self) {
        self.value.fetch_add(1, Ordering::SeqCst);
        // A waiter counts itself before it looks at the value for the last time, so one of the two sees the other.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&self.lock);
            self.stepped.notify_all();
        }
    }

    /// The first value seen that is `wanted`.
    pub(super) fn wait(&self, spin: Duration, wanted: impl Fn(u32) -> bool) -> u32 {
        let mut value = self.value();
        if wanted(value) {
            return value;
        }
        let start = Instant::now();
        while start.elapsed() < spin {
            // The clock is dearer than a look at the value.
            for _ in 0..32 {
                std::hint::spin_loop();
                value = self.value();
                if wanted(value) {
                    return value;
                }
            }
        }
        // On a crowded machine the awaited thread may only need the CPU.
        for _ in 0..2 {
            thread::yield_now();
            value = self.value();
            if wanted(value) {
                return value;
            }
        }
        self.sleep(wanted)
    }

    fn sleep(&self, wanted: impl Fn(u32) -> bool) -> u32 {
        let mut guard = lock(&self.lock);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut value = self.value();
        while !wanted(value) {
            guard = self.stepped.wait(guard).unwrap_or_else(PoisonError::into_inner);
            value = self.value();
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        value
    }
}

/// The panic that a worker unwinds with when another one's panic breaks the barrier that it waits at.
pub(super) struct LetGo;

#[derive(Default)]
pub(super) struct Barrier {
    arrived: AtomicUsize,
    passed: Signal,
    broken: AtomicBool,
}

impl Barrier {
    pub(super) fn wait(&self, count: usize, spin: Duration) {
        let before = self.passed.value();
        if self.arrived.fetch_add(1, Ordering::SeqCst) + 1 == count {
            self.arrived.store(0, Ordering::SeqCst);
            self.passed.step();
        } else if !self.broken.load(Ordering::SeqCst) {
            self.passed.wait(spin, |value| value != before);
        }
        if self.broken.load(Ordering::SeqCst) {
            resume_unwind(Box::new(LetGo));
        }
    }

    /// Lets all go that wait now or come later.
    pub(super) fn break_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.passed.step();
    }

    /// Makes it whole again, once no worker is in a region.
    pub(super) fn reset(&self) {
        if self.broken.swap(false, Ordering::SeqCst) {
            self.arrived.store(0, Ordering::SeqCst);
        }
    }
}

/// A lock whose holder panicked still guards sound data here: nothing is half-written under one.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
