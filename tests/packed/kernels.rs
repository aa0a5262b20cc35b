//! Kernels of every instruction set against the formats' oracles, on shapes that end inside of everything.

use std::ops::Range;
use std::slice;

use half::f16;
use quantbench::kernels::cpu::shared::SharedSlice;
use quantbench::kernels::isa::Isa;
use quantbench::quant::{CpuMatrix, FormatId, FormatOptions, HalfMatrix, Prepared, Stored};
use quantbench::rng::SplitMix64;

/// A zero's sign is free.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| (value + 0.0).to_bits()).collect()
}

pub fn multiply(matrix: &dyn CpuMatrix, x: &[f32], m: usize, parts: &[Range<usize>]) -> Vec<f32> {
    let (n, _) = matrix.shape();
    let mut y = vec![f32::NAN; m * n];
    let (mut room, mut scratch) = (Prepared::default(), Vec::new());
    let x = matrix.prepare(x, m, &mut room);
    for rows in parts {
        matrix.multiply(x, rows.clone(), None, &SharedSlice::new(&mut y), &mut scratch);
    }
    y
}

/// Σ |x · w| of each output, fp64 `[m, n]`.
pub fn magnitudes(weights: &[f32], k: usize, x: &[f32]) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum();
    x.chunks(k).flat_map(|x| weights.chunks(k).map(move |w| dot(x, w))).collect()
}

/// An fp32 sum of k products in any order rounds each product and each partial sum by half an ulp, 2⁻²⁴ of at most S = Σ|x·w|: (k + 1) · 2⁻²⁴ · S,
/// and 8 more for terms of second order and partial sums of pieces. The last rounding is 2⁻²⁴ of the result.
#[track_caller]
pub fn assert_products(what: &str, y: &[f32], expected: &[f64], sums: &[f64], k: usize) {
    assert_eq!(y.len(), expected.len(), "{what}");
    for ((y, expected), sum) in y.iter().zip(expected).zip(sums) {
        let bound = (k + 9) as f64 * 2f64.powi(-24) * sum + 2f64.powi(-24) * expected.abs();
        let error = (f64::from(*y) - expected).abs();
        assert!(error <= bound, "{what}: {y}, expected {expected}: off by {error:e} > {bound:e}");
    }
}

/// Holds the matrices that `read` makes to their oracle: values bit for bit, products within the bound, stored bytes kept.
pub fn check(what: &str, read: &dyn Fn() -> Box<dyn Stored>) {
    let stored = read();
    let (n, k) = stored.shape();
    let values = stored.dequantize();
    let bytes: usize = stored.parts().iter().map(|part| part.bytes.len()).sum();
    let mut rng = SplitMix64::new((n * 31 + k) as u64);
    for isa in Isa::available() {
        let (what, matrix) = (format!("{what} [{n}, {k}] {}", isa.name()), read().pack(isa));
        let rows = n / 3..n;
        let mut decoded = vec![f32::NAN; rows.len() * k];
        matrix.dequantize_rows(rows.clone(), &mut decoded);
        assert_eq!(bits(&decoded), bits(&values[rows.start * k..]), "{what}");
        assert_eq!(matrix.stored_bytes(), bytes, "{what}");
        let (unpacked, parts) = (matrix.unpack(), stored.parts());
        for (part, again) in parts.iter().zip(unpacked.parts()) {
            assert!((part.suffix, &part.bytes) == (again.suffix, &again.bytes), "{what}: part `{}`", part.suffix);
        }
        let mut read_bytes = 0;
        matrix.memory_of(0..n, &mut |piece| read_bytes += piece.len());
        // A token reads all but a factor or an offset of the whole matrix.
        assert!((bytes.saturating_sub(4)..=bytes).contains(&read_bytes), "{what}: {read_bytes} of {bytes}");
        for m in [1, 3, 13] {
            let x: Vec<f32> = (0..m * k).map(|_| rng.unit() as f32 - 0.5).collect();
            let oracle: Vec<f64> = stored.multiply(&x, m).into_iter().map(f64::from).collect();
            let sums = magnitudes(&values, k, &x);
            // As two threads take them, and a third one without rows.
            let first = n.div_ceil(2).next_multiple_of(matrix.row_granule()).min(n);
            let y = multiply(&*matrix, &x, m, &[0..first, first..n, n..n]);
            // One more, for the oracle rounds too.
            assert_products(&format!("{what} m {m}"), &y, &oracle, &sums, k + 1);
            assert_eq!(y, multiply(&*matrix, &x, m, slice::from_ref(&(0..n))), "{what}: rows split otherwise");
            let mut broken = x;
            broken[k / 2] = f32::NAN;
            let y = multiply(&*matrix, &broken, m, slice::from_ref(&(0..n)));
            assert!(y[..n].iter().all(|y| y.is_nan()), "{what}: an activation that is no number stays visible");
        }
    }
}

const SHAPES: &[(usize, usize)] =
    &[(1, 1), (3, 37), (16, 32), (17, 128), (33, 100), (5, 1040), (40, 513), (70, 2100), (2, 48)];

#[test]
fn formats_that_are_made_equal_their_oracles() {
    for name in ["fp8", "nvfp4", "w8a16", "w4a16-g128"] {
        let format = (FormatId::parse(name).expect("a precision").new)(FormatOptions::default());
        for &(n, k) in SHAPES {
            let mut rng = SplitMix64::new((n + 7 * k) as u64);
            let data: Vec<f16> = (0..n * k).map(|_| f16::from_f32((rng.unit() as f32 - 0.5) * 3.0)).collect();
            check(name, &|| format.quantize(HalfMatrix { n, k, data: data.clone() }).expect(name));
        }
    }
}
