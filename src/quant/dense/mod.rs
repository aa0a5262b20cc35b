//! Matrices of plain floating-point values: what fp16 and fp32 share. The value type is the format.

pub(in crate::quant) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use candle_core::{Result, bail};
use safetensors::Dtype;

use super::{CpuMatrix, FormatId, Part, Stored, take_part};
use crate::kernels::isa::Isa;

pub use cpu::DenseValue;

/// Row-major values.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseStored<T> {
    pub n: usize,
    pub k: usize,
    /// `n * k` values.
    pub data: Vec<T>,
}

impl<T> DenseStored<T> {
    /// Fails where the matrix is empty or its data is not `n * k` values.
    pub fn new(n: usize, k: usize, data: Vec<T>) -> Result<Self> {
        if n == 0 || k == 0 || n.checked_mul(k) != Some(data.len()) {
            bail!("a weight of [{n}, {k}] cannot be made of {} values", data.len());
        }
        Ok(Self { n, k, data })
    }
}

impl<T: DenseValue> DenseStored<T> {
    /// From the one part that [`Stored::parts`] gives.
    pub fn restore(n: usize, k: usize, mut parts: Vec<Part>) -> Result<Self> {
        let bytes = take_part(&mut parts, "", T::DTYPE, n.saturating_mul(k))?;
        Self::new(n, k, bytes.chunks_exact(size_of::<T>()).map(T::of_little_endian).collect())
    }
}

/// A value type that is a format.
pub trait DenseFormat {
    const ID: FormatId;
    const DTYPE: Dtype;
}

impl<T: DenseValue> Stored for DenseStored<T> {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn parts(&self) -> Vec<Part> {
        let bytes = self.data.iter().flat_map(|value| value.little_endian()).collect();
        vec![Part { suffix: "", dtype: T::DTYPE, shape: vec![self.n, self.k], bytes }]
    }

    fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.data.len()];
        T::widen(&self.data, &mut values);
        values
    }

    /// Sums in fp64, rounded once.
    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32> {
        super::multiply_dense(&self.dequantize(), self.shape(), x, m)
    }

    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix> {
        Box::new(cpu::DenseMatrix::new(&self, isa))
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, device: &candle_core::Device) -> Result<Box<dyn super::CudaMatrix>> {
        cuda::upload(self, device)
    }
}
