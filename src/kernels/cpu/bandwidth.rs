//! The read bandwidth of this machine's memory: the limit that decode speed is held against.

use super::lanes::{Lanes, LanesKernel, fence_streamed_stores, on, prefetch};
use super::pages::Pages;
use super::pool::{Pool, Worker};
use super::shared::SharedSlice;
use super::topology::{available_memory_bytes, last_level_cache_bytes};
use crate::kernels::isa::Isa;
use std::io;
use std::time::{Duration, Instant};

const MIN_BYTES: usize = 256 << 20;
const MAX_BYTES: usize = 2 << 30;
/// Each worker's part starts on a huge page of its own.
const GRANULE: usize = (2 << 20) / size_of::<f32>();
const MIN_PASSES: usize = 5;
const MAX_PASSES: usize = 25;
/// No pass starts later, once [`MIN_PASSES`] are done.
const BUDGET: Duration = Duration::from_millis(300);

/// Memory that every thread of a pool has touched its part of: writing it for the first time takes longer than all passes over it.
pub struct WorkingSet(Pages);

impl WorkingSet {
    /// Eight times the last-level caches (256 MB to 2 GB, no more than a quarter of the free memory). Fails where the memory cannot be had.
    pub fn new(pool: &Pool) -> io::Result<Self> {
        let mut pages = Pages::zeroed(working_set_bytes())?;
        let shared = SharedSlice::new(pages.as_values_mut::<f32>());
        pool.run(&|worker| {
            // SAFETY: shares are disjoint.
            unsafe { shared.range_mut(worker.share(shared.len(), GRANULE)) }.fill(1.0);
        });
        Ok(Self(pages))
    }

    /// Bytes read per second / 1e9 with the widest loads on all threads of `pool`: the best of at least five passes. Each thread reads memory
    /// that it touched first.
    pub fn read_gb_s(&mut self, isa: Isa, pool: &Pool) -> f64 {
        let shared = SharedSlice::new(self.0.as_values_mut::<f32>());
        let seconds = best_pass_s(pool, &|worker| {
            // SAFETY: nothing writes meanwhile.
            let sum = on(isa, Read { x: unsafe { shared.range(worker.share(shared.len(), GRANULE)) } });
            std::hint::black_box(sum);
        });
        size_of::<f32>() as f64 * shared.len() as f64 / 1e9 / seconds
    }

    /// Bytes read plus bytes written per second / 1e9 when each thread copies one half of its part to the other, with stores that go past
    /// the caches; otherwise as [`Self::read_gb_s`].
    pub fn copy_gb_s(&mut self, isa: Isa, pool: &Pool) -> f64 {
        let shared = SharedSlice::new(self.0.as_values_mut::<f32>());
        let half = |worker: &Worker| worker.share(shared.len(), GRANULE).len() / 2;
        let copied = std::sync::atomic::AtomicUsize::new(0);
        pool.run(&|worker| {
            copied.fetch_add(half(worker), std::sync::atomic::Ordering::Relaxed);
        });
        let seconds = best_pass_s(pool, &|worker| {
            let (start, half) = (worker.share(shared.len(), GRANULE).start, half(worker));
            // SAFETY: the parts of workers are disjoint, and so are their halves.
            let (x, out) =
                unsafe { (shared.range(start..start + half), shared.range_mut(start + half..start + 2 * half)) };
            on(isa, Copy { x, out });
        });
        2.0 * size_of::<f32>() as f64 * copied.into_inner() as f64 / 1e9 / seconds
    }
}

/// Reads `bytes` with the widest loads, each once, and gives the exclusive or of all of them: what memory alone takes of a
/// computation that reads the same. As fast as [`WorkingSet::read_gb_s`] where `bytes` are many.
pub fn read_through(isa: Isa, bytes: &[u8]) -> u8 {
    // SAFETY: every four bytes are an fp32 value.
    let (head, words, tail) = unsafe { bytes.align_to::<f32>() };
    let (turns, rest) = words.split_at(words.len() / TURN * TURN);
    let folded = rest.iter().fold(on(isa, Fold { x: turns }), |folded, word| folded ^ word.to_bits());
    head.iter().chain(tail).chain(&folded.to_ne_bytes()).fold(0, |folded, byte| folded ^ byte)
}

/// A multiple of two granules, so that the half of a part ends at a granule or in its middle.
fn working_set_bytes() -> usize {
    let wanted =
        last_level_cache_bytes().map_or(MIN_BYTES, |cache| cache.saturating_mul(8)).clamp(MIN_BYTES, MAX_BYTES);
    let allowed = available_memory_bytes().map_or(wanted, |free| wanted.min(free / 4));
    let granules = 2 * GRANULE * size_of::<f32>();
    (allowed / granules).max(1) * granules
}

fn best_pass_s(pool: &Pool, pass: &(dyn Fn(&Worker) + Sync)) -> f64 {
    let start = Instant::now();
    let mut best = Duration::MAX;
    for n in 0..MAX_PASSES {
        if n >= MIN_PASSES && start.elapsed() > BUDGET {
            break;
        }
        let begin = Instant::now();
        pool.run(pass);
        best = best.min(begin.elapsed());
    }
    best.as_secs_f64()
}

