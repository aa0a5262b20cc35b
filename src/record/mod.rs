//! The record: one JSON object for each precision of a run. Leaf module; every output is made from it.
//!
//! Bytes are bytes, times say their unit in the name, an undefined number is `null`. [`metrics::METRICS`] lists the numbers
//! that tables, gates and reports can name. `docs/record.schema.json` is generated from these types.

mod bound;
pub mod break_even;
mod engines;
pub mod import;
mod machine;
pub mod metrics;
mod quality;
mod summary;
mod unknown;

pub use bound::Bound;
pub use break_even::{BreakEven, BreakEvenFinding};
pub use engines::{Agreement, HeldFormat, OtherEngine, WidthRatio};
pub use machine::{Energy, Memory, Pool, PoolPhase, Range, Series};
pub use quality::{ModuleQuality, Quality};
pub use summary::Summary;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Raised when a key changes its meaning or goes away; new keys do not raise it.
pub const SCHEMA_VERSION: u32 = 1;

/// A whole output file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Document {
    pub schema_version: u32,
    pub records: Vec<Record>,
}

/// The precision that the others are compared with.
pub const BASELINE: &str = "fp16";

/// One precision of one case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    pub status: Status,
    /// Reason why the status is not `ok`.
    pub reason: Option<String>,
    /// Something disturbed the measurement; `warnings` name it.
    #[serde(default)]
    pub tainted: bool,
    pub engine: EngineInfo,
    /// Last component of the file that it was read from, so that a report distinguishes the runs of several files; never in JSON.
    #[serde(skip)]
    pub file: String,
    /// The command that made this record; paths keep their last component.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub command: String,
    /// RFC 3339, UTC.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub timestamp: String,
    pub model: ModelFacts,
    pub weights: WeightFacts,
    /// One name per arithmetic: `fp16`, `int8`, `nf4`, `nf4-nodq`.
    pub precision: String,
    /// Patterns of linear layers that stayed in fp16.
    #[serde(default)]
    pub keep_fp16: Vec<String>,
    /// LLM.int8 only.
    pub int8: Option<Int8Facts>,
    pub device: DeviceFacts,
    pub workload: Workload,
    /// Number and order of the repeats, and the criterion that ended them.
    #[serde(default)]
    pub protocol: Protocol,
    /// Seconds by phase: `resolve`, `load`, `quantize`, `warmup`, `measure`, …
    pub phases: BTreeMap<String, f64>,
    pub samples: Samples,
    /// By METRICS key.
    pub metrics: BTreeMap<String, Summary>,
    pub dtypes: Dtypes,
    /// Speed-up in `decode_tps` over the fp16 record of the same run, from paired repeats; of another engine over its own 16-bit record.
    pub ratio_to_fp16: Option<Ratio>,
    /// Where the precision stops being faster, of a case that was measured with several batches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub break_even: Option<BreakEven>,
    pub memory: Memory,
    pub bandwidth: Bandwidth,
    /// `None` where no counter can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<Energy>,
    /// Ranges of the readings during the repeats, by name; the unit ends the name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub monitor: BTreeMap<String, Range>,
    /// The readings behind `monitor`, one entry a repeat; absent unless asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub series: Vec<Series>,
    pub output: Output,
    /// The kernels against the format's reference on one matrix, before anything was timed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub self_check: Option<SelfCheck>,
    /// Cost of the precision in quality, where it was measured.
    #[serde(default)]
    pub quality: Option<Quality>,
    /// What is known of an engine that is no code of quantbench's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_engine: Option<OtherEngine>,
    /// Logits against those of quantbench's record in the same run, where several engines ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Agreement>,
    pub environment: Environment,
    /// Memory of the card that the user named with `--card`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card_bytes: Option<u64>,
    pub warnings: Vec<String>,
}

