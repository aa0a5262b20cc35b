//! Vectors of fp32: sums, the greatest element, finiteness, and conversions to and from fp16.

use super::lanes::{Kernel, Lanes, on};
use crate::kernels::isa::Isa;
use half::f16;

/// `out = a + b`
pub fn add(isa: Isa, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == b.len() && a.len() == out.len(), "{} + {} into {}", a.len(), b.len(), out.len());
    on(isa, Add { a, b, out });
}

/// `a += b`
pub fn add_to(isa: Isa, a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    on(isa, AddTo { a, b });
}

/// Index of the greatest element, the lowest where several tie. NaN never wins; 0 if nothing else is there.
pub fn argmax(isa: Isa, x: &[f32]) -> usize {
    on(isa, Argmax { x })
}

/// Whether no element is infinite or NaN.
pub fn all_finite(isa: Isa, x: &[f32]) -> bool {
    on(isa, Finite { x })
}

/// fp16 to fp32, exact.
pub fn widen(isa: Isa, x: &[f16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    on(isa, Widen { x, out });
}

/// fp32 to fp16, to nearest, ties to even; what is too large becomes infinite.
pub fn narrow(isa: Isa, x: &[f32], out: &mut [f16]) {
    assert_eq!(x.len(), out.len());
    on(isa, Narrow { x, out });
}

struct Add<'a> {
    a: &'a [f32],
    b: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (mut a, mut b) = (self.a.chunks_exact(L::WIDTH), self.b.chunks_exact(L::WIDTH));
        let mut out = self.out.chunks_exact_mut(L::WIDTH);
        for ((a, b), out) in (&mut a).zip(&mut b).zip(&mut out) {
            L::load(a).add(L::load(b)).store(out);
        }
        let tail = L::load_head(a.remainder()).add(L::load_head(b.remainder()));
        tail.store_head(out.into_remainder());
    }
}

struct AddTo<'a> {
    a: &'a mut [f32],
    b: &'a [f32],
}

impl Kernel for AddTo<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (mut a, mut b) = (self.a.chunks_exact_mut(L::WIDTH), self.b.chunks_exact(L::WIDTH));
        for (a, b) in (&mut a).zip(&mut b) {
            L::load(a).add(L::load(b)).store(a);
        }
        let tail = a.into_remainder();
        L::load_head(tail).add(L::load_head(b.remainder())).store_head(tail);
    }
}

struct Argmax<'a> {
    x: &'a [f32],
}

impl Kernel for Argmax<'_> {
    type Output = usize;
    /// One pass finds the block (of 4 KiB) that first holds the greatest value, and only that block is searched.
    #[inline(always)]
    fn run<L: Lanes>(self) -> usize {
        const BLOCK: usize = 1024;
        let (mut best, mut start) = (f32::NEG_INFINITY, 0);
        for (i, block) in self.x.chunks(BLOCK).enumerate() {
            let greatest = greatest::<L>(block);
            if greatest > best {
                (best, start) = (greatest, i * BLOCK);
            }
        }
        self.x[start..].iter().position(|x| *x == best).map_or(0, |i| start + i)
    }
}

#[inline(always)]
fn greatest<L: Lanes>(x: &[f32]) -> f32 {
    let mut best = [L::splat(f32::NEG_INFINITY); 4];
    let mut chunks = x.chunks_exact(4 * L::WIDTH);
    for chunk in &mut chunks {
        for (i, best) in best.iter_mut().enumerate() {
            *best = L::load(&chunk[i * L::WIDTH..]).max(*best);
        }
    }
    let best = best[0].max(best[1]).max(best[2].max(best[3])).greatest();
    chunks.remainder().iter().copied().fold(best, f32::max)
}

struct Finite<'a> {
    x: &'a [f32],
}

impl Kernel for Finite<'_> {
    type Output = bool;
    /// `0 · x` is zero for a finite `x` and NaN otherwise, and NaN survives a sum.
    #[inline(always)]
    fn run<L: Lanes>(self) -> bool {
        let zero = L::splat(0.0);
        let mut sums = [zero; 4];
        let mut chunks = self.x.chunks_exact(4 * L::WIDTH);
        for chunk in &mut chunks {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(&chunk[i * L::WIDTH..]).mul_add(zero, *sum);
            }
        }
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        sum == 0.0 && chunks.remainder().iter().all(|x| x.is_finite())
    }
}

