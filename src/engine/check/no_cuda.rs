//! Stands in for the products on a CUDA device in a build without the feature.

use anyhow::{Result, bail};

use super::Call;
use crate::quant::Stored;

/// Always fails: this build has no CUDA.
pub fn multiply(_stored: &dyn Stored, _calls: &[Call], _ordinal: usize) -> Result<Vec<Vec<f32>>> {
    bail!("this build of quantbench has no CUDA support")
}
