//! A case: one model on one device with one workload, and the variants of it that are measured.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::measurement_protocol::MeasurementProtocol;
use crate::call::KvFormat;
use crate::engine::Engine;
use crate::engines::{Asked, EngineChoice, EngineProgram, ModelForm, WIDTHS, Width};
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
    pub engines: Vec<EngineChoice>,
    /// What engines other than our own are asked to hold; empty: a format of each width.
    #[serde(default)]
    pub asked: Vec<Asked>,
    /// Set where the model's files bind what engines can run, once it is opened.
    #[serde(default)]
    pub saved: Option<SavedModel>,
    /// Longest time for one answer of another engine.
    #[serde(default = "engine_timeout_s")]
    pub engine_timeout_s: f64,
    pub format_options: FormatOptions,
    pub device: DeviceChoice,
    /// 0: physical cores within the cgroup's limit.
    pub threads: usize,
    /// A decode step on CUDA is one graph.
    pub cuda_graph: bool,
    /// Sequences that a call runs at once.
    pub sequences: usize,
    /// `sequences` is, or is to become, the largest number that fits.
    #[serde(default)]
    pub largest_batch: bool,
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

/// Files of a model of which no other form is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedModel {
    pub form: ModelForm,
    /// What it was quantized into before it was saved: every engine runs it so, or not at all. `None`: plain values.
    pub precision: Option<FormatId>,
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

/// Longest time for one answer of another engine, by default: loading may quantize a large model.
pub fn engine_timeout_s() -> f64 {
    1800.0
}

/// An engine at a precision: one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Variant {
    /// An engine of our own.
    Own { engine: Engine, precision: FormatId },
    /// Another program, with its own name of the format; `width` is unknown for a format of no width that all engines have. Its memory is
    /// estimated as that of our own engine in `like`.
    Other { program: EngineProgram, precision: String, width: Option<Width>, like: FormatId },
}

impl Variant {
    /// `precision` on quantbench's own engine.
    pub fn own(precision: FormatId) -> Self {
        Variant::Own { engine: Engine::Quantbench, precision }
    }

    pub fn engine_name(&self) -> &str {
        match self {
            Variant::Own { engine, .. } => engine.name(),
            Variant::Other { program, .. } => &program.name,
        }
    }

    pub fn precision(&self) -> String {
        match self {
            Variant::Own { precision, .. } => precision.to_string(),
            Variant::Other { precision, .. } => precision.clone(),
        }
    }

    /// The engine of our own.
    pub fn own_engine(&self) -> Option<Engine> {
        match self {
            Variant::Own { engine, .. } => Some(*engine),
            Variant::Other { .. } => None,
        }
    }

    /// The format of our own; for another engine, whose needs are unknown, that of the model's files or the widest one.
    pub fn format(&self) -> FormatId {
        match self {
            Variant::Own { precision, .. } => *precision,
            Variant::Other { like, .. } => *like,
        }
    }

    pub fn width(&self) -> Option<Width> {
        match self {
            Variant::Own { precision, .. } => crate::engines::width_of(precision.name),
            Variant::Other { width, .. } => *width,
        }
    }

    /// True for quantbench's own engine.
    pub fn is_quantbench(&self) -> bool {
        self.own_engine() == Some(Engine::Quantbench)
    }

    /// Name in labels and file names; quantbench's own engine is left out.
    pub fn label(&self) -> String {
        match self.own_engine() {
            Some(Engine::Quantbench) => self.precision(),
            _ => format!("{}-{}", self.engine_name(), self.precision()),
        }
    }
}

impl Case {
    /// Each engine at each precision that it runs, in the order of the command line.
    pub fn variants(&self) -> Vec<Variant> {
        let of = |choice: &EngineChoice| -> Vec<Variant> {
            match choice {
                EngineChoice::Own(engine) => {
                    let precisions = self.precisions.iter().filter(|precision| engine.runs(**precision));
                    precisions.map(|&precision| Variant::Own { engine: *engine, precision }).collect()
                }
                EngineChoice::Other(program) => self.of_program(program).into_iter().flatten().collect(),
            }
        };
        self.engines.iter().flat_map(of).collect()
    }

    /// What a program holds of what is asked for, each format once, or a line that says why not.
    fn of_program(&self, program: &EngineProgram) -> Vec<Result<Variant, String>> {
        if let Some(found) = self.saved.as_ref().and_then(|saved| self.of_saved(program, saved)) {
            return vec![found];
        }
        let every = WIDTHS.map(Asked::Width);
        let asked = if self.asked.is_empty() { &every } else { self.asked.as_slice() };
        let mut all: Vec<Result<Variant, String>> = Vec::new();
        for asked in asked {
            let found = match program.format(asked) {
                Ok((precision, width)) => {
                    Ok(Variant::Other { program: program.clone(), precision, width, like: quant::BASELINE })
                }
                Err(nearest) => Err(not_offered(
                    &program.name,
                    match asked {
                        Asked::Width(width) => width.name(),
                        Asked::Name(name) => name,
                    },
                    nearest,
                )),
            };
            if !all.contains(&found) {
                all.push(found);
            }
        }
        all
    }

