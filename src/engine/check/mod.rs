//! Checks that the kernels multiply right on this machine: one matrix of the model through the device's kernel and through its
//! format's plain reference.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;

use anyhow::Result;

use super::{Device, Setup, load};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;
use crate::quant::{Prepared, Stored};
use crate::rng::SplitMix64;
use crate::weights::spec::MatrixSpec;

/// Rows of the products: a decode step's, and enough for the kernels of a prefill.
const ROWS: [usize; 2] = [1, 9];

/// An activation that LLM.int8 takes for an outlier at its usual threshold; the others stay below.
const OUTLIER: f32 = 8.0;

/// A larger matrix is not checked: the reference would take longer than its answer is worth. Of a model's linear layers the
/// smallest are far below.
const MAX_ELEMENTS: usize = 1 << 24;

/// The result for one matrix.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SelfCheck {
    /// The name in the checkpoint.
    pub matrix: String,
    /// The largest error over what rounding explains; `None` where the kernel gave a value that is no number.
    pub error_share: Option<f64>,
}

impl SelfCheck {
    pub fn passes(&self) -> bool {
        self.error_share.is_some_and(|share| share <= 1.0)
    }
}

/// Multiplies the smallest matrix that the precision quantizes. `None` where it quantizes none of a size
/// to check. Fails where the matrix cannot be
/// read or multiplied at all.
pub fn self_check(setup: &Setup) -> Result<Option<SelfCheck>> {
    let fits = |spec: &&MatrixSpec| spec.role.is_quantized() && spec.n * spec.k <= MAX_ELEMENTS;
    let linears = setup.model.matrices.iter().filter(fits);
    let Some(spec) = linears.min_by_key(|spec| spec.n * spec.k) else { return Ok(None) };
    let stored = load::one(setup, spec)?;
    let weights = stored.dequantize();
    let calls = ROWS.map(|m| Call { x: activations(m, spec.k), m });
    let expected = calls.each_ref().map(|call| stored.multiply(&call.x, call.m));
    let seen = match setup.device {
        Device::Cpu => on_cpu(stored, &calls),
        Device::Cuda(ordinal) => cuda::multiply(stored.as_ref(), &calls, ordinal)?,
    };
    let half = matches!(setup.device, Device::Cuda(_));
    let shares = calls.iter().zip(&expected).zip(&seen).map(|((call, expected), seen)| {
        let product = Product { weights: &weights, k: spec.k, x: &call.x, expected, half };
        product.error_share(seen)
    });
    let error_share = shares.collect::<Option<Vec<f64>>>().map(|shares| shares.into_iter().fold(0.0, f64::max));
    Ok(Some(SelfCheck { matrix: spec.name.clone(), error_share }))
}

/// Activations of one product, `[m, k]`.
struct Call {
    x: Vec<f32>,
    m: usize,
}

/// Signed multiples of 1/64 below 4, which fp16 holds exactly, and one outlier.
fn activations(m: usize, k: usize) -> Vec<f32> {
    let mut rng = SplitMix64::new((m * k) as u64);
    let mut x: Vec<f32> = (0..m * k).map(|_| (rng.below(511) as f32 - 255.0) / 64.0).collect();
    let at = rng.below(x.len());
    x[at] = OUTLIER;
    x
}

fn on_cpu(stored: Box<dyn Stored>, calls: &[Call]) -> Vec<Vec<f32>> {
    let matrix = stored.pack(Isa::detect());
    let (n, _) = matrix.shape();
    let (mut prepared, mut scratch) = (Prepared::default(), Vec::new());
    let mut one = |call: &Call| {
        let mut y = vec![f32::NAN; call.m * n];
        let x = matrix.prepare(&call.x, call.m, &mut prepared);
        matrix.multiply(x, 0..n, None, &SharedSlice::new(&mut y), &mut scratch);
        y
    };
    calls.iter().map(&mut one).collect()
}

/// A product by the reference, and what its kernel computes with.
struct Product<'a> {
    /// fp32 `[n, k]`
    weights: &'a [f32],
    k: usize,
    /// `[m, k]`
    x: &'a [f32],
    /// `[m, n]`
    expected: &'a [f32],
    /// Weights, activations and results are fp16 at times, as on CUDA.
    half: bool,
}

