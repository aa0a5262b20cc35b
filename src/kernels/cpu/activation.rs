//! Activations of the feed-forward blocks, element by element in fp32.
//!
//! Each is `out = act(gate)`, times `up` where the block is gated; `out` is as long as `gate` and apart from it.

use super::lanes::{Lanes, LanesKernel, exp, on};
use crate::kernels::isa::Isa;

/// `x / (1 + e^(−x))`, within 4e-7 · |x · σ(x)| (below x = −88.72 the result is 0, which is off by 3e-37 at most).
pub fn silu(isa: Isa, gate: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    apply::<Silu>(isa, gate, up, out);
}

/// `x / 2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³)))`, within 6e-7 · |x|: transformers' `gelu_new` and
/// `gelu_pytorch_tanh`.
pub fn gelu_tanh(isa: Isa, gate: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    apply::<GeluTanh>(isa, gate, up, out);
}

/// `max(x, 0)`, exact; NaN stays NaN.
pub fn relu(isa: Isa, gate: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    apply::<Relu>(isa, gate, up, out);
}

/// gpt-oss: `(up + 1) · g · σ(α g)`, where `g = min(gate, limit)` and `up` is clamped to `±limit`; within 6e-7 of `|up + 1| · |g|`.
pub fn clamped_swiglu(isa: Isa, gate: &[f32], up: &[f32], limit: f32, alpha: f32, out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    on(isa, ClampedSwiglu { gate, up, limit, alpha, out });
}

struct ClampedSwiglu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    limit: f32,
    alpha: f32,
    out: &'a mut [f32],
}

impl LanesKernel for ClampedSwiglu<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (limit, alpha) = (L::splat(self.limit), L::splat(self.alpha));
        let lowest = L::splat(-self.limit);
        let at = |gate: L, up: L| {
            // A NaN stays one: the clamped value comes last where both compare false.
            let gate = limit.min(gate);
            let up = lowest.max(limit.min(up));
            logistic_product(gate, gate.mul(alpha)).mul(up.add(L::splat(1.0)))
        };
        let mut gate = self.gate.chunks_exact(L::WIDTH);
        let mut up = self.up.chunks_exact(L::WIDTH);
        let mut out = self.out.chunks_exact_mut(L::WIDTH);
        for ((gate, up), out) in (&mut gate).zip(&mut up).zip(&mut out) {
            at(L::load(gate), L::load(up)).store(out);
        }
        at(L::load_head(gate.remainder()), L::load_head(up.remainder())).store_head(out.into_remainder());
    }
}

trait Curve {
    fn at<L: Lanes>(x: L) -> L;
}

struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn at<L: Lanes>(x: L) -> L {
        logistic_product(x, x)
    }
}

struct GeluTanh;

impl Curve for GeluTanh {
    /// `(1 + tanh(u)) / 2 = 1 / (1 + e^(−2u))`, so one exponential does.
    #[inline(always)]
    fn at<L: Lanes>(x: L) -> L {
        const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769_2;
        let cubic = x.mul(x).mul_add(L::splat(0.044_715), L::splat(1.0));
        logistic_product(x, x.mul(L::splat(TWICE_SQRT_2_OVER_PI)).mul(cubic))
    }
}

struct Relu;

impl Curve for Relu {
    #[inline(always)]
    fn at<L: Lanes>(x: L) -> L {
        L::splat(0.0).max(x)
    }
}

/// `x · σ(u)`
#[inline(always)]
fn logistic_product<L: Lanes>(x: L, u: L) -> L {
    x.div(exp(L::splat(0.0).sub(u)).add(L::splat(1.0)))
}

fn apply<C: Curve>(isa: Isa, gate: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    assert_eq!(gate.len(), out.len());
    match up {
        Some(up) => {
            assert_eq!(gate.len(), up.len());
            on(isa, Gated { curve: std::marker::PhantomData::<C>, gate, up, out });
        }
        None => on(isa, Plain { curve: std::marker::PhantomData::<C>, gate, out }),
    }
}

struct Plain<'a, C> {
    curve: std::marker::PhantomData<C>,
    gate: &'a [f32],
    out: &'a mut [f32],
}

