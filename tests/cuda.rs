//! The CUDA path of every format against its oracle. On a machine without a usable GPU each test prints why it skips.
#![cfg(feature = "cuda")]

mod gpu;

use self::gpu::gpu;
use candle_core::{Device, Tensor};
use half::f16;
use quantbench::kernels::cuda::{device, memory};
use quantbench::quant::cuda::multiply;
use quantbench::quant::{FORMATS, FormatOptions, HalfMatrix, Stored};

/// What is unusual about a case's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Gaussian,
    /// Some activations at and above the LLM.int8 threshold, 6.0 itself among them.
    Outliers,
    /// Stretches and rows of zero weights, and a zero row of activations.
    Zeros,
    /// One weight and one activation far above all others; their product, where they meet, is near fp16's largest value.
    Extremes,
}

const KINDS: [Kind; 4] = [Kind::Gaussian, Kind::Outliers, Kind::Zeros, Kind::Extremes];

/// n × k: whole chunks, blocks across rows, rows that begin in the middle of a byte, short last blocks, many blocks.
const SHAPES: [(usize, usize); 10] =
    [(64, 64), (1, 1), (3, 7), (5, 33), (100, 200), (17, 1001), (256, 512), (66, 2560), (4500, 192), (130, 4096)];
/// One row streams the matrix; more go through cuBLAS.
const ROWS: [usize; 7] = [1, 2, 3, 7, 8, 9, 37];

/// A seeded sequence, the same on every machine (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Near enough to a standard normal: signed, centred, unit variance.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    fn below(&mut self, end: usize) -> usize {
        ((self.uniform() * end as f32) as usize).min(end - 1)
    }
}

fn weight(n: usize, k: usize, kind: Kind, numbers: &mut Numbers) -> HalfMatrix {
    let mut data: Vec<f16> = (0..n * k).map(|_| f16::from_f32(0.05 * numbers.normal())).collect();
    match kind {
        Kind::Gaussian | Kind::Outliers => {}
        Kind::Zeros => {
            let middle = data.len() / 3;
            data.iter_mut().skip(middle).take(200).for_each(|value| *value = f16::ZERO);
            data.chunks_exact_mut(k).step_by(3).for_each(|row| row.fill(f16::ZERO));
        }
        Kind::Extremes => {
            let at = numbers.below(data.len());
            data[at] = f16::from_f32(-240.0);
        }
    }
    HalfMatrix { n, k, data }
}

fn activations(m: usize, k: usize, kind: Kind, numbers: &mut Numbers) -> Vec<f16> {
    let mut x: Vec<f16> = (0..m * k).map(|_| f16::from_f32(0.3 * numbers.normal())).collect();
    match kind {
        Kind::Gaussian => {}
        Kind::Outliers => {
            for value in [6.0, -6.0, 25.0, -11.5, 5.996] {
                let at = numbers.below(x.len());
                x[at] = f16::from_f32(value);
            }
        }
        Kind::Zeros => x[..k].fill(f16::ZERO),
        Kind::Extremes => {
            x.iter_mut().for_each(|value| *value = f16::from_f32(value.to_f32() / 1024.0));
            let at = numbers.below(x.len());
            x[at] = f16::from_f32(250.0);
        }
    }
    x
}

/// How far the device may be from the oracle at one output, from `summed` = Σ|x·w| over what is added in fp32, `rough`
/// = Σ|x·w| over weights that the device rounds to fp16 first, and the value `y` itself. With ε = 2⁻¹¹ for fp16 and k terms in fp32:
/// - a sum in any order, each product at most a few roundings away from the oracle's: (k + 8) · 2⁻²³ · summed, twice
///   the textbook bound, since tensor cores truncate where they align;
/// - rounded weights: ε · rough, and half the smallest subnormal (2⁻²⁵) for each activation they meet;
/// - the result's rounding: ε · |y|. LLM.int8 rounds its regular part before (at most |y| + rough), so ε · (2|y| + rough).
///   That part's unit, 1/127², is bitsandbytes' CUDA one here and its CPU one in the oracle, 2⁻¹⁵ apart at most; its four
///   fp32 roundings are below 1 % of all this.
///
/// Products of two of these are below 1 % of them.
fn allowed(name: &str, k: usize, y: f32, summed: f32, rough: f32, rough_activations: f32) -> f32 {
    let (half, subnormal) = (2f32.powi(-11), 2f32.powi(-25));
    let sum = (k + 8) as f32 * 2f32.powi(-23) * summed;
    let weights = half * rough + subnormal * rough_activations;
    let regular = y.abs() + rough;
    let result = if name == "int8" {
        half * (y.abs() + regular) + 2f32.powi(-15) * regular + 2.0 * subnormal
    } else {
        half * y.abs() + subnormal
    };
    1.01 * (sum + weights + result)
}

