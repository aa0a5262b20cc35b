//! Loading a model into a worker.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::task::Task;
use crate::call::KvFormat;
use crate::engine::check::SelfCheck;
use crate::engine::memory::PoolUse;
use crate::engine::{Device, Engine};
use crate::error::BadInput;
use crate::protocol::{self, Encode, HeldModel, Load};
use crate::quant::{FormatId, FormatOptions};
use crate::weights::ModelRequest;
use crate::weights::policy::Selection;

/// All that one worker of our own needs. The parent has checked it and turned the prompt into ids.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadRequest {
    pub precision: FormatId,
    pub device: Device,
    /// At least 1.
    pub threads: usize,
    pub task: Task,
    /// Most bytes that the worker may allocate.
    pub memory_limit_bytes: Option<u64>,
    pub options: OwnOptions,
}

/// What our own worker alone understands: the `options` of a [`Load`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnOptions {
    pub model: ModelRequest,
    pub engine: Engine,
    pub format_options: FormatOptions,
    /// Rows that the encoder must hold; 0 without one.
    pub encoder_capacity: usize,
    /// What goes into the encoder: a picture is read once.
    pub encode: Encode,
    /// Format of the key/value cache; `None`: the engine's own.
    pub kv_format: Option<KvFormat>,
    pub cuda_graph: bool,
    /// The matrices that are quantized.
    pub selection: Selection,
}

/// The device and the threads that a worker uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceAssignment {
    pub device: Device,
    /// At least 1.
    pub threads: usize,
}

impl LoadRequest {
    /// The request on the wire, without a directory for arrays.
    pub fn wire(&self) -> Result<Load, serde_json::Error> {
        Ok(Load {
            protocol: protocol::VERSION,
            model: self.options.model.model_id.clone(),
            precision: self.precision.to_string(),
            device: self.device.name(),
            threads: self.threads,
            batch: self.task.sequences,
            capacity: self.task.capacity(),
            seed: self.options.model.seed,
            memory_limit_bytes: self.memory_limit_bytes,
            directory: PathBuf::new(),
            options: serde_json::to_value(&self.options)?,
        })
    }
}

/// A [`Load`] as our own worker reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnLoad {
    pub precision: FormatId,
    pub device: Device,
    pub threads: usize,
    pub sequences: usize,
    pub capacity: usize,
    pub memory_limit_bytes: Option<u64>,
    pub options: OwnOptions,
}

impl OwnLoad {
    /// Fails on words and options that no parent of this build writes.
    pub fn of(load: &Load) -> Result<Self> {
        let unknown = |what: &str, word: &str| BadInput::new(format!("this build knows no {what} `{word}`"));
        Ok(Self {
            precision: FormatId::named(&load.precision).ok_or_else(|| unknown("precision", &load.precision))?,
            device: Device::named(&load.device).ok_or_else(|| unknown("device", &load.device))?,
            threads: load.threads,
            sequences: load.batch,
            capacity: load.capacity,
            memory_limit_bytes: load.memory_limit_bytes,
            options: serde_json::from_value(load.options.clone())
                .context("the options of the worker come from another build of quantbench")?,
        })
    }
}

/// Time, kernels and sizes of a load.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoadReport {
    pub load_s: f64,
    pub isa: String,
    /// Version of the engine, as it said; empty for our own.
    pub version: String,
    /// What another engine holds.
    pub held: HeldModel,
    /// Resident set just before, with all that the process imports.
    pub before_bytes: Option<u64>,
    /// Memory of the device just before; `None` on the CPU.
    pub before_device_bytes: Option<u64>,
    /// Highest resident set while loading.
    pub load_peak_bytes: Option<u64>,
    pub own: OwnLoaded,
}

/// What our own worker alone says of a load: the `details` of a [`protocol::LoadReply`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OwnLoaded {
    pub quantize_s: f64,
    pub fp16_overflow: u64,
    /// The same by tensor; empty where there are none.
    pub fp16_overflow_by_tensor: BTreeMap<String, u64>,
    /// Format of the key/value cache.
    pub kv_format: Option<KvFormat>,
    /// `None` where no matrix is quantized.
    pub self_check: Option<SelfCheck>,
    /// Highest resident set up to the end of the load, before the kernels were checked.
    pub load_peak_bytes: Option<u64>,
    /// Use of the device's memory pool at the same moment.
    pub pool: Option<PoolUse>,
    /// Stored bytes of the weights by format.
    pub weights_by_format: BTreeMap<String, u64>,
}
