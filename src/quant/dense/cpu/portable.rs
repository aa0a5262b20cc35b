//! In plain Rust; `half` uses the machine's conversion instructions where it finds them.

use super::DenseValue;
use crate::quant::cpu::STRIP_ROWS;

/// Values converted at once, and as many sums that the compiler may keep in vectors.
const CHUNK: usize = 64;
const LANES: usize = 16;

/// `Σ row · x` over equally many values.
pub fn dot<T: DenseValue>(row: &[T], x: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut values = [0.0f32; CHUNK];
    for (row, x) in row.chunks(CHUNK).zip(x.chunks(CHUNK)) {
        let values = &mut values[..row.len()];
        T::widen(row, values);
        for (values, x) in values.chunks(LANES).zip(x.chunks(LANES)) {
            sums.iter_mut().zip(values).zip(x).for_each(|((sum, value), x)| *sum += value * x);
        }
    }
    sums.iter().sum()
}

/// Columns of `rows` from `first` on, as `[columns][16]`.
pub fn transpose<T: DenseValue>(rows: &[&[T]; STRIP_ROWS], first: usize, panel: &mut [f32]) {
    for (column, lanes) in panel.as_chunks_mut::<STRIP_ROWS>().0.iter_mut().enumerate().skip(first) {
        for (lane, row) in lanes.iter_mut().zip(rows) {
            T::widen(&row[column..=column], std::slice::from_mut(lane));
        }
    }
}
