//! What the parent and a worker process say to each other: one JSON object a line, [`Ask`] on the worker's standard input,
//! [`Reply`] on its standard output. What later versions added has a default, so that another build's worker is
//! understood.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::load::LoadSpan;
use super::measure::Task;
use super::prompt::Workload;
use super::scoring::{Scored, Scoring};
use super::{Case, DeviceChoice, Row};
use crate::engine::check::SelfCheck;
use crate::engine::memory::{MeasuredBandwidth, PoolUse};
use crate::engine::{Alone, Engine, Footprint, OutlierColumns};
use crate::error::{BadInput, OutOfMemory, Refused};
use crate::events::Event;
use crate::quant::{FormatId, FormatOptions};
use crate::record::Status;
use crate::weights::policy::Selection;

/// All that one worker needs: the parent has checked it and turned the prompt into ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub model: crate::weights::Request,
    pub engine: Engine,
    pub precision: FormatId,
    pub format_options: FormatOptions,
    /// Rows that the encoder must hold; 0 without one.
    pub encoder_capacity: usize,
    /// Never [`DeviceChoice::Auto`].
    pub device: DeviceChoice,
    /// At least 1.
    pub threads: usize,
    pub cuda_graph: bool,
    pub task: Task,
    /// Which matrices are quantized.
    pub selection: Selection,
    /// What the worker may allocate.
    pub memory_limit_bytes: Option<u64>,
    /// Of the untimed pass after the last repeat.
    pub save_logits: Option<std::path::PathBuf>,
}

/// The part of the machine that a worker uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Never [`DeviceChoice::Auto`].
    pub device: DeviceChoice,
    /// At least 1.
    pub threads: usize,
}

impl Job {
    pub fn new(case: &Case, row: &Row, machine: Share, workload: &Workload) -> Self {
        let save_logits = case.save_logits.as_ref();
        let Share { device, threads } = machine;
        let (task, encoder_capacity) = (workload.task.clone(), workload.n_encoder);
        Self {
            // The parent has fetched whatever was missing.
            model: crate::weights::Request { offline: true, ..case.model.clone() },
            engine: row.engine,
            cuda_graph: case.cuda_graph,
            precision: row.precision,
            format_options: case.format_options,
            encoder_capacity,
            device,
            threads,
            task,
            selection: case.selection(),
            memory_limit_bytes: case.protocol.memory_limit_bytes,
            save_logits: save_logits.map(|path| super::logits::path_of(path, &row.label(), case.rows().len())),
        }
    }

    /// Tokens that the decoder's key/value cache must hold.
    pub fn capacity(&self) -> usize {
        self.task.depth.len() + self.task.prompt.len() + self.task.n_gen
    }
}

/// A worker answers each with one [`Reply`] of the same name or with [`Reply::Failed`], after any number of events.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    Load(Box<Job>),
    WarmUp,
    Repeat,
    Finish,
    Score(Box<Scoring>),
    /// Of the CUDA device of this number; nothing is loaded then.
    Bandwidth(usize),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Event(Event),
    Loaded(LoadFacts),
    Warmed(Warmed),
    Sample(Sample),
    Finished(Finished),
    Scored(Scored),
    Bandwidth(MeasuredBandwidth),
    Failed(Failure),
}

/// How the weights came into memory.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadFacts {
    pub load_s: f64,
    pub quantize_s: f64,
    pub fp16_overflow: u64,
    pub isa: String,
    /// Highest resident set while loading.
    pub load_peak_bytes: Option<u64>,
    /// `None` where no matrix is quantized.
    pub self_check: Option<SelfCheck>,
    /// Stored bytes of the weights by format.
    pub weights_by_format: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Warmed {
    /// End to end, in order.
    pub runs_ns: Vec<u64>,
    pub ended: WarmupEnd,
    pub duration_s: f64,
    /// Tokens that each repeat generates: what was asked, or up to the end of the text.
    pub n_gen: usize,
    pub start_bytes: Option<u64>,
    /// Highest resident set up to the end of the warm-up.
    pub warmup_peak_bytes: Option<u64>,
    /// Of an untimed run; `None` where the kernel's mark cannot be reset, or without a warm-up.
    #[serde(default)]
    pub prefill_peak_bytes: Option<u64>,
    #[serde(default)]
    pub decode_peak_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WarmupEnd {
    /// The last two runs agree.
    Agreed,
    /// The user's own number of runs.
    Count,
    /// The most that an adaptive warm-up runs.
    Cap,
    MaxTime,
}

/// One counted repeat.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// The encoder's part of `prefill_ns`; 0 without one.
    pub encode_ns: u64,
    /// From the start to the first token.
    pub prefill_ns: u64,
    pub step_ns: Vec<u64>,
    pub end_to_end_ns: u64,
    /// Each decode step on the device's own clock; empty where it has none.
    pub device_step_ns: Vec<u64>,
    /// Of a run behind this one that waited for the device after every token; empty unless asked for.
    pub synced_step_ns: Vec<u64>,
    pub ids: Vec<u32>,
    pub finite_logits: bool,
    pub load: Option<LoadSpan>,
}