/// Elements ahead that are asked for: 2 KiB covers the latency of memory at the rate of one core.
const AHEAD: usize = 512;
/// Elements of a turn of the loop, 512 bytes.
const TURN: usize = 128;

struct Read<'a> {
    x: &'a [f32],
}

impl LanesKernel for Read<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let mut sums = [L::splat(0.0); 8];
        for turn in self.x.chunks_exact(TURN) {
            for line in 0..TURN / 16 {
                prefetch(turn.as_ptr().wrapping_add(AHEAD + line * 16));
            }
            for at in (0..TURN).step_by(8 * L::WIDTH) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(L::load(&turn[at + i * L::WIDTH..]));
                }
            }
        }
        let mut total = L::splat(0.0);
        for sum in sums {
            total = total.add(sum);
        }
        total.sum()
    }
}

/// The exclusive or of all words; `x` is whole turns. Unlike a sum it has no slow values, whatever the bits are.
struct Fold<'a> {
    x: &'a [f32],
}

impl LanesKernel for Fold<'_> {
    type Output = u32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> u32 {
        let mut folded = [L::splat(0.0); 8];
        for turn in self.x.chunks_exact(TURN) {
            for line in 0..TURN / 16 {
                prefetch(turn.as_ptr().wrapping_add(AHEAD + line * 16));
            }
            for at in (0..TURN).step_by(8 * L::WIDTH) {
                for (i, folded) in folded.iter_mut().enumerate() {
                    *folded = folded.xor(L::load(&turn[at + i * L::WIDTH..]));
                }
            }
        }
        let mut all = L::splat(0.0);
        for folded in folded {
            all = all.xor(folded);
        }
        let mut lanes = [0.0; TURN];
        all.store(&mut lanes);
        lanes[..L::WIDTH].iter().fold(0, |folded, lane| folded ^ lane.to_bits())
    }
}

struct Copy<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl LanesKernel for Copy<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (x, out) in self.x.chunks_exact(TURN).zip(self.out.chunks_exact_mut(TURN)) {
            for line in 0..TURN / 16 {
                prefetch(x.as_ptr().wrapping_add(AHEAD + line * 16));
            }
            assert!(out.as_ptr().addr().is_multiple_of(64), "shares start on a page");
            for at in (0..TURN).step_by(L::WIDTH) {
                // SAFETY: at + WIDTH ≤ TURN, and `out` is aligned to 64 bytes.
                unsafe { L::load(&x[at..]).write_past_caches(out.as_mut_ptr().add(at)) };
            }
        }
        fence_streamed_stores();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_is_whole_pages_within_bounds() {
        let bytes = working_set_bytes();
        assert!(bytes > 0 && bytes <= MAX_BYTES && bytes.is_multiple_of(4 << 20));
    }

    #[test]
    fn a_copy_goes_from_one_half_of_each_part_to_the_other() {
        let pool = Pool::new(3);
        // Three parts of two, one and one granules.
        let mut set = WorkingSet(Pages::zeroed(4 * GRANULE * size_of::<f32>()).unwrap());
        set.0.as_values_mut::<f32>().fill(2.0);
        assert!(set.read_gb_s(Isa::detect(), &pool) > 0.0);
        let n = set.0.as_values_mut::<f32>().len();
        for (i, x) in set.0.as_values_mut::<f32>().iter_mut().enumerate() {
            *x = i as f32;
        }
        assert!(set.copy_gb_s(Isa::detect(), &pool) > 0.0);
        let values = set.0.as_values_mut::<f32>();
        let mut start = 0;
        for granules in [2, 1, 1] {
            let half = granules * GRANULE / 2;
            assert!(values[start..start + half] == values[start + half..start + 2 * half]);
            assert_eq!(values[start + half], start as f32);
            start += 2 * half;
        }
        assert_eq!(start, n);
    }

    #[test]
    fn reading_through_reads_every_byte_once() {
        // NaN, denormal numbers and all else.
        let bytes: Vec<u8> = (0..9000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
        for isa in Isa::available() {
            for range in [0..0, 0..1, 3..10, 0..512, 1..513, 5..8999, 0..9000] {
                let expected = bytes[range.clone()].iter().fold(0, |folded, byte| folded ^ byte);
                assert_eq!(read_through(isa, &bytes[range.clone()]), expected, "{} {range:?}", isa.name());
            }
        }
    }

    #[test]
    fn reading_sums_and_copying_copies() {
        let pages = || Pages::zeroed(4 << 20).unwrap();
        let (mut source, mut target) = (pages(), pages());
        let (x, out) = (source.as_values_mut::<f32>(), target.as_values_mut::<f32>());
        for (i, x) in x.iter_mut().enumerate() {
            // Sums of up to 2^20 values of −8..=7 stay exact.
            *x = (i % 16) as f32 - 8.0;
        }
        for isa in Isa::available() {
            out.fill(0.0);
            assert_eq!(on(isa, Read { x }), -0.5 * x.len() as f32, "{}", isa.name());
            on(isa, Copy { x, out });
            assert!(x == out, "{}", isa.name());
        }
    }
}
