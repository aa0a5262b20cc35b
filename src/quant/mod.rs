//! Formats: how a weight matrix is held, quantized and multiplied.
//!
//! A format is one folder here and one line in [`FORMATS`]. It stores exactly the bytes that bitsandbytes stores (its
//! CPU rules, on every device), keeps a plain safe-Rust reference as the oracle in its `mod.rs`, and has kernels for the
//! CPU (`cpu.rs`) and CUDA (`cuda.rs`) beside it.
//!
//! Dimensions: a weight is `[n, k]` row-major, n outputs and k inputs; activations are `[m, k]`; `y = x · Wᵀ` is `[m, n]`.

pub mod awq;
pub mod bnb4;
pub mod compressed_tensors;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dense;
pub mod fp16;
pub mod fp32;
pub mod fp8;
pub mod ggml;
pub mod gptq;
mod id;
pub mod int8;
pub mod modelopt;
pub mod mxfp4;
pub mod nf4;
pub mod nvfp4;
pub mod saved;
pub mod scaled;
pub mod scheme;
mod words;

#[cfg(feature = "cuda")]
pub use cuda::CudaMatrix;
pub use id::{FormatEntry, FormatId};

use std::ops::Range;
use std::sync::LazyLock;

use candle_core::Result;
use half::f16;

use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// A weight matrix in fp16, row-major: what a checkpoint holds after the cast and before quantization.
#[derive(Debug, Clone, PartialEq)]
pub struct HalfMatrix {
    pub n: usize,
    pub k: usize,
    /// `n * k` values.
    pub data: Vec<f16>,
}

impl HalfMatrix {
    /// Fails where the matrix is empty or its data is not `n * k` values.
    pub fn check(&self) -> Result<()> {
        let Self { n, k, data } = self;
        if *n == 0 || *k == 0 || n.checked_mul(*k) != Some(data.len()) {
            candle_core::bail!("a weight of [{n}, {k}] cannot be made of {} values", data.len());
        }
        Ok(())
    }
}

/// The oracle of the formats that multiply dequantized weights: sums of `x · Wᵀ` in fp64, rounded once. `weights` is
/// `[n, k]`, `x` `[m, k]`, the result `[m, n]`.
fn multiply_dense(weights: &[f32], (n, k): (usize, usize), x: &[f32], m: usize) -> Vec<f32> {
    assert_eq!(x.len(), m * k, "activations of {m} tokens");
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>() as f32;
    let y: Vec<f32> = x.chunks_exact(k).flat_map(|x| weights.chunks_exact(k).map(move |w| dot(x, w))).collect();
    debug_assert_eq!(y.len(), m * n);
    y
}

/// The largest magnitude, NaN where a value is. Compared as integers, which have the same order and, unlike floats, one
/// that compilers may take apart into vectors.
#[inline(always)]
fn absmax(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |max, value| max.max(value.abs().to_bits())))
}

/// How a format is configured; the defaults are bitsandbytes'.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct FormatOptions {
    /// LLM.int8: an activation of at least this magnitude marks its column as an outlier column.
    pub int8_threshold: f32,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self { int8_threshold: 6.0 }
    }
}

/// Counts of LLM.int8's outlier columns since the session began.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct OutlierColumns {
    pub calls: u64,
    pub columns: u64,
    /// Columns of the activations of all calls, outliers or not.
    pub examined: u64,
}

impl std::ops::AddAssign for OutlierColumns {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.columns += other.columns;
        self.examined += other.examined;
    }
}

/// The precisions that every device runs, in the order tables show them.
pub static FORMATS: &[FormatId] = &[fp16::ID, int8::ID, nf4::ID, nf4::NO_DOUBLE_QUANT];

/// Formats that no user asks for: what some layers are held in at every precision.
pub static INTERNAL_FORMATS: &[FormatId] = &[fp32::ID];

/// Formats that files hold, and are read as stored in. Those that are made can be asked for as well.
pub static STORED_FORMATS: LazyLock<Vec<FormatId>> = LazyLock::new(|| {
    let folders = [
        ggml::FORMATS,
        gptq::FORMATS,
        awq::FORMATS,
        fp8::FORMATS,
        compressed_tensors::FORMATS,
        nvfp4::FORMATS,
        bnb4::FORMATS,
    ];
    folders.concat()
});

