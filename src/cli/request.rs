//! What the command line means: every word looked up, every number in range, every file read. No model is touched.

use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::words::{Takes, ids, unknown_precision};
use super::{
    DEFAULT_CUDA_MODEL_ID, DEFAULT_MODEL_ID, DeviceArgs, ModelArgs, OutputArgs, PathWord, PrecisionArgs, PromptArgs,
    QualityArgs, RunArgs, TextArgs, WeightsWord,
};
use crate::engine::{Device, ENGINES, Engine};
use crate::error::BadInput;
use crate::harness::{
    self, Case, DEFAULT_QUALITY_TOKENS, DeviceChoice, MeasurementProtocol, PrecisionSelection, PromptChoice,
    QualityChoice,
};
use crate::quality::CallPath;
use crate::quant::{FORMATS, FormatId, FormatOptions};
use crate::report::{self, Writer};
use crate::weights::{self, WeightsChoice};

/// A run as it will happen.
pub struct Request {
    pub case: Case,
    /// What goes to stdout.
    pub stdout: &'static Writer,
    /// What goes to a file besides.
    pub file: Option<(PathBuf, &'static Writer)>,
    pub options: report::Options,
    pub quiet: bool,
    /// No model, precision, comparison or output was named: the reader is new here, so the table ends with what comes next.
    pub is_first_look: bool,
    /// A precision that does not fit is no failure.
    pub allow_oom: bool,
}

impl Request {
    /// Fails with [`BadInput`] on an unknown word, a number out of range, an unreadable prompt file or an output that
    /// cannot be written. `command` is what records show.
    pub fn new(args: &RunArgs, command: String) -> Result<Self> {
        let wants_quality = args.quality || args.text.is_given();
        let case = Case {
            image: args.picture.image.clone(),
            n_gen: positive("--max-new-tokens", args.max_new_tokens)?,
            n_depth: args.depth,
            stop_at_eos: args.stop_at_eos,
            protocol: args.method.protocol(protocol(args)?)?,
            save_logits: args.save_logits.clone(),
            engines: engines(args)?,
            quality: if wants_quality { Some(quality(&args.text)?) } else { None },
            ..case(&args.model, &args.precision, &args.prompt, &args.device, command)?
        };
        case.save_logits.as_deref().map(report::check_writable).transpose()?;
        let (is_first_look, allow_oom) = (is_first_look(args), args.method.allow_oom);
        Ok(Self { is_first_look, allow_oom, ..Self::with(case, &args.output)? })
    }

    /// The same for `quantbench quality`: nothing is generated but a short text that shows where precisions part.
    pub fn for_quality(args: &QualityArgs, command: String) -> Result<Self> {
        let case = case(&args.model, &args.precision, &args.prompt, &args.device, command)?;
        let (image, text) = (args.picture.image.clone(), quality(&args.text)?);
        let quality = Some(QualityChoice { by_module: args.by_module, ..text });
        Self::with(Case { image, quality, ..case }, &args.output)
    }

