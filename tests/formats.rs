//! Formats against golden bytes, and kernels of every instruction set against the formats' oracles.

use std::ops::Range;
use std::slice::from_ref;

use half::f16;
use proptest::prelude::*;
use quantbench::kernels::cpu::shared::SharedSlice;
use quantbench::kernels::isa::Isa;
use quantbench::quant::nf4::{BLOCK, CODES};
use quantbench::quant::{
    Activations, CpuMatrix, FORMATS, Format, FormatId, FormatOptions, HalfMatrix, INTERNAL_FORMATS, Part, Prepared,
    Stored, int8,
};
use safetensors::SafeTensors;

/// A file of golden tensors.
struct Golden(Vec<u8>);

impl Golden {
    fn open(name: &str) -> Self {
        let path = format!("{}/tests/golden/quant/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        Golden(std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}")))
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).expect("golden file")
    }

    fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        self.tensors().tensor(name).ok().map(|tensor| tensor.data().to_vec())
    }

    fn f16s(&self, name: &str) -> Option<Vec<f16>> {
        let bytes = self.bytes(name)?;
        Some(bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect())
    }

    fn f32s(&self, name: &str) -> Option<Vec<f32>> {
        Some(self.bytes(name)?.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    fn f64s(&self, name: &str) -> Option<Vec<f64>> {
        Some(self.bytes(name)?.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
    }

    /// All weights of `nf4.safetensors` by name.
    fn weights(&self) -> Vec<(String, HalfMatrix)> {
        let tensors = self.tensors();
        let names = tensors.names().into_iter().filter_map(|name| name.strip_suffix(".weight"));
        let weights = names.map(|name| {
            let shape = tensors.tensor(&format!("{name}.weight")).expect("named above").shape().to_vec();
            let data = self.f16s(&format!("{name}.weight")).expect("named above");
            (name.to_owned(), HalfMatrix { n: shape[0], k: shape[1], data })
        });
        weights.collect()
    }
}

fn format(name: &str) -> Box<dyn Format> {
    (FormatId::named(name).expect("a format of the table").new)(FormatOptions::default())
}

fn part(stored: &dyn Stored, suffix: &str) -> Part {
    stored.parts().into_iter().find(|part| part.suffix == suffix).unwrap_or_else(|| panic!("no part `{suffix}`"))
}

/// xorshift64*, one sequence for each seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / 8_388_608.0 - 1.0
    }

    fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// Signed weights with a row of zeros, a row of ±max, a row of subnormals and a zero block.
fn weight(n: usize, k: usize) -> HalfMatrix {
    let mut random = Random(0x9e37_79b9 + (n * 131 + k) as u64);
    let mut data: Vec<f16> = random.vector(n * k).into_iter().map(|v| f16::from_f32(v * v * v)).collect();
    let mut fill = |row: usize, value: &dyn Fn(usize) -> f16| {
        if row < n {
            (0..k).for_each(|column| data[row * k + column] = value(column));
        }
    };
    fill(1, &|_| f16::ZERO);
    fill(2, &|column| if column % 3 == 0 { f16::MAX } else { f16::MIN });
    fill(3, &|column| f16::from_bits((column % 7) as u16 | if column % 2 == 0 { 0x8000 } else { 0 }));
    if k > 2 * BLOCK {
        data[BLOCK..2 * BLOCK].fill(f16::ZERO);
    }
    HalfMatrix { n, k, data }
}

/// Signed activations below the outlier threshold, or with entries of at least 6 in two columns.
fn activations(m: usize, k: usize, outliers: usize) -> Vec<f32> {
    let mut x: Vec<f32> = Random(77 + (m * k) as u64).vector(m * k).into_iter().map(|v| 5.9 * v).collect();
    for i in 0..outliers.min(k) {
        x[(i * 7 % m) * k + (i * 37 + k / 2) % k] = if i % 2 == 0 { 6.0 } else { -31.5 };
    }
    x
}

#[test]
fn nf4_bytes_equal_the_goldens() {
    let golden = Golden::open("nf4");
    for (name, weight) in golden.weights() {
        let nested = format("nf4").quantize(weight.clone()).unwrap();
        let plain = format("nf4-nodq").quantize(weight).unwrap();
        let expected = |suffix: &str| golden.bytes(&format!("{name}.{suffix}"));
        assert_eq!(Some(part(&*nested, "").bytes), expected("packed"), "{name}");
        assert_eq!(Some(part(&*plain, "").bytes), expected("packed"), "{name}");
        assert_eq!(Some(part(&*plain, "absmax").bytes), expected("absmax"), "{name}");
        assert_eq!(Some(part(&*nested, "absmax").bytes), expected("nested.qabsmax"), "{name}");
        assert_eq!(Some(part(&*nested, "nested_absmax").bytes), expected("nested.absmax"), "{name}");
        assert_eq!(Some(part(&*nested, "nested_offset").bytes), expected("nested.offset"), "{name}");
        for (stored, suffix) in [(&plain, "dequant"), (&nested, "nested.dequant")] {
            if let Some(expected) = golden.f16s(&format!("{name}.{suffix}")) {
                let values: Vec<f16> = stored.dequantize().into_iter().map(f16::from_f32).collect();
                assert_eq!(values, expected, "{name}.{suffix}");
            }
        }
    }
}

#[test]
fn nf4_tables_equal_the_goldens() {
    let golden = Golden::open("nf4");
    assert_eq!(golden.f32s("nf4_code").as_deref(), Some(&CODES[..]));
    assert_eq!(golden.f32s("nested_code").as_deref(), Some(&quantbench::quant::nf4::nested::VALUES[..]));
}

#[test]
fn int8_bytes_equal_the_goldens() {
    let golden = Golden::open("int8");
    for (name, weight) in Golden::open("nf4").weights() {
        let stored = format("int8").quantize(weight).unwrap();
        assert_eq!(Some(part(&*stored, "").bytes), golden.bytes(&format!("{name}.CB")), "{name}");
        assert_eq!(Some(part(&*stored, "SCB").bytes), golden.bytes(&format!("{name}.SCB")), "{name}");
    }
}

/// Sums of magnitudes that the rounding errors of `y = x · Wᵀ` scale with, fp64 `[m, n]`. `x_error` is added to each |x|.
fn magnitudes(weights: &[f32], k: usize, x: &[f32], x_error: f32) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from((x.abs() + x_error) * w.abs())).sum();
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

