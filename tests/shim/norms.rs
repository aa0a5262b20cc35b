//! Norms in front of a product: a matrix that is the identity shows the activations that kernels multiply.

use half::f16;
use quantbench::kernels::cuda::matvec::{Epilogue, InputDesc, Mode, NORM_LAYER, NORM_RMS, Product};
use quantbench::kernels::cuda::program::tagged_float;
use quantbench::quant::{HalfMatrix, fp16};

use super::host::{CHIPS, Host};
use super::matvec::launch;
use super::memory::Memory;
use super::place::{place, quantize};
use super::products::{Numbers, rounding};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    None,
    Rms,
    Layer,
}

impl Norm {
    pub const ALL: [Self; 3] = [Self::None, Self::Rms, Self::Layer];
}

const EPSILON: f32 = 1e-5;

pub fn norms_of_one_row() {
    let mut numbers = Numbers(0x9044);
    // Behind 4096 elements a norm reads its input again.
    let widths = [1, 5, 64, 200, 511, 513, 1031];
    let mut cases: Vec<_> = widths.into_iter().flat_map(|k| Norm::ALL.map(|norm| (norm, k))).collect();
    cases.extend([(Norm::Rms, 4133), (Norm::Layer, 4133)]);
    for (turn, (norm, k)) in cases.into_iter().enumerate() {
        let memory = Memory::default();
        let host = Host { chip: CHIPS[turn % CHIPS.len()], memory: &memory };
        input(&host, norm, k, if turn % 3 == 0 { 1.0 } else { 0.37 }, &mut numbers);
    }
}

/// An input of a launch and the fp16 `[k]` that it becomes, checked against fp64.
pub fn input(host: &Host, norm: Norm, k: usize, scale: f32, numbers: &mut Numbers) -> (InputDesc, Vec<f16>) {
    let mut vector =
        |factor: f32, offset: f32| -> Vec<f32> { (0..k).map(|_| factor * numbers.normal() + offset).collect() };
    let (x, weight, bias) = (vector(0.8, 0.1), vector(0.3, 1.0), vector(0.2, 0.0));
    let bias = if norm == Norm::Layer { bias } else { vec![0.0; k] };
    // Kernels read two at a time.
    let padded = |values: &[f32]| [values, &vec![0.0; k.next_multiple_of(2) - k]].concat();
    let memory = host.memory;
    let plain = InputDesc { scale, epsilon: EPSILON, ..InputDesc::default() };
    let halves: Vec<f16> = x.iter().map(|value| f16::from_f32(*value)).collect();
    let input = match norm {
        Norm::None => InputDesc { x: memory.hold(&halves), ..plain },
        _ => InputDesc {
            x: memory.hold(&padded(&x).into_iter().map(tagged_float).collect::<Vec<_>>()),
            norm_weight: memory.hold(&padded(&weight)),
            norm_bias: memory.hold(&padded(&bias)),
            norm: if norm == Norm::Rms { NORM_RMS } else { NORM_LAYER },
            ..plain
        },
    };
    let made = shown(host, input, k);
    let reference = match norm {
        Norm::None => halves.iter().map(|value| (value.to_f64(), 0.0)).collect(),
        Norm::Rms => normed(&x, &weight, &bias, 0.0),
        Norm::Layer => normed(&x, &weight, &bias, x.iter().map(|x| f64::from(*x)).sum::<f64>() / k as f64),
    };
    for (at, (made, (y, error))) in made.iter().zip(reference).enumerate() {
        let scaled = y * f64::from(scale);
        // Rounded as a norm's result and as its multiple, where it has them.
        let roundings = f64::from(rounding(y as f32) * scale + rounding(scaled as f32));
        let (off, allowed) = ((made.to_f64() - scaled).abs(), 1.01 * (error * f64::from(scale) + roundings));
        assert!(off <= allowed, "{norm:?} of {k} [{at}]: {made} for {scaled}, off by {off:e}, allowed {allowed:e}");
    }
    (input, made)
}

/// Values and what fp32 may change of them: sums of k values in any order are off by (k + 8) · 2⁻²⁴ of their magnitudes, which
/// moves the mean by that part of the mean magnitude, and everything by that part through the factor.
pub fn normed(x: &[f32], weight: &[f32], bias: &[f32], mean: f64) -> Vec<(f64, f64)> {
    let k = x.len() as f64;
    let rounds = (k + 8.0) * 2f64.powi(-24);
    let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / k;
    let factor = 1.0 / (variance + f64::from(EPSILON)).sqrt();
    let moved = if mean == 0.0 { 0.0 } else { rounds * x.iter().map(|x| f64::from(x.abs())).sum::<f64>() / k };
    let values = x.iter().zip(weight).zip(bias).map(|((x, weight), bias)| {
        let scaled = (f64::from(*x) - mean) * factor * f64::from(*weight);
        let value = scaled + f64::from(*bias);
        // The factor: half of the variance's part and some roundings, of which the mean's move is one of second order.
        let error = scaled.abs() * (rounds + 2f64.powi(-20)) + moved * factor * f64::from(weight.abs());
        (value, error + 2f64.powi(-23) * value.abs())
    });
    values.collect()
}

/// The identity of fp16 times what kernels make of `input`: each sum has one term, so that it is exact.
pub fn shown(host: &Host, input: InputDesc, k: usize) -> Vec<f16> {
    let data = (0..k * k).map(|at| if at / k == at % k { f16::ONE } else { f16::ZERO }).collect();
    let identity = quantize(fp16::ID, HalfMatrix { n: k, k, data });
    let matrix = place(host.memory, "fp16", &*identity, f32::NAN);
    let out = host.memory.room::<f16>(k);
    let product = Product { matrix, first_row: 0, bias: 0, out, activation: 0 };
    launch(host, 3, Mode::Apart, &[input], &[product], Epilogue::default());
    host.memory.read(out, k)
}
