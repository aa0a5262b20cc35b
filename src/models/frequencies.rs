//! Rotary frequencies of each kind of scaling.

use super::rope::{RopeKind, RopeSettings, Yarn};
use crate::plan::{Rope, RopeByLength};

impl RopeSettings {
    /// In fp32, operation by operation as transformers computes it.
    pub fn rope(&self) -> Rope {
        let dim = self.rotary_dim;
        let power = |i: usize, of: usize| (self.theta as f32).powf((2 * i) as f32 / of as f32);
        let plain = (0..dim / 2).map(|i| 1.0 / power(i, dim));
        let stretched = |factors: &[f64]| {
            factors.iter().enumerate().map(|(i, factor)| 1.0 / (*factor as f32 * power(i, dim))).collect::<Vec<f32>>()
        };
        let (inverse_frequencies, attention_factor): (Vec<f32>, f64) = match &self.kind {
            RopeKind::Default | RopeKind::Dynamic { .. } => (plain.collect(), 1.0),
            RopeKind::Linear { factor } => (plain.map(|f| f / *factor as f32).collect(), 1.0),
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let [factor, low, high, original] =
                    [factor, low_freq_factor, high_freq_factor, original].map(|x| *x as f32);
                (plain.map(|f| llama3_frequency(f, factor, low, high, original)).collect(), 1.0)
            }
            RopeKind::Yarn(yarn) => {
                let (low, high) = yarn.range(dim, self.theta);
                let frequency = |i| yarn.frequency(power(i, dim), i, low, high);
                ((0..dim / 2).map(frequency).collect(), yarn.attention_factor)
            }
            RopeKind::LongRope { short_factor, attention_factor, .. } => (stretched(short_factor), *attention_factor),
            RopeKind::Proportional { factor, rotated } => {
                let rotated = (rotated * self.head_dim as f64 / 2.0) as usize;
                let frequency = |i| if i < rotated { 1.0 / power(i, self.head_dim) / *factor as f32 } else { 0.0 };
                ((0..dim / 2).map(frequency).collect(), 1.0)
            }
        };
        let by_length = match &self.kind {
            RopeKind::Dynamic { factor } => {
                Some(RopeByLength::DynamicNtk { original: self.max_positions, theta: self.theta, factor: *factor })
            }
            RopeKind::LongRope { long_factor, original, .. } if *original < self.max_positions => {
                Some(RopeByLength::Switch { original: *original, inverse_frequencies: stretched(long_factor) })
            }
            _ => None,
        };
        Rope { rotary_dim: dim, inverse_frequencies, attention_factor: attention_factor as f32, by_length }
    }
}

impl Yarn {
    /// Between which pairs frequencies pass from their own to the stretched ones.
    fn range(&self, dim: usize, theta: f64) -> (f64, f64) {
        let pair = |rotations: f64| {
            dim as f64 * (self.original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
        };
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        (low.max(0.0), high.min(dim as f64 - 1.0))
    }

    fn frequency(&self, power: f32, i: usize, low: f64, high: f64) -> f32 {
        let high = if low == high { high + 0.001 } else { high };
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let (own, stretched, share) = (1.0 / power, 1.0 / (self.factor as f32 * power), 1.0 - ramp);
        stretched * (1.0 - share) + own * share
    }
}

/// Llama 3.1's scaling: short wavelengths stay, long ones are stretched by `factor`, those between are blended.
fn llama3_frequency(frequency: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}
