//! Checkpoints in safetensors that were quantized before they were saved, read as stored: single matrices, whole models, and what is none.
//!
//! tests/golden/formats holds what the default run needs; `QUANTBENCH_FORMATS` names a folder of the same layout (`tensors/`, `models/`,
//! `golden/`), which is run instead.

mod golden;
mod hostile;
mod kernels;
mod made;
mod models;
mod tensors;
