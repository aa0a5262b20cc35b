//! fp32 vectors as wide as the machine's registers, so that a kernel is written once and runs on every [`Isa`].
//!
//! A kernel implements [`LanesKernel`] with an `#[inline(always)]` body that is generic over [`Lanes`]; [`on`] checks the
//! machine and calls it inside a function compiled for that instruction set.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::kernels::isa::Isa;
use std::sync::LazyLock;

/// One vector of fp32. Implementations name instructions that the machine must have, and only [`on`] picks one, after
/// it has checked; so the arithmetic is safe to call.
pub(super) trait Lanes: Copy {
    const WIDTH: usize;

    fn splat(value: f32) -> Self;

    /// # Safety
    /// `WIDTH` elements from `start` are readable.
    unsafe fn read(start: *const f32) -> Self;
    /// # Safety
    /// `WIDTH` elements from `start` are writable.
    unsafe fn write(self, start: *mut f32);
    /// # Safety
    /// Writes as [`Lanes::write`] does, and `start` is aligned to the vector. The store goes past the caches, and other threads may look at it
    /// only after [`fence_streamed_stores`].
    unsafe fn write_past_caches(self, start: *mut f32);

    /// The first `x.len()` < `WIDTH` lanes from `x`, zeros after.
    fn load_head(x: &[f32]) -> Self;
    /// The first `out.len()` < `WIDTH` lanes to `out`.
    fn store_head(self, out: &mut [f32]);

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self · factor + addend`, rounded once where the machine can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// `self` where it is greater, else `other`: a NaN on either side gives `other`.
    fn max(self, other: Self) -> Self;
    /// `self` where it is less, else `other`: a NaN on either side gives `other`.
    fn min(self, other: Self) -> Self;
    /// Operates on the bits of each lane.
    fn xor(self, other: Self) -> Self;
    /// Rounds to the nearest integer, ties to even; |self| < 2^22.
    fn round(self) -> Self;
    /// `self · 2^n` for integral `n` in −252..=252; `self` in 0.5..2.
    fn scale_by_power_of_two(self, n: Self) -> Self;

    fn sum(self) -> f32;
    /// The sums of four vectors: dearer than [`Lanes::sum`] once, cheaper than it four times.
    fn sum_each(four: [Self; 4]) -> [f32; 4];
    /// The greatest lane; NaN lanes never win.
    fn greatest(self) -> f32;

    #[inline(always)]
    fn load(x: &[f32]) -> Self {
        assert!(x.len() >= Self::WIDTH);
        // SAFETY: the assert above.
        unsafe { Self::read(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, out: &mut [f32]) {
        assert!(out.len() >= Self::WIDTH);
        // SAFETY: the assert above.
        unsafe { self.write(out.as_mut_ptr()) }
    }
}

/// Work that runs on any [`Lanes`]. `run` must be `#[inline(always)]`, or it is compiled without the instruction set.
pub(super) trait LanesKernel {
    type Output;
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs `kernel` with the vectors of `isa`. Panics if the machine lacks it.
pub(super) fn on<K: LanesKernel>(isa: Isa, kernel: K) -> K::Output {
    static BEST: LazyLock<Isa> = LazyLock::new(Isa::detect);
    assert!(isa <= *BEST, "this machine runs up to {}, not {}", BEST.name(), isa.name());
    if isa == Isa::Portable { kernel.run::<portable::Eight>() } else { on_vector_unit(isa, kernel) }
}

#[cfg(target_arch = "x86_64")]
fn on_vector_unit<K: LanesKernel>(isa: Isa, kernel: K) -> K::Output {
    // SAFETY: `on` has checked that the machine has `isa`.
    unsafe { if isa == Isa::Avx512 { x86::run_avx512(kernel) } else { x86::run_avx2(kernel) } }
}

#[cfg(not(target_arch = "x86_64"))]
fn on_vector_unit<K: LanesKernel>(_: Isa, kernel: K) -> K::Output {
    kernel.run::<portable::Eight>()
}

/// Asks for the cache line of `address`, which need not be readable.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn prefetch(address: *const f32) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch of any address is harmless, and every x86-64 machine has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

/// Other machines fetch ahead by themselves.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(super) fn prefetch(_: *const f32) {}

/// Orders the stores of [`Lanes::write_past_caches`] before all that this thread writes later.
#[cfg(target_arch = "x86_64")]
pub(super) fn fence_streamed_stores() {
    // SAFETY: every x86-64 machine has it.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

/// Other machines use ordinary stores.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn fence_streamed_stores() {}

/// `e^x` lane by lane: relative error below 2e-7 where the result is a normal number; 0 from −104 down, infinite above
/// 88.73; NaN stays NaN.
///
/// `e^x = 2^n · e^r` with `|r| ≤ ln 2 / 2`. The Taylor series of degree 7 leaves `r^8 / 8!` ≤ 5.2e-9 of it, far below the
/// fp32 roundings, so fitted coefficients would gain nothing.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    // `ln 2` in two parts: n times the first is exact for |n| < 2^15, as its last 15 bits are zero.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = L::splat(-104.0).max(L::splat(89.0).min(x));
    let n = x.mul(L::splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(L::splat(-LN_2_LOW), n.mul_add(L::splat(-LN_2_HIGH), x));
    let mut series = L::splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series.mul_add(r, L::splat(coefficient));
    }
    series.scale_by_power_of_two(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpOf<'a>(&'a mut [f32]);

    impl LanesKernel for ExpOf<'_> {
        type Output = ();
        #[inline(always)]
        fn run<L: Lanes>(self) {
            let mut chunks = self.0.chunks_exact_mut(L::WIDTH);
            for chunk in &mut chunks {
                exp(L::load(chunk)).store(chunk);
            }
            let tail = chunks.into_remainder();
            exp(L::load_head(tail)).store_head(tail);
        }
    }

