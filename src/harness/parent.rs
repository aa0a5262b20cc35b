//! One case → records: check everything, measure the memory, run the workers.

use std::path::Path;

use anyhow::Result;
use tokenizers::Tokenizer;

use super::assemble::{self, Facts};
use super::environment::{self, Machine};
use super::measure::Encode;
use super::memory::ProcessMemory;
use super::process::ProcessWorker;
use super::prompt::{self, Workload};
use super::protocol::{Failure, Finished, Job, LoadFacts, Sample, Share, Warmed};
use super::quality::{Failed, Passage, Refusal};
use super::schedule::{self, Order, Outcome, Worker};
use super::warnings::Warning;
use super::worker::{self, Opened};
use super::{Asked, Case, DeviceChoice, logits};
use crate::error::{BadInput, OutOfMemory};
use crate::events::{Event, Listener, Unit};
use crate::kernels::cpu::bandwidth;
use crate::kernels::cpu::pool::{Pool, default_threads};
use crate::kernels::cpu::topology::last_level_cache_bytes;
use crate::kernels::isa::Isa;
use crate::plan::Model;
use crate::quant::{self, FormatOptions};
use crate::record::{self, Record, Status};
use crate::weights::SourceKind;
use crate::weights::bnb::PreQuantized;

/// What a worker holds beside weights and cache: code, activations, tables.
const WORKER_BYTES: u64 = 64 << 20;

/// What loading may use beyond the final size, for one worker at a time.
const LOADING_BYTES: u64 = 256 << 20;

/// Measures every precision of `case`. Fails on input that cannot be used; a precision that fails becomes a record.
pub fn run(case: &Case, events: &dyn Listener) -> Result<Vec<Record>> {
    let device = check(case)?;
    let mut opened = worker::open(&case.model, events)?;
    opened.select(&case.selection())?;
    let case = &in_own_precision(case, opened.checkpoint.quantized.as_ref())?;
    let plan = Plan::new(case, device, opened)?;
    let passage = plan.passage(case)?;
    let mut facts = plan.facts(case, events);
    let outcomes = plan.outcomes(case, facts.order, events)?;
    let decode = |ids: &[u32]| plan.opened.checkpoint.tokenizer.as_ref().and_then(|tokenizer| text(tokenizer, ids));
    let mut records = assemble::records(&facts, case, &outcomes, &decode);
    if let Some(read_gb_s) = facts.read_gb_s.filter(|_| exceeds_bandwidth(&records)) {
        // A kernel that reads faster than the benchmark did shows that the benchmark was disturbed, or that caches helped.
        let again = plan.read_and_copy_gb_s(events).0;
        facts.read_gb_s = Some(again.map_or(read_gb_s, |again| again.max(read_gb_s)));
        records = assemble::records(&facts, case, &outcomes, &decode);
    }
    add_quality(&plan, case, passage, &mut records, events)?;
    Ok(records)
}

/// Measures every precision of `case` with this build and with another one, repeat by repeat in turn: the records of the other
/// build, then those of this one. Both speak the same worker protocol or the other's records say that they do not.
pub fn run_ab(case: &Case, other: &Path, events: &dyn Listener) -> Result<(Vec<Record>, Vec<Record>)> {
    let device = check(case)?;
    let mut opened = worker::open(&case.model, events)?;
    opened.select(&case.selection())?;
    let case = &in_own_precision(case, opened.checkpoint.quantized.as_ref())?;
    let plan = Plan::new(case, device, opened)?;
    let facts = plan.facts(case, events);
    let mut of_other = Facts { engine: engine_of(other)?, ..facts.clone() };
    // How the other was built is not known.
    of_other.environment.build_profile.clear();
    of_other.environment.features.clear();
    let workers = case.precisions.iter().zip(&plan.needs).flat_map(|(precision, &need)| {
        let job = Job::new(case, precision, plan.share, &plan.workload);
        let other = ProcessWorker::new(job, need).of_binary(other.to_owned());
        [Box::new(other) as Box<dyn Worker>, plan.worker(case, precision, need)]
    });
    let outcomes = plan.measured(workers.collect(), case, Order::Interleaved, events)?;
    let of_side = |side: usize| outcomes.iter().skip(side).step_by(2).cloned().collect::<Vec<_>>();
    let decode = |ids: &[u32]| plan.opened.checkpoint.tokenizer.as_ref().and_then(|tokenizer| text(tokenizer, ids));
    let records = |facts: &Facts, side: usize| assemble::records(facts, case, &of_side(side), &decode);
    Ok((records(&of_other, 0), records(&facts, 1)))
}