    fn with(case: Case, output: &OutputArgs) -> Result<Self> {
        Ok(Self {
            stdout: writer(output.format.as_deref())?,
            file: output.output.as_deref().map(output_file).transpose()?,
            options: report::Options { wide: output.wide, card_bytes: output.card },
            quiet: output.quiet,
            is_first_look: false,
            allow_oom: false,
            case,
        })
    }
}

/// What every command that loads a model says; one token is generated and nothing else is asked for.
fn case(
    model_args: &ModelArgs,
    precision: &PrecisionArgs,
    prompt_args: &PromptArgs,
    device_args: &DeviceArgs,
    command: String,
) -> Result<Case> {
    let device = device(&device_args.device)?;
    Ok(Case {
        model: model(model_args, device),
        precisions: precisions(&precision.precision, precision.no_double_quant)?,
        engines: vec![Engine::Quantbench],
        precision_selection: precision_selection(&precision.precision, precision.no_double_quant),
        format_options: FormatOptions { int8_threshold: not_negative("--int8-threshold", precision.int8_threshold)? },
        device,
        cuda_graph: !device_args.no_cuda_graph,
        threads: device_args.threads.map(threads).transpose()?.unwrap_or(0),
        prompt: prompt(prompt_args)?,
        keep_fp16: precision.keep_fp16.iter().map(|pattern| pattern.trim().to_owned()).collect(),
        image: None,
        n_gen: 1,
        n_depth: 0,
        stop_at_eos: false,
        protocol: MeasurementProtocol::default(),
        save_logits: None,
        quality: None,
        command,
    })
}

/// In the order asked, each once.
fn engines(args: &RunArgs) -> Result<Vec<Engine>, BadInput> {
    let mut engines: Vec<Engine> = Vec::new();
    for engine in args.engine.iter().flat_map(|word| ENGINES.iter().filter(move |engine| engine.name() == word)) {
        if !engines.contains(engine) {
            engines.push(*engine);
        }
    }
    if engines.contains(&Engine::Candle) && (args.quality || args.text.is_given()) {
        return Err(BadInput::new(
            "`--engine candle` measures speed alone: quality is that of quantbench's own precisions",
        )
        .hint("drop `--engine candle`, or the options of quality"));
    }
    Ok(engines)
}

impl TextArgs {
    fn is_given(&self) -> bool {
        self.quality_text.is_some() || self.quality_tokens.is_some() || self.quality_path.is_some()
    }
}

fn quality(args: &TextArgs) -> Result<QualityChoice> {
    let n_tokens = args.quality_tokens.unwrap_or(DEFAULT_QUALITY_TOKENS);
    if n_tokens < 2 {
        let message =
            format!("`--quality-tokens {n_tokens}`: at least 2 are needed, since the first token is predicted by none");
        return Err(BadInput::new(message).into());
    }
    let path = args.quality_path.map(|word| match word {
        PathWord::Prefill => CallPath::Prefill,
        PathWord::Decode => CallPath::Decode,
    });
    Ok(QualityChoice {
        text: args.quality_text.as_deref().map(text_file).transpose()?,
        n_tokens,
        path,
        by_module: false,
    })
}

/// Last component and content.
fn text_file(path: &Path) -> Result<(String, String), BadInput> {
    let text = read_text("--quality-text", path)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((name, text))
}

fn is_first_look(args: &RunArgs) -> bool {
    let OutputArgs { format, output, quiet, .. } = &args.output;
    let asks_for_nothing = args.model.model_id.is_none() && args.precision.precision == ["all"];
    let compares = args.against.baseline.is_some() || args.against.ab.is_some();
    asks_for_nothing && !compares && !quiet && format.is_none() && output.is_none()
}

/// What is measured where no model is named.
fn default_model_id(device: DeviceChoice) -> &'static str {
    // A device that cannot be had is an error elsewhere.
    match harness::device(device) {
        Ok(Device::Cuda(_)) => DEFAULT_CUDA_MODEL_ID,
        Ok(Device::Cpu) | Err(_) => DEFAULT_MODEL_ID,
    }
}

fn model(args: &ModelArgs, device: DeviceChoice) -> weights::Request {
    weights::Request {
        model_id: args.model_id.clone().unwrap_or_else(|| default_model_id(device).to_owned()),
        revision: args.revision.clone(),
        offline: args.offline,
        weights: match args.weights {
            WeightsWord::Auto => WeightsChoice::Auto,
            WeightsWord::Random => WeightsChoice::Random,
        },
        seed: args.seed,
        outlier_channels: args.outlier_channels,
        strict_config: args.strict_config,
    }
}

/// In the order asked, each once. `all` is every precision that is not a variant of another.
fn precisions(words: &[String], no_double_quant: bool) -> Result<Vec<FormatId>, BadInput> {
    let mut precisions: Vec<FormatId> = Vec::new();
    for word in words {
        let formats: Vec<FormatId> = match word.trim().to_lowercase().as_str() {
            "all" => FORMATS.iter().copied().filter(|format| !format.is_variant).collect(),
            word => vec![FormatId::parse(word).ok_or_else(|| unknown_precision(word, Takes::Many))?],
        };
        for format in formats {
            let format = format.without_double_quant.filter(|_| no_double_quant).unwrap_or(format);
            if !precisions.contains(&format) {
                precisions.push(format);
            }
        }
    }
    Ok(precisions)
}

/// `--no-double-quant` names a precision too.
fn precision_selection(words: &[String], no_double_quant: bool) -> PrecisionSelection {
    match words {
        [word] if word.trim().eq_ignore_ascii_case("all") && !no_double_quant => PrecisionSelection::All,
        _ => PrecisionSelection::ByName,
    }
}

fn device(word: &str) -> Result<DeviceChoice, BadInput> {
    let choice = match word.split_once(':') {
        None if word == "auto" => Some(DeviceChoice::Auto),
        None if word == "cpu" => Some(DeviceChoice::Cpu),
        None if word == "cuda" => Some(DeviceChoice::Cuda(0)),
        Some(("cuda", index)) => index.parse().ok().map(DeviceChoice::Cuda),
        _ => None,
    };
    match choice {
        None => Err(BadInput::new(format!(
            "unknown device `{word}`: known are auto, cpu, cuda and cuda:N (N counts from 0)"
        ))),
        Some(DeviceChoice::Cuda(_)) if !cfg!(feature = "cuda") => {
            Err(BadInput::new(format!("`--device {word}`: this build has no CUDA support"))
                .hint("build with `cargo build --release --features cuda`, or measure with `--device cpu`"))
        }
        Some(choice) => Ok(choice),
    }
}