/// The format of plain values that a checkpoint holds in `dtype`; `None` for others.
pub fn of_plain(dtype: safetensors::Dtype) -> Option<FormatId> {
    ggml::TYPES.iter().find(|known| known.plain == Some(dtype)).map(|known| known.format)
}

/// The format that others are compared with: weights without quantization. Vectors are held in it too.
pub const BASELINE: FormatId = fp16::ID;

/// The format that holds a checkpoint's own values, uncast: the reference of quality, and what some layers are held in at every precision.
pub const EXACT: FormatId = fp32::ID;

/// A matrix of [`EXACT`] from `n * k` row-major values. Fails where there are not as many, and where it is empty.
pub fn exact(n: usize, k: usize, values: Vec<f32>) -> Result<Box<dyn Stored>> {
    Ok(Box::new(fp32::Fp32Stored::new(n, k, values)?))
}

/// Quantizes matrices into one storage format.
pub trait Format: Send + Sync {
    fn id(&self) -> FormatId;

    /// Bytes that an `[n, k]` matrix takes in storage: codes and statistics, no padding.
    fn stored_bytes(&self, n: usize, k: usize) -> usize;

    /// Fails where bitsandbytes cannot hold the matrix either, naming the reason.
    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>>;

    /// What an `[n, k]` matrix takes on a CUDA device.
    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> cuda::DeviceBytes;

    /// Makes an `[n, k]` matrix on a CUDA device. Fails where [`Self::quantize`] does.
    #[cfg(feature = "cuda")]
    fn encoder(&self, n: usize, k: usize, device: &candle_core::Device) -> Result<Box<dyn cuda::CudaEncoder>>;

    /// A matrix from the [`Stored::parts`] that were saved of it, in any order. Fails where they are not this format's, or not
    /// of an `[n, k]` matrix.
    fn restore(&self, n: usize, k: usize, parts: Vec<Part>) -> Result<Box<dyn Stored>>;
}

/// Takes the part `suffix` out of `parts`, in the dtype and of the number of values that a format needs.
fn take_part(parts: &mut Vec<Part>, suffix: &str, dtype: safetensors::Dtype, len: usize) -> Result<Vec<u8>> {
    let found = parts.iter().position(|part| part.suffix == suffix).map(|at| parts.swap_remove(at));
    match found {
        Some(part) if part.dtype == dtype && Some(part.bytes.len()) == len.checked_mul(dtype.bitsize() / 8) => {
            Ok(part.bytes)
        }
        Some(part) => candle_core::bail!(
            "part `{suffix}` is {} of shape {:?}, not {dtype} of {len} values",
            part.dtype,
            part.shape
        ),
        None => candle_core::bail!("part `{suffix}` is absent"),
    }
}

