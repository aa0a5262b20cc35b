//! Activations of LLM.int8: the cast to fp16, outlier columns, row absmax and codes.

use super::super::{code_scale, encode, encode_values, exceeds_f16, is_outlier, through_f16};
use crate::kernels::isa::Isa;
use crate::quant::Prepared;

/// What the kernels of `isa` want added to the codes of activations: VNNI multiplies unsigned by signed bytes.
pub fn offset(isa: Isa) -> i16 {
    if isa == Isa::Avx512 { 128 } else { 0 }
}

/// Encodes a row of weights and returns its absmax.
pub fn encode_row(values: &[f32], codes: &mut [i8]) -> f32 {
    match Isa::detect() {
        // SAFETY: the instruction set was detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::encode_row_avx512(values, codes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::encode_row_avx2(values, codes) },
        _ => encode_values(values, codes),
    }
}

/// Fills `prepared`, whose `m` and `k` are set, for kernels of `isa`, which is checked.
pub fn prepare(x: &[f32], padded_k: usize, threshold: f32, isa: Isa, prepared: &mut Prepared) {
    let (m, k) = (prepared.m, prepared.k);
    prepared.f32s.resize(m * k, 0.0);
    prepared.i8s.resize(m * padded_k, 0);
    prepared.scales.resize(m, 0.0);
    prepared.outlier_columns.clear();
    match isa {
        // SAFETY: the instruction set is checked.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::quantize_avx512(x, padded_k, threshold, isa, prepared) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::quantize_avx2(x, padded_k, threshold, isa, prepared) },
        _ => quantize(x, padded_k, threshold, isa, prepared, cast),
    }
}

/// What [`prepare`] does, compiled for each instruction set.
#[inline(always)]
fn quantize(
    x: &[f32],
    padded_k: usize,
    threshold: f32,
    isa: Isa,
    prepared: &mut Prepared,
    cast: impl Fn(&[f32], &mut [f32]),
) {
    let Prepared { m, k, f32s, i8s, scales, outlier_columns } = prepared;
    for ((x, values), absmax) in x.chunks_exact(*k).zip(f32s.chunks_exact_mut(*k)).zip(&mut *scales) {
        cast(x, values);
        *absmax = scan(values, threshold, outlier_columns);
        if exceeds_f16(*absmax, threshold) && x.iter().all(|x| x.is_finite()) {
            values.copy_from_slice(x);
            *absmax = scan(values, threshold, outlier_columns);
        }
    }
    outlier_columns.sort_unstable();
    outlier_columns.dedup();
    let offset = offset(isa) as u8;
    for ((values, codes), absmax) in f32s.chunks_exact(*k).zip(i8s.chunks_exact_mut(padded_k)).zip(&*scales) {
        let scale = code_scale(*absmax);
        for (code, value) in codes.iter_mut().zip(values) {
            *code = encode(*value, scale).cast_unsigned().wrapping_add(offset).cast_signed();
        }
        for column in outlier_columns.iter() {
            codes[*column as usize] = offset.cast_signed();
        }
    }
    f32s.reserve(*m * outlier_columns.len());
    for x in x.chunks_exact(*k) {
        f32s.extend(outlier_columns.iter().map(|column| x[*column as usize]));
    }
}

/// `x` through fp16.
fn cast(x: &[f32], values: &mut [f32]) {
    x.iter().zip(values).for_each(|(x, value)| *value = through_f16(*x));
}

/// The absmax over all entries that are no outliers; the outliers' columns are appended. Magnitudes are compared as
/// integers, where NaN is the largest, so that a diverged token stays visible.
#[inline(always)]
fn scan(values: &[f32], threshold: f32, outlier_columns: &mut Vec<u32>) -> f32 {
    let mut kept = 0u32;
    let mut largest = 0u32;
    for value in values {
        let bits = value.abs().to_bits();
        largest = largest.max(bits);
        kept = kept.max(if is_outlier(*value, threshold) { 0 } else { bits });
    }
    if largest != kept {
        collect_outliers(values, threshold, outlier_columns);
    }
    f32::from_bits(kept)
}

#[inline(always)]
fn collect_outliers(values: &[f32], threshold: f32, outlier_columns: &mut Vec<u32>) {
    /// Outliers are rare: a chunk without any is passed over in a few vector instructions.
    const CHUNK: usize = 64;
    for (chunk, values) in values.chunks(CHUNK).enumerate() {
        if values.iter().fold(false, |any, value| any | is_outlier(*value, threshold)) {
            let columns = values.iter().enumerate().filter(|(_, value)| is_outlier(**value, threshold));
            outlier_columns.extend(columns.map(|(column, _)| (chunk * CHUNK + column) as u32));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// # Safety
    /// The machine has what [`Isa::Avx512`] stands for.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
    pub unsafe fn quantize_avx512(x: &[f32], padded_k: usize, threshold: f32, isa: Isa, prepared: &mut Prepared) {
        quantize(x, padded_k, threshold, isa, prepared, |x, values| cast_avx512(x, values));
    }

    #[target_feature(enable = "avx512f")]
    fn cast_avx512(x: &[f32], values: &mut [f32]) {
        let ((xs, x_tail), (outs, out_tail)) = (x.as_chunks::<16>(), values.as_chunks_mut::<16>());
        for (x, out) in xs.iter().zip(outs) {
            // SAFETY: 16 values each.
            unsafe {
                let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_loadu_ps(x.as_ptr()));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(halves));
            }
        }
        cast(x_tail, out_tail);
    }

    /// # Safety
    /// The machine has what [`Isa::Avx2`] stands for.
    #[target_feature(enable = "avx2,f16c")]
    pub unsafe fn quantize_avx2(x: &[f32], padded_k: usize, threshold: f32, isa: Isa, prepared: &mut Prepared) {
        quantize(x, padded_k, threshold, isa, prepared, |x, values| cast_avx2(x, values));
    }

    #[target_feature(enable = "avx2,f16c")]
    fn cast_avx2(x: &[f32], values: &mut [f32]) {
        let ((xs, x_tail), (outs, out_tail)) = (x.as_chunks::<8>(), values.as_chunks_mut::<8>());
        for (x, out) in xs.iter().zip(outs) {
            // SAFETY: 8 values each.
            unsafe {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(x.as_ptr()));
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        cast(x_tail, out_tail);
    }

    /// # Safety
    /// The machine has what [`Isa::Avx512`] stands for.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub unsafe fn encode_row_avx512(values: &[f32], codes: &mut [i8]) -> f32 {
        encode_values(values, codes)
    }

    /// # Safety
    /// The machine has what [`Isa::Avx2`] stands for.
    #[target_feature(enable = "avx2")]
    pub unsafe fn encode_row_avx2(values: &[f32], codes: &mut [i8]) -> f32 {
        encode_values(values, codes)
    }
}
