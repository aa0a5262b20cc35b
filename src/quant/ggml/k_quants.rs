//! Types of blocks of 256 values, whose scales are quantized too: the K types and IQ4_XS. `d` and `dmin` are fp16.

use super::super::{FormatEntry, FormatId};
use super::block::{Block, BlockEncoder, DotKernel, entry};
use super::encode;
use super::small::{IQ4_VALUES, half, nibbles};

static Q2_K: FormatEntry =
    entry::<Q2K>("q2_k", "2-bit integers with 4-bit scales and minima for 16 in blocks of 256, ggml's Q2_K");

/// scales[16], codes[64], `d`, `dmin`: `d·(s & 15)·q − dmin·(s >> 4)`, one s for 16 elements. The bit pair at 2i of byte l of a half
/// h is element 128h + 32i + l.
pub enum Q2K {}

impl Block for Q2K {
    const ID: FormatId = FormatId::of(&Q2_K);
    const LEN: usize = 256;
    const BYTES: usize = 84;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, dmin) = (half(block, 80), half(block, 82));
        for (run, values) in values.chunks_exact_mut(16).enumerate() {
            let (scale, min) = (d * f32::from(block[run] & 15), dmin * f32::from(block[run] >> 4));
            let (codes, shift) = pairs(&block[16..80], run);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = scale * f32::from(code >> shift & 3) - min;
            }
        }
    }
}

/// The 16 bytes that hold the bit pairs of run `run` of 16 elements, and their shift.
#[inline(always)]
fn pairs(codes: &[u8], run: usize) -> (&[u8], usize) {
    let (half, i, upper) = (run / 8, run % 8 / 2, run % 2);
    (&codes[32 * half + 16 * upper..][..16], 2 * i)
}

static Q3_K: FormatEntry =
    entry::<Q3K>("q3_k", "3-bit integers with 6-bit scales for 16 in blocks of 256, ggml's Q3_K");

/// high bits[32], codes[64], scales[12], `d`: `d·(s − 32)·(q − 4)`. Codes lie as in Q2_K. Bit 4h + i of byte l belongs to element
/// 128h + 32i + l.
pub enum Q3K {}

impl Block for Q3K {
    const ID: FormatId = FormatId::of(&Q3_K);
    const LEN: usize = 256;
    const BYTES: usize = 110;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, scales) = (half(block, 108), &block[96..108]);
        for (run, values) in values.chunks_exact_mut(16).enumerate() {
            let low = scales[run % 8] >> (4 * (run / 8)) & 15;
            let high = scales[8 + run % 4] >> (2 * (run / 4)) & 3;
            let scale = d * f32::from((low | high << 4) as i8 - 32);
            let (codes, shift) = pairs(&block[32..96], run);
            let highs = &block[16 * (run % 2)..][..16];
            for ((value, code), high) in values.iter_mut().zip(codes).zip(highs) {
                let third = (high >> (run / 2) & 1) << 2;
                *value = scale * f32::from((code >> shift & 3 | third) as i8 - 4);
            }
        }
    }
}