    /// How a program runs a model of which no other form is made; `None` where it may be asked for any of its formats.
    fn of_saved(&self, program: &EngineProgram, saved: &SavedModel) -> Option<Result<Variant, String>> {
        let (name, model_id) = (&program.name, &self.model.model_id);
        let takes = program.form().is_none_or(|form| form == saved.form);
        let Some(own) = saved.precision else {
            let line =
                || format!("{name} loads no GGUF file such as `{model_id}`: name the model that it was made from");
            return (!takes).then(|| Err(line()));
        };
        // A file names itself; of a folder an engine must have the format.
        let has = saved.form == ModelForm::Gguf || program.format(&Asked::Name(own.name.to_owned())).is_ok();
        Some(match takes && has {
            true => Ok(Variant::Other {
                program: program.clone(),
                precision: own.to_string(),
                width: crate::engines::width_of(own.name),
                like: own,
            }),
            false => Err(format!(
                "{name} does not load `{model_id}`, which is saved in `{own}`: name the model that it was made from"
            )),
        })
    }

    /// One line for each format that was asked for by name and that an engine does not have, and for each engine that does not load the
    /// model's files.
    pub fn not_offered(&self) -> Vec<String> {
        let of = |choice: &EngineChoice| -> Vec<String> {
            match choice {
                EngineChoice::Other(program) => self.of_program(program).into_iter().filter_map(Result::err).collect(),
                EngineChoice::Own(Engine::Candle) => Vec::new(),
                EngineChoice::Own(Engine::Quantbench) => {
                    let foreign = self.asked.iter().filter_map(|asked| match asked {
                        Asked::Name(name) if FormatId::parse(name).is_none() => Some(name),
                        Asked::Name(_) | Asked::Width(_) => None,
                    });
                    let near = |name: &str| crate::engines::width_of(name).map_or(quant::BASELINE, Width::own);
                    foreign.map(|name| not_offered("quantbench", name, near(name).name)).collect()
                }
            }
        };
        self.engines.iter().flat_map(of).collect()
    }

    pub fn has(&self, engine: Engine) -> bool {
        self.engines.contains(&EngineChoice::Own(engine))
    }

    /// True where a program that is not our own is measured.
    pub fn has_others(&self) -> bool {
        self.engines.iter().any(|choice| matches!(choice, EngineChoice::Other(_)))
    }

    /// Index of the variant that our own are compared with: fp16 on quantbench's own engine, else any fp16 of our own.
    pub fn baseline(&self) -> Option<usize> {
        let variants = self.variants();
        let own = variants.iter().position(|variant| *variant == Variant::own(quant::BASELINE));
        own.or_else(|| {
            let is_fp16 = |variant: &Variant| variant.own_engine().is_some() && variant.format() == quant::BASELINE;
            variants.iter().position(is_fp16)
        })
    }

    /// Index of the variant that one is compared with: our own engines' fp16, or the 16-bit format of the same other engine.
    pub fn baseline_of(&self, at: usize) -> Option<usize> {
        let variants = self.variants();
        match &variants[at] {
            Variant::Own { .. } => self.baseline(),
            Variant::Other { program, .. } => variants.iter().position(|variant| {
                matches!(variant, Variant::Other { program: of, width: Some(Width::Bits16), .. } if of == program)
            }),
        }
    }

    /// Index of quantbench's own variant that another engine's stands beside: of the same format by name, else of the same width.
    pub fn own_beside(&self, at: usize) -> Option<usize> {
        let variants = self.variants();
        let (name, width) = (variants[at].precision(), variants[at].width());
        let own =
            |is: &dyn Fn(&Variant) -> bool| variants.iter().position(|variant| variant.is_quantbench() && is(variant));
        own(&|variant| variant.precision() == name)
            .or_else(|| own(&|variant| width.is_some() && variant.width() == width))
    }

    /// Index of quantbench's variant whose logits those of this one are compared with: the 16-bit one, else the one beside it. `None` for
    /// that variant itself, and where quantbench is not measured.
    pub fn compared_with(&self, at: usize) -> Option<usize> {
        let is_wide = |variant: &Variant| variant.is_quantbench() && variant.width() == Some(Width::Bits16);
        let wide = self.variants().iter().position(is_wide);
        wide.or_else(|| self.own_beside(at)).filter(|reference| *reference != at)
    }

    /// Matrices that every precision quantizes.
    pub fn selection(&self) -> Selection {
        if self.keep_fp16.is_empty() { Selection::Usual } else { Selection::Without(self.keep_fp16.clone()) }
    }
}