fn take_f32_part(parts: &mut Vec<Part>, suffix: &str, len: usize) -> Result<Vec<f32>> {
    let bytes = take_part(parts, suffix, safetensors::Dtype::F32, len)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// One tensor of a stored matrix under the name that bitsandbytes gives it, relative to the weight: `""` is the weight
/// itself, `"absmax"` is `{weight}.absmax`. Two differ: LLM.int8's `"SCB"` is saved beside the weight, as `{layer}.SCB`,
/// and `"nested_offset"` inside NF4's `quant_state` blob.
pub struct Part {
    pub suffix: &'static str,
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

/// A matrix in the exact bytes that bitsandbytes stores.
pub trait Stored: Send + Sync {
    /// `(n, k)`.
    fn shape(&self) -> (usize, usize);

    /// The stored tensors; their sizes add up to [`Format::stored_bytes`].
    fn parts(&self) -> Vec<Part>;

    /// The values that the multiplication uses, fp32 `[n, k]`.
    fn dequantize(&self) -> Vec<f32>;

    /// The oracle: `y = x · Wᵀ` in plain safe Rust, by the format's own arithmetic. `x` is `[m, k]`, the result `[m, n]`.
    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32>;

    /// Repacks into the layout that the CPU kernels of `isa` stream.
    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix>;

    /// Uploads to a CUDA device.
    #[cfg(feature = "cuda")]
    fn upload(&self, device: &candle_core::Device) -> Result<Box<dyn CudaMatrix>>;
}

/// Activations of one call in the form that a kernel reads.
#[derive(Debug, Clone, Copy)]
pub struct Activations<'a> {
    /// Rows.
    pub m: usize,
    /// Columns.
    pub k: usize,
    /// fp32: `[m, k]`, and for LLM.int8 the outlier columns' `[m, outlier_columns]`.
    pub f32s: &'a [f32],
    /// Codes of LLM.int8, rows padded as the kernel wants.
    pub i8s: &'a [i8],
    /// Per row.
    pub scales: &'a [f32],
    /// LLM.int8's outlier columns of this call, ascending.
    pub outlier_columns: &'a [u32],
    /// Rows of several sequences. A few of them share each weight while it is in a register; those of one sequence keep a prompt's order of
    /// sums, however few they are.
    pub of_batch: bool,
}

impl<'a> Activations<'a> {
    /// Whether a kernel takes all rows for each weight that it has in a register.
    pub fn are_few(&self) -> bool {
        self.of_batch && (2..=cpu::FEW_TOKENS).contains(&self.m)
    }

    /// `x` `[m, k]` as it is.
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn plain(x: &'a [f32], m: usize, k: usize) -> Self {
        assert_eq!(x.len(), m * k, "activations of {m} tokens");
        Self { m, k, f32s: x, i8s: &[], scales: &[], outlier_columns: &[], of_batch: false }
    }
}

/// Memory of activations that were brought into a form of their own, as [`Activations`] has it. It is reused, so that a decode step
/// allocates nothing.
#[derive(Debug, Default)]
pub struct Prepared {
    pub m: usize,
    pub k: usize,
    pub f32s: Vec<f32>,
    pub i8s: Vec<i8>,
    pub scales: Vec<f32>,
    pub outlier_columns: Vec<u32>,
}

impl Prepared {
    /// Keeps `x` `[m, k]` as it is.
    pub fn copy(&mut self, x: &[f32], m: usize, k: usize) {
        assert_eq!(x.len(), m * k, "activations of {m} tokens");
        (self.m, self.k) = (m, k);
        self.f32s.clear();
        self.f32s.extend_from_slice(x);
        self.i8s.clear();
        self.scales.clear();
        self.outlier_columns.clear();
    }

    pub fn view(&self) -> Activations<'_> {
        let Self { m, k, f32s, i8s, scales, outlier_columns } = self;
        Activations { m: *m, k: *k, f32s, i8s, scales, outlier_columns, of_batch: false }
    }

    /// Bytes of the memory that is held.
    pub fn capacity_bytes(&self) -> usize {
        let words = self.f32s.capacity() + self.scales.capacity() + self.outlier_columns.capacity();
        size_of::<f32>() * words + self.i8s.capacity()
    }
}

/// A matrix in the layout that a CPU kernel streams. The stored bytes stay recoverable bit for bit.
pub trait CpuMatrix: Send + Sync {
    /// The format whose arithmetic this is; matrices of one format and k read the same [`Activations`].
    fn format(&self) -> FormatId;

    /// `(n, k)`.
    fn shape(&self) -> (usize, usize);

    /// Bytes of the format, without padding: what a token has to read.
    fn stored_bytes(&self) -> usize;

    /// Bytes that this layout takes in memory.
    fn resident_bytes(&self) -> usize;

    /// The stored form again.
    fn unpack(&self) -> Box<dyn Stored>;

    /// Dequantized rows, fp32 `[rows, k]` into `out`: embedding rows and tests.
    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]);

    /// Whether [`Self::multiply`] reads activations in another form than fp32.
    fn quantizes_activations(&self) -> bool {
        false
    }

    /// Brings `x` `[m, k]` into the kernel's form: into `room` where that is another one. Called by one thread, before [`Self::multiply`] on all.
    fn prepare<'a>(&self, x: &'a [f32], m: usize, room: &'a mut Prepared) -> Activations<'a> {
        let _ = room;
        Activations::plain(x, m, self.shape().1)
    }

    /// Hands out the memory that [`Self::multiply`] reads of `rows` for one token, piece by piece.
    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8]));

    /// Whether `prepare` looks for outlier columns.
    fn finds_outliers(&self) -> bool {
        false
    }

    /// Output rows are handed to threads in multiples of this.
    fn row_granule(&self) -> usize {
        4
    }

    /// `y[.., rows] = x · W[rows, ..]ᵀ + bias[rows]`, where `y` is `[m, n]` and no other thread writes the same columns.
    /// `scratch` belongs to the calling thread and is only ever grown.
    fn multiply(
        &self,
        x: Activations,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        y: &SharedSlice<'_, f32>,
        scratch: &mut Vec<f32>,
    );
}
