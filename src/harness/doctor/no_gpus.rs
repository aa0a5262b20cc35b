//! Stands in for the GPUs in a build without the feature.

use crate::error::BadInput;
use crate::report::doctor::{CudaLibrary, GpuDevice};

/// None: this build does not ask the driver.
pub fn devices() -> Result<Vec<GpuDevice>, BadInput> {
    Ok(Vec::new())
}

/// None: this build opens no CUDA library.
pub fn libraries() -> Vec<CudaLibrary> {
    Vec::new()
}