fn prompt(args: &PromptArgs) -> Result<PromptChoice, BadInput> {
    if let Some(text) = &args.prompt {
        return text_prompt("--prompt", text.clone());
    }
    if let Some(path) = &args.prompt_file {
        return text_prompt("--prompt-file", read_text("--prompt-file", path)?);
    }
    if let Some(n) = args.prompt_tokens {
        return positive("--prompt-tokens", n).map(PromptChoice::Synthetic);
    }
    match &args.prompt_ids {
        None => Ok(PromptChoice::Default),
        Some(words) => ids(&words.join(" "))
            .map(PromptChoice::Ids)
            .map_err(|what| BadInput::new(format!("`--prompt-ids`: {what}"))),
    }
}

/// Of a text: more than any context holds, and less than the memory of a machine that measures.
const MOST_TEXT_MIB: usize = 64;

/// The text of a file or a pipe.
fn read_text(option: &str, path: &Path) -> Result<String, BadInput> {
    let bad = |why: &dyn Display| BadInput::new(format!("`{option} {}`: {why}", path.display()));
    let mut text = String::new();
    let most = MOST_TEXT_MIB << 20;
    let read = File::open(path).and_then(|file| file.take(most as u64 + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(bad(&error)),
        Ok(n) if n > most => Err(bad(&format!("more than {MOST_TEXT_MIB} MiB of text")).hint("give a part of it")),
        Ok(_) => Ok(text),
    }
}

fn text_prompt(option: &str, text: String) -> Result<PromptChoice, BadInput> {
    if text.is_empty() {
        return Err(BadInput::new(format!("`{option}` is empty: prefill needs at least one token"))
            .hint("give some text, or `--prompt-tokens N` for N synthetic ids"));
    }
    Ok(PromptChoice::Text(text))
}

fn protocol(args: &RunArgs) -> Result<MeasurementProtocol, BadInput> {
    let protocol = MeasurementProtocol {
        warmup: args.warmup,
        repeats: args.repeats.map(|n| positive("--repeats", n)).transpose()?,
        min_time_s: not_negative("--min-time", args.min_time)?,
        max_time_s: not_negative("--max-time", args.max_time)?,
        rel_ci: not_negative("--rel-ci", args.rel_ci)?,
        ..MeasurementProtocol::default()
    };
    if protocol.min_time_s > protocol.max_time_s {
        let (min, max) = (protocol.min_time_s, protocol.max_time_s);
        return Err(BadInput::new(format!("`--min-time {min}` is more than `--max-time {max}`")));
    }
    Ok(protocol)
}

/// The table where no format is named.
fn writer(name: Option<&str>) -> Result<&'static Writer, BadInput> {
    let name = name.unwrap_or("table");
    report::find(name).ok_or_else(|| BadInput::new(format!("unknown output format `{name}`")))
}

fn output_file(path: &Path) -> Result<(PathBuf, &'static Writer)> {
    let writer = report::by_extension(path)?;
    report::check_writable(path)?;
    Ok((path.to_owned(), writer))
}

pub(super) fn positive(option: &str, n: usize) -> Result<usize, BadInput> {
    match n {
        0 => Err(BadInput::new(format!("`{option} 0`: at least 1 is needed"))),
        n => Ok(n),
    }
}

/// More than any machine has: many more, and the system ends a process that starts them.
const MOST_THREADS: usize = 1024;

fn threads(n: usize) -> Result<usize, BadInput> {
    match positive("--threads", n)? {
        n if n > MOST_THREADS => {
            Err(BadInput::new(format!("`--threads {n}`: at most {MOST_THREADS} can be asked for"))
                .hint("leave `--threads` out for one thread a core"))
        }
        n => Ok(n),
    }
}

