//! `quantbench` measures in one command the trade-offs of precisions for a model on this machine.
//!
//! It loads a model, holds its linear weights in fp16, int8 (LLM.int8) or 4-bit (NF4 with double quantization), runs
//! the generate loop and reports speed, memory and the limit that the hardware sets. ARCHITECTURE.md draws the layers;
//! a module here imports nothing that stands above it in this list, except the leaves `record`, `report`, `stats`,
//! `rng` and `events`, which every layer may use.

// Only `ui` writes to the terminal; tests say why they skip.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

pub mod commands;

pub mod cli;
pub mod ui;

pub mod suite;

pub mod harness;

pub mod engines;

pub mod ipc;
pub mod protocol;

pub mod quality;

pub mod engine;

pub mod lower;

pub mod models;
pub mod plan;

pub mod call;

pub mod weights;

pub mod quant;

pub mod kernels;

pub mod os;

pub mod error;

pub mod events;
pub mod record;
pub mod report;
pub mod rng;
pub mod stats;
