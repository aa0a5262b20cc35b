//! Double quantization: 8-bit codes for the absmax values of NF4 blocks.

use std::sync::LazyLock;

/// Absmax values that share an fp32 scale.
pub const NESTED_BLOCK: usize = 256;

/// `absmax = value[code] * nested_absmax + offset`.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedAbsmax {
    /// One for each block.
    pub codes: Vec<u8>,
    /// One for each 256 blocks.
    pub absmax: Vec<f32>,
    /// Mean of the absmax values.
    pub offset: f32,
}

/// Bytes for the absmax values of `blocks` blocks.
pub fn stored_bytes(blocks: usize) -> usize {
    blocks + (blocks.div_ceil(NESTED_BLOCK) + 1) * size_of::<f32>()
}

impl NestedAbsmax {
    pub fn quantize(absmax: Vec<f32>) -> Self {
        // In fp64, since the order of an fp32 sum would show in its last bits.
        let offset = (absmax.iter().map(|&value| f64::from(value)).sum::<f64>() / absmax.len() as f64) as f32;
        let mut nested = Self { codes: Vec::with_capacity(absmax.len()), absmax: Vec::new(), offset };
        for block in absmax.chunks(NESTED_BLOCK) {
            let largest = block.iter().fold(0.0f32, |max, value| max.max((value - offset).abs()));
            nested.absmax.push(largest);
            if largest == 0.0 {
                nested.codes.extend(block.iter().map(|_| 0));
            } else {
                let scale = 1.0 / largest;
                nested.codes.extend(block.iter().map(|value| encode((value - offset) * scale)));
            }
        }
        nested
    }

    /// The absmax of a block, in two roundings as bitsandbytes computes it.
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        VALUES[usize::from(self.codes[block])] * self.absmax[block / NESTED_BLOCK] + self.offset
    }
}

/// The values of the codes, ascending: bitsandbytes' signed dynamic map of 8 bits. Seven decades from 1e-6 to 1 hold 1, 2,
/// 4, … 64 values each way, evenly spaced within a decade; 0 and 1 complete the 256.
pub static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let steps = 1usize << decade;
        let scale = 10f64.powi(decade - 6) as f32;
        for i in 0..steps {
            let mean = (boundary(i, steps) + boundary(i + 1, steps)) / 2.0;
            values.extend([scale * mean, -(scale * mean)]);
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2 · (1 + 2 + … + 64) values")
});

/// Point `i` of `steps` equal steps from 0.1 to 1, reckoned from the nearer end with one rounding.
fn boundary(i: usize, steps: usize) -> f32 {
    let step = (1.0 - 0.1f32) / steps as f32;
    if i < steps.div_ceil(2) { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((steps - i) as f32, 1.0) }
}

/// For each 65536th of −1 … 1 the code whose value is nearest.
static NEAREST: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut code = 0u8;
    let point = |i: u32| (f64::from(i) * 2.0 / 65535.0 - 1.0) as f32;
    let midpoint = |code: u8| (f64::from(VALUES[usize::from(code)]) + f64::from(VALUES[usize::from(code) + 1])) / 2.0;
    (0..=u32::from(u16::MAX))
        .map(|i| {
            while code < u8::MAX && midpoint(code) < f64::from(point(i)) {
                code += 1;
            }
            code
        })
        .collect()
});

/// The code for a value in −1 … 1 by the table that bitsandbytes uses on CPUs: within 1.5e-5 of a midpoint it may differ
/// by one from the nearest.
fn encode(value: f32) -> u8 {
    let place = (value.clamp(-1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5;
    NEAREST[(place as usize).min(NEAREST.len() - 1)]
}
