//! The worker process, and the harness's only ties to the parts that load models.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, bail};

use super::clock::Monotonic;
use super::load::CpuLoad;
use super::measure::{Bench, Encode};
use super::memory::ProcessMemory;
use super::picture::Preprocessor;
use super::protocol::{Ask, Failure, Job, LoadFacts, Reply};
use super::scoring;
use super::validity;
use crate::engine::{self, Engine, Setup, check};
use crate::error::{BadInput, without_backtrace};
use crate::events::{Event, Listener, WithoutWarnings};
use crate::kernels::cpu::rlimit;
use crate::models;
use crate::plan::{EncoderInputKind, Model};
use crate::quant::fp16;
use crate::weights::policy::{Formats, Selection};
use crate::weights::{self, Checkpoint, Request, Source};

/// A model whose files were found and whose plan was built; no weights are in memory.
pub struct Opened {
    pub checkpoint: Checkpoint,
    pub model: Model,
    pub source: Box<dyn Source>,
}

/// Finds a model's files, downloading what is missing, and checks that they hold what the architecture needs.
pub fn open(request: &Request, events: &dyn Listener) -> Result<Opened> {
    let checkpoint = weights::open(request, events)?;
    let model = build(&checkpoint, request, events)?;
    let source = checkpoint.source_with(&model.matrices, &model.vectors, events)?;
    Ok(Opened { checkpoint, model, source })
}

/// The plan of a model, with a warning of each setting of its files that is not computed. Fails on one that must be, and with
/// `--strict-config` on any.
pub fn build(checkpoint: &Checkpoint, request: &Request, events: &dyn Listener) -> Result<Model, BadInput> {
    let files = models::Files { config: &checkpoint.config, generation: checkpoint.generation_config.as_ref() };
    let built = models::read(&files).map_err(|error| {
        let model_id = &request.model_id;
        BadInput::new(format!(
            "the config.json of `{model_id}` cannot be used: {}",
            without_backtrace(&error.to_string())
        ))
    })?;
    let unread = checkpoint.notes.iter().map(|message| (models::UNREAD_FILE, message.clone()));
    for (name, message) in unread.chain(built.notes.into_iter().map(|note| (note.name, note.message))) {
        if request.strict_config {
            return Err(BadInput::new(format!("`--strict-config`: {message}"))
                .hint("drop `--strict-config` to run with a warning in the record instead"));
        }
        events.on(Event::Warning { name: name.to_owned(), message });
    }
    Ok(built.model)
}

impl Opened {
    /// As [`select`].
    pub fn select(&mut self, selection: &Selection) -> Result<(), BadInput> {
        select(&mut self.model, &self.checkpoint, selection)
    }
}

/// Makes the model quantize what `selection` says. Fails where a pattern matches no linear layer, and where the weights were
/// quantized already.
pub fn select(model: &mut Model, checkpoint: &Checkpoint, selection: &Selection) -> Result<(), BadInput> {
    if let (Selection::Without(patterns), Some(own)) = (selection, &checkpoint.quantized) {
        let message = format!("`--keep-fp16 {}`: the weights were saved in `{}`", patterns.join(","), own.precision);
        return Err(BadInput::new(message).hint("drop `--keep-fp16`, or name the model that they were made from"));
    }
    selection.apply(&mut model.matrices).map_err(|pattern| {
        let message = format!("`--keep-fp16 {pattern}` matches no linear layer of `{}`", checkpoint.id);
        BadInput::new(message).hint(format!(
            "a pattern is a part of a name such as `{}`, from dot to dot; `*` stands for anything between dots",
            last_linear(model)
        ))
    })
}

/// The name of a linear layer, to show how they are spelled.
fn last_linear(model: &Model) -> &str {
    let linear = model.matrices.iter().rev().find(|spec| spec.role.is_quantized());
    linear.map_or("model.layers.0.mlp.down_proj", |spec| spec.name.trim_end_matches(".weight"))
}

