//! Stands in for the GPUs in a build without the feature.

use crate::error::BadInput;
use crate::report::doctor::{CudaLibrary, GpuDevice};

/// None: this build does not ask the driver.
pub fn devices() -> Result<Vec<GpuDevice>, BadInput> {
    Ok(Vec::new())
}

/// Fails: this build uses none.
pub fn check(_ordinal: usize) -> Result<(), BadInput> {
    Err(BadInput::new("this build of quantbench has no CUDA support").hint("build with `--features cuda`"))
}

/// None: this build opens no CUDA library.
pub fn libraries() -> Vec<CudaLibrary> {
    Vec::new()
}