/// Version and commit as the other build's `--version` gives them.
fn engine_of(binary: &Path) -> Result<record::Engine, BadInput> {
    let bad = |why: String| BadInput::new(format!("`--ab {}`: {why}", binary.display()));
    let output = std::process::Command::new(binary).arg("--version").output();
    let output = output.map_err(|error| bad(format!("it cannot be started: {error}")))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = said.trim().split([' ', '(', ',', ')']).filter(|word| !word.is_empty());
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("quantbench"), Some(version), Some("commit"), Some(commit)) => {
            let word = str::to_owned;
            Ok(record::Engine { name: word("quantbench"), version: word(version), commit: word(commit) })
        }
        _ => Err(bad("it is no quantbench: `--version` names no version and commit".into())),
    }
}

/// Measures the quality of every precision of `case` and no speed. Fails on input that cannot be used and on a model that
/// has no quality; a precision that fails becomes a record.
pub fn quality(case: &Case, events: &dyn Listener) -> Result<Vec<Record>> {
    let device = check(case)?;
    let mut opened = worker::open(&case.model, events)?;
    opened.select(&case.selection())?;
    let case = &in_own_precision(case, opened.checkpoint.quantized.as_ref())?;
    let plan = Plan::new(case, device, opened)?;
    let Some(passage) = plan.passage(case)? else { return Ok(Vec::new()) };
    let passage = passage.map_err(BadInput::from)?;
    let mut records = assemble::unmeasured(&plan.facts_unmeasured(case), case);
    for Failed { at, reason } in passage.measure(case, (plan.share, &plan.opened.model), &mut records, events)? {
        (records[at].status, records[at].reason) = (Status::Error, Some(reason));
    }
    Ok(records)
}

/// Quality beside speed: what stands in its way is a warning.
fn add_quality(
    plan: &Plan,
    case: &Case,
    passage: Option<Result<Passage, Refusal>>,
    records: &mut [Record],
    events: &dyn Listener,
) -> Result<()> {
    let warn = |record: &mut Record, reason: String| record.warnings.push(Warning::NoQuality { reason }.to_string());
    match passage {
        None => {}
        Some(Err(refusal)) => records.iter_mut().for_each(|record| warn(record, refusal.reason.clone())),
        Some(Ok(passage)) => {
            for Failed { at, reason } in passage.measure(case, (plan.share, &plan.opened.model), records, events)? {
                warn(&mut records[at], reason);
            }
        }
    }
    Ok(())
}