#[test]
fn oracles_equal_the_golden_layers() {
    let golden = Golden::open("linear");
    let mut layers = 0;
    for (name, weight) in Golden::open("nf4").weights() {
        let Some(bias) = golden.f16s(&format!("{name}.bias")) else { continue };
        for (case, m) in [("m1.plain", 1), ("m1.outliers", 1), ("m6.plain", 6), ("m6.outliers", 6)] {
            let case = format!("{name}.{case}");
            let x: Vec<f32> = golden.f16s(&format!("{case}.x")).expect("a case").iter().map(|x| x.to_f32()).collect();
            let multiply = |stored: &dyn Stored| -> Vec<f32> {
                let y = stored.multiply(&x, m);
                y.iter().zip(bias.iter().cycle()).map(|(y, bias)| y + bias.to_f32()).collect()
            };
            let (n, k) = (weight.n, weight.k);
            // fp32 results: as many roundings as an fp32 sum has, each half an ulp (2^-24) of at most the magnitudes' sum;
            // `+ |bias|` is covered by the last term.
            let fp32 = |sum: f64, y: f64| (k as f64 + 8.0) * 2f64.powi(-24) * sum + 2f64.powi(-23) * y.abs() + 1e-30;

            let nf4 = format("nf4").quantize(weight.clone()).unwrap();
            let y = multiply(&*nf4);
            let sums = magnitudes(&nf4.dequantize(), k, &x, 0.0);
            let expected: Vec<f64> =
                golden.f32s(&format!("{case}.nf4.y_bnb_cpu_f32")).expect("a case").into_iter().map(f64::from).collect();
            assert_close(&format!("{case} nf4 fp32"), &y, &expected, |i| fp32(sums[i], expected[i]));
            // The exact golden rounds each weight to fp16: half an ulp (2^-11), or half the smallest subnormal.
            let expected = golden.f64s(&format!("{case}.nf4.y_exact_f16_weights_f64")).expect("a case");
            let absolute =
                |i: usize| x[i / n * k..][..k].iter().map(|x| f64::from(x.abs())).sum::<f64>() * 2f64.powi(-25);
            assert_close(&format!("{case} nf4 exact"), &y, &expected, |i| {
                2f64.powi(-11) * sums[i] + absolute(i) + fp32(sums[i], expected[i])
            });

            let int8 = format("int8").quantize(weight.clone()).unwrap();
            let y = multiply(&*int8);
            // Quantizing adds at most half a step, absmax / 254, to an activation's magnitude.
            let largest = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let sums = magnitudes(&int8.dequantize(), k, &x, largest / 254.0);
            let expected = golden.f64s(&format!("{case}.int8.y_exact_f64")).expect("a case");
            // The integer part is exact up to six roundings; the outliers' fp64 sum takes one for each weight. The exact values
            // take 1 / 127² for bitsandbytes' 6.200124e-5, which is 1.8e-5 more.
            assert_close(&format!("{case} int8 exact"), &y, &expected, |i| {
                1.81e-5 * sums[i] + 8.0 * 2f64.powi(-24) * sums[i] + fp32(0.0, expected[i])
            });
            let expected: Vec<f64> = golden
                .f32s(&format!("{case}.int8.y_bnb_cpu_f32"))
                .expect("a case")
                .into_iter()
                .map(f64::from)
                .collect();
            assert_close(&format!("{case} int8 fp32"), &y, &expected, |i| fp32(sums[i], expected[i]));
            layers += 1;
        }
    }
    assert!(layers >= 20, "{layers} golden layers");
}

