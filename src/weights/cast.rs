//! Checkpoint bytes to fp16, rounding to nearest even, and to fp32, which loses nothing.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Values converted at once: fp32 scratch of 16 KiB, which stays in the first-level cache.
const CHUNK: usize = 4096;

pub fn from_f16(bytes: &[u8], out: &mut [f16]) -> usize {
    for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *value = f16::from_le_bytes([pair[0], pair[1]]);
    }
    0
}

pub fn from_bf16(bytes: &[u8], out: &mut [f16]) -> usize {
    through_f32(bytes, 2, out, widen_bf16)
}

pub fn from_f32(bytes: &[u8], out: &mut [f16]) -> usize {
    through_f32(bytes, 4, out, widen_f32)
}

/// Little-endian fp16.
pub fn widen_f16(bytes: &[u8], out: &mut [f32]) {
    for (value, pair) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = f16::from_le_bytes(*pair).to_f32();
    }
}

/// Little-endian bf16.
pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
    for (value, pair) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
    }
}

/// Little-endian fp32.
pub fn widen_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, quad) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*quad);
    }
}

fn through_f32(bytes: &[u8], size: usize, out: &mut [f16], widen: impl Fn(&[u8], &mut [f32])) -> usize {
    let mut scratch = [0f32; CHUNK];
    let mut overflow = 0;
    for (bytes, out) in bytes.chunks(CHUNK * size).zip(out.chunks_mut(CHUNK)) {
        let wide = &mut scratch[..out.len()];
        widen(bytes, wide);
        out.convert_from_f32_slice(wide);
        overflow += overflowed(wide, out);
    }
    overflow
}

/// The comparison runs only where an infinity came out, which is almost never.
fn overflowed(wide: &[f32], narrow: &[f16]) -> usize {
    let infinite = narrow.iter().map(|value| u32::from(value.to_bits() & 0x7fff == 0x7c00)).sum::<u32>();
    match infinite {
        0 => 0,
        _ => wide.iter().zip(narrow).filter(|(wide, narrow)| wide.is_finite() && narrow.is_infinite()).count(),
    }
}
