//! Plumbing that knows no format and no model: instruction sets, threads, and the operations between the matrices.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod isa;
/// Needs no CUDA to build: the library is looked for at run time.
#[path = "cuda/nvml.rs"]
pub mod nvml;