impl<C: Curve> LanesKernel for Plain<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let mut gate = self.gate.chunks_exact(L::WIDTH);
        let mut out = self.out.chunks_exact_mut(L::WIDTH);
        for (gate, out) in (&mut gate).zip(&mut out) {
            C::at(L::load(gate)).store(out);
        }
        C::at(L::load_head(gate.remainder())).store_head(out.into_remainder());
    }
}

struct Gated<'a, C> {
    curve: std::marker::PhantomData<C>,
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl<C: Curve> LanesKernel for Gated<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let mut gate = self.gate.chunks_exact(L::WIDTH);
        let mut up = self.up.chunks_exact(L::WIDTH);
        let mut out = self.out.chunks_exact_mut(L::WIDTH);
        for ((gate, up), out) in (&mut gate).zip(&mut up).zip(&mut out) {
            C::at(L::load(gate)).mul(L::load(up)).store(out);
        }
        let tail = C::at(L::load_head(gate.remainder())).mul(L::load_head(up.remainder()));
        tail.store_head(out.into_remainder());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::test_data::random;

    #[test]
    fn clamped_swiglu_is_within_its_stated_error() {
        let (limit, alpha) = (1.5f32, 1.702f32);
        for isa in Isa::available() {
            for len in [1, 7, 16, 67] {
                let gate: Vec<f32> = random(len, 5).iter().map(|x| 3.0 * x).collect();
                let up: Vec<f32> = random(len, 6).iter().map(|x| 3.0 * x).collect();
                let mut out = vec![f32::NAN; len];
                clamped_swiglu(isa, &gate, &up, limit, alpha, &mut out);
                for ((gate, up), out) in gate.iter().zip(&up).zip(&out) {
                    let (g, u) = (gate.min(limit) as f64, up.clamp(-limit, limit) as f64);
                    let expected = (u + 1.0) * g / (1.0 + (-(alpha as f64) * g).exp());
                    let allowed = 6e-7 * ((u + 1.0) * g).abs();
                    assert!((*out as f64 - expected).abs() <= allowed, "{}: {gate} {up}: {out}", isa.name());
                }
            }
        }
    }

    type Activation = fn(Isa, &[f32], Option<&[f32]>, &mut [f32]);
    /// Name, function, f64 reference, and the error stated above for `x` and the exact result.
    type Row = (&'static str, Activation, fn(f64) -> f64, fn(f64, f64) -> f64);

    const ACTIVATIONS: [Row; 3] = [
        ("silu", silu, |x| x / (1.0 + (-x).exp()), |_, y| 4e-7 * y.abs() + 3e-37),
        (
            "gelu_tanh",
            gelu_tanh,
            |x| x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
            |x, _| 6e-7 * x.abs(),
        ),
        ("relu", relu, |x| x.max(0.0), |_, _| 0.0),
    ];

    #[test]
    fn each_is_within_its_stated_error() {
        let mut x: Vec<f32> = (0..100_001).map(|i| (i as f32 - 50_000.0) / 500.0).collect();
        x.extend([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4]);
        for isa in Isa::available() {
            for (name, activation, reference, allowed) in ACTIVATIONS {
                let mut out = vec![f32::NAN; x.len()];
                activation(isa, &x, None, &mut out);
                for (x, y) in x.iter().zip(&out) {
                    let expected = reference(*x as f64);
                    let error = (*y as f64 - expected).abs();
                    assert!(error <= allowed(*x as f64, expected), "{} {name}({x}) = {y}: {error:e}", isa.name());
                }
            }
        }
    }

    #[test]
    fn gating_multiplies_and_nan_shows() {
        for isa in Isa::available() {
            for (name, activation, ..) in ACTIVATIONS {
                for n in [0, 1, 7, 16, 33, 101] {
                    let (mut gate, up) = (random(n, 1), random(n, 2));
                    if let Some(last) = gate.last_mut() {
                        *last = f32::NAN;
                    }
                    let (mut plain, mut gated) = (vec![0.0; n], vec![0.0; n]);
                    activation(isa, &gate, None, &mut plain);
                    activation(isa, &gate, Some(&up), &mut gated);
                    for i in 0..n.saturating_sub(1) {
                        assert_eq!(gated[i], plain[i] * up[i], "{} {name} [{i}] of {n}", isa.name());
                    }
                    assert!(gated.last().is_none_or(|y| y.is_nan()), "{} {name}", isa.name());
                }
            }
        }
    }
}
