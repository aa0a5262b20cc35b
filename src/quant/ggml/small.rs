//! Types of short blocks: 32 values, and bf16, whose values stand alone.
//!
//! `d` and `m` are fp16. Where 32 codes lie in 16 bytes, byte j holds elements j (low nibble) and j + 16 (high nibble).

use super::super::{FormatEntry, FormatId};
use super::block::{Block, BlockEncoder, DotKernel, entry};
use super::encode;

/// Twice the values of E2M1, by code.
const E2M1_DOUBLED: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// The values of codes that are integers, and of those that stand for −8 … 7.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only kernels of x86-64 read it"))]
const CODES: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only kernels of x86-64 read it"))]
const CENTRED: [f32; 16] = [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// The values of IQ4_NL and IQ4_XS, by code.
pub const IQ4_VALUES: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// The fp16 value at byte `at`.
#[inline(always)]
pub fn half(block: &[u8], at: usize) -> f32 {
    // Without a look for the machine's own instruction, which would be one for each block.
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
    let value = match magnitude >= 0x7c00 << 13 {
        true => f32::from_bits(magnitude | 0x7f80_0000),
        // 2^112 brings the exponent from the bias of fp16 to that of fp32, subnormals included.
        false => f32::from_bits(magnitude) * f32::from_bits(0x7780_0000),
    };
    f32::from_bits(value.to_bits() | sign)
}

/// Decodes a half of `values` from the low nibbles of `codes` and the other half from the high ones. Both functions get the byte's
/// index and the nibble.
#[inline(always)]
pub fn nibbles(codes: &[u8], values: &mut [f32], low: impl Fn(usize, u8) -> f32, high: impl Fn(usize, u8) -> f32) {
    let (lows, highs) = values.split_at_mut(codes.len());
    for (j, ((code, l), h)) in codes.iter().zip(lows).zip(highs).enumerate() {
        *l = low(j, code & 15);
        *h = high(j, code >> 4);
    }
}

static BF16: FormatEntry = entry::<Bf16>("bf16", "bfloat16, as a file holds it");

/// The upper half of an fp32.
pub enum Bf16 {}

impl Block for Bf16 {
    const ID: FormatId = FormatId::of(&BF16);
    const LEN: usize = 1;
    const BYTES: usize = 2;
    const ENCODE: Option<BlockEncoder> = Some(encode::bf16);
    const KERNEL: DotKernel = DotKernel::Bf16;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        values[0] = f32::from_bits(u32::from(u16::from_le_bytes([block[0], block[1]])) << 16);
    }
}

static Q8_0: FormatEntry = entry::<Q8_0>("q8_0", "8-bit integers with an fp16 scale for 32, ggml's Q8_0");

/// `d`, int8[32]: `d·q`
pub enum Q8_0 {}

impl Block for Q8_0 {
    const ID: FormatId = FormatId::of(&Q8_0);
    const LEN: usize = 32;
    const BYTES: usize = 34;
    const ENCODE: Option<BlockEncoder> = Some(encode::q8_0);
    const KERNEL: DotKernel = DotKernel::Bytes;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half(block, 0);
        for (value, code) in values.iter_mut().zip(&block[2..34]) {
            *value = d * f32::from(*code as i8);
        }
    }
}

static Q4_0: FormatEntry = entry::<Q4_0>("q4_0", "4-bit integers with an fp16 scale for 32, ggml's Q4_0");

/// `d`, codes[16]: `d·(q − 8)`
pub enum Q4_0 {}

impl Block for Q4_0 {
    const ID: FormatId = FormatId::of(&Q4_0);
    const LEN: usize = 32;
    const BYTES: usize = 18;
    const ENCODE: Option<BlockEncoder> = Some(encode::q4_0);
    const KERNEL: DotKernel = DotKernel::Nibbles { at: 2, table: &CENTRED, has_min: false };

    #[inline(always)]
    fn scales(block: &[u8]) -> (f32, f32) {
        (half(block, 0), 0.0)
    }

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half(block, 0);
        let value = |_: usize, q: u8| d * f32::from(q as i8 - 8);
        nibbles(&block[2..18], values, value, value);
    }
}

static Q4_1: FormatEntry = entry::<Q4_1>("q4_1", "4-bit integers with an fp16 scale and minimum for 32, ggml's Q4_1");

/// `d`, `m`, codes[16]: `d·q + m`
pub enum Q4_1 {}

impl Block for Q4_1 {
    const ID: FormatId = FormatId::of(&Q4_1);
    const LEN: usize = 32;
    const BYTES: usize = 20;
    const ENCODE: Option<BlockEncoder> = Some(encode::q4_1);
    const KERNEL: DotKernel = DotKernel::Nibbles { at: 4, table: &CODES, has_min: true };