/// Scale and minimum of run `i` of 32 elements, 6 bits each, of 12 bytes.
#[inline(always)]
pub fn scale_and_min(s: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = match i < 4 {
        true => (s[i] & 63, s[i + 4] & 63),
        false => (s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

static Q4_K: FormatEntry =
    entry::<Q4K>("q4_k", "4-bit integers with 6-bit scales and minima for 32 in blocks of 256, ggml's Q4_K");

/// `d`, `dmin`, scales[12], codes[128]: `d·s·q − dmin·m`. 32 bytes hold 64 elements, the low nibbles first.
pub enum Q4K {}

impl Block for Q4K {
    const ID: FormatId = FormatId::of(&Q4_K);
    const LEN: usize = 256;
    const BYTES: usize = 144;
    const ENCODE: Option<BlockEncoder> = Some(encode::q4_k);
    const KERNEL: DotKernel = DotKernel::Q4K;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, dmin, scales) = (half(block, 0), half(block, 2), &block[4..16]);
        for (j, (codes, values)) in block[16..144].chunks_exact(32).zip(values.chunks_exact_mut(64)).enumerate() {
            let [(s, m), (t, n)] = [2 * j, 2 * j + 1].map(|i| scale_and_min(scales, i)).map(|(s, m)| (d * s, dmin * m));
            nibbles(codes, values, |_, q| s * f32::from(q) - m, |_, q| t * f32::from(q) - n);
        }
    }
}

static Q5_K: FormatEntry =
    entry::<Q5K>("q5_k", "5-bit integers with 6-bit scales and minima for 32 in blocks of 256, ggml's Q5_K");

/// `d`, `dmin`, scales[12], high bits[32], codes[128]: as Q4_K with q of 5 bits. Bit i of byte l is element 32i + l.
pub enum Q5K {}

impl Block for Q5K {
    const ID: FormatId = FormatId::of(&Q5_K);
    const LEN: usize = 256;
    const BYTES: usize = 176;
    const ENCODE: Option<BlockEncoder> = Some(encode::q5_k);

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, dmin, scales, highs) = (half(block, 0), half(block, 2), &block[4..16], &block[16..48]);
        for (j, (codes, values)) in block[48..176].chunks_exact(32).zip(values.chunks_exact_mut(64)).enumerate() {
            let [(s, m), (t, n)] = [2 * j, 2 * j + 1].map(|i| scale_and_min(scales, i)).map(|(s, m)| (d * s, dmin * m));
            let fifth = |l: usize, i: usize| (highs[l] >> i & 1) << 4;
            let low = |l: usize, q: u8| s * f32::from(q | fifth(l, 2 * j)) - m;
            let high = |l: usize, q: u8| t * f32::from(q | fifth(l, 2 * j + 1)) - n;
            nibbles(codes, values, low, high);
        }
    }
}

static Q6_K: FormatEntry =
    entry::<Q6K>("q6_k", "6-bit integers with 8-bit scales for 16 in blocks of 256, ggml's Q6_K");

/// low codes[128], high codes[64], int8 scales[16], `d`: `d·s·(q − 32)`. Of each half of 128, the low nibbles of its 64 bytes are
/// elements 0 … 63 and the high ones 64 … 127; the pair at 2i of its 32 high bytes belongs to elements 32i … 32i + 31.
pub enum Q6K {}

impl Block for Q6K {
    const ID: FormatId = FormatId::of(&Q6_K);
    const LEN: usize = 256;
    const BYTES: usize = 210;
    const ENCODE: Option<BlockEncoder> = Some(encode::q6_k);
    const KERNEL: DotKernel = DotKernel::Q6K;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let d = half(block, 208);
        for (run, values) in values.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(block[192 + run] as i8);
            let (h, in_half) = (run / 8, run % 8);
            let lows = &block[64 * h + 16 * (in_half % 4)..][..16];
            let shift = 4 * (in_half / 4);
            let (highs, pair) = pairs(&block[128..192], run);
            for ((value, low), high) in values.iter_mut().zip(lows).zip(highs) {
                let code = low >> shift & 15 | (high >> pair & 3) << 4;
                *value = scale * f32::from(code as i8 - 32);
            }
        }
    }
}

static IQ4_XS: FormatEntry =
    entry::<Iq4Xs>("iq4_xs", "4-bit codes of a table with 6-bit scales for 32 in blocks of 256, ggml's IQ4_XS");

/// `d`, u16 of high scale bits, low scales[4], codes[128]: `d·(s − 32)·T[q]`, in eight runs paired like short blocks. Scale i has
/// nibble i of the four bytes below bits 2i and 2i + 1 of the u16.
pub enum Iq4Xs {}

impl Block for Iq4Xs {
    const ID: FormatId = FormatId::of(&IQ4_XS);
    const LEN: usize = 256;
    const BYTES: usize = 136;

    #[inline(always)]
    fn decode(block: &[u8], values: &mut [f32]) {
        let (d, highs) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
        for (i, (codes, values)) in block[8..136].chunks_exact(16).zip(values.chunks_exact_mut(32)).enumerate() {
            let low = block[4 + i / 2] >> (4 * (i % 2)) & 15;
            let high = (highs >> (2 * i) & 3) as u8;
            let scale = d * f32::from((low | high << 4) as i8 - 32);
            let value = |_: usize, q: u8| scale * IQ4_VALUES[usize::from(q)];
            nibbles(codes, values, value, value);
        }
    }
}