/// Columns whose weights the device rounds to fp16 before it multiplies.
fn rough_columns(name: &str, x: &[f32], k: usize) -> Vec<bool> {
    let threshold = FormatOptions::default().int8_threshold;
    let is_rough = |column: usize| match name {
        "int8" => x[column..].iter().step_by(k).any(|value| value.abs() >= threshold),
        // NF4 rounds weights for many rows and its 16 code values for one.
        _ => name != "fp16",
    };
    (0..k).map(is_rough).collect()
}

fn check(name: &str, what: &str, stored: &dyn Stored, x: &[f32], y: &[f32]) {
    let (n, k) = stored.shape();
    let m = x.len() / k;
    let (expected, weight) = (stored.multiply(x, m), stored.dequantize());
    let rough = rough_columns(name, x, k);
    for (at, (y, expected)) in y.iter().zip(&expected).enumerate() {
        let (x, w) = (&x[at / n * k..][..k], &weight[at % n * k..][..k]);
        let magnitudes = x.iter().zip(w).map(|(x, w)| (x * w).abs());
        let magnitude: f32 = magnitudes.clone().sum();
        let rough_magnitude: f32 =
            magnitudes.zip(&rough).map(|(product, rough)| if *rough { product } else { 0.0 }).sum();
        let rough_activations: f32 = x.iter().zip(&rough).map(|(x, rough)| if *rough { x.abs() } else { 0.0 }).sum();
        // LLM.int8 adds only its outlier columns in fp32; the rest is exact in int32.
        let summed = if name == "int8" { rough_magnitude } else { magnitude };
        let allowed = allowed(name, k, *expected, summed, rough_magnitude, rough_activations);
        let off = (y - expected).abs();
        assert!(
            off <= allowed,
            "{name} {what} [{}, {}]: {y} for {expected}, off by {off}, allowed {allowed}",
            at / n,
            at % n
        );
    }
}

fn to_device(x: &[f16], m: usize, k: usize, device: &Device) -> Tensor {
    // A row of NaN before the rows that count: a kernel that ignores the tensor's offset shows, and so does a read outside.
    let mut rows = vec![f16::NAN; k];
    rows.extend_from_slice(x);
    Tensor::from_vec(rows, (m + 1, k), device).and_then(|x| x.narrow(0, 1, m)).expect("upload of activations")
}

fn to_host(y: &Tensor) -> Vec<f32> {
    let values = y.flatten_all().and_then(|y| y.to_vec1::<f16>()).expect("download of a product");
    values.into_iter().map(f16::to_f32).collect()
}

#[test]
fn every_format_multiplies_as_its_oracle() {
    let Some((device, _turn)) = gpu() else { return };
    let mut numbers = Numbers(0x5eed);
    for entry in FORMATS {
        let format = (entry.new)(FormatOptions::default());
        for ((n, k), kind) in SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind))) {
            let stored = format.quantize(weight(n, k, kind, &mut numbers)).expect("quantize");
            let matrix = stored.upload(&device).expect("upload");
            assert_eq!((matrix.shape(), matrix.stored_bytes()), ((n, k), format.stored_bytes(n, k)), "{}", entry.name);
            for m in ROWS {
                let x = activations(m, k, kind, &mut numbers);
                let tensor = to_device(&x, m, k, &device);
                let what = format!("{kind:?} {m}x{k} @ {k}x{n}");
                let y =
                    multiply(matrix.as_ref(), &tensor).unwrap_or_else(|error| panic!("{} {what}: {error}", entry.name));
                assert_eq!(y.dims(), [m, n]);
                let (y, again) = (to_host(&y), to_host(&multiply(matrix.as_ref(), &tensor).expect("the same product")));
                assert_eq!(y, again, "{} {what}: two runs differ", entry.name);
                let x: Vec<f32> = x.into_iter().map(f16::to_f32).collect();
                check(entry.name, &what, stored.as_ref(), &x, &y);
            }
        }
        println!("{}: {} products checked", entry.name, SHAPES.len() * KINDS.len() * ROWS.len());
    }
}