/// Stored bytes of the weights by the format that holds them; vectors count as fp16.
fn weights_by_format(opened: &Opened, formats: &Formats) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::from([(fp16::ID.to_string(), opened.model.vector_bytes() as u64)]);
    for spec in &opened.model.matrices {
        // What a checkpoint that was saved quantized holds in 2 bytes a value or more was left out on purpose.
        let wide = opened.source.stored_bytes(&spec.name) >= 2 * (spec.n * spec.k) as u64;
        let left_out = opened.source.is_quantized() && spec.role.is_quantized() && wide;
        let format = if left_out { formats.fp16() } else { formats.of(spec.role) };
        *bytes.entry(format.id().to_string()).or_default() += format.stored_bytes(spec.n, spec.k) as u64;
    }
    bytes
}

/// The hidden subcommand: answers the parent until it closes the pipe. Nothing else may write to standard output. Fails on
/// input that no parent writes.
pub fn worker_main() -> Result<()> {
    // The kernel should end a worker, not the parent, when memory runs out. Raising one's own score needs no right; where it
    // fails nothing is lost.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let replies = Replies(Mutex::new(std::io::stdout()));
    let mut state = None;
    for ask in asks() {
        let reply = answer(ask?, &mut state, &replies).unwrap_or_else(|error| Reply::Failed(Failure::of(&error)));
        replies.send(&reply);
    }
    Ok(())
}

struct State {
    bench: Bench<Monotonic>,
    job: Job,
}

fn answer(ask: Ask, state: &mut Option<State>, events: &Replies) -> Result<Reply> {
    let loaded = state.as_mut().context("nothing is loaded yet");
    Ok(match ask {
        Ask::Load(job) => {
            let (loaded, facts) = load(*job, events)?;
            *state = Some(loaded);
            Reply::Loaded(facts)
        }
        Ask::WarmUp => Reply::Warmed(loaded?.bench.warm_up()?),
        Ask::Repeat => Reply::Sample(loaded?.bench.repeat()?),
        Ask::Finish => {
            let State { bench, job } = loaded?;
            Reply::Finished(bench.finish(job.save_logits.as_deref())?)
        }
        Ask::Bandwidth(ordinal) => Reply::Bandwidth(engine::memory::read_bandwidth(ordinal)?),
        Ask::Score(scoring) => Reply::Scored(scoring::score(loaded?.bench.encoded()?, &scoring)?),
    })
}

/// What a task shows the model, as its preprocessor makes it; empty where it shows none. Fails on a picture that cannot be used.
pub fn pixels(model: &Model, checkpoint: &Checkpoint, encode: &Encode) -> Result<Vec<f32>> {
    let Encode::Picture { image } = encode else { return Ok(Vec::new()) };
    let Some(EncoderInputKind::Picture(picture)) = model.encoder.as_ref().map(|encoder| encoder.input) else {
        bail!("`{}` has no image input", model.architecture)
    };
    let preprocessor = Preprocessor::new(checkpoint.preprocessor_config.as_ref(), picture.size)?;
    let pixels = match image {
        Some(path) => preprocessor.open(path)?,
        None => preprocessor.generated(),
    };
    Ok(pixels.values)
}

