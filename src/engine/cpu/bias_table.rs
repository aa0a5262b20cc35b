//! Relative biases as attention reads them.

use crate::plan::RelativeBias;
use crate::quant::CpuMatrix;

/// A relative bias laid out by distance: `[h, 2 · reach + 1]`, distance 0 in the middle, so that the biases of one query
/// lie together.
pub(super) struct BiasTable {
    values: Vec<f32>,
    reach: usize,
}

impl BiasTable {
    pub(super) fn new(bias: &RelativeBias, table: &dyn CpuMatrix, reach: usize) -> Self {
        let (buckets, heads) = table.shape();
        let mut learned = vec![0.0; buckets * heads];
        table.dequantize_rows(0..buckets, &mut learned);
        let distances = -(reach as i64)..=reach as i64;
        let of_head = |head: usize| {
            let learned = &learned;
            distances.clone().map(move |distance| learned[bias.bucket(distance, buckets) * heads + head])
        };
        Self { values: (0..heads).flat_map(of_head).collect(), reach }
    }

    /// Biases of `head` from a query at `query` to the keys `0..seen`.
    pub(super) fn of(&self, head: usize, query: usize, seen: usize) -> &[f32] {
        let start = head * (2 * self.reach + 1) + self.reach - query;
        &self.values[start..start + seen]
    }
}
