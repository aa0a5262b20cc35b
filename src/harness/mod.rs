//! One case → records: workers, protocol, clock, memory, environment, validity, warnings. Never prints.

mod ab;
pub mod assemble;
mod checks;
pub mod clock;
mod control_groups;
mod deadline;
pub mod doctor;
mod dry_run;
pub mod environment;
mod exit_reason;
mod kept;
pub mod load;
mod logits;
pub mod measure;
pub mod memory;
mod modules;
mod parent;
pub mod picture;
mod process;
mod prompt;
pub mod protocol;
mod quality;
mod room;
pub mod schedule;
mod scoring;
pub mod stopping;
mod validity;
pub mod warnings;
pub mod watch;
mod worker;

pub use ab::run_ab;
pub use checks::device;
pub use deadline::Deadline;
pub use dry_run::dry_run;
pub use exit_reason::{Before, exit_reason};
pub use parent::{check, engine_facts, quality, run};
pub use process::{SUBCOMMAND, stderr_tail};
pub use prompt::DEFAULT_TEXT;
pub use quality::{DEFAULT_TOKENS as DEFAULT_QUALITY_TOKENS, QualityChoice};
pub use warnings::LOGITS_NOT_SAVED;
pub use worker::{build, select, worker_main};

use std::path::PathBuf;

use crate::engine::Engine;
use crate::quant::{self, FormatId, FormatOptions};
use crate::weights::policy::Selection;

/// A case: one model on one device with one workload, at several precisions.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Case {
    pub model: crate::weights::Request,
    /// In the order asked.
    pub precisions: Vec<FormatId>,
    pub asked: Asked,
    /// Whose code runs, in the order asked.
    pub engines: Vec<Engine>,
    pub format_options: FormatOptions,
    pub device: DeviceChoice,
    /// 0: physical cores within the cgroup's limit.
    pub threads: usize,
    /// A decode step on CUDA is one graph.
    pub cuda_graph: bool,
    pub prompt: PromptChoice,
    /// The prompt is a message, written as the model's chat template says.
    pub chat: bool,
    /// What a model that sees is shown; `None`: the generated test picture.
    pub image: Option<PathBuf>,
    /// Tokens generated, always exactly this many unless `stop_at_eos`.
    pub n_gen: usize,
    /// Synthetic tokens prefilled untimed before the prompt.
    pub n_depth: usize,
    pub stop_at_eos: bool,
    pub protocol: Protocol,
    /// Where an untimed pass writes its logits, fp32 `[n_gen, vocab]` as tensor `logits`.
    pub save_logits: Option<PathBuf>,
    /// Patterns of linear layers that every precision leaves in fp16.
    pub keep_fp16: Vec<String>,
    /// What quality is measured on, if it is.
    pub quality: Option<QualityChoice>,
    /// As records show it; paths keep their last component.
    pub command: String,
}

/// How the precisions of a case were chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Asked {
    /// By name: a model that was saved in another precision is refused.
    #[default]
    ByName,
    /// By saying nothing or `all`: a model that was saved quantized is measured in its own precision.
    All,
}

/// What one record is about: an engine at a precision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub engine: Engine,
    pub precision: FormatId,
}

impl Row {
    /// Of our own engine.
    pub fn own(precision: FormatId) -> Self {
        Self { engine: Engine::Quantbench, precision }
    }

    /// In labels and file names; our own engine goes without saying.
    pub fn label(&self) -> String {
        match self.engine {
            Engine::Quantbench => self.precision.to_string(),
            other => format!("{}-{}", other.name(), self.precision),
        }
    }
}

impl Case {
    /// Each engine at each precision that it runs, in the order asked.
    pub fn rows(&self) -> Vec<Row> {
        let of = |&engine: &Engine| {
            let precisions = self.precisions.iter().filter(move |precision| engine.runs(**precision));
            precisions.map(move |&precision| Row { engine, precision })
        };
        self.engines.iter().flat_map(of).collect()
    }

    /// What the others are compared with: our own fp16, else any fp16.
    pub fn baseline(&self) -> Option<usize> {
        let rows = self.rows();
        let own = rows.iter().position(|row| *row == Row::own(quant::BASELINE));
        own.or_else(|| rows.iter().position(|row| row.precision == quant::BASELINE))
    }

