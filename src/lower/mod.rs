//! Lowering: plans become what a device runs, made of shapes and addresses alone. No memory is allocated and nothing is
//! launched by itself here, so that the engine on a GPU and the tests on a host run the same code.

#![deny(clippy::wildcard_enum_match_arm)]

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod prompt;