impl Record {
    /// True for the precision that others are compared with, on any engine.
    pub fn is_fp16(&self) -> bool {
        self.precision == BASELINE
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    /// It did not fit into memory.
    Oom,
    /// It ran, but its output cannot be right: non-finite logits, a wrong token count.
    Invalid,
    Error,
    Timeout,
}

/// The engine whose code ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EngineInfo {
    pub name: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub version: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub commit: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelFacts {
    /// Hub id, built-in name, or the last component of a folder.
    pub id: String,
    /// Commit on the hub.
    pub revision: Option<String>,
    /// `model_type` of config.json.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub architecture: String,
    #[serde(with = "unknown::count")]
    #[schemars(with = "Option<u64>")]
    pub parameters: u64,
    /// Facts of a mixture of experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertFacts>,
}

/// Experts of each layer that has a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ExpertFacts {
    /// Experts that there are.
    pub total: u64,
    /// Experts that a token is sent through: those whose bytes count as read.
    pub per_token: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WeightFacts {
    /// `hub`, `local` or `random`.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub source: String,
    /// Dtype of the checkpoint, before the cast to fp16.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub dtype: String,
    pub seed: Option<u64>,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub hash: String,
    /// Finite checkpoint values that became infinite in fp16.
    pub fp16_overflow: u64,
    /// The same by tensor, where there are any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fp16_overflow_by_tensor: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Int8Facts {
    pub threshold: f64,
    /// Outlier columns per linear call in decode, on average.
    pub outlier_columns_mean: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceFacts {
    /// `cpu` or `cuda`.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub kind: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Workload {
    /// Tokens of each sequence, as the other lengths are.
    pub n_prompt: u64,
    pub n_gen: u64,
    /// Tokens in the cache before the prompt.
    pub n_depth: u64,
    pub n_image: u64,
    /// Source of the picture for a vision-language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSource>,
    /// Sequences that are generated at once.
    pub batch_size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// The test picture, the same on every machine.
    Generated,
    /// A file of the user's.
    File,
}

/// The way in which repeats were taken.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Protocol {
    /// Runs before the counted ones, at full shape and length.
    pub n_warmup: u64,
    /// Criterion that ended the warm-up: `agreed`, `count`, `cap` or `max_time`.
    pub warmup_ended: String,
    pub n_repeats: u64,
    /// Criterion that ended the repeats: `rel_ci`, `count`, `max_time` or `cap`.
    pub ended: String,
    /// `interleaved` with the other precisions, or `in_turn`.
    pub order: String,
    /// Span of the intervals: `within-run`, one start of the worker, or `between-launches`.
    pub interval: String,
    /// `quantbench`, or `single-cold-run` (`seed` in earlier records): one run without a warm-up, its prefill included.
    #[serde(default)]
    pub method: String,
    /// Repeats that were taken again because the GPU's clock was held down.
    #[serde(default)]
    pub n_discarded: u64,
}

impl Protocol {
    /// One run without a warm-up, its prefill included. Earlier records say `seed`.
    pub fn is_cold_run(&self) -> bool {
        matches!(self.method.as_str(), "single-cold-run" | "seed")
    }
}

/// Raw nanoseconds, one entry per counted repeat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Samples {
    /// The encoder's part of `prefill_ns`, where the model has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub encode_ns: Vec<u64>,
    /// Start of prefill to the first token on the host; an encoder runs first and counts.
    pub prefill_ns: Vec<u64>,
    /// Every decode step of every repeat.
    pub decode_step_ns: Vec<Vec<u64>>,
    /// Start of prefill to the last token on the host.
    pub end_to_end_ns: Vec<u64>,
    /// The first warm-up run, kept apart: end to end.
    pub cold_ns: Option<u64>,
    /// Every warm-up run, the first included: end to end.
    #[serde(default)]
    pub warmup_ns: Vec<u64>,
    /// Repeats of each start of the worker, in order; absent for one start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub launches: Vec<u64>,
    /// Every decode step by the device's own clock, where it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_step_ns: Vec<Vec<u64>>,
    /// Time of each decode step that the host spent outside the engine's call into the model, where an engine tells it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_step_ns: Vec<Vec<u64>>,
    /// Every decode step of a second run after each repeat, which waited for the device after every token; absent unless asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub synced_step_ns: Vec<Vec<u64>>,
    /// Real decode steps of rounds after the repeats, on a CPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alone_step_ns: Vec<u64>,
    /// The same arithmetic on matrices that stay in the cache, in the same rounds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alone_arithmetic_ns: Vec<u64>,
    /// Reads of the same bytes without arithmetic, in the same rounds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alone_memory_ns: Vec<u64>,
    /// The counter's increase over each of its windows, the length of the window, and the tokens generated in it. A window is a
    /// counted repeat, or a block of untimed ones after them (`energy.window`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub energy_j: Vec<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub energy_window_s: Vec<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub energy_tokens: Vec<u64>,
    /// Values of a row from another tool: one a repeat by METRICS key, where its times are not the ones above.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub imported: BTreeMap<String, Vec<f64>>,
}

