//! fp32: the checkpoint's own values. No precision that can be asked for, but what transformers keeps some layers in
//! whatever the model's dtype is.

use candle_core::Result;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::dense::{DenseFormat, DenseStored};
use super::{Format, FormatEntry, FormatId, FormatOptions, HalfMatrix, Part, Stored};

pub const ID: FormatId = FormatId::of(&ENTRY);

static ENTRY: FormatEntry = FormatEntry {
    is_exact: true,
    // Activations in fp32.
    prefill_bytes: |m, (_, k)| (m as u64).saturating_mul((k * size_of::<f32>()) as u64),
    ..FormatEntry::plain("fp32", "32-bit floating point, for layers that no precision may touch", |_: FormatOptions| {
        Box::new(Fp32)
    })
};

impl DenseFormat for f32 {
    const ID: FormatId = ID;
    const DTYPE: Dtype = Dtype::F32;
}

/// Row-major fp32.
pub type Fp32Stored = DenseStored<f32>;

struct Fp32;

impl Format for Fp32 {
    fn id(&self) -> FormatId {
        ID
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        n * k * size_of::<f32>()
    }

    /// Widens what was cast already; uncast values make a [`Fp32Stored`] themselves.
    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        Ok(Box::new(Fp32Stored::new(weight.n, weight.k, weight.data.to_f32_vec())?))
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::cuda::DeviceBytes {
        super::dense::cuda::device_bytes::<f32>(n, k)
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, n: usize, k: usize, device: &candle_core::Device) -> Result<Box<dyn super::cuda::CudaEncoder>> {
        super::dense::cuda::encoder::<f32>(n, k, device)
    }

    fn restore(&self, n: usize, k: usize, parts: Vec<Part>) -> Result<Box<dyn Stored>> {
        Ok(Box::new(Fp32Stored::restore(n, k, parts)?))
    }
}
