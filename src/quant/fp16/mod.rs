//! fp16: the weights as the checkpoint cast to fp16 holds them.

use candle_core::Result;
use half::f16;
use safetensors::Dtype;

use super::dense::{DenseFormat, DenseStored};
use super::{Format, FormatEntry, FormatId, FormatOptions, HalfMatrix, Part, Stored};

pub const ID: FormatId = FormatId::of(&ENTRY);

static ENTRY: FormatEntry = FormatEntry {
    aliases: &["f16", "half"],
    ..FormatEntry::plain("fp16", "16-bit floating point, no quantization", |_: FormatOptions| Box::new(Fp16))
};

impl DenseFormat for f16 {
    const ID: FormatId = ID;
    const DTYPE: Dtype = Dtype::F16;
}

/// Row-major fp16.
pub type Fp16Stored = DenseStored<f16>;

struct Fp16;

impl Format for Fp16 {
    fn id(&self) -> FormatId {
        ID
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        n * k * size_of::<f16>()
    }

    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        Ok(Box::new(Fp16Stored::new(weight.n, weight.k, weight.data)?))
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::cuda::DeviceBytes {
        super::dense::cuda::device_bytes::<f16>(n, k)
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, n: usize, k: usize, device: &candle_core::Device) -> Result<Box<dyn super::cuda::CudaEncoder>> {
        super::dense::cuda::encoder::<f16>(n, k, device)
    }

    fn restore(&self, n: usize, k: usize, parts: Vec<Part>) -> Result<Box<dyn Stored>> {
        Ok(Box::new(Fp16Stored::restore(n, k, parts)?))
    }
}
