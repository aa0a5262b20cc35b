//! Threads that run one region of work together, many thousand times a second.
//!
//! A pool keeps its threads between regions: they spin for [`SPIN`] and then sleep, so that a decode step finds them awake
//! and an idle session burns nothing. The thread that calls [`Pool::run`] is worker 0. Threads of the pool are pinned to
//! cores other than the one that the maker of the pool was on. The caller stays free to move, so that what it starts
//! (child processes, threads) inherits no narrow mask; it can be held to its core for as long as a [`PinnedCaller`] lives.

use super::topology::affinity::{self, Mask};
use super::topology::{core_of, cores};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

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
    /// A pool of `threads` ≥ 1, the caller included. Panics if the system refuses to start a thread.
    pub fn new(threads: usize) -> Self {
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
        let start = |index: usize| {
            let shared = shared.clone();
            let mask = cpus.as_ref().and_then(|cpus| Mask::only(*cpus.get(index - 1)?));
            let name = format!("compute-{index}");
            let body = move || serve(&shared, index, mask);
            thread::Builder::new().name(name).spawn(body).expect("the system starts a thread")
        };
        let threads = (1..threads).map(start).collect();
        Self { shared, threads, region: Mutex::new(()), caller_cpu }
    }

    pub fn threads(&self) -> usize {
        self.shared.count
    }

    /// Runs `work` once on every worker and returns when all are done. A panic of a worker is raised again here; workers
    /// that wait at a barrier meanwhile are let go. Regions do not nest: a call from inside one panics.
    pub fn run(&self, work: &(dyn Fn(&Worker) + Sync)) {
        assert!(!IN_REGION.get(), "a region of a pool starts no other");
        let _turn = lock(&self.region);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes, and every thread is through with `work` before this function returns.
        let endless = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        let finished = shared.finished.value();
        // SAFETY: `_turn` is held and no region runs, so no thread reads `work` now.
        unsafe { *shared.work.get() = Some(endless) };
        shared.started.step();
        shared.take_part(0, work);
        let all = finished.wrapping_add(shared.count as u32 - 1);
        shared.finished.wait(shared.spin, |value| value == all);
        shared.barrier.reset();
        let panic = lock(&shared.panic).take();
        drop(_turn);
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
        // The system does not tell; assume that the user does not ask for more threads than cores.
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

/// A counter that threads wait on: they spin a while, then sleep.
#[derive(Default)]
struct Signal {
    value: AtomicU32,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    stepped: Condvar,
}

impl Signal {
    fn value(&self) -> u32 {
        self.value.load(Ordering::SeqCst)
    }

    fn step(&self) {
        self.value.fetch_add(1, Ordering::SeqCst);
        // A waiter counts itself before it looks at the value for the last time, so one of the two sees the other.
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&self.lock);
            self.stepped.notify_all();
        }
    }

    /// The first value seen that is `wanted`.
    fn wait(&self, spin: Duration, wanted: impl Fn(u32) -> bool) -> u32 {
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

/// What a worker unwinds with when another one's panic breaks the barrier that it waits at.
struct LetGo;

#[derive(Default)]
struct Barrier {
    arrived: AtomicUsize,
    passed: Signal,
    broken: AtomicBool,
}

impl Barrier {
    fn wait(&self, count: usize, spin: Duration) {
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
    fn break_up(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.passed.step();
    }

    /// Makes it whole again, once no worker is in a region.
    fn reset(&self) {
        if self.broken.swap(false, Ordering::SeqCst) {
            self.arrived.store(0, Ordering::SeqCst);
        }
    }
}

/// A lock whose holder panicked still guards sound data here: nothing is half-written under one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::shared::SharedSlice;

    #[test]
    fn every_worker_runs_once_in_each_region() {
        for threads in [1, 2, 4, 7] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            let runs: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..500 {
                pool.run(&|worker| {
                    assert_eq!(worker.count(), threads);
                    runs[worker.index()].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 500), "{threads} threads");
        }
    }

    /// Each round every worker reads what all wrote in the round before.
    #[test]
    fn barriers_order_writes_and_reads() {
        for (threads, rounds) in [(1, 2000), (2, 2000), (4, 300)] {
            let pool = Pool::new(threads);
            let mut cells = vec![0usize; 2 * threads];
            let shared = SharedSlice::new(&mut cells);
            pool.run(&|worker| {
                for round in 1..=rounds {
                    let (old, new) = ((round - 1) % 2 * threads, round % 2 * threads);
                    // SAFETY: the half `old` is written by no one in this round.
                    let sum: usize = unsafe { shared.range(old..old + threads) }.iter().sum();
                    assert_eq!(sum, (round - 1) * threads);
                    let own = new + worker.index();
                    // SAFETY: the half `new` is read by no one in this round, and this element is this worker's.
                    unsafe { shared.range_mut(own..own + 1) }.fill(round);
                    worker.barrier();
                }
            });
            let last = rounds % 2 * threads;
            assert_eq!(cells[last..last + threads], vec![rounds; threads]);
        }
    }

    #[test]
    fn a_panic_comes_out_and_the_pool_goes_on() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            for culprit in 0..threads {
                let region = || {
                    pool.run(&|worker| {
                        worker.barrier();
                        if worker.index() == culprit {
                            resume_unwind(Box::new(culprit));
                        }
                        worker.barrier();
                        worker.barrier();
                    })
                };
                let panic = catch_unwind(AssertUnwindSafe(region)).unwrap_err();
                assert_eq!(panic.downcast_ref(), Some(&culprit), "{threads} threads");
                let done = AtomicUsize::new(0);
                pool.run(&|worker| {
                    worker.barrier();
                    done.fetch_add(1, Ordering::Relaxed);
                    worker.barrier();
                });
                assert_eq!(done.into_inner(), threads);
            }
        }
    }

    #[test]
    fn regions_do_not_nest_and_callers_take_turns() {
        let pool = Pool::new(2);
        let nested = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|worker| {
                if worker.index() == 0 {
                    pool.run(&|_| {});
                }
            })
        }));
        assert!(nested.is_err());
        let (inside, total) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let region = |worker: &Worker| {
            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
            worker.barrier();
            total.fetch_add(1, Ordering::SeqCst);
            inside.fetch_sub(1, Ordering::SeqCst);
            worker.barrier();
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..100).for_each(|_| pool.run(&region)));
            }
        });
        assert_eq!(total.into_inner(), 600);
    }

    #[test]
    fn shares_cover_all_and_are_even() {
        for n in [0, 1, 5, 16, 17, 63, 64, 100, 1001] {
            for granule in [1, 4, 16, 64] {
                for count in [1, 2, 3, 8, 33] {
                    let parts: Vec<_> = (0..count).map(|index| share(n, granule, index, count)).collect();
                    let mut next = 0;
                    for part in &parts {
                        assert_eq!(part.start, next);
                        assert!(part.start % granule == 0 || part.start == n);
                        next = part.end;
                    }
                    assert_eq!(next, n);
                    let granules = parts.iter().map(|part| part.len().div_ceil(granule));
                    let (least, most) = (granules.clone().min(), granules.max());
                    assert!(most <= least.map(|least| least + 1), "{n} by {granule} over {count}");
                }
            }
        }
    }

    #[test]
    fn a_pinned_caller_gets_its_mask_back() {
        let before = affinity::allowed();
        let pool = Pool::new(1);
        let pinned = pool.pin_caller();
        pool.run(&|_| assert!(affinity::allowed().len() <= before.len().max(1)));
        drop(pinned);
        assert_eq!(affinity::allowed(), before);
    }
}
