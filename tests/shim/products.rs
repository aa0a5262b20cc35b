//! Matrices and activations for tests of products on a device, and what the products may be.

use half::f16;
use quantbench::quant::{FormatOptions, HalfMatrix, Stored};

/// What is unusual about a case's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Gaussian,
    /// Some activations at and above the LLM.int8 threshold, 6.0 itself among them.
    Outliers,
    /// Stretches and rows of zero weights, and a zero row of activations.
    Zeros,
    /// One weight and one activation far above all others; their product, where they meet, is near fp16's largest value.
    Extremes,
}

pub const KINDS: [Kind; 4] = [Kind::Gaussian, Kind::Outliers, Kind::Zeros, Kind::Extremes];

/// n × k: whole chunks, blocks across rows, rows that begin in the middle of a byte, short last blocks, many blocks.
pub const SHAPES: [(usize, usize); 10] =
    [(64, 64), (1, 1), (3, 7), (5, 33), (100, 200), (17, 1001), (256, 512), (66, 2560), (4500, 192), (130, 4096)];

/// A seeded sequence, the same on every machine (xorshift64*).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Near enough to a standard normal: signed, centred, unit variance.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((self.uniform() * end as f32) as usize).min(end - 1)
    }
}

pub fn weight(n: usize, k: usize, kind: Kind, numbers: &mut Numbers) -> HalfMatrix {
    let mut data: Vec<f16> = (0..n * k).map(|_| f16::from_f32(0.05 * numbers.normal())).collect();
    match kind {
        Kind::Gaussian | Kind::Outliers => {}
        Kind::Zeros => {
            let middle = data.len() / 3;
            data.iter_mut().skip(middle).take(200).for_each(|value| *value = f16::ZERO);
            data.chunks_exact_mut(k).step_by(3).for_each(|row| row.fill(f16::ZERO));
        }
        Kind::Extremes => {
            let at = numbers.below(data.len());
            data[at] = f16::from_f32(-240.0);
        }
    }
    HalfMatrix { n, k, data }
}

pub fn activations(m: usize, k: usize, kind: Kind, numbers: &mut Numbers) -> Vec<f16> {
    let mut x: Vec<f16> = (0..m * k).map(|_| f16::from_f32(0.3 * numbers.normal())).collect();
    match kind {
        Kind::Gaussian => {}
        Kind::Outliers => {
            for value in [6.0, -6.0, 25.0, -11.5, 5.996] {
                let at = numbers.below(x.len());
                x[at] = f16::from_f32(value);
            }
        }
        Kind::Zeros => x[..k].fill(f16::ZERO),
        Kind::Extremes => {
            x.iter_mut().for_each(|value| *value = f16::from_f32(value.to_f32() / 1024.0));
            let at = numbers.below(x.len());
            x[at] = f16::from_f32(250.0);
        }
    }
    x
}

/// fp16's ε: half a unit in the last place, relative; and half its smallest subnormal.
const HALF: f32 = 1.0 / 2048.0;
const SUBNORMAL: f32 = 1.0 / (1 << 25) as f32;

/// What rounding `y` to fp16 may change.
pub fn rounding(y: f32) -> f32 {
    HALF * y.abs() + SUBNORMAL
}

/// Outputs of a format's reference, and how far a device's sums may be from them.
pub struct Expected {
    pub values: Vec<f32>,
    pub errors: Vec<f32>,
}