impl Sample {
    /// Generated in it, in the run that waited after every token as well.
    pub fn n_tokens(&self) -> u64 {
        let again = if self.synced_step_ns.is_empty() { 0 } else { self.synced_step_ns.len() + 1 };
        (self.step_ns.len() + 1 + again) as u64
    }

    /// Of both runs, but for the prefill of the one that waited.
    pub fn total_ns(&self) -> u64 {
        self.end_to_end_ns + self.synced_step_ns.iter().sum::<u64>()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    pub end_bytes: Option<u64>,
    pub peak_bytes: Option<u64>,
    /// False where the kernel's high-water mark could not be reset and the peak is the highest value seen between repeats.
    pub peak_is_exact: bool,
    pub footprint: Footprint,
    pub outliers: OutlierColumns,
    /// What the device's pool held at the end of each phase, and at most in it; empty on the CPU.
    #[serde(default)]
    pub pool: BTreeMap<String, PoolUse>,
    #[serde(default)]
    pub release_threshold_bytes: Option<u64>,
    /// Decode steps beside their parts alone; `None` where the engine cannot tell, without a decode step, and where it would take too long.
    #[serde(default)]
    pub alone: Option<Alone>,
    /// Why the logits that were asked for are not in their file.
    #[serde(default)]
    pub logits_problem: Option<String>,
}

impl Finished {
    /// Of two launches: the higher memory, the rounds of both, and what does not differ.
    pub fn highest(self, later: Finished) -> Self {
        Self {
            end_bytes: self.end_bytes.max(later.end_bytes),
            peak_bytes: self.peak_bytes.max(later.peak_bytes),
            peak_is_exact: self.peak_is_exact && later.peak_is_exact,
            logits_problem: self.logits_problem.or(later.logits_problem.clone()),
            pool: highest(self.pool, later.pool),
            alone: match (self.alone, later.alone) {
                (Some(first), Some(later)) => Some(first.and(later)),
                (first, later) => first.or(later),
            },
            ..later
        }
    }
}

fn highest(mut pool: BTreeMap<String, PoolUse>, later: BTreeMap<String, PoolUse>) -> BTreeMap<String, PoolUse> {
    for (phase, later) in later {
        let known = pool.entry(phase).or_default();
        *known = PoolUse {
            used_bytes: known.used_bytes.max(later.used_bytes),
            used_high_bytes: known.used_high_bytes.max(later.used_high_bytes),
            reserved_bytes: known.reserved_bytes.max(later.reserved_bytes),
            reserved_high_bytes: known.reserved_high_bytes.max(later.reserved_high_bytes),
        };
    }
    pool
}

/// Why a worker gives no result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Failure {
    BadInput {
        message: String,
        hint: Option<String>,
    },
    OutOfMemory {
        message: String,
        wanted_bytes: u64,
        free_bytes: u64,
    },
    /// It runs, and what it computes is wrong.
    Invalid {
        message: String,
    },
    /// It was still running when the case had to be over.
    Timeout {
        message: String,
    },
    Error {
        message: String,
    },
}

