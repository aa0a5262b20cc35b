use super::*;
use crate::kernels::cpu::shared::SharedSlice;
use std::sync::atomic::AtomicUsize;
use std::thread;

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
