//! Vectors of fp32: sums and the greatest element.

use super::lanes::{Lanes, LanesKernel, exp, on};
use crate::kernels::isa::Isa;

/// `a += b`
pub fn add_to(isa: Isa, a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    on(isa, AddTo { a, b });
}

/// `cap · tanh(x / cap)` in place, within 2e-7 · cap.
pub fn cap(isa: Isa, x: &mut [f32], cap: f32) {
    on(isa, Cap { x, cap });
}

/// `y += factor · x`
pub fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    assert_eq!(y.len(), x.len());
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

struct Cap<'a> {
    x: &'a mut [f32],
    cap: f32,
}

impl LanesKernel for Cap<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (factor, cap) = (2.0 / self.cap, L::splat(self.cap));
        // tanh(u) = 1 − 2 / (1 + e^(2u)), which is −1 and 1 at the ends.
        let at = |x: L| {
            let e = exp(x.mul(L::splat(factor)));
            L::splat(1.0).sub(L::splat(2.0).div(e.add(L::splat(1.0)))).mul(cap)
        };
        let mut chunks = self.x.chunks_exact_mut(L::WIDTH);
        for chunk in &mut chunks {
            at(L::load(chunk)).store(chunk);
        }
        let tail = chunks.into_remainder();
        at(L::load_head(tail)).store_head(tail);
    }
}

/// Index of the greatest element, the lowest where several tie. NaN never wins; 0 if nothing else is there.
pub fn argmax(isa: Isa, x: &[f32]) -> usize {
    on(isa, Argmax { x })
}

struct AddTo<'a> {
    a: &'a mut [f32],
    b: &'a [f32],
}

impl LanesKernel for AddTo<'_> {
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

impl LanesKernel for Argmax<'_> {
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
                let mut sum = a.clone();
                add_to(isa, &mut sum, &b);
                assert_eq!(sum, expected, "{} n {n}", isa.name());
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
}