    fn exp_all(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        on(isa, ExpOf(&mut out));
        out
    }

    #[test]
    fn exp_is_within_its_stated_error() {
        let x: Vec<f32> = (0..400_003).map(|i| -87.3 + i as f32 * (88.7 + 87.3) / 400_003.0).collect();
        for isa in Isa::available() {
            for (x, y) in x.iter().zip(exp_all(isa, &x)) {
                let expected = (*x as f64).exp();
                let error = ((y as f64 - expected) / expected).abs();
                assert!(error < 2e-7, "{}: exp({x}) = {y}, off by {error:e}", isa.name());
            }
        }
    }

    #[test]
    fn exp_of_extremes() {
        for isa in Isa::available() {
            let y = exp_all(isa, &[f32::NEG_INFINITY, -200.0, 0.0, 88.8, f32::INFINITY, f32::MAX, f32::MIN, -0.0]);
            assert_eq!(y, [0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY, 0.0, 1.0], "{}", isa.name());
            assert!(exp_all(isa, &[f32::NAN])[0].is_nan(), "{}", isa.name());
            let denormal = exp_all(isa, &[-95.0])[0] as f64;
            assert!((denormal - (-95.0f64).exp()).abs() < 3e-45, "{}: {denormal}", isa.name());
        }
    }

    struct Reductions<'a>(&'a [f32]);

    impl LanesKernel for Reductions<'_> {
        type Output = (usize, f32, [f32; 4], f32);
        #[inline(always)]
        fn run<L: Lanes>(self) -> Self::Output {
            let four = [0, 1, 2, 3].map(|i| L::load(&self.0[i * L::WIDTH..]));
            (L::WIDTH, four[0].sum(), L::sum_each(four), four[0].greatest())
        }
    }

    #[test]
    fn reductions_of_small_integers_are_exact() {
        let x: Vec<f32> = (0..64).map(|i| ((i * 37) % 23) as f32 - 11.0).collect();
        for isa in Isa::available() {
            let (width, sum, sums, greatest) = on(isa, Reductions(&x));
            let expected: Vec<f32> = x.chunks(width).take(4).map(|c| c.iter().sum()).collect();
            assert_eq!((sum, sums.to_vec()), (expected[0], expected), "{}", isa.name());
            assert_eq!(greatest, x[..width].iter().copied().fold(f32::MIN, f32::max), "{}", isa.name());
        }
    }
}