#[test]
fn int8_without_a_threshold_has_no_outlier_columns() {
    let Some((device, _turn)) = gpu() else { return };
    let (n, k, m) = (33, 130, 3);
    let mut numbers = Numbers(7);
    let format =
        (quantbench::quant::find("int8").expect("int8 is a format").new)(FormatOptions { int8_threshold: 0.0 });
    let stored = format.quantize(weight(n, k, Kind::Gaussian, &mut numbers)).expect("quantize");
    let x = activations(m, k, Kind::Outliers, &mut numbers);
    let y = stored
        .upload(&device)
        .and_then(|matrix| multiply(matrix.as_ref(), &to_device(&x, m, k, &device)))
        .expect("multiply");
    let x: Vec<f32> = x.into_iter().map(f16::to_f32).collect();
    for (y, expected) in to_host(&y).iter().zip(stored.multiply(&x, m)) {
        // The two units of 1/127², four fp32 roundings on either side, and one to fp16.
        let allowed = expected.abs() * (2f32.powi(-11) + 2f32.powi(-15) + 2f32.powi(-20)) + 2f32.powi(-24);
        assert!((y - expected).abs() <= allowed, "{y} for {expected}");
    }
}

#[test]
fn a_nan_activation_stays_visible_in_its_row_alone() {
    let Some((device, _turn)) = gpu() else { return };
    let (n, k, m) = (40, 96, 2);
    let mut numbers = Numbers(11);
    for entry in FORMATS {
        let stored = (entry.new)(FormatOptions::default()).quantize(weight(n, k, Kind::Gaussian, &mut numbers));
        let matrix = stored.and_then(|stored| stored.upload(&device)).expect("upload");
        let mut x = activations(m, k, Kind::Gaussian, &mut numbers);
        x[5] = f16::NAN;
        let y = to_host(&multiply(matrix.as_ref(), &to_device(&x, m, k, &device)).expect("multiply"));
        assert!(y[..n].iter().all(|value| value.is_nan()), "{}: NaN vanished", entry.name);
        assert!(y[n..].iter().all(|value| value.is_finite()), "{}: NaN spread", entry.name);
    }
}

#[test]
fn activations_of_another_shape_or_type_are_refused() {
    let Some((device, _turn)) = gpu() else { return };
    let mut numbers = Numbers(13);
    let half = |m, k| Tensor::zeros((m, k), candle_core::DType::F16, &device).expect("zeros");
    let wrong = [half(2, 65), half(65, 2), Tensor::zeros((2, 64), candle_core::DType::F32, &device).expect("zeros")];
    for entry in FORMATS {
        let stored = (entry.new)(FormatOptions::default()).quantize(weight(9, 64, Kind::Gaussian, &mut numbers));
        let matrix = stored.and_then(|stored| stored.upload(&device)).expect("upload");
        for x in &wrong {
            assert!(multiply(matrix.as_ref(), x).is_err(), "{} took {:?} {:?}", entry.name, x.dims(), x.dtype());
        }
    }
}

#[test]
fn the_pool_knows_its_exact_peak() {
    let Some((device, _turn)) = gpu() else { return };
    let cuda = device.as_cuda_device().expect("a CUDA device").clone();
    let bytes = 64 << 20;
    memory::reset_high_marks(&cuda).expect("reset");
    let before = memory::pool_use(&cuda).expect("pool");
    drop(Tensor::zeros(bytes, candle_core::DType::U8, &device).expect("zeros"));
    let after = memory::pool_use(&cuda).expect("pool");
    assert_eq!(after.used_high_bytes, before.used_bytes + bytes as u64, "{before:?} {after:?}");
    assert!(after.reserved_high_bytes >= after.used_high_bytes, "{after:?}");
    memory::release_unused(&cuda).expect("release");
    let (free, total) = memory::free_and_total_bytes(&cuda).expect("free");
    assert!(free <= total && total > 0);
    println!("{:?}\n{after:?}", device::probe(0).expect("facts"));
}

#[test]
fn an_allocation_that_cannot_fit_is_known_as_such() {
    let Some((device, _turn)) = gpu() else { return };
    let cuda = device.as_cuda_device().expect("a CUDA device");
    let (_, total) = memory::free_and_total_bytes(cuda).expect("total");
    let error = Tensor::zeros(2 * total as usize, candle_core::DType::U8, &device).expect_err("twice the device");
    assert!(memory::is_out_of_memory(&error), "{error:?}");
    // The pool has taken what it could get before it gave up, and keeps it: the next process would find a full device.
    let reserved_bytes = || memory::pool_use(cuda).expect("pool").reserved_bytes;
    println!("reserved after the failure: {}", reserved_bytes());
    memory::release_unused(cuda).expect("release");
    assert!(reserved_bytes() < total / 2, "{} of {total} still reserved", reserved_bytes());
}
