//! fp16: the weights as the checkpoint cast to fp16 holds them.

mod cpu;

use candle_core::Result;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{CpuMatrix, Format, FormatEntry, FormatOptions, HalfMatrix, Part, Stored};
use crate::kernels::isa::Isa;

pub const ENTRY: FormatEntry = FormatEntry {
    name: NAME,
    aliases: &["f16", "half"],
    doc: "16-bit floating point, no quantization",
    new: |_: FormatOptions| Box::new(Fp16),
};

const NAME: &str = "fp16";

struct Fp16;

impl Format for Fp16 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        n * k * size_of::<f16>()
    }

    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        weight.check()?;
        Ok(Box::new(Fp16Stored { weight }))
    }
}

/// Row-major fp16.
pub struct Fp16Stored {
    weight: HalfMatrix,
}

impl Stored for Fp16Stored {
    fn shape(&self) -> (usize, usize) {
        (self.weight.n, self.weight.k)
    }

    fn parts(&self) -> Vec<Part> {
        vec![Part {
            suffix: "",
            dtype: safetensors::Dtype::F16,
            shape: vec![self.weight.n, self.weight.k],
            bytes: self.weight.data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }]
    }

    fn dequantize(&self) -> Vec<f32> {
        self.weight.data.to_f32_vec()
    }

    /// Sums in fp64, rounded once: the products of fp16 and fp32 values are exact there.
    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32> {
        super::multiply_dense(&self.dequantize(), self.shape(), x, m)
    }

    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix> {
        Box::new(cpu::Fp16Matrix::new(&self.weight, isa))
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, _device: &candle_core::Device) -> Result<Box<dyn super::CudaMatrix>> {
        candle_core::bail!("fp16 has no CUDA kernels yet")
    }
}
