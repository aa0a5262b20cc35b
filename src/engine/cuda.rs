//! The reference executor on a CUDA device: fp16 activations, the formats' device kernels.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use super::load::stream;
use super::reference::{Linear, Reference};
use super::{Loaded, Setup};
use crate::events::Listener;
use crate::kernels::cuda::{open, probe};
use crate::quant::{CudaMatrix, Stored};
use crate::weights::spec::{MatrixSpec, Role};

/// Loads `setup` onto device `ordinal`.
pub fn load(setup: &Setup, ordinal: usize, events: &dyn Listener) -> Result<Loaded> {
    probe(ordinal)?;
    let device = open(ordinal).with_context(|| format!("opening CUDA device {ordinal}"))?;
    let finish = |spec: &MatrixSpec, stored: Box<dyn Stored>| place(spec, stored.as_ref(), &device);
    let streamed = stream(setup, events, &finish)?;
    Reference::loaded(setup, streamed, device, DType::F16, "cuda".to_owned())
}

fn place(spec: &MatrixSpec, stored: &dyn Stored, device: &Device) -> candle_core::Result<Box<dyn Linear>> {
    match spec.role {
        Role::Embedding | Role::Head | Role::Patches | Role::Kept => {
            let bytes = stored.parts().swap_remove(0).bytes;
            let table = Tensor::from_raw_buffer(&bytes, DType::F16, &[spec.n, spec.k], device)?;
            Ok(Box::new(Table(table)))
        }
        Role::Projection | Role::HighPrecision => Ok(Box::new(Kernel(stored.upload(device)?))),
    }
}

/// An fp16 matrix that also serves rows: embeddings and heads.
struct Table(Tensor);

impl Linear for Table {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.0.t()?)
    }

    fn rows(&self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        self.0.index_select(&Tensor::new(tokens, self.0.device())?, 0)
    }

    fn stored_bytes(&self) -> usize {
        2 * self.0.elem_count()
    }
}

/// A matrix behind its format's kernel.
struct Kernel(Box<dyn CudaMatrix>);

impl Linear for Kernel {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.0.multiply(x)
    }

    fn rows(&self, _tokens: &[u32]) -> candle_core::Result<Tensor> {
        candle_core::bail!("a projection serves no rows")
    }

    fn stored_bytes(&self) -> usize {
        self.0.stored_bytes()
    }
}
