//! Stands in for the CUDA engine in a build without the feature.

use anyhow::Result;

use super::{Loaded, Setup};
use crate::error::BadInput;
use crate::events::Listener;

/// Always fails: this build has no CUDA.
pub fn load(_setup: &Setup, _ordinal: usize, _events: &dyn Listener) -> Result<Loaded> {
    Err(BadInput::new("this build of quantbench has no CUDA support")
        .hint("use `--device cpu`, or build with `--features cuda` (scripts/cuda-toolkit.sh gets the toolkit)")
        .into())
}
