//! Eight lanes in plain Rust, which the compiler turns into whatever vectors the target has.

use super::Lanes;

#[derive(Clone, Copy)]
pub(super) struct Eight([f32; 8]);

impl Eight {
    #[inline(always)]
    fn with(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

/// 2^n for n in −126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

impl Lanes for Eight {
    const WIDTH: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn read(start: *const f32) -> Self {
        // SAFETY: the caller's promise; an array of fp32 needs no more alignment than its elements.
        Self(unsafe { start.cast::<[f32; 8]>().read() })
    }
    #[inline(always)]
    unsafe fn write(self, start: *mut f32) {
        // SAFETY: as in `read`.
        unsafe { start.cast::<[f32; 8]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn write_past_caches(self, start: *mut f32) {
        // SAFETY: the caller's promise. Plain Rust has no streaming store.
        unsafe { self.write(start) }
    }
    #[inline(always)]
    fn load_head(x: &[f32]) -> Self {
        let mut lanes = [0.0; 8];
        lanes[..x.len()].copy_from_slice(x);
        Self(lanes)
    }
    #[inline(always)]
    fn store_head(self, out: &mut [f32]) {
        out.copy_from_slice(&self.0[..out.len()]);
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self.with(other, |a, b| f32::from_bits(a.to_bits() ^ b.to_bits()))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.with(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.with(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.with(other, |a, b| a / b)
    }
    /// Rounds twice: a fused one is a library call on targets that lack it.
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.mul(factor).add(addend)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.with(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.with(other, |a, b| if a < b { a } else { b })
    }
    /// Adding 1.5 · 2^23 leaves no bits for a fraction, and `round_ties_even` is a library call on old targets.
    #[inline(always)]
    fn round(self) -> Self {
        const NO_FRACTION: f32 = 12_582_912.0;
        Self(self.0.map(|x| (x + NO_FRACTION) - NO_FRACTION))
    }
    /// Multiplies in two factors, as 2^128 is no fp32 and small results are denormal.
    #[inline(always)]
    fn scale_by_power_of_two(self, n: Self) -> Self {
        self.with(n, |x, n| {
            let half = n as i32 >> 1;
            x * power_of_two(half) * power_of_two(n as i32 - half)
        })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let x = self.0;
        ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]))
    }
    #[inline(always)]
    fn sum_each(four: [Self; 4]) -> [f32; 4] {
        four.map(Self::sum)
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