/// Rows in multiples of the granule, in three parts as threads would take them, and what is left for a fourth one: nothing.
fn row_parts(matrix: &dyn CpuMatrix) -> Vec<Range<usize>> {
    let (n, _) = matrix.shape();
    let granules = n.div_ceil(matrix.row_granule());
    let bound = |part: usize| (granules * part / 3 * matrix.row_granule()).min(n);
    (0..3).map(|part| bound(part)..bound(part + 1)).chain(std::iter::once(n..n)).collect()
}

fn multiply(matrix: &dyn CpuMatrix, x: &[f32], m: usize, bias: Option<&[f32]>, parts: &[Range<usize>]) -> Vec<f32> {
    multiply_of(matrix, (x, m, false), bias, parts)
}

/// The same for rows of one sequence or of several (`of_batch`).
fn multiply_of(
    matrix: &dyn CpuMatrix,
    (x, m, of_batch): (&[f32], usize, bool),
    bias: Option<&[f32]>,
    parts: &[Range<usize>],
) -> Vec<f32> {
    let (n, _) = matrix.shape();
    let mut y = vec![f32::NAN; m * n];
    let (mut prepared, mut scratch) = (Prepared::default(), Vec::new());
    let prepared = Activations { of_batch, ..matrix.prepare(x, m, &mut prepared) };
    for rows in parts {
        matrix.multiply(prepared, rows.clone(), bias, &SharedSlice::new(&mut y), &mut scratch);
    }
    y
}

/// `[n, k]`: one and several strips and panels, tails of rows and columns, blocks that cross rows.
const SHAPES: &[(usize, usize)] = &[
    (1, 1),
    (3, 5),
    (1, 64),
    (16, 64),
    (17, 128),
    (33, 100),
    (40, 202),
    (64, 200),
    (100, 320),
    (5, 576),
    (300, 192),
    (48, 257),
    (23, 1024),
    (70, 1537),
];

