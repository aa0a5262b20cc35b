//! Weights as checkpoints hold them, for tests of what a device makes of them: every kind of value that a file can hold.

use half::f16;
use half::slice::HalfFloatSliceExt;
use quantbench::rng::SplitMix64;
use safetensors::Dtype;

/// A matrix in its saved dtype, and what the host's cast makes of it.
pub struct Case {
    pub what: String,
    pub n: usize,
    pub k: usize,
    pub dtype: Dtype,
    /// Little-endian, `[n, k]`.
    pub bytes: Vec<u8>,
    pub halves: Vec<f16>,
    pub floats: Vec<f32>,
    /// Finite values that became infinite.
    pub overflow: u64,
}

/// In the order that source_values.cuh counts them in.
pub const DTYPES: [Dtype; 3] = [Dtype::F16, Dtype::BF16, Dtype::F32];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Gaussian,
    /// Stretches and rows of zeros of either sign, and values that are subnormal in fp16 or nothing at all.
    Zeros,
    /// Halfway between two codes of int8, at a threshold of NF4, halfway between two fp16 values.
    Ties,
    /// Every pattern of bits: infinities, NaNs of all payloads, subnormals, what overflows fp16.
    Patterns,
}

const KINDS: [Kind; 4] = [Kind::Gaussian, Kind::Zeros, Kind::Ties, Kind::Patterns];

/// n × k: whole chunks, blocks across rows, rows that begin in the middle of a byte, short last blocks, rows of more than one
/// round of a block of threads.
const SHAPES: [(usize, usize); 9] =
    [(64, 64), (1, 1), (3, 7), (5, 33), (200, 100), (129, 1001), (70, 192), (66, 2560), (9, 8200)];

pub fn cases() -> Vec<Case> {
    let all = SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind)));
    all.flat_map(|((n, k), kind)| DTYPES.map(|dtype| case(n, k, kind, dtype))).collect()
}

fn case(n: usize, k: usize, kind: Kind, dtype: Dtype) -> Case {
    let mut random = SplitMix64::new((n * 31 + k) as u64);
    let bits: Vec<u32> = (0..n * k).map(|at| value_bits(at, kind, dtype, &mut random)).collect();
    let bytes = match dtype {
        Dtype::F32 => bits.iter().flat_map(|bits| bits.to_le_bytes()).collect(),
        _ => bits.iter().flat_map(|bits| (*bits as u16).to_le_bytes()).collect(),
    };
    let mut floats = vec![0.0; n * k];
    let mut halves = vec![f16::ZERO; n * k];
    match dtype {
        Dtype::F16 => {
            halves = bits.iter().map(|bits| f16::from_bits(*bits as u16)).collect();
            halves.convert_to_f32_slice(&mut floats);
        }
        Dtype::BF16 => floats = bits.iter().map(|bits| f32::from_bits(bits << 16)).collect(),
        _ => floats = bits.iter().map(|bits| f32::from_bits(*bits)).collect(),
    }
    if dtype != Dtype::F16 {
        halves.convert_from_f32_slice(&floats);
    }
    let overflowed = floats.iter().zip(&halves).filter(|(wide, half)| wide.is_finite() && half.is_infinite());
    let overflow = overflowed.count() as u64;
    Case { what: format!("{kind:?} {dtype} [{n}, {k}]"), n, k, dtype, bytes, halves, floats, overflow }
}

fn value_bits(at: usize, kind: Kind, dtype: Dtype, random: &mut SplitMix64) -> u32 {
    // Near enough to a standard normal.
    let mut normal = || (0..12).map(|_| random.unit()).sum::<f64>() as f32 - 6.0;
    let value = match kind {
        Kind::Gaussian => 0.05 * normal(),
        Kind::Zeros => match at / 50 % 5 {
            0 => 0.0,
            1 => -0.0,
            2 => normal() * 2f32.powi(-23),
            3 => 1e-30,
            _ => normal(),
        },
        Kind::Ties => match at % 8 {
            // The absmax: codes of int8 are the values themselves.
            0 => 127.0,
            1 => random.below(127) as f32 + 0.5,
            // A value of NF4, and midpoints of two, under this absmax.
            2 => 127.0 * 0.562_617,
            3 => -127.0 * 0.848_096_4,
            4 => 127.0 * 0.039_790_15,
            5 => 1.0 + 2f32.powi(-11),
            6 => 65519.996 / 65536.0,
            _ => -(random.below(127) as f32) - 0.5,
        },
        Kind::Patterns => {
            // The upper half of an fp32 value is a bf16 value.
            let low = (at as u32).wrapping_mul(0x9e37_79b9);
            let pattern = (at as u32).wrapping_mul(7) & 0xffff;
            return if dtype == Dtype::F32 { pattern << 16 | low >> 16 } else { pattern };
        }
    };
    match dtype {
        Dtype::F16 => u32::from(f16::from_f32(value).to_bits()),
        Dtype::BF16 => u32::from(half::bf16::from_f32(value).to_bits()),
        _ => value.to_bits(),
    }
}
