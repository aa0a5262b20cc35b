//! The part of a record about the machine during a run: memory, energy, and readings.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Bytes. On a CPU: resident set of the worker process; on CUDA: the memory pool's own counters.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    /// After load and warm-up, before prefill.
    pub start_bytes: Option<u64>,
    /// After the run.
    pub end_bytes: Option<u64>,
    /// High-water mark in the run.
    pub peak_bytes: Option<u64>,
    /// High-water mark while loading.
    pub load_peak_bytes: Option<u64>,
    /// High-water marks of an untimed run's prefill and of its decode steps.
    #[serde(default)]
    pub prefill_peak_bytes: Option<u64>,
    #[serde(default)]
    pub decode_peak_bytes: Option<u64>,
    /// In the stored formats, without padding.
    pub weights_bytes: Option<u64>,
    /// The same by format; vectors count as fp16.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights_by_format: BTreeMap<String, u64>,
    /// Bytes of the weights in memory, padding and repacking included.
    #[serde(default)]
    pub weights_resident_bytes: Option<u64>,
    pub kv_cache_bytes: Option<u64>,
    pub scratch_bytes: Option<u64>,
    /// Bytes of `start_bytes` beside weights, cache and scratch: on a CPU the program, its stacks and tables.
    #[serde(default)]
    pub other_bytes: Option<u64>,
    /// CUDA: what the process takes of the device beside its pool: context, kernels, libraries.
    #[serde(default)]
    pub context_bytes: Option<u64>,
    /// CUDA: the most that the process took of the device during the repeats, by NVML.
    #[serde(default)]
    pub device_process_bytes: Option<u64>,
    /// CUDA: the memory pool's counters at the end of each phase: `load`, `warmup`, `prefill`, `decode`, `start`, `run`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
    /// Resident set of the process before it loaded anything: programs and libraries. What lies above it is the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before_load_bytes: Option<u64>,
    /// What the process grew by from just before it loaded to the most in the run: on a CPU of its resident set; on CUDA of its memory of the
    /// device, by NVML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth_bytes: Option<u64>,
    /// Highest resident set of the process from start to end.
    pub process_peak_rss_bytes: Option<u64>,
    /// For a model that did not fit: the estimated bytes of weights, cache, scratch and a GPU's context.
    #[serde(default)]
    pub needed_bytes: Option<u64>,
    /// The most sequences that fit, where the batch was chosen so (`--batch-size max`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_batch: Option<u64>,
    /// For a model that did not fit: the allocation that failed, where known; for one that was not started, `needed_bytes`.
    #[serde(default)]
    pub wanted_bytes: Option<u64>,
    /// For a model that did not fit: the bytes that were free then, where known.
    #[serde(default)]
    pub free_bytes: Option<u64>,
}

/// A CUDA memory pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Pool {
    /// Unused bytes that it keeps; the driver's own choice is 0.
    pub release_threshold_bytes: Option<u64>,
    pub phases: BTreeMap<String, PoolPhase>,
}

/// Bytes at the end of a phase and at most in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PoolPhase {
    pub used_bytes: u64,
    pub used_high_bytes: u64,
    /// Used, and kept for later.
    pub reserved_bytes: u64,
    pub reserved_high_bytes: u64,
}

/// Energy over windows of back-to-back repeats, from a counter that grows with every joule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Energy {
    /// `nvml`: the GPU alone; `rapl`: the processor packages, with all processes on them.
    pub source: String,
    /// Mean power before any worker was started; joules per token are those above it.
    pub idle_watts: Option<f64>,
    /// Kind of the windows of `samples.energy_j`: a counted `repeat`, or a `block` of untimed ones after them where one repeat
    /// is too short for the counter.
    #[serde(default)]
    pub window: String,
    /// Reason why there are no joules per token.
    pub refused: Option<String>,
}

/// One quantity over all readings during the repeats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Range {
    pub min: f64,
    pub median: f64,
    pub max: f64,
    pub n: u64,
}

/// The readings of one repeat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Series {
    /// Since the repeat began.
    pub at_ms: Vec<f64>,
    /// By name, one value a reading; those of cores have their number after a dot. `null` where one could not be read.
    pub values: BTreeMap<String, Vec<Option<f64>>>,
}
