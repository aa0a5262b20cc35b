//! AVX-512: products of a row with one token, straight from the blocks. Codes become fp32 in registers; a block's scale multiplies its sum.

use std::arch::x86_64::*;

use super::super::block::{Block, DotKernel};

/// `Σ row · x` over whole blocks; `None` for types without a kernel of their own.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
pub unsafe fn dot<B: Block>(blocks: &[u8], x: &[f32]) -> Option<f32> {
    let mut sums = [_mm512_setzero_ps(); 2];
    let pairs = blocks.chunks_exact(B::BYTES).zip(x.chunks_exact(B::LEN)).enumerate();
    match B::KERNEL {
        DotKernel::Decoded => return None,
        DotKernel::Bf16 => return Some(bf16(blocks, x)),
        DotKernel::Bytes => pairs.for_each(|(at, (block, x))| sums[at % 2] = bytes(block, x, sums[at % 2])),
        DotKernel::Nibbles { at: from, table, has_min } => {
            // SAFETY: 16 values.
            let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
            for (at, (block, x)) in pairs {
                let scales = B::scales(block);
                sums[at % 2] = nibbles(&block[from..], table, scales, has_min, x, sums[at % 2]);
            }
        }
        DotKernel::Q4K => pairs.for_each(|(at, (block, x))| sums[at % 2] = q4_k(block, x, sums[at % 2])),
        DotKernel::Q6K => pairs.for_each(|(at, (block, x))| sums[at % 2] = q6_k(block, x, sums[at % 2])),
    }
    Some(_mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])))
}

/// 16 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn load16(bytes: &[u8], at: usize) -> __m128i {
    let bytes = &bytes[at..][..16];
    // SAFETY: 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// 16 values from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn values(x: &[f32], at: usize) -> __m512 {
    let x = &x[at..][..16];
    // SAFETY: 16 values.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// fp16 at byte `at`, in all lanes.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
fn half(block: &[u8], at: usize) -> __m512 {
    let bits = i32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))
}

/// Values of 2 bytes, 64 at once: as many sums as FMAs are under way.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn bf16(bytes: &[u8], x: &[f32]) -> f32 {
    const SUMS: usize = 4;
    let mut sums = [_mm512_setzero_ps(); SUMS];
    let (chunks, tail) = bytes.as_chunks::<{ 2 * 16 * SUMS }>();
    for (chunk, x) in chunks.iter().zip(x.chunks_exact(16 * SUMS)) {
        for (at, sum) in sums.iter_mut().enumerate() {
            let half = &chunk[32 * at..][..32];
            // SAFETY: 32 bytes.
            let half = unsafe { _mm256_loadu_si256(half.as_ptr().cast()) };
            let wide = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
            *sum = _mm512_fmadd_ps(wide, values(x, 16 * at), *sum);
        }
    }
    let sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    let behind = chunks.len() * 16 * SUMS;
    let value = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    let tail = tail.as_chunks::<2>().0.iter().zip(&x[behind..]);
    tail.fold(_mm512_reduce_add_ps(sum), |sum, (bytes, x)| value(bytes).mul_add(*x, sum))
}

/// Q8_0.
#[inline]
#[target_feature(enable = "avx512f,f16c,fma")]
fn bytes(block: &[u8], x: &[f32], sum: __m512) -> __m512 {
    let code = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(block, 2 + at)));
    let low = _mm512_mul_ps(code(0), values(x, 0));
    _mm512_fmadd_ps(_mm512_fmadd_ps(code(16), values(x, 16), low), half(block, 0), sum)
}

/// Short blocks of nibbles: `d·table[q] + m`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,fma")]
fn nibbles(codes: &[u8], table: __m512, scales: (f32, f32), has_min: bool, x: &[f32], sum: __m512) -> __m512 {
    let codes = load16(codes, 0);
    // A permutation reads the lowest four bits of an index.
    let low = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table);
    let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(codes)), table);
    let (x0, x1) = (values(x, 0), values(x, 16));
    let product = _mm512_fmadd_ps(high, x1, _mm512_mul_ps(low, x0));
    let sum = _mm512_fmadd_ps(product, _mm512_set1_ps(scales.0), sum);
    if has_min { _mm512_fmadd_ps(_mm512_add_ps(x0, x1), _mm512_set1_ps(scales.1), sum) } else { sum }
}

/// 16 codes in the low nibbles of bytes, and 16 in the high ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn both(codes: __m128i) -> [__m512i; 2] {
    let wide = _mm512_cvtepu8_epi32(codes);
    [_mm512_and_si512(wide, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(wide)]
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,f16c,fma")]
fn q4_k(block: &[u8], x: &[f32], mut sum: __m512) -> __m512 {
    let (d, dmin) = (half(block, 0), half(block, 2));
    for j in 0..4 {
        let [first, second] = [both(load16(block, 16 + 32 * j)), both(load16(block, 32 + 32 * j))];
        for run in 0..2 {
            let (scale, min) = super::super::k_quants::scale_and_min(&block[4..16], 2 * j + run);
            let at = 64 * j + 32 * run;
            let (x0, x1) = (values(x, at), values(x, at + 16));
            let low = _mm512_mul_ps(_mm512_cvtepi32_ps(first[run]), x0);
            let product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second[run]), x1, low);
            sum = _mm512_fmadd_ps(product, _mm512_mul_ps(d, _mm512_set1_ps(scale)), sum);
            sum = _mm512_fnmadd_ps(_mm512_add_ps(x0, x1), _mm512_mul_ps(dmin, _mm512_set1_ps(min)), sum);
        }
    }
    sum
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,f16c,fma")]
fn q6_k(block: &[u8], x: &[f32], mut sum: __m512) -> __m512 {
    let d = half(block, 208);
    for h in 0..2 {
        for part in 0..2 {
            // 16 high bytes serve runs 16 · part of each 32 elements; 32 low bytes serve two of them.
            let highs = _mm512_cvtepu8_epi32(load16(block, 128 + 32 * h + 16 * part));
            for i in 0..4 {
                let lows = both(load16(block, 64 * h + 32 * (i % 2) + 16 * part));
                let shift = _mm512_set1_epi32(2 * i as i32);
                let high = _mm512_and_si512(_mm512_srlv_epi32(highs, shift), _mm512_set1_epi32(3));
                let code = _mm512_or_si512(lows[i / 2], _mm512_slli_epi32::<4>(high));
                let code = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(32)));
                let scale = f32::from(block[192 + 8 * h + 2 * i + part] as i8);
                let product = _mm512_mul_ps(code, values(x, 128 * h + 32 * i + 16 * part));
                sum = _mm512_fmadd_ps(product, _mm512_mul_ps(d, _mm512_set1_ps(scale)), sum);
            }
        }
    }
    sum
}
