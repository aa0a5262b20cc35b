//! The vectors of AVX2 and AVX-512.

use super::{Lanes, LanesKernel};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run_avx2<K: LanesKernel>(kernel: K) -> K::Output {
    kernel.run::<Ymm>()
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn run_avx512<K: LanesKernel>(kernel: K) -> K::Output {
    kernel.run::<Zmm>()
}

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Ymm(__m256);

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(super) struct Zmm(__m512);

/// Arithmetic that is one instruction.
macro_rules! direct {
    ($wrap:ident, $($name:ident($($other:ident),*) = $instruction:ident;)*) => {$(
        #[inline(always)]
        fn $name(self, $($other: Self),*) -> Self {
            // SAFETY: only `on` picks these lanes, after it has checked the machine.
            $wrap(unsafe { $instruction(self.0, $($other.0),*) })
        }
    )*};
}

/// Bits all set in the first `n` of eight lanes.
#[inline(always)]
fn ymm_head(n: usize) -> __m256i {
    // SAFETY: the machine has AVX2, as above.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

impl Lanes for Ymm {
    const WIDTH: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: the machine has AVX2: only `on` picks these lanes, after it has checked.
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn read(start: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { _mm256_loadu_ps(start) })
    }
    #[inline(always)]
    unsafe fn write(self, start: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(start, self.0) }
    }
    #[inline(always)]
    unsafe fn write_past_caches(self, start: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_stream_ps(start, self.0) }
    }
    #[inline(always)]
    fn load_head(x: &[f32]) -> Self {
        // SAFETY: lanes past `x` are masked and not read.
        Self(unsafe { _mm256_maskload_ps(x.as_ptr(), ymm_head(x.len())) })
    }
    #[inline(always)]
    fn store_head(self, out: &mut [f32]) {
        // SAFETY: lanes past `out` are masked and not written.
        unsafe { _mm256_maskstore_ps(out.as_mut_ptr(), ymm_head(out.len()), self.0) }
    }
    direct! { Self,
        add(other) = _mm256_add_ps;
        sub(other) = _mm256_sub_ps;
        mul(other) = _mm256_mul_ps;
        div(other) = _mm256_div_ps;
        max(other) = _mm256_max_ps;
        xor(other) = _mm256_xor_ps;
        min(other) = _mm256_min_ps;
        mul_add(factor, addend) = _mm256_fmadd_ps;
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: the machine has AVX2.
        Self(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    /// Multiplies in two factors, as 2^128 is no fp32 and small results are denormal.
    #[inline(always)]
    fn scale_by_power_of_two(self, n: Self) -> Self {
        // SAFETY: the machine has AVX2.
        unsafe {
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let [first, second] = [half, _mm256_sub_epi32(n, half)].map(|n| {
                let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            });
            Self(_mm256_mul_ps(_mm256_mul_ps(self.0, first), second))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: the machine has AVX2.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn sum_each(four: [Self; 4]) -> [f32; 4] {
        let [a, b, c, d] = four;
        let mut sums = [0.0; 4];
        // SAFETY: the machine has AVX2; `sums` holds four.
        unsafe {
            let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a.0, b.0), _mm256_hadd_ps(c.0, d.0));
            let all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
            _mm_storeu_ps(sums.as_mut_ptr(), all);
        }
        sums
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        let Self(numbers) = self.max(Self::splat(f32::NEG_INFINITY));
        // SAFETY: the machine has AVX2.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps::<1>(numbers));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

/// The first `n` ≤ 16 lanes.
#[inline(always)]
fn zmm_head(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

impl Zmm {
    /// The upper half added to the lower.
    #[inline(always)]
    fn fold(self) -> Ymm {
        // SAFETY: the machine has AVX-512 F and DQ.
        Ymm(unsafe { _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0)) })
    }
}

impl Lanes for Zmm {
    const WIDTH: usize = 16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: the machine has AVX-512: only `on` picks these lanes, after it has checked.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn read(start: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { _mm512_loadu_ps(start) })
    }
    #[inline(always)]
    unsafe fn write(self, start: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(start, self.0) }
    }
    #[inline(always)]
    unsafe fn write_past_caches(self, start: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_stream_ps(start, self.0) }
    }
    #[inline(always)]
    fn load_head(x: &[f32]) -> Self {
        // SAFETY: lanes past `x` are masked and not read.
        Self(unsafe { _mm512_maskz_loadu_ps(zmm_head(x.len()), x.as_ptr()) })
    }
    #[inline(always)]
    fn store_head(self, out: &mut [f32]) {
        // SAFETY: lanes past `out` are masked and not written.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), zmm_head(out.len()), self.0) }
    }
    direct! { Self,
        add(other) = _mm512_add_ps;
        sub(other) = _mm512_sub_ps;
        mul(other) = _mm512_mul_ps;
        div(other) = _mm512_div_ps;
        max(other) = _mm512_max_ps;
        min(other) = _mm512_min_ps;
        mul_add(factor, addend) = _mm512_fmadd_ps;
        xor(other) = _mm512_xor_ps;
        scale_by_power_of_two(n) = _mm512_scalef_ps;
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: the machine has AVX-512 F.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.fold().sum()
    }
    #[inline(always)]
    fn sum_each(four: [Self; 4]) -> [f32; 4] {
        let [a, b, c, d] = four;
        Ymm::sum_each([a.fold(), b.fold(), c.fold(), d.fold()])
    }
    #[inline(always)]
    fn greatest(self) -> f32 {
        let numbers = self.max(Self::splat(f32::NEG_INFINITY));
        // SAFETY: the machine has AVX-512 F and DQ.
        let [low, high] = unsafe { [_mm512_castps512_ps256(numbers.0), _mm512_extractf32x8_ps::<1>(numbers.0)] };
        Ymm(low).max(Ymm(high)).greatest()
    }
}
