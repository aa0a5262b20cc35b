//! `ENGINES`: whose code runs a model, each with its formats by width. quantbench's own engines run in a worker of this program; every
//! other one is a program that speaks the engine protocol.
//!
//! Files here import each other, never this façade.

mod adapters;
mod choice;
mod python;

pub use adapters::{ADAPTERS, Adapter, Asked, ModelForm, Package, WIDTHS, Width, is_format, width_of};
pub use choice::{EngineChoice, EngineProgram, names};
pub use python::{Probe, find_python, probe};
