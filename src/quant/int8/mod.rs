//! LLM.int8 (Dettmers et al. 2022): int8 weights with one absmax a row, int8 activations with one absmax a token, and
//! columns with outlier activations multiplied in floating point.
//!
//! Activations are cast to fp16 before they are quantized, as bitsandbytes does whatever the model computes in. An entry of
//! at least the threshold makes its column an outlier column for all tokens of the call: its codes are zero, and its part
//! of the sum takes the activations uncast and the dequantized int8 weights.

mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod saved;

use candle_core::{Result, bail};
use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::{
    CpuMatrix, Format, FormatEntry, FormatId, FormatOptions, HalfMatrix, Part, Stored, take_f32_part, take_part,
};
use crate::kernels::isa::Isa;

pub const ID: FormatId = FormatId::of(&ENTRY);

static ENTRY: FormatEntry = FormatEntry {
    aliases: &["8bit", "llm.int8"],
    finds_outliers: true,
    saved: Some(&saved::Int8Saved),
    prefill_bytes,
    ..FormatEntry::plain(
        "int8",
        "LLM.int8: 8-bit weights and activations, outlier columns in floating point",
        |options: FormatOptions| Box::new(Int8 { threshold: options.int8_threshold }),
    )
};

/// What a product of codes is worth under absmax 1, as bitsandbytes' CPU code has it: 1 / 127² with a digit missing, 1.8e-5
/// too large. Its CUDA kernels have the correct 6.200012e-5, and so has the CUDA path here: the difference is enough to move
/// the next layer's codes, so each device computes what bitsandbytes computes there.
const PRODUCT_UNIT: f32 = 6.200_124e-5;
/// 1 / 127, what a weight's code is worth under absmax 1, as bitsandbytes writes it.
const CODE_UNIT: f32 = 0.007_874_016;

/// More columns could overflow the int32 sum of products of up to 127².
const MAX_COLUMNS: usize = (i32::MAX / (127 * 127)) as usize;

/// Codes of the activations and int32 products; from 64 rows on, outlier columns of activations and weights in fp16, of which all may be some.
fn prefill_bytes(m: usize, (n, k): (usize, usize)) -> u64 {
    let plain = (m as u64).saturating_mul((n * size_of::<i32>() + k) as u64);
    let gathered =
        if m < 64 { 0 } else { (m as u64).saturating_add(n as u64).saturating_mul((size_of::<f16>() * k) as u64) };
    plain.saturating_add(gathered)
}

struct Int8 {
    threshold: f32,
}

impl Format for Int8 {
    fn id(&self) -> FormatId {
        ID
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        n * k + n * size_of::<f32>()
    }

    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        weight.check()?;
        let HalfMatrix { n, k, data } = weight;
        check_columns(n, k)?;
        let mut stored = Int8Stored { n, k, threshold: self.threshold, codes: vec![0; n * k], absmax: vec![0.0; n] };
        let mut values = vec![0.0f32; k];
        let rows = data.chunks_exact(k).zip(stored.codes.chunks_exact_mut(k)).zip(&mut stored.absmax);
        for ((row, codes), absmax) in rows {
            row.convert_to_f32_slice(&mut values);
            *absmax = cpu::encode_row(&values, codes);
        }
        Ok(Box::new(stored))
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::cuda::DeviceBytes {
        cuda::device_bytes(n, k)
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, n: usize, k: usize, device: &candle_core::Device) -> Result<Box<dyn super::cuda::CudaEncoder>> {
        cuda::encoder(n, k, self.threshold, device)
    }

    fn restore(&self, n: usize, k: usize, mut parts: Vec<Part>) -> Result<Box<dyn Stored>> {
        check_columns(n, k)?;
        let Some(values) = n.checked_mul(k).filter(|values| *values > 0) else {
            bail!("a matrix of [{n}, {k}] cannot be stored")
        };
        let codes: Vec<i8> = take_part(&mut parts, "", Dtype::I8, values)?.into_iter().map(u8::cast_signed).collect();
        if codes.contains(&i8::MIN) {
            bail!("int8 codes go from -127 to 127; -128 is among those stored");
        }
        let absmax = take_f32_part(&mut parts, "SCB", n)?;
        Ok(Box::new(Int8Stored { n, k, threshold: self.threshold, codes, absmax }))
    }
}

fn check_columns(n: usize, k: usize) -> Result<()> {
    if k > MAX_COLUMNS {
        bail!("int8 sums of [{n}, {k}] would overflow 32 bits; at most {MAX_COLUMNS} columns");
    }
    Ok(())
}

/// The factor that turns values into codes: a reciprocal and a product, two roundings as torch evaluates `127.0 / absmax`.
#[inline(always)]
fn code_scale(absmax: f32) -> f32 {
    (1.0 / absmax) * 127.0
}

/// `value * scale` rounded half to even, for results in −127 … 127; NaN, which a row of zeros gives, becomes 0. The sum
/// with 1.5 · 2²³ has the integer in its low bits, and compilers turn it into vectors on every machine.
#[inline(always)]
fn encode(value: f32, scale: f32) -> i8 {
    const INTEGERS: f32 = 12_582_912.0;
    (value * scale + INTEGERS).to_bits() as i8
}

