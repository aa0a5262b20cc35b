//! Tables that kernels read, as they lie in memory.

use crate::plan::{RelativeBias, Rope, RopeByLength};

/// Cosine and sine of every angle of a call after which the sequence has `length` positions, fp32 `[rows, rotary / 2, 2]`.
pub fn call_angles(rope: &Rope, rows: usize, length: usize) -> Vec<f32> {
    let frequencies = rope.frequencies(length);
    let turns = (0..rows).flat_map(|position| rope.turns_by(&frequencies, position));
    turns.flat_map(|(cos, sin)| [cos, sin]).collect()
}

/// [`call_angles`] of decode steps, of which the one at a position has one row: `[capacity, rotary / 2, 2]`. `length` chooses
/// LongRoPE's frequencies.
pub fn step_angles(rope: &Rope, capacity: usize, length: usize) -> Vec<f32> {
    match rope.by_length {
        Some(RopeByLength::DynamicNtk { .. }) => {
            let turns = |position: usize| {
                let frequencies = rope.frequencies(position + 1);
                rope.turns_by(&frequencies, position).flat_map(|(cos, sin)| [cos, sin]).collect::<Vec<f32>>()
            };
            (0..capacity).flat_map(turns).collect()
        }
        Some(RopeByLength::Switch { .. }) | None => call_angles(rope, capacity, length),
    }
}

/// Lengths of one number have the same [`call_angles`].
pub fn length_class(rope: &Rope, length: usize) -> usize {
    match rope.by_length {
        Some(RopeByLength::Switch { original, .. }) => usize::from(length > original),
        Some(RopeByLength::DynamicNtk { original, .. }) => length.max(original),
        None => 0,
    }
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
