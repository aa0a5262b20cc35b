//! Properties of a run that every record repeats.

use super::measurement_protocol::MeasurementProtocol;
use super::schedule::RunOrder;
use super::warnings::Warning;
use super::watch::energy::Counter;
use crate::quant::FormatOptions;
use crate::record;

/// Properties that all records of a run share.
#[derive(Debug, Clone)]
pub struct RunContext {
    pub engine: record::EngineInfo,
    pub command: String,
    pub timestamp: String,
    pub model: record::ModelFacts,
    /// Without `fp16_overflow`, which each precision has of its own.
    pub weights: record::WeightFacts,
    pub device: record::DeviceFacts,
    /// `n_gen` as on the command line.
    pub workload: record::Workload,
    /// Positions of the decoder's cache before the first decode step.
    pub n_before: u64,
    /// The batch is the largest that fits.
    pub largest_batch: bool,
    /// Operations of the matrix products in a decode step in the middle of a run.
    pub flops_per_step: u64,
    pub environment: record::Environment,
    pub format_options: FormatOptions,
    /// Patterns of linear layers that stay fp16.
    pub keep_fp16: Vec<String>,
    pub protocol: MeasurementProtocol,
    pub order: RunOrder,
    pub resolve_s: f64,
    pub read_gb_s: Option<f64>,
    pub copy_gb_s: Option<f64>,
    /// fp32 operations of a large matrix product, in 1e9 a second.
    pub matmul_gflop_s: Option<f64>,
    /// Time at which an earlier run measured both; `None` for this run.
    pub bandwidth_since: Option<String>,
    /// Bandwidth of the memory by its clock and bus width, or the reason why it is unknown.
    pub theoretical_gb_s: Result<f64, String>,
    pub cache_bytes: Option<u64>,
    /// The energy counter; `None` without one.
    pub counter: Option<Counter>,
    /// Warnings of the machine and the run, for every record.
    pub warnings: Vec<Warning>,
}