fn not_negative<T: Into<f64> + Copy + Display>(option: &str, x: T) -> Result<T, BadInput> {
    match x.into() {
        value if value.is_finite() && value >= 0.0 => Ok(x),
        _ => Err(BadInput::new(format!("`{option} {x}`: a finite number of at least 0 is needed"))),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn request(line: &str) -> Result<Request> {
        let words = std::iter::once("quantbench").chain(line.split_whitespace());
        Request::new(&Cli::try_parse_from(words)?.run, line.to_owned())
    }

    #[test]
    fn precisions_are_canonical_and_unique() {
        for (line, names) in [
            ("", "fp16 int8 nf4"),
            ("--precision 4bit", "nf4"),
            ("--precision nf4,4bit", "nf4"),
            ("--precision int8,fp16", "int8 fp16"),
            ("--precision NF4", "nf4"),
            ("--precision nf4-nodq,all", "nf4-nodq fp16 int8 nf4"),
            ("--no-double-quant", "fp16 int8 nf4-nodq"),
            ("--precision 4bit --no-double-quant", "nf4-nodq"),
        ] {
            assert_eq!(
                request(line).unwrap().case.precisions.iter().map(FormatId::to_string).collect::<Vec<_>>().join(" "),
                names,
                "{line}"
            );
        }
    }

    #[test]
    fn every_format_can_be_asked_for_by_every_name() {
        for entry in FORMATS {
            for word in std::iter::once(&entry.name).chain(entry.aliases) {
                let case = request(&format!("--precision {word}")).unwrap().case;
                assert_eq!(case.precisions, [*entry], "{word}");
            }
        }
    }

    #[test]
    fn prompts_and_devices_are_told_apart() {
        assert_eq!(request("--prompt-ids 1,2,3").unwrap().case.prompt, PromptChoice::Ids(vec![1, 2, 3]));
        assert_eq!(request("--prompt-ids 1, 2, 3").unwrap().case.prompt, PromptChoice::Ids(vec![1, 2, 3]));
        assert_eq!(request("--prompt-ids [1, 2,3] --quiet").unwrap().case.prompt, PromptChoice::Ids(vec![1, 2, 3]));
        assert_eq!(request("--prompt-tokens 9").unwrap().case.prompt, PromptChoice::Synthetic(9));
        assert_eq!(request("--prompt hi").unwrap().case.prompt, PromptChoice::Text("hi".into()));
        assert_eq!(request("").unwrap().case.prompt, PromptChoice::Default);
        assert_eq!(request("--device cpu").unwrap().case.device, DeviceChoice::Cpu);
    }

    #[test]
    fn run_may_be_left_out() {
        let Ok(Cli { command: Some(Command::Run(args)), .. }) =
            Cli::try_parse_from(["quantbench", "run", "--threads", "3", "--precision", "nf4"])
        else {
            panic!("`run` is a command");
        };
        let typed = Request::new(&args, "a command".to_owned()).unwrap().case;
        let left_out = Request::new(
            &Cli::try_parse_from(["quantbench", "--threads", "3", "--precision", "nf4"]).unwrap().run,
            "a command".to_owned(),
        );
        assert_eq!((typed.threads, typed.precisions.len()), (3, 1));
        assert_eq!(typed, left_out.unwrap().case);
    }

    #[test]
    fn the_default_model_on_cuda_is_larger() {
        let on_cuda = |model_id: &'static str| Some(model_id).filter(|_| cfg!(feature = "cuda"));
        for (line, model_id) in [
            ("--device cpu", Some(DEFAULT_MODEL_ID)),
            ("--device cpu --model-id phi-2", Some("phi-2")),
            ("--device cuda:1", on_cuda(DEFAULT_CUDA_MODEL_ID)),
            ("--device cuda --model-id phi-2", on_cuda("phi-2")),
        ] {
            let asked = request(line).ok().map(|request| (request.case.model.model_id, request.is_first_look));
            assert_eq!(asked, model_id.map(|id| (id.to_owned(), !line.contains("--model-id"))), "{line}");
        }
        for line in [
            "--quiet",
            "--format table",
            "--output r.json",
            "--model-id smollm2-135m",
            "--precision nf4",
            "--baseline b.json",
        ] {
            assert!(!request(line).unwrap().is_first_look, "{line}");
        }
        let is_built_in = |name: &str| weights::builtin_models().iter().any(|shape| shape.name == name);
        assert!(is_built_in(DEFAULT_MODEL_ID) && is_built_in(DEFAULT_CUDA_MODEL_ID));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for (line, word) in [
            ("--precision fp61", "fp16"),
            ("--precision fp16,", "unknown precision"),
            ("--device gpu", "cuda:N"),
            ("--device cuda:x", "cuda:N"),
            ("--max-new-tokens 0", "at least 1"),
            ("--prompt-tokens 0", "at least 1"),
            ("--repeats 0", "at least 1"),
            ("--launches 0", "at least 1"),
            ("--method seed --repeats 3", "cannot be used with"),
            ("--method seed --launches 3", "one run"),
            ("--method fair", "quantbench"),
            ("--threads 0", "at least 1"),
            ("--threads 99999", "at most 1024"),
            ("--int8-threshold NaN", "finite"),
            ("--min-time 5 --max-time 4", "--max-time 4"),
            ("--rel-ci=-1", "at least 0"),
            ("--prompt-ids 1,x", "`x` is no token id"),
            ("--precision int4", "--precision 4bit"),
            ("--prompt a --prompt-tokens 3", "cannot be used with"),
        ] {
            let error = request(line).err().expect(line);
            let hint = crate::error::hint(&error).unwrap_or_default();
            assert!(format!("{error:#} {hint}").contains(word), "{line}: {error:#} {hint}");
        }
    }
}