impl Product<'_> {
    /// The largest error over its bound; `None` where `seen` is no number and the reference is one. Where the reference is none,
    /// as with a weight that is none, nothing is reported: the logits show it.
    fn error_share(&self, seen: &[f32]) -> Option<f64> {
        let n = self.weights.len() / self.k;
        let mut worst = 0.0f64;
        for (at, (&seen, &expected)) in seen.iter().zip(self.expected).enumerate() {
            let bound = self.bound(at / n, at % n, expected);
            if !expected.is_finite() || !bound.is_finite() {
                continue;
            }
            let share = f64::from((seen - expected).abs()) / bound;
            if share.is_nan() || share.is_infinite() {
                return None;
            }
            worst = worst.max(share);
        }
        Some(worst)
    }

    /// The error that rounding explains of output `[row, column]`, from S = Σ (|x| + half a step of 8-bit activations) · |w|:
    /// - k products and a few scales in fp32 in any order, on both sides: (k + 8) · 2⁻²³ · S + 2⁻²² · |y|;
    /// - in fp16 the weights and the regular part of LLM.int8 round by 2⁻¹¹ of at most S + |y| each, the result by as much of
    ///   |y|, and LLM.int8's two units differ by 2⁻¹⁵: together below 2⁻¹⁰ · 1.04 · (S + |y|); subnormals add 2⁻²⁵ for each
    ///   activation.
    fn bound(&self, row: usize, column: usize, y: f32) -> f64 {
        let (x, w) = (&self.x[row * self.k..][..self.k], &self.weights[column * self.k..][..self.k]);
        let step = f64::from(OUTLIER) / 254.0;
        let sum: f64 = x.iter().zip(w).map(|(x, w)| (f64::from(x.abs()) + step) * f64::from(w.abs())).sum();
        let y = f64::from(y.abs());
        let single = (self.k + 8) as f64 * 2f64.powi(-23) * sum + 2f64.powi(-22) * (y + f64::MIN_POSITIVE);
        let subnormals: f64 = x.iter().map(|x| f64::from(x.abs())).sum::<f64>() * 2f64.powi(-25);
        single + if self.half { 1.04 * 2f64.powi(-10) * (sum + y) + subnormals } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{FORMATS, FormatOptions, HalfMatrix};
    use half::f16;

    fn weight(n: usize, k: usize) -> HalfMatrix {
        let mut rng = SplitMix64::new(3);
        let value = |_| f16::from_f32((rng.unit() - 0.5) as f32);
        HalfMatrix { n, k, data: (0..n * k).map(value).collect() }
    }

    fn share(seen: impl Fn(Vec<f32>) -> Vec<f32>, format: &dyn crate::quant::Format) -> Vec<Option<f64>> {
        let (n, k) = (24, 192);
        let stored = format.quantize(weight(n, k)).unwrap();
        let weights = stored.dequantize();
        let calls = ROWS.map(|m| Call { x: activations(m, k), m });
        let expected = calls.each_ref().map(|call| stored.multiply(&call.x, call.m));
        let products = on_cpu(stored, &calls);
        let one = |((call, expected), y): ((&Call, &Vec<f32>), Vec<f32>)| {
            Product { weights: &weights, k, x: &call.x, expected, half: false }.error_share(&seen(y))
        };
        calls.iter().zip(&expected).zip(products).map(one).collect()
    }

    #[test]
    fn every_format_passes_and_a_wrong_kernel_does_not() {
        for entry in FORMATS {
            let format = (entry.new)(FormatOptions::default());
            let right = share(|y| y, format.as_ref());
            assert!(right.iter().all(|share| share.is_some_and(|share| share <= 1.0)), "{} {right:?}", entry.name);
            // Two outputs changed places, as a layout that is off by one has it.
            let swapped = |mut y: Vec<f32>| {
                y.swap(0, 1);
                y
            };
            let wrong = share(swapped, format.as_ref());
            assert!(wrong.iter().all(|share| share.is_some_and(|share| share > 1.0)), "{} {wrong:?}", entry.name);
            let not_a_number = |mut y: Vec<f32>| {
                y[3] = f32::NAN;
                y
            };
            assert_eq!(share(not_a_number, format.as_ref()), [None, None], "{}", entry.name);
        }
    }

    #[test]
    fn a_check_passes_within_its_bound() {
        let check = |error_share| SelfCheck { matrix: "w".to_owned(), error_share }.passes();
        assert_eq!([Some(0.0), Some(1.0), Some(1.1), None].map(check), [true, true, false, false]);
    }
}