fn exceeds_bandwidth(records: &[Record]) -> bool {
    records.iter().any(|record| record.bandwidth.mbu.is_some_and(|mbu| mbu > 1.0))
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> Option<String> {
    tokenizer.decode(ids, true).ok()
}

/// A case that was checked.
struct Plan {
    opened: Opened,
    share: Share,
    workload: Workload,
    /// What each precision needs, in bytes, and what is free.
    needs: Vec<u64>,
    free_bytes: Option<u64>,
}

impl Plan {
    /// The checks that need the model but no weights in memory.
    fn new(case: &Case, device: DeviceChoice, opened: Opened) -> Result<Self> {
        let workload = prompt::workload(case, opened.checkpoint.tokenizer.as_ref(), &opened.model)?;
        // Whether the picture can be read; the workers read it again.
        worker::pixels(&opened, &workload.task.encode)?;
        let threads = if case.threads == 0 { default_threads() } else { case.threads };
        let share = Share { device, threads };
        let cache_bytes = cache_bytes(&opened.model, &workload);
        let stored = |precision: &String| worker::stored_bytes(&opened.model, precision, case.format_options);
        let needs = case.precisions.iter().map(|p| Ok(stored(p)? + cache_bytes)).collect::<Result<_>>()?;
        let free_bytes = ProcessMemory::default().available_bytes();
        Ok(Self { opened, share, workload, needs, free_bytes })
    }

    /// The text that quality is asked for on, or why there is none.
    fn passage(&self, case: &Case) -> Result<Option<Result<Passage, Refusal>>> {
        case.quality.as_ref().map(|choice| Passage::new(choice, &self.opened, &self.workload)).transpose()
    }

    fn together_bytes(&self) -> u64 {
        self.needs.iter().map(|need| need + WORKER_BYTES).sum::<u64>() + LOADING_BYTES
    }

    /// Host memory decides on the CPU alone.
    fn order(&self) -> Order {
        let fits = self.free_bytes.is_none_or(|free| self.together_bytes() <= free);
        if self.share.device == DeviceChoice::Cpu && self.needs.len() > 1 && !fits {
            Order::InTurn
        } else {
            Order::Interleaved
        }
    }

    fn facts(&self, case: &Case, events: &dyn Listener) -> Facts {
        let mut facts = self.facts_unmeasured(case);
        if facts.order == Order::InTurn {
            let (needed_bytes, free_bytes) = (self.together_bytes(), self.free_bytes.unwrap_or(0));
            facts.warnings.push(Warning::UnpairedRatios { needed_bytes, free_bytes });
        }
        if self.share.device == DeviceChoice::Cpu {
            (facts.read_gb_s, facts.copy_gb_s) = self.read_and_copy_gb_s(events);
            facts.cache_bytes = last_level_cache_bytes().map(|bytes| bytes as u64);
        }
        facts
    }

    /// What is known without measuring the machine.
    fn facts_unmeasured(&self, case: &Case) -> Facts {
        let (machine, order, isa) = (Machine::default(), self.order(), Isa::detect());
        let warnings = machine.warnings();
        Facts {
            engine: engine(),
            command: case.command.clone(),
            timestamp: environment::timestamp(),
            model: self.model_facts(),
            weights: self.weight_facts(),
            device: self.device_facts(&machine),
            workload: self.workload_facts(),
            n_before: (self.workload.task.depth.len() + self.workload.task.prompt.len()) as u64,
            environment: machine.environment(isa.name(), self.share.threads),
            format_options: case.format_options,
            keep_fp16: case.keep_fp16.clone(),
            protocol: case.protocol.clone(),
            order,
            resolve_s: self.opened.checkpoint.resolve_s,
            read_gb_s: None,
            copy_gb_s: None,
            cache_bytes: None,
            warnings,
        }
    }

    /// The pool ends with the measurement, so that no thread of the parent is awake beside the workers. `None` where the
    /// memory for it cannot be had.
    fn read_and_copy_gb_s(&self, events: &dyn Listener) -> (Option<f64>, Option<f64>) {
        events.on(Event::Begin { label: "memory bandwidth".to_owned(), total: 2, unit: Unit::Runs });
        let (isa, pool) = (Isa::detect(), Pool::new(self.share.threads));
        let _pinned = pool.pin_caller();
        let read = bandwidth::read_gb_s(isa, &pool).ok();
        events.on(Event::Progress { done: 1 });
        let copy = bandwidth::copy_gb_s(isa, &pool).ok();
        events.on(Event::End);
        (read, copy)
    }

    fn outcomes(&self, case: &Case, order: Order, events: &dyn Listener) -> Result<Vec<Outcome>> {
        let workers =
            case.precisions.iter().zip(&self.needs).map(|(precision, &need)| self.worker(case, precision, need));
        self.measured(workers.collect(), case, order, events)
    }

    fn measured(
        &self,
        workers: Vec<Box<dyn Worker>>,
        case: &Case,
        order: Order,
        events: &dyn Listener,
    ) -> Result<Vec<Outcome>> {
        match schedule::measure(workers, &case.protocol, order, events) {
            Ok(outcomes) => Ok(outcomes),
            Err(Failure::BadInput { message, hint }) => {
                let bad = BadInput::new(message);
                Err(if let Some(hint) = hint { bad.hint(hint) } else { bad }.into())
            }
            Err(other) => Err(anyhow::anyhow!(other.message().to_owned())),
        }
    }

    /// A worker process, or for a precision whose weights and cache alone exceed what is free, its refusal.
    fn worker(&self, case: &Case, precision: &str, wanted_bytes: u64) -> Box<dyn Worker> {
        let room_bytes = ProcessMemory::default().room_bytes();
        let too_little = room_bytes.filter(|room| self.share.device == DeviceChoice::Cpu && wanted_bytes > *room);
        if let Some(free_bytes) = too_little {
            return Box::new(TooLarge {
                precision: precision.to_owned(),
                oom: OutOfMemory { wanted_bytes, free_bytes },
            });
        }
        Box::new(ProcessWorker::new(Job::new(case, precision, self.share, &self.workload), wanted_bytes))
    }

    fn model_facts(&self) -> record::ModelFacts {
        record::ModelFacts {
            id: self.opened.checkpoint.id.clone(),
            revision: self.opened.checkpoint.revision.clone(),
            architecture: self.opened.model.architecture.to_owned(),
            parameters: self.opened.model.parameters() as u64,
        }
    }

    fn weight_facts(&self) -> record::WeightFacts {
        let info = self.opened.source.info();
        let source = match info.source {
            SourceKind::Hub => "hub",
            SourceKind::Local => "local",
            SourceKind::Random => "random",
        };
        record::WeightFacts {
            source: source.to_owned(),
            dtype: info.dtype.clone(),
            seed: info.seed,
            hash: info.hash.clone(),
            fp16_overflow: 0,
        }
    }

    fn device_facts(&self, machine: &Machine) -> record::DeviceFacts {
        match self.share.device {
            DeviceChoice::Cuda(ordinal) => {
                record::DeviceFacts { kind: "cuda".to_owned(), name: format!("cuda:{ordinal}") }
            }
            _ => record::DeviceFacts { kind: "cpu".to_owned(), name: machine.cpu_name() },
        }
    }

    fn workload_facts(&self) -> record::Workload {
        let Workload { task, n_prompt, n_image, .. } = &self.workload;
        record::Workload {
            n_prompt: *n_prompt as u64,
            n_gen: task.n_gen as u64,
            n_depth: task.depth.len() as u64,
            n_image: *n_image as u64,
            image: match &task.encode {
                Encode::Picture { image: None } => Some(record::ImageSource::Generated),
                Encode::Picture { image: Some(_) } => Some(record::ImageSource::File),
                Encode::Nothing | Encode::Tokens(_) => None,
            },
            batch_size: 1,
        }
    }
}

/// Keys and values of both sides, fp32 as on the CPU.
fn cache_bytes(model: &Model, workload: &Workload) -> u64 {
    let task = &workload.task;
    let n_positions = task.depth.len() + task.prompt.len() + task.n_gen;
    (model.kv_bytes_per_position(4) * n_positions + model.cross_bytes_per_position(4) * workload.n_encoder) as u64
}

fn engine() -> record::Engine {
    record::Engine {
        name: "quantbench".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: option_env!("QUANTBENCH_COMMIT").unwrap_or("unknown").to_owned(),
    }
}

/// The checks that need no model; what is wrong is said before anything is downloaded.
fn check(case: &Case) -> Result<DeviceChoice> {
    check_precisions(case)?;
    let device = device(case.device)?;
    for precision in case.save_logits.iter().flat_map(|_| &case.precisions) {
        let path = case.save_logits.as_ref().map(|path| logits::path_of(path, precision, case.precisions.len()));
        path.map_or(Ok(()), |path| logits::check_writable(&path))?;
    }
    Ok(device)
}

fn check_precisions(case: &Case) -> Result<(), BadInput> {
    let known = || quant::FORMATS.iter().map(|entry| format!("`{}`", entry.name)).collect::<Vec<_>>().join(", ");
    if case.precisions.is_empty() {
        return Err(BadInput::new("no precision is asked for").hint(format!("known are {}", known())));
    }
    match case.precisions.iter().find(|name| quant::find(name).is_none()) {
        Some(name) => Err(BadInput::new(format!("unknown precision `{name}`")).hint(format!("known are {}", known()))),
        None => Ok(()),
    }
}

/// The case as a model that was saved quantized allows it: in the precision that it has.
fn in_own_precision(case: &Case, quantized: Option<&PreQuantized>) -> Result<Case, BadInput> {
    let Some(own) = quantized else { return Ok(case.clone()) };
    let others = || case.precisions.iter().find(|name| *name != own.precision);
    if let Some(other) = others().filter(|_| case.asked == Asked::ByName) {
        return Err(BadInput::new(format!(
            "`--precision {other}` is not possible: the weights of `{}` were saved in `{}`",
            case.model.model_id, own.precision
        ))
        .hint(format!("drop `--precision` to measure `{}`, or name the model that it was made from", own.precision)));
    }
    let mut case = Case { precisions: vec![own.precision.to_owned()], ..case.clone() };
    if case.format_options == FormatOptions::default() {
        case.format_options.int8_threshold = own.int8_threshold;
    }
    Ok(case)
}

/// The device that a choice means here. The parent creates no CUDA context, which would take memory from the workers.
fn device(choice: DeviceChoice) -> Result<DeviceChoice, BadInput> {
    let built = cfg!(feature = "cuda");
    let driver = std::path::Path::new("/proc/driver/nvidia/version").exists();
    match choice {
        DeviceChoice::Auto if built && driver => Ok(DeviceChoice::Cuda(0)),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(DeviceChoice::Cpu),
        DeviceChoice::Cuda(_) if !built => Err(BadInput::new("this build of quantbench has no CUDA support")
            .hint("use `--device cpu`, or build with `--features cuda` (scripts/cuda-toolkit.sh gets the toolkit)")),
        DeviceChoice::Cuda(_) => Ok(choice),
    }
}

/// Stands in for a worker that is not worth starting.
struct TooLarge {
    precision: String,
    oom: OutOfMemory,
}

impl TooLarge {
    fn refuse<T>(&self) -> Result<T, Failure> {
        Err(Failure::of(&self.oom.into()))
    }
}

impl Worker for TooLarge {
    fn precision(&self) -> &str {
        &self.precision
    }

    fn load(&mut self, _events: &dyn Listener) -> Result<LoadFacts, Failure> {
        self.refuse()
    }

    fn warm_up(&mut self, _events: &dyn Listener) -> Result<Warmed, Failure> {
        self.refuse()
    }

    fn repeat(&mut self, _events: &dyn Listener) -> Result<Sample, Failure> {
        self.refuse()
    }

    fn finish(&mut self, _events: &dyn Listener) -> Result<Finished, Failure> {
        self.refuse()
    }
}
