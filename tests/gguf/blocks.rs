//! The block formats of GGUF files against ggml's own bytes, values and products, and their kernels against their oracles.

use std::ops::Range;
use std::slice;

use quantbench::kernels::cpu::shared::SharedSlice;
use quantbench::kernels::isa::Isa;
use quantbench::quant::ggml::{GgmlType, TYPES};
use quantbench::quant::{CpuMatrix, Format, FormatOptions, HalfMatrix, Part, Prepared, STORED_FORMATS, Stored};
use quantbench::rng::SplitMix64;
use safetensors::{Dtype, SafeTensors};

const GOLDEN: &[u8] = include_bytes!("../golden/formats/gguf.safetensors");

/// Shape and bytes of a golden tensor.
fn golden(name: &str) -> Option<(Vec<usize>, Vec<u8>)> {
    let tensors = SafeTensors::deserialize(GOLDEN).expect("a golden file");
    tensors.tensor(name).ok().map(|tensor| (tensor.shape().to_vec(), tensor.data().to_vec()))
}

fn f32s(name: &str) -> Option<Vec<f32>> {
    Some(golden(name)?.1.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

fn f64s(name: &str) -> Option<Vec<f64>> {
    Some(golden(name)?.1.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
}

/// The types whose matrices are blocks.
fn block_types() -> impl Iterator<Item = &'static GgmlType> {
    TYPES.iter().filter(|known| known.format.is_stored)
}

fn format(known: &GgmlType) -> Box<dyn Format> {
    (known.format.new)(FormatOptions::default())
}

fn parts(bytes: Vec<u8>) -> Vec<Part> {
    vec![Part { suffix: "", dtype: Dtype::U8, shape: vec![bytes.len()], bytes }]
}

fn restored(known: &GgmlType, (n, k): (usize, usize), bytes: Vec<u8>) -> Box<dyn Stored> {
    format(known).restore(n, k, parts(bytes)).unwrap_or_else(|error| panic!("{} [{n}, {k}]: {error}", known.name))
}

/// The golden cases of a type: name, `[n, k]` and bytes.
fn cases(known: &GgmlType) -> Vec<(String, (usize, usize), Vec<u8>)> {
    let mut found = Vec::new();
    for case in ["a", "b", "r", "edge"] {
        let name = format!("{}.{case}", known.format.name);
        if let Some((shape, bytes)) = golden(&format!("{name}.bytes")) {
            let k = shape[1] / known.block_bytes * known.block_len;
            found.push((name, (shape[0], k), bytes));
        }
    }
    found
}

#[test]
fn decoded_values_are_ggmls_bit_for_bit() {
    let mut compared = 0;
    for known in block_types() {
        for (name, shape, bytes) in cases(known) {
            let Some(expected) = f32s(&format!("{name}.dequant")) else { continue };
            // A zero's sign is free.
            let bits = |values: &[f32]| values.iter().map(|value| (value + 0.0).to_bits()).collect::<Vec<_>>();
            let stored = restored(known, shape, bytes.clone());
            assert_eq!(bits(&stored.dequantize()), bits(&expected), "{name}");
            for isa in Isa::available() {
                let matrix = restored(known, shape, bytes.clone()).pack(isa);
                let mut values = vec![f32::NAN; expected.len()];
                matrix.dequantize_rows(0..shape.0, &mut values);
                assert_eq!(bits(&values), bits(&expected), "{name} {}", isa.name());
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 2 * block_types().count() + 1);
}

/// Of weights without importance matrix, and of a quantizer that ggml builds without fused multiply-add.
#[test]
fn made_bytes_are_ggmls() {
    let mut compared = 0;
    for known in block_types().filter(|known| known.format.is_made) {
        for case in ["a", "b"] {
            let name = format!("{}.{case}", known.format.name);
            let (shape, weight) = golden(&format!("{case}.weight")).expect("weights");
            let data = weight.as_chunks::<2>().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes)).collect();
            let made = format(known).quantize(HalfMatrix { n: shape[0], k: shape[1], data }).expect(&name);
            let (_, expected) = golden(&format!("{name}.bytes")).expect("bytes");
            let made = &made.parts()[0].bytes;
            let blocks = made.chunks(known.block_bytes).zip(expected.chunks(known.block_bytes));
            let differing: Vec<usize> =
                blocks.enumerate().filter(|(_, (made, expected))| made != expected).map(|(at, _)| at).collect();
            assert!(differing.is_empty(), "{name}: blocks {differing:?} of {}", made.len() / known.block_bytes);
            compared += 1;
        }
    }
    assert_eq!(compared, 2 * 10, "types that are made");
}

#[test]
fn rows_of_parts_of_blocks_are_refused() {
    for known in block_types().filter(|known| known.format.is_made && known.block_len > 1) {
        let (n, k) = (2, known.block_len + known.block_len / 2);
        let weight = HalfMatrix { n, k, data: vec![half::f16::ONE; n * k] };
        let error = format(known).quantize(weight).err().expect("no whole blocks").to_string();
        assert!(error.contains(&format!("rows of {k} values are no whole blocks")), "{error}");
    }
}

/// Σ |x · w| of each output, fp64 `[m, n]`.
fn magnitudes(weights: &[f32], k: usize, x: &[f32]) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum();
    x.chunks(k).flat_map(|x| weights.chunks(k).map(move |w| dot(x, w))).collect()
}

#[track_caller]
fn assert_close(what: &str, y: &[f32], expected: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(y.len(), expected.len(), "{what}");
    for (i, (y, expected)) in y.iter().zip(expected).enumerate() {
        let error = (f64::from(*y) - expected).abs();
        assert!(error <= bound(i), "{what}: output {i} is {y}, expected {expected}: off by {error:e} > {:e}", bound(i));
    }
}

/// An fp32 sum of k products in any order rounds each product and each partial sum by half an ulp, 2⁻²⁴ of at most S = Σ|x·w|: (k + 1) · 2⁻²⁴
/// · S, and 8 more for terms of second order and partial sums of pieces. The last rounding is 2⁻²⁴ of the result.
fn fp32_bound(k: usize, sum: f64, y: f64) -> f64 {
    (k + 9) as f64 * 2f64.powi(-24) * sum + 2f64.powi(-24) * y.abs()
}

fn multiply(matrix: &dyn CpuMatrix, x: &[f32], m: usize, bias: Option<&[f32]>, parts: &[Range<usize>]) -> Vec<f32> {
    let (n, _) = matrix.shape();
    let mut y = vec![f32::NAN; m * n];
    let (mut room, mut scratch) = (Prepared::default(), Vec::new());
    let x = matrix.prepare(x, m, &mut room);
    for rows in parts {
        matrix.multiply(x, rows.clone(), bias, &SharedSlice::new(&mut y), &mut scratch);
    }
    y
}

#[test]
fn products_are_the_goldens() {
    let mut compared = 0;
    for known in block_types() {
        for (name, (n, k), bytes) in cases(known) {
            let Some(expected) = f64s(&format!("{name}.y")) else { continue };
            let case = name.rsplit_once('.').expect("a case").1;
            let x = f32s(&format!("{case}.x")).expect("activations");
            let m = x.len() / k;
            let stored = restored(known, (n, k), bytes.clone());
            let sums = magnitudes(&stored.dequantize(), k, &x);
            // The oracle's fp64 sum differs from the golden's by its order alone, and rounds once.
            assert_close(&name, &stored.multiply(&x, m), &expected, |i| {
                2f64.powi(-24) * expected[i].abs() + k as f64 * 2f64.powi(-52) * sums[i]
            });
            for isa in Isa::available() {
                let matrix = restored(known, (n, k), bytes.clone()).pack(isa);
                let what = format!("{name} {}", isa.name());
                let close = |y: &[f32], range: Range<usize>| {
                    assert_close(&what, y, &expected[range.clone()], |i| {
                        let at = range.start + i;
                        fp32_bound(k, sums[at], expected[at])
                    });
                };
                close(&multiply(&*matrix, &x, m, None, slice::from_ref(&(0..n))), 0..m * n);
                // A decode step has kernels of its own.
                for token in 0..m {
                    let one = &x[token * k..][..k];
                    close(&multiply(&*matrix, one, 1, None, slice::from_ref(&(0..n))), token * n..(token + 1) * n);
                }
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 3 * block_types().count());
}

/// A matrix of golden blocks, in turn.
fn matrix_bytes(known: &GgmlType, (n, k): (usize, usize)) -> Vec<u8> {
    let golden: Vec<u8> =
        cases(known).into_iter().filter(|(name, ..)| !name.ends_with("edge")).flat_map(|c| c.2).collect();
    let pool: Vec<&[u8]> = golden.chunks_exact(known.block_bytes).collect();
    let mut rng = SplitMix64::new((n * 31 + k) as u64);
    (0..n * k / known.block_len).flat_map(|_| pool[rng.below(pool.len())].to_vec()).collect()
}

/// Rows in blocks: strips and their tails, pieces of a row and their tails, one block.
const SHAPES: &[(usize, usize)] = &[(1, 1), (3, 2), (16, 1), (17, 4), (40, 33), (70, 5), (5, 70)];

fn activations(m: usize, k: usize) -> Vec<f32> {
    let mut rng = SplitMix64::new((m * 7 + k) as u64);
    (0..m * k).map(|_| (rng.unit() as f32 - 0.5) * 12.0).collect()
}

#[test]
fn kernels_equal_the_oracles() {
    for known in block_types() {
        for &(n, blocks) in SHAPES {
            let k = blocks * known.block_len;
            let bytes = matrix_bytes(known, (n, k));
            let stored = restored(known, (n, k), bytes.clone());
            let (weights, bias) = (stored.dequantize(), activations(1, n));
            for m in [1, 2, 13] {
                let x = activations(m, k);
                let oracle = stored.multiply(&x, m);
                let with_bias = oracle.iter().zip(bias.iter().cycle());
                let expected: Vec<f64> = with_bias.map(|(y, bias)| f64::from(*y) + f64::from(*bias)).collect();
                let sums = magnitudes(&weights, k, &x);
                for isa in Isa::available() {
                    let what = format!("{} {} [{n}, {k}] m {m}", known.name, isa.name());
                    let matrix = restored(known, (n, k), bytes.clone()).pack(isa);
                    // As two threads take them, and a third one without rows.
                    let first = n.div_ceil(2).next_multiple_of(matrix.row_granule()).min(n);
                    let y = multiply(&*matrix, &x, m, Some(&bias), &[0..first, first..n, n..n]);
                    // Twice, for the oracle rounds too, and once more for the bias.
                    assert_close(&what, &y, &expected, |i| {
                        let bias = f64::from(bias[i % n].abs());
                        2.0 * fp32_bound(k, sums[i], expected[i]) + 2f64.powi(-23) * (expected[i].abs() + bias)
                    });
                    assert_eq!(
                        y,
                        multiply(&*matrix, &x, m, Some(&bias), slice::from_ref(&(0..n))),
                        "{what}: rows split otherwise"
                    );
                    let mut broken = x.clone();
                    broken[k / 2] = f32::NAN;
                    let y = multiply(&*matrix, &broken, m, None, slice::from_ref(&(0..n)));
                    assert!(y[..n].iter().all(|y| y.is_nan()), "{what}: an activation that is no number stays visible");
                }
            }
        }
    }
}

#[test]
fn packed_matrices_give_back_their_bytes_and_values() {
    for known in block_types() {
        for &(n, blocks) in SHAPES {
            let k = blocks * known.block_len;
            let bytes = matrix_bytes(known, (n, k));
            let stored = restored(known, (n, k), bytes.clone());
            assert_eq!(stored.parts()[0].bytes, bytes);
            assert_eq!(format(known).stored_bytes(n, k), bytes.len());
            for isa in Isa::available() {
                let matrix = restored(known, (n, k), bytes.clone()).pack(isa);
                assert_eq!((matrix.format(), matrix.shape()), (known.format, (n, k)));
                assert_eq!((matrix.stored_bytes(), &matrix.unpack().parts()[0].bytes), (bytes.len(), &bytes));
                let rows = n / 3..n;
                let mut values = vec![f32::NAN; rows.len() * k];
                matrix.dequantize_rows(rows.clone(), &mut values);
                assert_eq!(values, stored.dequantize()[rows.start * k..], "{} {}", known.name, isa.name());
                let mut read = Vec::new();
                matrix.memory_of(rows.clone(), &mut |piece| read.extend_from_slice(piece));
                assert_eq!(read, bytes[rows.start * bytes.len() / n..]);
            }
        }
    }
}

#[test]
fn what_is_no_matrix_is_an_error() {
    for known in block_types() {
        let (len, bytes) = (known.block_len, known.block_bytes);
        let format = format(known);
        for (n, k, held) in [
            (0, len, 0),
            (1, 0, 0),
            (1, len, bytes - 1),
            (1, len, bytes + 1),
            (2, len, bytes),
            (usize::MAX, len, bytes),
            (1, usize::MAX / 512 * 256, bytes),
        ] {
            assert!(format.restore(n, k, parts(vec![0; held])).is_err(), "{} [{n}, {k}] of {held} bytes", known.name);
        }
        if len > 1 {
            assert!(format.restore(1, len + 1, parts(vec![0; bytes])).is_err(), "{}", known.name);
        }
        assert!(format.restore(1, len, Vec::new()).is_err(), "{}", known.name);
    }
    for format in STORED_FORMATS.iter().filter(|format| !format.is_made) {
        let weight = HalfMatrix { n: 1, k: 256, data: vec![half::f16::ONE; 256] };
        let error = (format.new)(FormatOptions::default()).quantize(weight).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains(format.name)), "nothing makes {format}");
    }
}

/// The OCP says that this scale is no number; llama.cpp computes one.
#[test]
fn a_scale_of_255_is_refused() {
    let mxfp4 = block_types().find(|known| known.name == "MXFP4").expect("a type of the table");
    let mut bytes = matrix_bytes(mxfp4, (2, 64));
    bytes[3 * mxfp4.block_bytes] = 255;
    let error = format(mxfp4).restore(2, 64, parts(bytes)).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("block 3") && error.contains("255"), "{error}");
}