fn not_offered(engine: &str, asked: &str, nearest: &str) -> String {
    format!("`{asked}` is not offered by {engine}; nearest: {nearest}")
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
    /// Of each sequence of a batch, at least as many as there are.
    Texts(Vec<String>),
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
            engines: vec![Engine::Quantbench.into()],
            asked: Vec::new(),
            saved: None,
            engine_timeout_s: engine_timeout_s(),
            format_options: FormatOptions::default(),
            device: DeviceChoice::Cpu,
            threads: 1,
            cuda_graph: true,
            sequences: 1,
            largest_batch: false,
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
        let case = Case { precisions, engines: vec![Engine::Candle.into(), Engine::Quantbench.into()], ..case() };
        let labels: Vec<String> = case.variants().iter().map(Variant::label).collect();
        assert_eq!(labels, ["candle-fp16", "nf4", "fp16"]);
        assert_eq!(case.baseline(), Some(2), "fp16 of the own engine");
        assert_eq!(Case { engines: vec![Engine::Candle.into()], ..case.clone() }.baseline(), Some(0));
        assert_eq!(Case { precisions: vec![nf4::ID], ..case }.baseline(), None);
    }

    fn with_engines(words: &[&str], saved: Option<SavedModel>) -> Case {
        let engines = words.iter().map(|word| EngineChoice::parse(word, None).unwrap()).collect();
        Case { engines, saved, ..case() }
    }

    #[test]
    fn files_that_bind_engines_are_run_as_they_are_or_not_at_all() {
        let q4_k_m = FormatId::named("q4_k_m").unwrap();
        let rows = |case: &Case| case.variants().iter().map(Variant::label).collect::<Vec<_>>();
        let words = ["quantbench", "transformers", "llama.cpp", "mine=./mine"];
        let file = |precision| Some(SavedModel { form: ModelForm::Gguf, precision });
        let mixture = Case { precisions: vec![q4_k_m], ..with_engines(&words, file(Some(q4_k_m))) };
        assert_eq!(rows(&mixture), ["q4_k_m", "llama.cpp-q4_k_m", "mine-q4_k_m"]);
        let refused =
            "transformers does not load `tiny`, which is saved in `q4_k_m`: name the model that it was made from";
        assert_eq!(mixture.not_offered(), [refused]);
        assert_eq!(mixture.variants()[1].format(), q4_k_m, "its memory is that of the file");
        assert_eq!(
            (mixture.own_beside(1), mixture.compared_with(1), mixture.compared_with(0)),
            (Some(0), Some(0), None)
        );

        let plain = with_engines(&words, file(None));
        let every = ["fp16", "llama.cpp-f16", "llama.cpp-q8_0", "llama.cpp-q4_0", "mine-fp16", "mine-int8", "mine-nf4"];
        assert_eq!(rows(&plain), every);
        assert!(plain.not_offered()[0].starts_with("transformers loads no GGUF file such as `tiny`"));

        let saved = Some(SavedModel { form: ModelForm::Folder, precision: Some(nf4::ID) });
        let folder = Case { precisions: vec![nf4::ID], ..with_engines(&words, saved) };
        assert_eq!(rows(&folder), ["nf4", "transformers-nf4", "mine-nf4"]);
        assert!(folder.not_offered()[0].starts_with("llama.cpp does not load `tiny`, which is saved in `nf4`"));
    }

    #[test]
    fn other_engines_stand_beside_the_same_format_or_else_the_same_width() {
        let q4_0 = FormatId::named("q4_0").unwrap();
        let asked = [Asked::Width(Width::Bits16), Asked::Width(Width::Bits4), Asked::Name("q4_0".to_owned())];
        let precisions = vec![nf4::ID, q4_0, quant::BASELINE];
        let engines = with_engines(&["quantbench", "llama.cpp", "transformers"], None);
        let case = Case { precisions, asked: asked.to_vec(), ..engines };
        let labels: Vec<String> = case.variants().iter().map(Variant::label).collect();
        let others = ["llama.cpp-f16", "llama.cpp-q4_0", "transformers-fp16", "transformers-nf4"];
        assert_eq!(labels, [&["nf4", "q4_0", "fp16"][..], &others].concat());
        let beside: Vec<_> = (3..7).map(|at| case.own_beside(at)).collect();
        assert_eq!(beside, [Some(2), Some(1), Some(2), Some(0)]);
        // One reference for all where it is measured.
        let reference: Vec<_> = (0..7).map(|at| case.compared_with(at)).collect();
        assert_eq!(reference, [Some(2), Some(2), None, Some(2), Some(2), Some(2), Some(2)]);
        let narrow = Case { precisions: vec![nf4::ID], ..case };
        let reference: Vec<_> = (0..5).map(|at| narrow.compared_with(at)).collect();
        assert_eq!(reference, [None, None, Some(0), None, Some(0)], "each with the one beside it");
    }
}