/// Encodes a row and returns its absmax; what [`cpu::encode_row`] does, compiled for each instruction set.
#[inline(always)]
fn encode_values(values: &[f32], codes: &mut [i8]) -> f32 {
    let absmax = super::absmax(values);
    let scale = code_scale(absmax);
    codes.iter_mut().zip(values).for_each(|(code, value)| *code = encode(*value, scale));
    absmax
}

/// An activation as the format sees it.
fn through_f16(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// Whether a cast activation is beyond fp16 and is no outlier, which takes part uncast. bitsandbytes ends in NaN then; here the token's activations
/// are quantized as they are.
#[inline(always)]
fn exceeds_f16(cast: f32, threshold: f32) -> bool {
    cast.is_infinite() && !is_outlier(cast, threshold)
}

/// A matrix in the bytes that bitsandbytes stores.
#[derive(Debug, Clone, PartialEq)]
struct Int8Stored {
    n: usize,
    k: usize,
    /// Zero: no activation is an outlier.
    threshold: f32,
    /// `[n, k]`, −127 to 127.
    codes: Vec<i8>,
    /// Each row's absmax.
    absmax: Vec<f32>,
}

/// Whether an activation is an outlier; never NaN.
#[inline(always)]
fn is_outlier(value: f32, threshold: f32) -> bool {
    threshold > 0.0 && value.abs() >= threshold
}

impl Int8Stored {
    fn row(&self, row: usize) -> &[i8] {
        &self.codes[row * self.k..][..self.k]
    }

    /// Codes of one token, zero in outlier columns, and its absmax over all entries that are no outliers, whatever their
    /// column.
    fn quantize_token(&self, x: &[f32], outlier_columns: &[usize]) -> (Vec<i8>, f32) {
        let kept = x.iter().filter(|value| !is_outlier(**value, self.threshold));
        // Unlike `f32::max` keeps NaN: a diverged token must stay visible.
        let absmax =
            kept.fold(0.0f32, |max, value| if value.abs() > max || value.is_nan() { value.abs() } else { max });
        let scale = code_scale(absmax);
        let mut codes: Vec<i8> = x.iter().map(|value| encode(*value, scale)).collect();
        outlier_columns.iter().for_each(|&column| codes[column] = 0);
        (codes, absmax)
    }
}

impl Stored for Int8Stored {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn parts(&self) -> Vec<Part> {
        let codes = self.codes.iter().map(|code| code.cast_unsigned()).collect();
        let absmax = self.absmax.iter().flat_map(|value| value.to_le_bytes()).collect();
        vec![
            Part { suffix: "", dtype: Dtype::I8, shape: vec![self.n, self.k], bytes: codes },
            Part { suffix: "SCB", dtype: Dtype::F32, shape: vec![self.n], bytes: absmax },
        ]
    }

    fn dequantize(&self) -> Vec<f32> {
        let rows = self.codes.chunks_exact(self.k).zip(&self.absmax);
        rows.flat_map(|(row, absmax)| row.iter().map(move |code| f32::from(*code) * absmax * CODE_UNIT)).collect()
    }

    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32> {
        assert_eq!(x.len(), m * self.k, "activations of {m} tokens");
        let mut cast: Vec<f32> = x.iter().map(|value| through_f16(*value)).collect();
        for (x, cast) in x.chunks_exact(self.k).zip(cast.chunks_exact_mut(self.k)) {
            if cast.iter().any(|cast| exceeds_f16(*cast, self.threshold)) && x.iter().all(|x| x.is_finite()) {
                cast.copy_from_slice(x);
            }
        }
        let is_outlier_column =
            |column: &usize| cast[*column..].iter().step_by(self.k).any(|v| is_outlier(*v, self.threshold));
        let outlier_columns: Vec<usize> = (0..self.k).filter(is_outlier_column).collect();
        let mut y = Vec::with_capacity(m * self.n);
        for (x, cast) in x.chunks_exact(self.k).zip(cast.chunks_exact(self.k)) {
            let (codes, token_absmax) = self.quantize_token(cast, &outlier_columns);
            for row in 0..self.n {
                let products = self.row(row).iter().zip(&codes).map(|(&w, &x)| i32::from(w) * i32::from(x));
                let dot = products.sum::<i32>() as f32 * (token_absmax * self.absmax[row]) * PRODUCT_UNIT;
                let weight = |column: usize| f32::from(self.row(row)[column]) * self.absmax[row] * CODE_UNIT;
                let outliers: f64 =
                    outlier_columns.iter().map(|&column| f64::from(weight(column)) * f64::from(x[column])).sum();
                y.push(dot + outliers as f32);
            }
        }
        y
    }

    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix> {
        Box::new(cpu::Int8Matrix::new(*self, isa))
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, device: &candle_core::Device) -> Result<Box<dyn super::CudaMatrix>> {
        cuda::upload(self, device)
    }
}
