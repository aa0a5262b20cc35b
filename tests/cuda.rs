//! The CUDA path of every format against its oracle. On a machine without a usable GPU each test prints why it skips.
#![cfg(feature = "cuda")]

mod gpu;
#[path = "shim/products.rs"]
mod products;
mod skips;

use candle_core::{Device, Tensor};
use gpu::gpu;
use half::f16;
use products::{KINDS, Kind, Numbers, SHAPES, activations, check, weight};
use quantbench::kernels::cuda::{device, memory};
use quantbench::quant::cuda::multiply;
use quantbench::quant::{FORMATS, FormatOptions};

/// One row streams the matrix; more go through cuBLAS.
const ROWS: [usize; 7] = [1, 2, 3, 7, 8, 9, 37];

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
    let format = (quantbench::quant::int8::ID.new)(FormatOptions { int8_threshold: 0.0 });
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
    println!("{:?}\n{after:?}", device::probe(0).expect("properties"));
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
