//! One case → records: workers, protocol, clock, memory, environment, validity, warnings. Never prints.

pub mod assemble;
pub mod clock;
pub mod environment;
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
pub mod schedule;
mod scoring;
pub mod stopping;
mod validity;
pub mod warnings;
mod worker;

pub use parent::{quality, run, run_ab};
pub use process::SUBCOMMAND;
pub use prompt::DEFAULT_TEXT;
pub use quality::{DEFAULT_TOKENS as DEFAULT_QUALITY_TOKENS, QualityChoice};
pub use worker::worker_main;

use std::path::PathBuf;

use crate::quant::FormatOptions;
use crate::weights::policy::Selection;

/// A case: one model on one device with one workload, at several precisions.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Case {
    pub model: crate::weights::Request,
    /// Canonical names, in the order asked.
    pub precisions: Vec<String>,
    pub asked: Asked,
    pub format_options: FormatOptions,
    pub device: DeviceChoice,
    /// 0: physical cores within the cgroup's limit.
    pub threads: usize,
    pub prompt: PromptChoice,
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

impl Case {
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
}

impl Default for Protocol {
    fn default() -> Self {
        Self { warmup: None, repeats: None, min_repeats: 6, min_time_s: 3.0, max_time_s: 20.0, rel_ci: 0.02 }
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
            },
            precisions: vec!["fp16".to_owned()],
            asked: Asked::ByName,
            format_options: FormatOptions::default(),
            device: DeviceChoice::Cpu,
            threads: 1,
            prompt: PromptChoice::Default,
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