    /// Which matrices every precision quantizes.
    pub fn selection(&self) -> Selection {
        if self.keep_fp16.is_empty() { Selection::Usual } else { Selection::Without(self.keep_fp16.clone()) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum DeviceChoice {
    /// CUDA device 0 where the build and the machine have one, else the CPU.
    Auto,
    Cpu,
    Cuda(usize),
}

impl From<DeviceChoice> for crate::engine::Device {
    /// What was left open is the CPU.
    fn from(choice: DeviceChoice) -> Self {
        match choice {
            DeviceChoice::Cuda(ordinal) => Self::Cuda(ordinal),
            DeviceChoice::Cpu | DeviceChoice::Auto => Self::Cpu,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PromptChoice {
    /// The default text where there is a tokenizer, else 8 synthetic ids.
    Default,
    Text(String),
    /// So many synthetic ids.
    Synthetic(usize),
    Ids(Vec<u32>),
}

/// How often and how long.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Protocol {
    /// Warm-up runs at full shape and length; `None`: until the last two agree within 5 %, at most 5.
    pub warmup: Option<usize>,
    /// Counted repeats; `None`: adaptive.
    pub repeats: Option<usize>,
    pub min_repeats: usize,
    pub min_time_s: f64,
    pub max_time_s: f64,
    /// Half width of the 95 % interval of the median over the median at which repeating ends.
    pub rel_ci: f64,
    /// What each worker may allocate.
    pub memory_limit_bytes: Option<u64>,
    /// When every worker that still runs is killed.
    #[serde(skip)]
    pub deadline: Option<Deadline>,
    /// Fresh starts of every worker, at least 1; they share the times, and each takes its own repeats.
    pub launches: usize,
    /// After each repeat a run that waits for the device after every token, as the seed did.
    pub sync_each_token: bool,
    pub method: Method,
    /// Every reading of the machine goes into the record.
    pub keep_series: bool,
    /// Take no bandwidth from an earlier run.
    pub measure_bandwidth: bool,
}

/// Whose way of measuring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum Method {
    #[default]
    Quantbench,
    /// One run without a warm-up, its prefill included, that waits for the device after every token.
    Seed,
}

impl Method {
    /// As records have it.
    pub fn name(self) -> &'static str {
        match self {
            Method::Quantbench => "quantbench",
            Method::Seed => "seed",
        }
    }
}

impl Protocol {
    /// One run without warm-up.
    pub fn of_seed() -> Self {
        Self { warmup: Some(0), repeats: Some(1), method: Method::Seed, ..Self::default() }
    }

    /// What one of the launches does: an equal part of the times.
    pub fn of_one_launch(&self) -> Self {
        let n = self.launches.max(1) as f64;
        Self { min_time_s: self.min_time_s / n, max_time_s: self.max_time_s / n, ..self.clone() }
    }
}

impl Default for Protocol {
    fn default() -> Self {
        Self {
            warmup: None,
            repeats: None,
            min_repeats: 6,
            min_time_s: 3.0,
            max_time_s: 20.0,
            rel_ci: 0.02,
            memory_limit_bytes: None,
            deadline: None,
            launches: 1,
            sync_each_token: false,
            method: Method::default(),
            keep_series: false,
            measure_bandwidth: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ordinary case; tests vary what they are about.
    pub fn case() -> Case {
        Case {
            model: crate::weights::Request {
                model_id: "tiny".to_owned(),
                revision: None,
                offline: true,
                weights: crate::weights::WeightsChoice::Random,
                seed: 1,
                outlier_channels: 0,
                strict_config: false,
            },
            precisions: vec![quant::BASELINE],
            asked: Asked::ByName,
            engines: vec![Engine::Quantbench],
            format_options: FormatOptions::default(),
            device: DeviceChoice::Cpu,
            threads: 1,
            cuda_graph: true,
            prompt: PromptChoice::Default,
            chat: false,
            image: None,
            n_gen: 4,
            n_depth: 0,
            stop_at_eos: false,
            protocol: Protocol::default(),
            save_logits: None,
            keep_fp16: Vec::new(),
            quality: None,
            command: "quantbench".to_owned(),
        }
    }
}