struct Widen<'a> {
    x: &'a [f16],
    out: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (mut x, mut out) = (self.x.chunks_exact(L::WIDTH), self.out.chunks_exact_mut(L::WIDTH));
        for (x, out) in (&mut x).zip(&mut out) {
            L::load_f16(x).store(out);
        }
        for (x, out) in x.remainder().iter().zip(out.into_remainder()) {
            *out = x.to_f32();
        }
    }
}

struct Narrow<'a> {
    x: &'a [f32],
    out: &'a mut [f16],
}

impl Kernel for Narrow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (mut x, mut out) = (self.x.chunks_exact(L::WIDTH), self.out.chunks_exact_mut(L::WIDTH));
        for (x, out) in (&mut x).zip(&mut out) {
            L::load(x).store_f16(out);
        }
        for (x, out) in x.remainder().iter().zip(out.into_remainder()) {
            *out = f16::from_f32(*x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::test_data::random;

    const LENGTHS: [usize; 10] = [0, 1, 5, 15, 16, 17, 63, 65, 1025, 5003];

    #[test]
    fn sums_are_exact() {
        for isa in Isa::available() {
            for n in LENGTHS {
                let (a, b) = (random(n, 3), random(n, 4));
                let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
                let (mut out, mut sum) = (vec![f32::NAN; n], a.clone());
                add(isa, &a, &b, &mut out);
                add_to(isa, &mut sum, &b);
                assert_eq!((&out, &sum), (&expected, &expected), "{} n {n}", isa.name());
            }
        }
    }

    #[test]
    fn argmax_takes_the_lowest_of_ties_and_no_nan() {
        let (nan, low) = (f32::NAN, f32::NEG_INFINITY);
        let mut cases = vec![
            (vec![], 0),
            (vec![nan, nan], 0),
            (vec![nan, low], 1),
            (vec![low, low], 0),
            (vec![nan, 1.0, nan, 1.0], 1),
            (vec![-0.0, 0.0], 0),
            (vec![1.0, f32::INFINITY, f32::INFINITY], 1),
            (vec![nan; 3000], 0),
        ];
        for n in LENGTHS.into_iter().filter(|n| *n > 0) {
            for at in [0, n / 3, n / 2, n - 1] {
                let mut x = random(n, at as u64);
                x[at] = 50.0;
                x[n - 1] = 50.0;
                x[n / 4] = if n / 4 < at { nan } else { x[n / 4] };
                cases.push((x, at));
            }
        }
        for isa in Isa::available() {
            for (x, expected) in &cases {
                assert_eq!(argmax(isa, x), *expected, "{} of {}", isa.name(), x.len());
            }
        }
    }

    #[test]
    fn finiteness_is_found_at_every_place() {
        for isa in Isa::available() {
            for n in LENGTHS {
                let mut x = random(n, 8);
                x.iter_mut().step_by(3).for_each(|x| *x = f32::MAX);
                assert!(all_finite(isa, &x), "{} n {n}", isa.name());
                for at in (0..n).step_by(1 + n / 70) {
                    let kept = x[at];
                    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        x[at] = bad;
                        assert!(!all_finite(isa, &x), "{} [{at}] of {n}", isa.name());
                    }
                    x[at] = kept;
                }
            }
        }
    }

    #[test]
    fn halves_convert_as_the_half_crate_does() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|h| !h.is_nan()).collect();
        let mut singles = random(4099, 5);
        singles.extend([65_504.0, 65_519.9, 65_520.0, -70_000.0, 1e-8, 2f32.powi(-25), 1.0 + 2f32.powi(-11), f32::MAX]);
        for isa in Isa::available() {
            let mut wide = vec![0.0; halves.len()];
            widen(isa, &halves, &mut wide);
            assert!(wide.iter().zip(&halves).all(|(w, h)| w.to_bits() == h.to_f32().to_bits()), "{}", isa.name());
            let mut narrowed = vec![f16::ZERO; singles.len()];
            narrow(isa, &singles, &mut narrowed);
            for (n, x) in narrowed.iter().zip(&singles) {
                assert_eq!(n.to_bits(), f16::from_f32(*x).to_bits(), "{}: {x}", isa.name());
            }
        }
    }
}
