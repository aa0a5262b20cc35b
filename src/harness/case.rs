//! A case: one model on one device with one workload, and the variants of it that are measured.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::measurement_protocol::MeasurementProtocol;
use crate::call::KvFormat;
use crate::engine::Engine;
use crate::quality::CallPath;
use crate::quality::text::SAMPLE_NAME;
use crate::quant::{self, FormatId, FormatOptions};
use crate::weights::policy::Selection;

/// One model on one device with one workload, at several precisions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub model: crate::weights::ModelRequest,
    /// In the order of the command line.
    pub precisions: Vec<FormatId>,
    pub precision_selection: PrecisionSelection,
    /// In the order of the command line.
    pub engines: Vec<Engine>,
    pub format_options: FormatOptions,
    pub device: DeviceChoice,
    /// 0: physical cores within the cgroup's limit.
    pub threads: usize,
    /// A decode step on CUDA is one graph.
    pub cuda_graph: bool,
    /// Sequences that a call runs at once.
    pub sequences: usize,
    /// Format of the key/value cache; `None`: the engine's own.
    pub kv_format: Option<KvFormat>,
    pub prompt: PromptChoice,
    /// The prompt is a message, written as the model's chat template says.
    pub chat: bool,
    /// Picture for a vision-language model; `None`: the generated test picture.
    pub image: Option<PathBuf>,
    /// Tokens generated, always exactly this many unless `stop_at_eos`.
    pub n_gen: usize,
    /// Nobody asked for this many: fewer are generated where each takes long, so that there are several repeats.
    pub may_shorten: bool,
    /// Synthetic tokens prefilled untimed before the prompt.
    pub n_depth: usize,
    pub stop_at_eos: bool,
    pub protocol: MeasurementProtocol,
    /// What each variant writes is shown while it writes it, in an untimed run before its warm-up.
    pub stream: bool,
    /// File for the logits of an untimed pass, fp32 `[n_gen, vocab]` as tensor `logits`.
    pub save_logits: Option<PathBuf>,
    /// Patterns of linear layers that every precision leaves in fp16.
    pub keep_fp16: Vec<String>,
    /// Measurement of quality; `None`: speed alone.
    pub quality: Option<QualityChoice>,
    /// The command line for records; paths keep their last component.
    pub command: String,
}

/// The way in which the precisions of a case were chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PrecisionSelection {
    /// By name: a model that was saved in another precision is refused.
    #[default]
    ByName,
    /// By default or by `all`: a model that was saved quantized is measured in its own precision.
    All,
}

/// An engine at a precision: one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    pub engine: Engine,
    pub precision: FormatId,
}

impl Variant {
    /// `precision` on quantbench's own engine.
    pub fn own(precision: FormatId) -> Self {
        Self { engine: Engine::Quantbench, precision }
    }

    /// Name in labels and file names; quantbench's own engine is left out.
    pub fn label(&self) -> String {
        match self.engine {
            Engine::Quantbench => self.precision.to_string(),
            other => format!("{}-{}", other.name(), self.precision),
        }
    }
}

impl Case {
    /// Each engine at each precision that it runs, in the order of the command line.
    pub fn variants(&self) -> Vec<Variant> {
        let of = |&engine: &Engine| {
            let precisions = self.precisions.iter().filter(move |precision| engine.runs(**precision));
            precisions.map(move |&precision| Variant { engine, precision })
        };
        self.engines.iter().flat_map(of).collect()
    }

    /// Index of the variant that the others are compared with: fp16 on quantbench's own engine, else any fp16.
    pub fn baseline(&self) -> Option<usize> {
        let variants = self.variants();
        let own = variants.iter().position(|variant| *variant == Variant::own(quant::BASELINE));
        own.or_else(|| variants.iter().position(|variant| variant.precision == quant::BASELINE))
    }

    /// Matrices that every precision quantizes.
    pub fn selection(&self) -> Selection {
        if self.keep_fp16.is_empty() { Selection::Usual } else { Selection::Without(self.keep_fp16.clone()) }
    }
}

/// The device as the user chose it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceChoice {
    /// CUDA device 0 where the build and the machine have one, else the CPU.
    Auto,
    Cpu,
    Cuda(usize),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PromptChoice {
    /// The default text where there is a tokenizer, else 8 synthetic ids.
    Default,
    Text(String),
    /// This many synthetic ids.
    Synthetic(usize),
    Ids(Vec<u32>),
}

/// Tokens of the text for quality, by default.
pub const DEFAULT_QUALITY_TOKENS: usize = 512;

/// The text and the way to measure quality.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityChoice {
    /// Name and content; `None`: the built-in sample.
    pub text: Option<(String, String)>,
    /// Most tokens of the text, at least 2.
    pub n_tokens: usize,
    /// `None`: by precision, [`CallPath::usual`].
    pub path: Option<CallPath>,
    /// Also with one part of the model quantized at a time.
    pub by_module: bool,
}

impl QualityChoice {
    /// For a dry run.
    pub fn describe(&self) -> String {
        let text = self.text.as_ref().map_or(SAMPLE_NAME, |(name, _)| name.as_str());
        format!("at most {} tokens of `{text}`", self.n_tokens)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::quant::nf4;

    /// An ordinary case; tests vary what they are about.
    pub fn case() -> Case {
        Case {
            model: crate::weights::ModelRequest {
                model_id: "tiny".to_owned(),
                revision: None,
                offline: true,
                weights: crate::weights::WeightsChoice::Random,
                seed: 1,
                outlier_channels: 0,
                strict_config: false,
            },
            precisions: vec![quant::BASELINE],
            precision_selection: PrecisionSelection::ByName,
            engines: vec![Engine::Quantbench],
            format_options: FormatOptions::default(),
            device: DeviceChoice::Cpu,
            threads: 1,
            cuda_graph: true,
            sequences: 1,
            kv_format: None,
            prompt: PromptChoice::Default,
            chat: false,
            may_shorten: false,
            image: None,
            n_gen: 4,
            n_depth: 0,
            stop_at_eos: false,
            protocol: MeasurementProtocol::default(),
            stream: false,
            save_logits: None,
            keep_fp16: Vec::new(),
            quality: None,
            command: "quantbench".to_owned(),
        }
    }

    #[test]
    fn variants_are_each_engine_at_each_precision_that_it_runs() {
        let precisions = vec![nf4::ID, quant::BASELINE];
        let case = Case { precisions, engines: vec![Engine::Candle, Engine::Quantbench], ..case() };
        let labels: Vec<String> = case.variants().iter().map(Variant::label).collect();
        assert_eq!(labels, ["candle-fp16", "nf4", "fp16"]);
        assert_eq!(case.baseline(), Some(2), "fp16 of the own engine");
        assert_eq!(Case { engines: vec![Engine::Candle], ..case.clone() }.baseline(), Some(0));
        assert_eq!(Case { precisions: vec![nf4::ID], ..case }.baseline(), None);
    }
}