#[test]
fn kernels_equal_the_oracles() {
    for entry in FORMATS.iter().chain(INTERNAL_FORMATS) {
        let format = (entry.new)(FormatOptions::default());
        for &(n, k) in SHAPES {
            let weight = weight(n, k);
            let stored = format.quantize(weight.clone()).unwrap();
            let weights = stored.dequantize();
            let bias = Random(5).vector(n);
            // Rows of one sequence, and of several, of which up to eight share each weight.
            let one = [(1, 0), (1, 2), (2, 1), (7, 3), (13, 0), (30, 5)].map(|(m, outliers)| (m, outliers, false));
            let several =
                [(2, 1), (3, 0), (4, 2), (5, 0), (6, 1), (7, 3), (8, 0)].map(|(m, outliers)| (m, outliers, true));
            for (m, outliers, of_batch) in one.into_iter().chain(several) {
                let x = activations(m, k, outliers);
                let oracle = stored.multiply(&x, m);
                let expected: Vec<f64> =
                    oracle.iter().zip(bias.iter().cycle()).map(|(y, bias)| f64::from(*y) + f64::from(*bias)).collect();
                // Roundings of an fp32 sum, half an ulp (2^-24) of at most the magnitudes' sum each, on both sides. LLM.int8
                // sums integers: only its outlier columns and a few scales round.
                let (roundings, x_error) = match entry.name {
                    "int8" => (outliers + 8, 6.0 / 254.0),
                    _ => (k + 8, 0.0),
                };
                let sums = magnitudes(&weights, k, &x, x_error);
                for isa in Isa::available() {
                    let of = if of_batch { "sequences" } else { "rows" };
                    let what = format!("{} {} [{n}, {k}] {m} {of}, {outliers} outliers", entry.name, isa.name());
                    let matrix = format.quantize(weight.clone()).unwrap().pack(isa);
                    let parts = row_parts(&*matrix);
                    let rows = (x.as_slice(), m, of_batch);
                    let y = multiply_of(&*matrix, rows, Some(&bias), &parts);
                    assert_close(&what, &y, &expected, |i| {
                        // The sum that the bias joins is at most |y| + |bias|.
                        let bias = f64::from(bias[i % n].abs());
                        roundings as f64 * 2f64.powi(-23) * sums[i] + 2f64.powi(-22) * (expected[i].abs() + bias)
                    });
                    assert_eq!(
                        y,
                        multiply_of(&*matrix, rows, Some(&bias), from_ref(&(0..n))),
                        "{what}: rows split otherwise"
                    );
                    let zero = vec![0.0; n];
                    let unbiased = multiply_of(&*matrix, rows, None, &parts);
                    assert_eq!(unbiased, multiply_of(&*matrix, rows, Some(&zero), &parts), "{what}: zero bias");
                }
            }
        }
    }
}

#[test]
fn packed_matrices_give_back_their_bytes_and_values() {
    for entry in FORMATS.iter().chain(INTERNAL_FORMATS) {
        let format = (entry.new)(FormatOptions::default());
        for &(n, k) in SHAPES {
            let stored = format.quantize(weight(n, k)).unwrap();
            let (values, parts) = (stored.dequantize(), stored.parts());
            assert_eq!(parts.iter().map(|part| part.bytes.len()).sum::<usize>(), format.stored_bytes(n, k));
            for isa in Isa::available() {
                let what = format!("{} {} [{n}, {k}]", entry.name, isa.name());
                let matrix = format.quantize(weight(n, k)).unwrap().pack(isa);
                assert_eq!((matrix.format(), matrix.shape()), (*entry, (n, k)));
                assert_eq!(matrix.stored_bytes(), format.stored_bytes(n, k), "{what}");
                assert!(matrix.resident_bytes() >= matrix.stored_bytes(), "{what}");
                for (part, unpacked) in parts.iter().zip(matrix.unpack().parts()) {
                    let same =
                        (part.suffix, &part.shape, &part.bytes) == (unpacked.suffix, &unpacked.shape, &unpacked.bytes);
                    assert!(same, "{what}: part `{}`", part.suffix);
                }
                let rows = n / 3..n;
                let mut out = vec![f32::NAN; rows.len() * k];
                matrix.dequantize_rows(rows.clone(), &mut out);
                assert_eq!(out, values[rows.start * k..], "{what}");
            }
        }
    }
}