/// A ratio of paired repeats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ratio {
    pub median: f64,
    pub ci95_low: Option<f64>,
    pub ci95_high: Option<f64>,
    /// False where the two precisions did not alternate.
    pub paired: bool,
    /// Bytes that a decode step reads at fp16 over those that it reads here.
    pub by_bytes: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Dtypes {
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub weights: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub compute: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub kv_cache: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub logits: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Bandwidth {
    /// What a decode step of all sequences reads.
    pub weight_bytes_per_token: Option<u64>,
    /// The same, at the mean depth of the run.
    pub kv_bytes_per_token: Option<u64>,
    /// Read bandwidth of this device.
    pub read_gb_s: Option<f64>,
    pub copy_gb_s: Option<f64>,
    /// Time at which an earlier run on this device measured both; `None` for this run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Bytes of a step over its time.
    pub achieved_gb_s: Option<f64>,
    /// `achieved_gb_s / read_gb_s`.
    pub mbu: Option<f64>,
    /// Operations of the matrix products in a decode step of all sequences, at the mean depth of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops_per_step: Option<u64>,
    /// `flops_per_step` over the time of a step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub achieved_gflop_s: Option<f64>,
    /// fp32 operations a second of a large product of fp16 weights by the engine's own kernel on this device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matmul_gflop_s: Option<f64>,
    /// `achieved_gflop_s / matmul_gflop_s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Two transfers a clock over the width of the memory's bus.
    #[serde(default)]
    pub theoretical_gb_s: Option<f64>,
    /// Reason why `theoretical_gb_s` is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub theoretical_unknown: Option<String>,
    /// Time of the decode steps by the device's own clock over that by the host's.
    #[serde(default)]
    pub device_share: Option<f64>,
    /// On a CPU: reading what a decode step reads, without arithmetic, over the real step. It overlaps with arithmetic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_alone_share: Option<f64>,
    /// On a CPU: the same arithmetic on matrices that stay in the cache, over the real step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arithmetic_alone_share: Option<f64>,
    /// Limit of decoding, as far as it was measured: `memory`, `compute`, `mixed`, `host`, `cache-resident` or `not known`.
    #[serde(default)]
    pub bound: Option<String>,
}

/// A product by the kernels and by the format's plain reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SelfCheck {
    /// Name of the matrix in the model.
    pub matrix: String,
    /// The largest error over what rounding explains: at most 1.
    pub error_share: Option<f64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// Of the first sequence.
    pub token_ids: Vec<u32>,
    /// Of the first sequence.
    pub text: Option<String>,
    /// Of the other sequences of a batch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_token_ids: Vec<Vec<u32>>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Environment {
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub cpu: String,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub isa: String,
    #[serde(with = "unknown::count")]
    #[schemars(with = "Option<u64>")]
    pub threads: u64,
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub os: String,
    /// `release` or `debug`.
    #[serde(with = "unknown::text")]
    #[schemars(with = "Option<String>")]
    pub build_profile: String,
    pub features: Vec<String>,
    pub gpu: Option<String>,
    pub driver: Option<String>,
    pub cuda: Option<String>,
}
