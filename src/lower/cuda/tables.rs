//! Tables that kernels read, as they lie in memory.

use crate::plan::{RelativeBias, Rope};

/// Cosine and sine of every angle, fp32 `[capacity, rotary / 2, 2]`.
pub fn angles(rope: &Rope, capacity: usize) -> Vec<f32> {
    let Rope { rotary_dim: _, inverse_frequencies } = rope;
    let at = |position: usize| inverse_frequencies.iter().map(move |f| position as f32 * f);
    (0..capacity).flat_map(at).flat_map(|angle| [angle.cos(), angle.sin()]).collect()
}

/// A relative bias by distance, fp32 `[h, 2 · reach + 1]`, distance 0 in the middle. `learned` is the table `[buckets, h]`.
pub fn by_distance(bias: &RelativeBias, learned: &[f32], buckets: usize, reach: usize) -> Vec<f32> {
    let heads = learned.len() / buckets;
    let distances = -(reach as i64)..=reach as i64;
    let of_head = |head| distances.clone().map(move |at| learned[bias.bucket(at, buckets) * heads + head]);
    (0..heads).flat_map(of_head).collect()
}

/// An fp32 vector that kernels read two values at a time: zeros behind it.
pub fn padded(values: &[f32]) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(padded_floats(values.len()), 0.0);
    padded
}

/// Values of an fp32 vector of `len` with its padding.
pub fn padded_floats(len: usize) -> usize {
    len.next_multiple_of(2)
}