/// `x · Wᵀ` for rows `x`, with `threshold` for LLM.int8's outlier columns.
///
/// A device's sum may be off by the following, from `summed` = Σ|x·w| over what is added in fp32, `rough` = Σ|x·w| over
/// weights that the device rounds to fp16 first, and the value `y` itself. With ε = 2⁻¹¹ for fp16 and k terms in fp32:
/// - a sum in any order, each product at most a few roundings away from the oracle's: (k + 8) · 2⁻²³ · summed, twice
///   the textbook bound, since tensor cores truncate where they align;
/// - rounded weights: ε · rough, and half the smallest subnormal (2⁻²⁵) for each activation they meet;
/// - LLM.int8 rounds its regular part (at most |y| + rough) and its result: ε · (2|y| + rough). That part's unit, 1/127², is
///   bitsandbytes' CUDA one here and its CPU one in the oracle, 2⁻¹⁵ apart at most; its four fp32 roundings are below 1 %
///   of all this.
///
/// Products of two of these are below 1 % of them.
pub fn expected(name: &str, stored: &dyn Stored, x: &[f32], threshold: f32) -> Expected {
    let (n, k) = stored.shape();
    let (values, weight) = (stored.multiply(x, x.len() / k), stored.dequantize());
    let rough = rough_columns(name, x, k, threshold);
    let error = |at: usize| {
        let (y, x, w) = (values[at], &x[at / n * k..][..k], &weight[at % n * k..][..k]);
        let magnitudes = x.iter().zip(w).map(|(x, w)| (x * w).abs());
        let magnitude: f32 = magnitudes.clone().sum();
        let of_rough = |(value, rough): (f32, &bool)| if *rough { value } else { 0.0 };
        let rough_magnitude: f32 = magnitudes.zip(&rough).map(of_rough).sum();
        let rough_activations: f32 = x.iter().map(|x| x.abs()).zip(&rough).map(of_rough).sum();
        // LLM.int8 adds only its outlier columns in fp32; the rest is exact in int32.
        let summed = if name == "int8" { rough_magnitude } else { magnitude };
        let sum = (k + 8) as f32 * 2f32.powi(-23) * summed;
        let weights = HALF * rough_magnitude + SUBNORMAL * rough_activations;
        let regular = y.abs() + rough_magnitude;
        let parts =
            if name == "int8" { HALF * (y.abs() + regular) + 2f32.powi(-15) * regular + 2.0 * SUBNORMAL } else { 0.0 };
        1.01 * (sum + weights + parts)
    };
    Expected { errors: (0..values.len()).map(error).collect(), values }
}

/// Columns whose weights the device rounds to fp16 before it multiplies.
fn rough_columns(name: &str, x: &[f32], k: usize, threshold: f32) -> Vec<bool> {
    let is_rough = |column: usize| match name {
        "int8" => threshold > 0.0 && x[column..].iter().step_by(k).any(|value| value.abs() >= threshold),
        // NF4 rounds weights for many rows and its 16 code values for one.
        _ => name.starts_with("nf4"),
    };
    (0..k).map(is_rough).collect()
}

/// fp16 products of rows `x` against the format's reference at its usual options.
pub fn check(name: &str, what: &str, stored: &dyn Stored, x: &[f32], y: &[f32]) {
    check_stored_by(1.0, name, what, stored, x, y);
}

/// [`check`] of products that were rounded by a power of two, and multiplied by its inverse since.
pub fn check_stored_by(scale: f32, name: &str, what: &str, stored: &dyn Stored, x: &[f32], y: &[f32]) {
    let (n, _) = stored.shape();
    // LLM.int8's two roundings among fp16's subnormals, of which `expected` has those by 1.
    let subnormal = 2.0 * SUBNORMAL * (1.0 / scale - 1.0);
    let Expected { values, errors } = expected(name, stored, x, FormatOptions::default().int8_threshold);
    for (at, ((y, expected), error)) in y.iter().zip(&values).zip(&errors).enumerate() {
        // LLM.int8's result is fp16 before, and an fp32 matrix's never is.
        let last = if ["int8", "fp32"].contains(&name) { 0.0 } else { rounding(*expected) };
        let (off, allowed) = ((y - expected).abs(), error + 1.01 * last + subnormal);
        assert!(
            off <= allowed,
            "{name} {what} [{}, {}]: {y} for {expected}, off by {off}, allowed {allowed}",
            at / n,
            at % n
        );
    }
}
