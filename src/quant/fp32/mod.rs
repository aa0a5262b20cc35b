//! fp32: the checkpoint's own values. No precision that can be asked for, but what transformers keeps some layers in
//! whatever the model's dtype is.

use candle_core::Result;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::dense::{DenseStored, Name};
use super::{Format, FormatEntry, FormatOptions, HalfMatrix, Part, Stored};

pub const ENTRY: FormatEntry = FormatEntry {
    name: f32::NAME,
    aliases: &[],
    doc: "32-bit floating point, for layers that no precision may touch",
    new: |_: FormatOptions| Box::new(Fp32),
};

impl Name for f32 {
    const NAME: &'static str = "fp32";
    const DTYPE: Dtype = Dtype::F32;
}

/// Row-major fp32.
pub type Fp32Stored = DenseStored<f32>;

struct Fp32;

impl Format for Fp32 {
    fn name(&self) -> &'static str {
        f32::NAME
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
