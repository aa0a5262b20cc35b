//! Loading a model into a worker.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::task::Task;
use crate::call::KvFormat;
use crate::engine::check::SelfCheck;
use crate::engine::{Device, Engine};
use crate::quant::{FormatId, FormatOptions};
use crate::weights::policy::Selection;

/// All that one worker needs. The parent has checked it and turned the prompt into ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadRequest {
    /// [`super::VERSION`] of the parent; a parent older than this field speaks version 1.
    #[serde(default = "first_version")]
    pub protocol_version: u32,
    pub model: crate::weights::ModelRequest,
    pub engine: Engine,
    pub precision: FormatId,
    pub format_options: FormatOptions,
    /// Rows that the encoder must hold; 0 without one.
    pub encoder_capacity: usize,
    pub device: Device,
    /// At least 1.
    pub threads: usize,
    /// Sequences that a call runs at once; every engine runs one today and refuses others by name.
    #[serde(default = "one_sequence")]
    pub sequences: usize,
    /// Format of the key/value cache; `None`: the engine's own.
    #[serde(default)]
    pub kv_format: Option<KvFormat>,
    pub cuda_graph: bool,
    pub task: Task,
    /// The matrices that are quantized.
    pub selection: Selection,
    /// Most bytes that the worker may allocate.
    pub memory_limit_bytes: Option<u64>,
    /// File for the logits of an untimed pass after the last repeat.
    pub save_logits: Option<PathBuf>,
}

/// The device and the threads that a worker uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceAssignment {
    pub device: Device,
    /// At least 1.
    pub threads: usize,
}

impl LoadRequest {
    /// Tokens that the decoder's key/value cache must hold.
    pub fn capacity(&self) -> usize {
        self.task.depth.len() + self.task.prompt.len() + self.task.n_gen
    }
}

/// Time, kernels and sizes of a load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadReport {
    /// [`super::VERSION`] of the worker; a worker older than this field speaks version 1.
    pub protocol_version: u32,
    pub load_s: f64,
    pub quantize_s: f64,
    pub fp16_overflow: u64,
    /// The same by tensor, those without any left out.
    pub fp16_overflow_by_tensor: BTreeMap<String, u64>,
    pub isa: String,
    /// Format of the key/value cache; `None` from a worker older than this field.
    pub kv_format: Option<KvFormat>,
    /// Highest resident set while loading.
    pub load_peak_bytes: Option<u64>,
    /// `None` where no matrix is quantized.
    pub self_check: Option<SelfCheck>,
    /// Stored bytes of the weights by format.
    pub weights_by_format: BTreeMap<String, u64>,
}

impl Default for LoadReport {
    fn default() -> Self {
        Self {
            protocol_version: first_version(),
            load_s: 0.0,
            quantize_s: 0.0,
            fp16_overflow: 0,
            fp16_overflow_by_tensor: BTreeMap::new(),
            isa: String::new(),
            kv_format: None,
            load_peak_bytes: None,
            self_check: None,
            weights_by_format: BTreeMap::new(),
        }
    }
}

fn first_version() -> u32 {
    1
}

fn one_sequence() -> usize {
    1
}
