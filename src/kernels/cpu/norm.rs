//! The norms between the matrices, one row at a time, in fp32.

use super::lanes::{Lanes, LanesKernel, on};
use crate::kernels::isa::Isa;

/// `out = x / sqrt(mean(x²) + epsilon) · weight` over one row, as transformers' `LlamaRMSNorm` computes it.
pub fn rms(isa: Isa, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "{} {} {}", x.len(), weight.len(), out.len());
    let squares = on(isa, Squares { x, centre: 0.0 });
    let scale = 1.0 / (squares / x.len() as f32 + epsilon).sqrt();
    on(isa, Scale { x, centre: 0.0, scale, weight, bias: None, out });
}

/// `out = (x − mean(x)) / sqrt(variance(x) + epsilon) · weight + bias` over one row, with the variance of the whole
/// population (divided by the length), as torch's `LayerNorm` computes it.
pub fn layer(isa: Isa, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "{} {} {}", x.len(), weight.len(), out.len());
    assert_eq!(x.len(), bias.len());
    let centre = on(isa, Sum { x }) / x.len() as f32;
    // A second pass over the centred row: mean(x²) − mean(x)² cancels where the mean is large.
    let variance = on(isa, Squares { x, centre }) / x.len() as f32;
    on(isa, Scale { x, centre, scale: 1.0 / (variance + epsilon).sqrt(), weight, bias: Some(bias), out });
}

struct Sum<'a> {
    x: &'a [f32],
}

impl LanesKernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        total(self.x, |sum: L, x: L| sum.add(x), L::splat(0.0))
    }
}

/// `Σ (x − centre)²`
struct Squares<'a> {
    x: &'a [f32],
    centre: f32,
}

impl LanesKernel for Squares<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self) -> f32 {
        let centre = L::splat(self.centre);
        let square = |sum: L, x: L| {
            let x = x.sub(centre);
            x.mul_add(x, sum)
        };
        total(self.x, square, centre)
    }
}

/// Adds up a row with four vectors of sums, which hides the latency of the additions and keeps rounding small.
/// Lanes past the end count as `neutral`, which `step` must ignore.
#[inline(always)]
fn total<L: Lanes>(x: &[f32], step: impl Fn(L, L) -> L, neutral: L) -> f32 {
    let mut sums = [L::splat(0.0); 4];
    let mut blocks = x.chunks_exact(4 * L::WIDTH);
    for block in &mut blocks {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = step(*sum, L::load(&block[i * L::WIDTH..]));
        }
    }
    let mut rest = blocks.remainder().chunks_exact(L::WIDTH);
    for block in &mut rest {
        sums[0] = step(sums[0], L::load(block));
    }
    let tail = rest.remainder();
    if !tail.is_empty() {
        // At most 16 lanes: wide enough for every vector.
        let mut padded = [0.0; 16];
        neutral.store(&mut padded);
        padded[..tail.len()].copy_from_slice(tail);
        sums[1] = step(sums[1], L::load(&padded));
    }
    sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum()
}

/// `out = (x − centre) · scale · weight + bias`
struct Scale<'a> {
    x: &'a [f32],
    centre: f32,
    scale: f32,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl LanesKernel for Scale<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (centre, scale) = (L::splat(self.centre), L::splat(self.scale));
        let apply = |x: L, weight: L| x.sub(centre).mul(scale).mul(weight);
        let whole = self.x.len() / L::WIDTH * L::WIDTH;
        for i in (0..whole).step_by(L::WIDTH) {
            let y = apply(L::load(&self.x[i..]), L::load(&self.weight[i..]));
            let y = self.bias.map_or(y, |bias| y.add(L::load(&bias[i..])));
            y.store(&mut self.out[i..]);
        }
        let y = apply(L::load_head(&self.x[whole..]), L::load_head(&self.weight[whole..]));
        let y = self.bias.map_or(y, |bias| y.add(L::load_head(&bias[whole..])));
        y.store_head(&mut self.out[whole..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::test_data::random;

    const LENGTHS: [usize; 9] = [1, 3, 15, 16, 17, 63, 127, 576, 2561];

    /// Every term of a result carries at most: the centring (1 rounding of `x` and the mean's error), the scale (its
    /// mean's relative error n/64 roundings at worst, halved by the root), three products and the bias. 16 roundings of
    /// the largest magnitude cover that for the lengths here, as the errors of a sum of random terms grow with its root.
    fn check(got: &[f32], expected: &[f64], largest: f64, name: &str) {
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let allowed = 16.0 * (f32::EPSILON as f64 / 2.0) * largest;
            assert!((*got as f64 - expected).abs() <= allowed, "{name} [{i}]: {got} for {expected}");
        }
    }

    #[test]
    fn rms_follows_the_formula() {
        for isa in Isa::available() {
            for (seed, n) in LENGTHS.into_iter().enumerate() {
                let (x, w) = (random(n, seed as u64), random(n, 99 + seed as u64));
                let mut out = vec![f32::NAN; n];
                rms(isa, &x, &w, 1e-5, &mut out);
                let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / n as f64;
                let scale = 1.0 / (mean + 1e-5f32 as f64).sqrt();
                let expected: Vec<f64> = x.iter().zip(&w).map(|(x, w)| *x as f64 * scale * *w as f64).collect();
                let largest = expected.iter().fold(0.0f64, |m, y| m.max(y.abs()));
                check(&out, &expected, largest, &format!("{} n {n}", isa.name()));
            }
        }
    }

    #[test]
    fn layer_follows_the_formula() {
        for isa in Isa::available() {
            for (seed, n) in LENGTHS.into_iter().enumerate() {
                let (x, w, b) = (random(n, seed as u64), random(n, 7 + seed as u64), random(n, 55 + seed as u64));
                let x: Vec<f32> = x.iter().map(|x| x + 3.0).collect();
                let mut out = vec![f32::NAN; n];
                layer(isa, &x, &w, &b, 1e-5, &mut out);
                let mean = x.iter().map(|x| *x as f64).sum::<f64>() / n as f64;
                let variance = x.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / n as f64;
                let scale = 1.0 / (variance + 1e-5f32 as f64).sqrt();
                let expected: Vec<f64> =
                    (0..n).map(|i| (x[i] as f64 - mean) * scale * w[i] as f64 + b[i] as f64).collect();
                // The mean's rounding counts with the size of x, before centring.
                let largest = x.iter().fold(0.0f64, |m, x| m.max(x.abs() as f64)) * scale.max(1.0) * 2.0 + 1.0;
                check(&out, &expected, largest, &format!("{} n {n}", isa.name()));
            }
        }
    }

    #[test]
    fn zeros_stay_finite() {
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; 19];
            rms(isa, &[0.0; 19], &[2.0; 19], 1e-5, &mut out);
            assert_eq!(out, [0.0; 19]);
            layer(isa, &[4.0; 19], &[2.0; 19], &[0.5; 19], 1e-5, &mut out);
            assert_eq!(out, [0.5; 19]);
        }
    }
}