    #[inline(always)]
    fn scales(block: &[u8]) -> (f32, f32) {
        (half(block, 0), half(block, 2))
    }

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, m) = (half(block, 0), half(block, 2));
        let value = |_: usize, q: u8| d * f32::from(q) + m;
        nibbles(&block[4..20], values, value, value);
    }
}

/// The fifth bit of element `at`, in its place.
#[inline(always)]
fn fifth(bits: u32, at: usize) -> u8 {
    ((bits >> at & 1) as u8) << 4
}

static Q5_0: FormatEntry = entry::<Q5_0>("q5_0", "5-bit integers with an fp16 scale for 32, ggml's Q5_0");

/// `d`, u32 of fifth bits (bit i is element i), codes[16]: `d·(q − 16)`
pub enum Q5_0 {}

impl Block for Q5_0 {
    const ID: FormatId = FormatId::of(&Q5_0);
    const LEN: usize = 32;
    const BYTES: usize = 22;
    const ENCODE: Option<BlockEncoder> = Some(encode::q5_0);

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, bits) = (half(block, 0), u32::from_le_bytes([block[2], block[3], block[4], block[5]]));
        let value = |at: usize, q: u8| d * f32::from((q | fifth(bits, at)) as i8 - 16);
        nibbles(&block[6..22], values, value, |j, q| value(j + 16, q));
    }
}

static Q5_1: FormatEntry = entry::<Q5_1>("q5_1", "5-bit integers with an fp16 scale and minimum for 32, ggml's Q5_1");

/// `d`, `m`, u32 of fifth bits, codes[16]: `d·q + m`
pub enum Q5_1 {}

impl Block for Q5_1 {
    const ID: FormatId = FormatId::of(&Q5_1);
    const LEN: usize = 32;
    const BYTES: usize = 24;
    const ENCODE: Option<BlockEncoder> = Some(encode::q5_1);

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, m) = (half(block, 0), half(block, 2));
        let bits = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
        let value = |at: usize, q: u8| d * f32::from(q | fifth(bits, at)) + m;
        nibbles(&block[8..24], values, value, |j, q| value(j + 16, q));
    }
}

static IQ4_NL: FormatEntry =
    entry::<Iq4Nl>("iq4_nl", "4-bit codes of a table with an fp16 scale for 32, ggml's IQ4_NL");

/// `d`, codes[16]: `d·T[q]`
pub enum Iq4Nl {}

impl Block for Iq4Nl {
    const ID: FormatId = FormatId::of(&IQ4_NL);
    const LEN: usize = 32;
    const BYTES: usize = 18;
    const KERNEL: DotKernel = DotKernel::Nibbles { at: 2, table: &IQ4_VALUES, has_min: false };

    #[inline(always)]
    fn scales(block: &[u8]) -> (f32, f32) {
        (half(block, 0), 0.0)
    }

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half(block, 0);
        let value = |_: usize, q: u8| d * IQ4_VALUES[usize::from(q)];
        nibbles(&block[2..18], values, value, value);
    }
}

static MXFP4: FormatEntry =
    entry::<Mxfp4>("mxfp4", "4-bit floats (E2M1) with a power of two for 32: MXFP4 of the OCP, as ggml orders it");

/// `e`, codes[16]: `2^(e − 128) · D[q]`
pub enum Mxfp4 {}

impl Block for Mxfp4 {
    const ID: FormatId = FormatId::of(&MXFP4);
    const LEN: usize = 32;
    const BYTES: usize = 17;
    const ENCODE: Option<BlockEncoder> =
        Some(|values, block| encode::mxfp4(values, block, &E2M1_DOUBLED, |block| Self::scales(block).0));
    const KERNEL: DotKernel = DotKernel::Nibbles { at: 1, table: &E2M1_DOUBLED, has_min: false };

    #[inline(always)]
    fn scales(block: &[u8]) -> (f32, f32) {
        // 2^-128 and 2^-127 are subnormal.
        let e = u32::from(block[0]);
        (f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 }), 0.0)
    }

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (scale, _) = Self::scales(block);
        let value = |_: usize, q: u8| scale * E2M1_DOUBLED[usize::from(q)];
        nibbles(&block[1..17], values, value, value);
    }

    fn fault(block: &[u8]) -> Option<&'static str> {
        (block[0] == 255).then_some("its scale is 255, which is no number")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fp16_value_is_read() {
        for bits in 0..=u16::MAX {
            let (seen, expected) = (half(&bits.to_le_bytes(), 0), half::f16::from_bits(bits).to_f32());
            assert!(seen.to_bits() == expected.to_bits() || (seen.is_nan() && expected.is_nan()), "{bits:#x}");
        }
    }
}