/// A result that cannot be right, found before anything was measured.
#[derive(Debug)]
pub struct Wrong(pub String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

impl Failure {
    /// Sorts an error by what the parent does about it.
    pub fn of(error: &anyhow::Error) -> Self {
        let message = crate::error::plain_driver_errors(crate::error::without_backtrace(&format!("{error:#}")));
        if error.downcast_ref::<BadInput>().is_some() {
            return Failure::BadInput { message, hint: crate::error::hint(error) };
        }
        if let Some(oom) = error.downcast_ref::<OutOfMemory>() {
            let (wanted_bytes, free_bytes) = (oom.wanted_bytes, oom.free_bytes);
            return Failure::OutOfMemory { message, wanted_bytes, free_bytes };
        }
        if error.downcast_ref::<Wrong>().is_some() {
            return Failure::Invalid { message };
        }
        let refused = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::OutOfMemory;
        // cuBLAS allocates by itself, and its error is no driver's.
        let by_library = message.contains("CUBLAS_STATUS_ALLOC_FAILED");
        let by_system = error.chain().filter_map(|cause| cause.downcast_ref()).any(refused);
        if by_system || by_library || crate::engine::memory::is_out_of_memory(error) {
            let wanted_bytes = error.downcast_ref::<Refused>().map_or(0, |refused| refused.bytes);
            return Failure::OutOfMemory { message, wanted_bytes, free_bytes: 0 };
        }
        Failure::Error { message }
    }

    /// Of the record that tells it.
    pub fn status(&self) -> Status {
        match self {
            Failure::OutOfMemory { .. } => Status::Oom,
            Failure::Invalid { .. } => Status::Invalid,
            Failure::Timeout { .. } => Status::Timeout,
            Failure::BadInput { .. } | Failure::Error { .. } => Status::Error,
        }
    }

    /// The same, said to be of something that the reader did not ask for by name.
    pub fn within(mut self, what: &str) -> Self {
        let (Failure::BadInput { message, .. }
        | Failure::OutOfMemory { message, .. }
        | Failure::Invalid { message }
        | Failure::Timeout { message }
        | Failure::Error { message }) = &mut self;
        *message = format!("{what}: {message}");
        self
    }

    pub fn message(&self) -> &str {
        match self {
            Failure::BadInput { message, .. }
            | Failure::OutOfMemory { message, .. }
            | Failure::Invalid { message }
            | Failure::Timeout { message }
            | Failure::Error { message } => message,
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn errors_are_sorted_through_context() {
        let bad = Err::<(), _>(BadInput::new("no such folder").hint("look again")).context("loading").unwrap_err();
        let bad = Failure::of(&bad);
        assert_eq!(bad.message(), "loading: no such folder");
        assert!(matches!(bad, Failure::BadInput { hint: Some(hint), .. } if hint == "look again"));
        let oom = Err::<(), _>(OutOfMemory { wanted_bytes: 7, free_bytes: 5 }).context("loading").unwrap_err();
        assert!(matches!(Failure::of(&oom), Failure::OutOfMemory { wanted_bytes: 7, free_bytes: 5, .. }));
        let os = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::OutOfMemory)).context("reading");
        assert!(matches!(Failure::of(&os), Failure::OutOfMemory { wanted_bytes: 0, .. }));
        let what = "the attention scores".to_owned();
        let refused = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::OutOfMemory))
            .context(Refused { bytes: 3 << 30, what })
            .context("filling the cache");
        let refused = Failure::of(&refused);
        assert!(refused.message().starts_with("filling the cache: 3.00 GiB for the attention scores could not be"));
        assert!(matches!(refused, Failure::OutOfMemory { wanted_bytes, .. } if wanted_bytes == 3 << 30));
        assert!(matches!(Failure::of(&Wrong("no".into()).into()), Failure::Invalid { .. }));
        let blas = Failure::of(&anyhow::anyhow!("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"));
        assert_eq!(blas.message(), "cuBLAS had too little free memory (CUBLAS_STATUS_ALLOC_FAILED)");
        assert!(matches!(blas, Failure::OutOfMemory { .. }));
        let other = Failure::of(&anyhow::anyhow!("other"));
        assert!(matches!(&other, Failure::Error { .. }));
        assert_eq!(other.within("the reference").message(), "the reference: other");
    }

    #[test]
    fn messages_survive_the_pipe() {
        let reply = Reply::Failed(Failure::Error { message: "two\nlines".to_owned() });
        let line = serde_json::to_string(&reply).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
    }
}