/// LLM.int8's corners, each with what the oracle and every kernel must give.
#[test]
fn int8_corners() {
    // 6.0 counts as an outlier, and so does what fp16 rounds up to it; a threshold of 0 turns outliers off. 1e5 is infinite in fp16.
    for (value, threshold, columns) in
        [(6.0, 6.0, 1), (5.999, 6.0, 1), (5.99, 6.0, 0), (-6.0, 6.0, 1), (99.0, 0.0, 0), (1e5, 6.0, 1), (-1e5, 0.0, 0)]
    {
        let int8 = (int8::ID.new)(FormatOptions { int8_threshold: threshold });
        let k = 96;
        let mut x = activations(1, k, 0);
        x[17] = value;
        for isa in Isa::available() {
            let stored = int8.quantize(weight(20, k)).unwrap();
            let expected = stored.multiply(&x, 1);
            let matrix = stored.pack(isa);
            let mut prepared = Prepared::default();
            let prepared = matrix.prepare(&x, 1, &mut prepared);
            assert_eq!(prepared.outlier_columns.len(), columns, "{value} at {threshold}, {}", isa.name());
            let y = multiply(&*matrix, &x, 1, None, from_ref(&(0..20)));
            for (y, expected) in y.iter().zip(expected) {
                assert!(y.is_finite(), "{value} at {threshold}, {}", isa.name());
                // A handful of fp32 roundings of a dominant term.
                assert!((y - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{y} for {expected}");
            }
        }
    }
}

/// A diverged activation must not be hidden by quantizing it.
#[test]
fn nan_activations_stay_visible() {
    for entry in FORMATS.iter().chain(INTERNAL_FORMATS) {
        let format = (entry.new)(FormatOptions::default());
        for m in [1, 2] {
            for isa in Isa::available() {
                let stored = format.quantize(weight(20, 128)).unwrap();
                let mut x = activations(m, 128, 0);
                x[5] = f32::NAN;
                assert!(stored.multiply(&x, m)[0].is_nan(), "{} oracle", entry.name);
                let y = multiply(&*stored.pack(isa), &x, m, None, from_ref(&(0..20)));
                assert!(y[..20].iter().all(|y| y.is_nan()), "{} {} m {m}", entry.name, isa.name());
            }
        }
    }
}

#[test]
fn empty_and_mismatched_weights_are_errors() {
    for entry in FORMATS.iter().chain(INTERNAL_FORMATS) {
        let format = (entry.new)(FormatOptions::default());
        for (n, k, len) in [(0, 4, 0), (4, 0, 0), (2, 2, 3), (usize::MAX, 2, 2)] {
            let weight = HalfMatrix { n, k, data: vec![f16::ONE; len] };
            assert!(format.quantize(weight).is_err(), "{} [{n}, {k}] of {len} values", entry.name);
        }
    }
}

/// Names and aliases are found, and no word means two formats.
#[test]
fn words_name_one_format() {
    for entry in FORMATS {
        for word in entry.aliases.iter().chain([&entry.name]) {
            assert_eq!(FormatId::parse(word), Some(*entry));
        }
        assert_eq!((entry.new)(FormatOptions::default()).id(), *entry);
    }
}

proptest! {
    /// A weight comes back within half the largest gap of the codes, times its block's absmax, which double quantization
    /// moves by at most half the largest gap of its own codes (0.0141, and 2^-16 from the table's steps) times its scale.
    #[test]
    fn nf4_values_stay_near(values in prop::collection::vec(-100.0f32..100.0, 1..700), exponent in -8i32..1) {
        let data: Vec<f16> = values.iter().map(|value| f16::from_f32(value * 2f32.powi(exponent))).collect();
        let largest_gap = CODES.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
        for name in ["nf4", "nf4-nodq"] {
            let weight = HalfMatrix { n: 1, k: data.len(), data: data.clone() };
            let stored = format(name).quantize(weight).unwrap();
            let nested_error = match name {
                "nf4" => {
                    let scales = part(&*stored, "nested_absmax").bytes;
                    let largest = scales.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).fold(0.0, f32::max);
                    largest * (0.0141 / 2.0 + 2f32.powi(-16))
                }
                _ => 0.0,
            };
            for (block, values) in data.chunks(BLOCK).zip(stored.dequantize().chunks(BLOCK)) {
                let absmax = block.iter().fold(0.0f32, |max, w| max.max(w.to_f32().abs()));
                for (weight, value) in block.iter().zip(values) {
                    let error = (weight.to_f32() - value).abs();
                    // 2^-20: the few roundings of scaling to the block and back.
                    let bound = absmax * (largest_gap / 2.0 + 2f32.powi(-20)) + nested_error;
                    prop_assert!(error <= bound, "{name}: {weight} became {value}, absmax {absmax}");
                }
            }
        }
    }

    /// Half a step of the row's absmax, and the few roundings of scaling there and back.
    #[test]
    fn int8_values_stay_near(values in prop::collection::vec(-100.0f32..100.0, 1..300)) {
        let data: Vec<f16> = values.iter().map(|value| f16::from_f32(*value)).collect();
        let absmax = data.iter().fold(0.0f32, |max, w| max.max(w.to_f32().abs()));
        let stored = format("int8").quantize(HalfMatrix { n: 1, k: data.len(), data: data.clone() }).unwrap();
        for (weight, value) in data.iter().zip(stored.dequantize()) {
            prop_assert!((weight.to_f32() - value).abs() <= absmax * (1.0 / 254.0 + 2f32.powi(-20)));
        }
    }
}
