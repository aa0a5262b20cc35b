//! Threads that run one region of work together, many thousand times a second.
//!
//! A pool keeps its threads between regions: they spin for 50 µs and then sleep, so that a decode step finds them awake
//! and an idle session burns nothing. The thread that calls [`Pool::run`] is worker 0. Threads of the pool are pinned to
//! cores other than the one that the maker of the pool was on. The caller stays free to move, so that what it starts
//! (child processes, threads) inherits no narrow mask; it can be held to its core for as long as a [`PinnedCaller`] lives.

mod signal;

use super::topology::affinity::{self, Mask};
use super::topology::{core_of, cores};
use signal::{Barrier, LetGo, Signal, lock};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use super::topology::default_threads;

/// Longer than the serial work between two regions of a step, shorter than anyone notices on a battery. A wake-up from
/// sleep costs 5 to 50 µs, so spinning for about as long at most doubles the wait.
const SPIN: Duration = Duration::from_micros(50);

/// A fixed set of threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held while a region runs: regions of several callers take turns.
    region: Mutex<()>,
    /// The core that is left to the caller.
    caller_cpu: Option<usize>,
}

type Work<'a> = dyn Fn(&Worker) + Sync + 'a;

struct Shared {
    count: usize,
    spin: Duration,
    /// Counts regions; a step starts one.
    started: Signal,
    /// Counts threads that are through with their region.
    finished: Signal,
    barrier: Barrier,
    /// The region's work; written by the caller between regions only.
    work: UnsafeCell<Option<*const Work<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: all fields but `work` are Send and Sync. `work` is written by the holder of `Pool::region` while no thread is in
// a region, and read by threads after they have seen `started` change, which orders the two; it points to a Sync closure.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

thread_local! {
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` ≥ 1, the caller included. Panics where [`Pool::try_new`] fails.
    pub fn new(threads: usize) -> Self {
        Self::try_new(threads).expect("the system starts a thread for each core")
    }

    /// Makes a pool as [`Pool::new`] does; fails if the system refuses to start so many threads.
    pub fn try_new(threads: usize) -> io::Result<Self> {
        assert!(threads >= 1, "a pool has at least one thread");
        let (caller_cpu, cpus) = placement(threads);
        // More threads than cores: whoever spins keeps another from its work.
        let spin = if cpus.is_some() { SPIN } else { Duration::ZERO };
        let shared = Arc::new(Shared {
            count: threads,
            spin,
            started: Signal::default(),
            finished: Signal::default(),
            barrier: Barrier::default(),
            work: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        // Dropped on the way out of an error, which ends the threads that were started.
        let mut pool = Self { shared, threads: Vec::new(), region: Mutex::new(()), caller_cpu };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let mask = cpus.as_ref().and_then(|cpus| Mask::only(*cpus.get(index - 1)?));
            let body = move || serve(&shared, index, mask);
            pool.threads.push(thread::Builder::new().name(format!("compute-{index}")).spawn(body)?);
        }
        Ok(pool)
    }

    pub fn threads(&self) -> usize {
        self.shared.count
    }

    /// Runs `work` once on every worker and returns when all are done. A panic of a worker is raised again here; workers
    /// that wait at a barrier meanwhile are let go. Regions do not nest: a call from inside one panics.
    pub fn run(&self, work: &(dyn Fn(&Worker) + Sync)) {
        assert!(!IN_REGION.get(), "a region of a pool starts no other");
        let turn = lock(&self.region);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes, and every thread is through with `work` before this function returns.
        let endless = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        let finished = shared.finished.value();
        // SAFETY: `turn` is held and no region runs, so no thread reads `work` now.
        unsafe { *shared.work.get() = Some(endless) };
        shared.started.step();
        shared.take_part(0, work);
        let all = finished.wrapping_add(shared.count as u32 - 1);
        shared.finished.wait(shared.spin, |value| value == all);
        shared.barrier.reset();
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Holds the calling thread to the core that the pool's threads leave free, until the value is dropped. For the length
    /// of a call that runs many regions; nothing that the thread starts meanwhile can leave that core by itself.
    pub fn pin_caller(&self) -> PinnedCaller {
        let before = self.caller_cpu.and_then(|_| Mask::current());
        if let (Some(_), Some(mask)) = (&before, self.caller_cpu.and_then(Mask::only)) {
            mask.apply();
        }
        PinnedCaller { before, not_send: PhantomData }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.started.step();
        for thread in self.threads.drain(..) {
            // A thread ends without a panic: `take_part` catches those of the work.
            let _ = thread.join();
        }
    }
}

/// Gives the thread its CPUs back when dropped. See [`Pool::pin_caller`].
pub struct PinnedCaller {
    before: Option<Mask>,
    /// The mask is that of one thread.
    not_send: PhantomData<*const ()>,
}

impl Drop for PinnedCaller {
    fn drop(&mut self) {
        if let Some(mask) = &self.before {
            mask.apply();
        }
    }
}

/// One thread's view of a region.
pub struct Worker<'a> {
    index: usize,
    shared: &'a Shared,
}

impl Worker<'_> {
    /// 0 for the caller, below [`Worker::count`].
    pub fn index(&self) -> usize {
        self.index
    }

    pub fn count(&self) -> usize {
        self.shared.count
    }

    /// Returns once every worker of the region has called it; what they wrote before is then seen by all. Every worker
    /// calls it equally often.
    pub fn barrier(&self) {
        if self.shared.count > 1 {
            self.shared.barrier.wait(self.shared.count, self.shared.spin);
        }
    }

    /// This worker's contiguous part of 0..n, in multiples of `granule` ≥ 1 (the last part takes the tail); parts differ
    /// by at most one granule.
    pub fn share(&self, n: usize, granule: usize) -> Range<usize> {
        share(n, granule, self.index, self.shared.count)
    }
}

fn share(n: usize, granule: usize, index: usize, count: usize) -> Range<usize> {
    let granules = n.div_ceil(granule);
    let (each, extra) = (granules / count, granules % count);
    let start = index * each + index.min(extra);
    let end = start + each + usize::from(index < extra);
    (start * granule).min(n)..(end * granule).min(n)
}

impl Shared {
    /// Runs the work on this thread; keeps a panic and lets the others go.
    fn take_part(&self, index: usize, work: &Work) {
        IN_REGION.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| work(&Worker { index, shared: self })));
        IN_REGION.set(false);
        if let Err(panic) = result
            && !panic.is::<LetGo>()
        {
            lock(&self.panic).get_or_insert(panic);
            self.barrier.break_up();
        }
    }
}

/// The life of a thread of the pool.
fn serve(shared: &Shared, index: usize, mask: Option<Mask>) {
    if let Some(mask) = mask {
        mask.apply();
    }
    let mut seen = 0;
    loop {
        seen = shared.started.wait(shared.spin, |value| value != seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the caller wrote `work` before it stepped `started`, and waits for this thread before it writes again.
        if let Some(work) = unsafe { *shared.work.get() } {
            // SAFETY: the closure outlives the region, which lasts until `finished` is stepped below.
            shared.take_part(index, unsafe { &*work });
        }
        shared.finished.step();
    }
}

/// The caller's core, and one core for each other thread if there are enough.
fn placement(threads: usize) -> (Option<usize>, Option<Vec<usize>>) {
    let cores = cores();
    if cores.is_empty() {
        // The system does not report it; assume that the user does not ask for more threads than cores.
        return (None, Some(Vec::new()));
    }
    if threads > cores.len() {
        return (None, None);
    }
    // From the caller's core on, so that pools of several threads do not all crowd the same cores.
    let here = affinity::current_cpu().map(core_of);
    let first = cores.iter().position(|cpu| Some(core_of(*cpu)) == here).unwrap_or(0);
    let mut order = cores.iter().cycle().skip(first).take(threads).copied();
    let caller = order.next();
    (caller, Some(order.collect()))
}

#[cfg(test)]
mod tests;