fn load(job: Job, events: &dyn Listener) -> Result<(State, LoadFacts)> {
    job.memory_limit_bytes.map_or(Ok(()), rlimit::limit_data_bytes).context("limiting the memory of the worker")?;
    let mut opened = open(&job.model, &WithoutWarnings(events))?;
    opened.select(&job.selection)?;
    let pixels = pixels(&opened.model, &opened.checkpoint, &job.task.encode)?;
    let device: engine::Device = job.device.into();
    let kv_format = match job.engine {
        Engine::Quantbench => device.kv_format(),
        Engine::Candle => engine::candle::kv_format(opened.model.architecture),
    };
    let formats = Formats::new(job.precision, job.format_options);
    let setup = Setup {
        model: &opened.model,
        source: opened.source.as_ref(),
        formats: &formats,
        device,
        threads: job.threads,
        sequences: 1,
        kv_format,
        capacity: job.capacity(),
        encoder_capacity: job.encoder_capacity,
        cuda_graph: job.cuda_graph,
    };
    let loaded = match job.engine {
        Engine::Quantbench => engine::load(&setup, events)?,
        Engine::Candle => {
            let dtype = engine::candle::dtype(opened.model.architecture);
            engine::candle::load(&setup, &opened.checkpoint.config, dtype, events)?
        }
    };
    let memory = ProcessMemory::default();
    let load_peak_bytes = memory.peak_bytes();
    let task = job.task.clone();
    let mut bench = Bench::new(loaded.session, Monotonic::start(), memory, CpuLoad::default(), task, pixels);
    bench.loaded()?;
    let self_check = match job.engine {
        Engine::Quantbench => check::self_check(&setup)?,
        // Not our kernels.
        Engine::Candle => None,
    };
    validity::check_kernels(job.precision, self_check.as_ref())?;
    let facts = LoadFacts {
        load_s: loaded.load.as_secs_f64(),
        quantize_s: loaded.quantize.as_secs_f64(),
        fp16_overflow: loaded.fp16_overflow,
        isa: loaded.isa,
        load_peak_bytes,
        self_check,
        weights_by_format: weights_by_format(&opened, &formats),
    };
    Ok((State { bench, job }, facts))
}

/// What the parent asks, line by line, read by a thread of its own: when the parent is gone, so is this process, even in the
/// middle of a repeat. The thread sleeps in a read meanwhile.
fn asks() -> Receiver<Result<Ask>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let ask =
                serde_json::from_str(&line).context("the input of `quantbench worker` comes from quantbench itself");
            let last = ask.is_err();
            if sender.send(ask).is_err() || last {
                return;
            }
        }
        std::process::exit(0);
    });
    receiver
}

/// Standard output as a channel of replies; also the listener whose events the parent relays.
struct Replies(Mutex<std::io::Stdout>);

impl Replies {
    fn send(&self, reply: &Reply) {
        let mut line = serde_json::to_string(reply).unwrap_or_default();
        line.push('\n');
        let mut out = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A parent that no longer reads has closed the other pipe as well, which ends this process.
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }
}

impl Listener for Replies {
    fn on(&self, event: Event) {
        self.send(&Reply::Event(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::needs::stored_bytes;
    use crate::events::Silent;
    use crate::quant::{FormatOptions, fp32, nf4};
    use crate::weights::WeightsChoice;

    #[test]
    fn what_a_selection_needs_is_known_before_it_runs() {
        let request = Request {
            model_id: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny").to_owned(),
            revision: None,
            offline: true,
            weights: WeightsChoice::Auto,
            seed: 0,
            outlier_channels: 0,
            strict_config: false,
        };
        let model = open(&request, &Silent).unwrap().model;
        let formats = |precision| Formats::new(precision, FormatOptions::default());
        let stored = |precision| stored_bytes(&model, &formats(precision));
        let selected = |selection: Selection, precision| {
            let mut model = model.clone();
            selection.apply(&mut model.matrices).unwrap();
            stored_bytes(&model, &formats(precision))
        };
        assert_eq!(selected(Selection::Usual, nf4::ID), stored(nf4::ID));
        assert_eq!(selected(Selection::Only(Vec::new()), nf4::ID), stored(fp16::ID));
        let one = selected(Selection::Only(vec!["model.layers.0.mlp.down_proj.weight".to_owned()]), nf4::ID);
        assert!(stored(nf4::ID) < one && one < stored(fp16::ID));
        // The reference holds matrices in fp32; vectors count 2 bytes a value wherever they are.
        let matrices = |precision| stored(precision) - model.vector_bytes() as u64;
        assert_eq!(matrices(fp32::ID), 2 * matrices(fp16::ID));
    }
}
