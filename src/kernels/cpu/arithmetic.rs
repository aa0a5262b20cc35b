//! The fp32 arithmetic of this machine: what multiplication of many tokens is held against, and whether its CPUs share cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::lanes::{Lanes, LanesKernel, on};
use super::pool::Pool;
use crate::kernels::isa::Isa;

/// Independent sums: an FMA takes up to five cycles, and two start in each.
const SUMS: usize = 12;
/// Rounds of some milliseconds, the best of which counts.
const ROUNDS: usize = 10;
const ROUND: usize = 1 << 18;

/// fp32 operations per second / 1e9 (an FMA is two) of `threads` of the pool's threads at once, with its widest vectors.
pub fn gflop_s(isa: Isa, pool: &Pool, threads: usize) -> f64 {
    let (mut best, mut width) = (Duration::MAX, 0);
    for _ in 0..ROUNDS {
        let widths = AtomicUsize::new(0);
        let start = Instant::now();
        pool.run(&|worker| {
            if worker.index() < threads {
                widths.store(on(isa, Multiply { turns: ROUND }), Ordering::Relaxed);
            }
        });
        best = best.min(start.elapsed());
        width = widths.into_inner();
    }
    (2 * SUMS * ROUND * width * threads) as f64 / 1e9 / best.as_secs_f64()
}

struct Multiply {
    turns: usize,
}

impl LanesKernel for Multiply {
    /// Elements of a vector.
    type Output = usize;

    #[inline(always)]
    fn run<L: Lanes>(self) -> usize {
        let mut sums = [L::splat(1.0); SUMS];
        let (factor, addend) = std::hint::black_box((0.999, 0.001));
        let (factor, addend) = (L::splat(factor), L::splat(addend));
        for _ in 0..self.turns {
            sums.iter_mut().for_each(|sum| *sum = sum.mul_add(factor, addend));
        }
        std::hint::black_box(sums.into_iter().map(L::sum).sum::<f32>());
        L::WIDTH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_computes() {
        let pool = Pool::new(2);
        for isa in Isa::available() {
            for threads in [1, 2] {
                let rate = gflop_s(isa, &pool, threads);
                assert!(rate.is_finite() && rate > 0.0, "{}: {rate}", isa.name());
            }
        }
    }
}
