//! CUDA plumbing: what the device is, its memory pool, and how our kernels are loaded and launched.
//!
//! candle owns context, stream, allocations and reference operations; everything here works on its [`CudaDevice`]. Kernels
//! are compiled by `build.rs` into one fatbin per `.cu` and embedded; a launch names its kernel, so an error does too.
//!
//! [`CudaDevice`]: candle_core::CudaDevice

pub mod arena;
pub mod attend;
pub mod attention;
pub mod attributes;
pub mod bandwidth;
pub mod choose;
pub mod cublas;
pub mod device;
pub mod few_rows;
mod functions;
pub mod gemm;
pub mod launch;
pub mod libraries;
pub mod matvec;
pub mod memory;
pub mod norm_add;
pub mod place;
pub mod program;
pub mod route;
pub mod rows;
pub mod shared_input;
pub mod staging;
pub mod step_kernel;
pub mod trace;

pub use device::{open, probe};
