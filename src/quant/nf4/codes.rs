//! The 16 values of NF4 and how a weight finds its code.

use super::super::absmax;

/// Weights that share an absmax.
pub const BLOCK: usize = 64;

/// The values of the codes, ascending (QLoRA, appendix E), as bitsandbytes writes them.
pub const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Midpoints of neighbouring values, in fp32.
pub const THRESHOLDS: [f32; 15] = {
    let mut thresholds = [0.0; 15];
    let mut i = 0;
    while i < thresholds.len() {
        thresholds[i] = (CODES[i] + CODES[i + 1]) / 2.0;
        i += 1;
    }
    thresholds
};

/// bitsandbytes raises an absmax to this before it divides by it, and stores it so for a short last block.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// Encodes one block into `packed` (the even element in the high nibble) and returns the absmax to store.
#[inline(always)]
pub fn encode_block(values: &[f32; BLOCK], packed: &mut [u8; BLOCK / 2]) -> f32 {
    let absmax = absmax(values);
    // One reciprocal for the block, as bitsandbytes takes it; a division would round differently.
    let scale = 1.0 / absmax.max(SMALLEST_ABSMAX);
    let mut codes = [0u8; BLOCK];
    codes.iter_mut().zip(values).for_each(|(code, value)| *code = encode(value * scale));
    packed.iter_mut().zip(codes.as_chunks::<2>().0).for_each(|(byte, [even, odd])| *byte = even << 4 | odd);
    absmax
}

/// As [`encode_block`] for the last 1 to 63 weights of a matrix, which are divided by their absmax.
pub fn encode_short_block(values: &[f32], packed: &mut [u8]) -> f32 {
    let absmax = absmax(values).max(SMALLEST_ABSMAX);
    for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
        let odd = pair.get(1).map_or(0, |value| encode(value / absmax));
        *byte = encode(pair[0] / absmax) << 4 | odd;
    }
    absmax
}

/// The number of thresholds below `value`: on a threshold the lower code wins. Counting all 15 needs no branch, so that
/// the compiler encodes a vector of values at once.
#[inline(always)]
fn encode(value: f32) -> u8 {
    THRESHOLDS.iter().map(|&threshold| u32::from(value > threshold)).sum::<u32>() as u8
}
