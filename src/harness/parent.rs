//! One case → records: check everything, measure the memory, run the workers.

use anyhow::Result;

use super::assemble::{self, Facts};
use super::checks::Chosen;
use super::environment::{self, Machine};
use super::kept::{Kept, Known};
use super::measure::Encode;
use super::memory::ProcessMemory;
use super::process::{self, ProcessWorker};
use super::prompt::{self, Words, Workload};
use super::protocol::{Failure, Job, Share};
use super::quality::{Failed, Passage};
use super::room::{Room, TooLarge};
use super::schedule::{self, Order, Outcome, Stage, Worker};
use super::warnings::Warning;
use super::watch::Watch;
use super::watch::machine::{MachineWatch, Sensors};
use super::worker::{self, Opened};
use super::{Case, DeviceChoice, Row, checks};
use crate::engine::memory::MeasuredBandwidth;
use crate::engine::needs::Needs;
use crate::engine::{self, Engine};
use crate::error::BadInput;
use crate::events::{Collector, Event, Listener, Silent, Unit};
use crate::kernels::cpu::bandwidth::WorkingSet;
use crate::kernels::cpu::pool::{Pool, default_threads};
use crate::kernels::cpu::topology::last_level_cache_bytes;
use crate::kernels::isa::Isa;
use crate::kernels::nvml::Gpu;
use crate::record::{self, Record};

/// Measures every precision of `case`. Fails on input that cannot be used; a precision that fails becomes a record.
pub fn run(case: &Case, events: &dyn Listener) -> Result<Vec<Record>> {
    let chosen = checks::check(case)?;
    let (case, plan) = &Plan::open(case, chosen, events)?;
    let passage = plan.passage(case)?;
    let mut facts = plan.facts(case, events)?;
    let mut watch = MachineWatch::new(plan.sensors(&mut facts));
    let outcomes = plan.outcomes(case, facts.order, &mut watch, events)?;
    let decode = |ids: &[u32]| plan.text(ids);
    let mut records = assemble::records(&facts, case, &outcomes, &decode);
    if let Some(read_gb_s) = facts.read_gb_s.filter(|_| exceeds_bandwidth(&records)) {
        // A kernel that reads faster than the benchmark did shows that the benchmark was disturbed, or that caches helped.
        let again = plan.bandwidth(case, Bandwidth::Measured, events)?.measured.read_gb_s;
        let higher = again.filter(|again| *again > read_gb_s);
        facts.bandwidth_since = facts.bandwidth_since.take().filter(|_| higher.is_none());
        facts.read_gb_s = Some(higher.unwrap_or(read_gb_s));
        records = assemble::records(&facts, case, &outcomes, &decode);
    }
    add_quality(plan, case, passage, &mut records, events)?;
    Ok(records)
}

/// Fails where [`run`] would fail before anything is measured.
pub fn check(case: &Case) -> Result<()> {
    let chosen = checks::check(case)?;
    Plan::open(case, chosen, &Silent).map(drop)
}

/// Measures the quality of every precision of `case` and no speed. Fails on input that cannot be used and on a model that
/// has no quality; a precision that fails becomes a record.
pub fn quality(case: &Case, events: &dyn Listener) -> Result<Vec<Record>> {
    let chosen = checks::check(case)?;
    let (case, plan) = &Plan::open(case, chosen, events)?;
    let Some(passage) = plan.passage(case)? else { return Ok(Vec::new()) };
    let mut records = assemble::unmeasured(&plan.facts_unmeasured(case), case);
    for Failed { at, failure } in passage.measure(case, (plan.share, &plan.opened.model), &mut records, events)? {
        assemble::fail(&mut records[at], &failure);
    }
    Ok(records)
}

/// Quality beside speed: where one precision fails at it, its speed stays.
fn add_quality(
    plan: &Plan,
    case: &Case,
    passage: Option<Passage>,
    records: &mut [Record],
    events: &dyn Listener,
) -> Result<()> {
    let warn = |record: &mut Record, reason: String| record.warnings.push(Warning::NoQuality { reason }.to_string());
    let Some(passage) = passage else { return Ok(()) };
    for Failed { at, failure } in passage.measure(case, (plan.share, &plan.opened.model), records, events)? {
        warn(&mut records[at], failure.message().to_owned());
    }
    Ok(())
}

/// What no precision can do anything about.
pub(super) fn into_error(failure: Failure) -> anyhow::Error {
    match failure {
        Failure::BadInput { message, hint: Some(hint) } => BadInput::new(message).hint(hint).into(),
        Failure::BadInput { message, hint: None } => BadInput::new(message).into(),
        other => anyhow::anyhow!(other.message().to_owned()),
    }
}

fn exceeds_bandwidth(records: &[Record]) -> bool {
    records.iter().any(|record| record.bandwidth.mbu.is_some_and(|mbu| mbu > 1.0))
}

/// Whether a bandwidth of an earlier run is good enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bandwidth {
    Kept,
    Measured,
}

/// A case that was checked.
pub(super) struct Plan {
    opened: Opened,
    pub(super) share: Share,
    pub(super) workload: Workload,
    pub(super) room: Room,
    /// From choosing the device and opening the model.
    warnings: Vec<Warning>,
}

impl Plan {
    /// Finds the model, downloading what is missing, and gives the case as that model allows it.
    pub(super) fn open(case: &Case, chosen: Chosen, events: &dyn Listener) -> Result<(Case, Self)> {
        let collector = Collector::new(events);
        let mut opened = worker::open(&case.model, &collector)?;
        opened.select(&case.selection())?;
        let case = checks::in_own_precision(case, opened.checkpoint.quantized.as_ref())?;
        checks::check_engines(&case)?;
        let mut plan = Self::new(&case, chosen.device, opened)?;
        if let Some(message) = Words::of(&plan.opened.checkpoint).hint(&case) {
            events.on(Event::Hint { message: message.to_owned() });
        }
        let collected = collector.warnings().into_iter();
        let of_model = collected.map(|(name, message)| Warning::Model { name, message });
        plan.warnings = chosen.warning.into_iter().chain(of_model).collect();
        Ok((case, plan))
    }

    /// The checks that need the model but no weights in memory.
    fn new(case: &Case, device: DeviceChoice, opened: Opened) -> Result<Self> {
        if case.engines.contains(&Engine::Candle) {
            engine::candle::check(&opened.model, &opened.checkpoint.config)?;
        }
        let workload = prompt::workload(case, Words::of(&opened.checkpoint), &opened.model)?;
        // Whether the picture can be read; the workers read it again.
        worker::pixels(&opened.model, &opened.checkpoint, &workload.task.encode)?;
        let threads = if case.threads == 0 { default_threads() } else { case.threads };
        let share = Share { device, threads };
        let room = Room::new(case, (&opened.model, &workload), device)?;
        Ok(Self { opened, share, workload, room, warnings: Vec::new() })
    }

    /// The text that quality is measured on, where it was asked for. Fails at once on a model whose quality cannot be measured.
    fn passage(&self, case: &Case) -> Result<Option<Passage>> {
        case.quality.as_ref().map(|choice| Passage::new(choice, &self.opened, &self.workload)).transpose()
    }

    /// What `ids` say, where there is a tokenizer.
    pub(super) fn text(&self, ids: &[u32]) -> Option<String> {
        self.opened.checkpoint.tokenizer.as_ref()?.decode(ids, true).ok()
    }

    pub(super) fn facts(&self, case: &Case, events: &dyn Listener) -> Result<Facts> {
        let mut facts = self.facts_unmeasured(case);
        if facts.order == Order::InTurn {
            let (needed_bytes, free_bytes) = (self.room.together_bytes(), self.room.free_bytes.unwrap_or(0));
            facts.warnings.push(Warning::UnpairedRatios { needed_bytes, free_bytes });
        }
        if self.share.device == DeviceChoice::Cpu {
            facts.cache_bytes = last_level_cache_bytes().map(|bytes| bytes as u64);
        }
        let wanted = if case.protocol.measure_bandwidth { Bandwidth::Measured } else { Bandwidth::Kept };
        let Known { measured, since } = self.bandwidth(case, wanted, events)?;
        (facts.read_gb_s, facts.copy_gb_s, facts.bandwidth_since) = (measured.read_gb_s, measured.copy_gb_s, since);
        Ok(facts)
    }

    /// What is read while repeats run, and what the driver knows of the device. Nothing may run yet: the idle power is taken.
    pub(super) fn sensors(&self, facts: &mut Facts) -> Sensors {
        let gpu = match self.share.device {
            DeviceChoice::Cuda(ordinal) => Gpu::open(ordinal),
            DeviceChoice::Cpu | DeviceChoice::Auto => None,
        };
        if self.share.device != DeviceChoice::Cpu {
            facts.theoretical_gb_s = Err("NVML does not tell the memory's clock and bus".to_owned());
        }
        if let Some(gpu) = &gpu {
            facts.theoretical_gb_s = gpu.theoretical_gb_s().ok_or_else(|| "NVML does not tell it here".to_owned());
            facts.cache_bytes = gpu.l2_bytes;
            facts.environment.gpu = gpu.name();
            facts.environment.isa = gpu.isa().unwrap_or_default();
            if let (Some(name), DeviceChoice::Cuda(ordinal)) = (gpu.name(), self.share.device) {
                facts.device.name = format!("{name} (cuda:{ordinal})");
            }
            facts.environment.driver = gpu.driver();
            facts.environment.cuda = gpu.cuda();
        }
        let mut sensors = Sensors::below("/", gpu);
        facts.counter = sensors.counter();
        sensors
    }

    /// What is known without measuring the machine.
    fn facts_unmeasured(&self, case: &Case) -> Facts {
        let (machine, order) = (Machine::default(), self.room.order());
        let is_cpu = self.share.device == DeviceChoice::Cpu;
        let isa = if is_cpu { Isa::detect().name() } else { "" };
        let threads = is_cpu.then(|| environment::too_many_threads(self.share.threads)).flatten();
        let warnings = [machine.warnings(), Vec::from_iter(threads), self.warnings.clone()].concat();
        Facts {
            engine: engine_facts(Engine::Quantbench),
            command: case.command.clone(),
            timestamp: environment::timestamp(),
            model: self.model_facts(),
            weights: self.weight_facts(),
            device: self.device_facts(&machine),
            workload: workload_facts(&self.workload),
            n_before: (self.workload.task.depth.len() + self.workload.task.prompt.len()) as u64,
            environment: machine.environment(isa, self.share.threads),
            format_options: case.format_options,
            keep_fp16: case.keep_fp16.clone(),
            protocol: case.protocol.clone(),
            order,
            resolve_s: self.opened.checkpoint.resolve_s,
            read_gb_s: None,
            copy_gb_s: None,
            bandwidth_since: None,
            theoretical_gb_s: Err("the memory's speed stands in DMI tables, which root alone may read".to_owned()),
            cache_bytes: None,
            counter: None,
            warnings,
        }
    }

    /// Of the device that is measured. Fails where there is none.
    fn bandwidth(&self, case: &Case, wanted: Bandwidth, events: &dyn Listener) -> Result<Known> {
        let kept = match self.share.device {
            DeviceChoice::Cuda(ordinal) => Gpu::open(ordinal).as_ref().and_then(Kept::of),
            // What a machine gives to processors varies from run to run.
            DeviceChoice::Cpu | DeviceChoice::Auto => None,
        };
        if wanted == Bandwidth::Kept
            && let Some(known) = kept.as_ref().and_then(Kept::recall)
        {
            return Ok(known);
        }
        events.on(Event::Begin { label: "memory bandwidth".to_owned(), total: 2, unit: Unit::Runs });
        let measured = match self.share.device {
            DeviceChoice::Cuda(ordinal) => match process::bandwidth(ordinal, case.protocol.deadline) {
                Err(bad @ Failure::BadInput { .. }) => Err(into_error(bad)),
                // The precisions can do without it, and fail on their own where the device does.
                measured => Ok(measured.unwrap_or_default()),
            },
            DeviceChoice::Cpu | DeviceChoice::Auto => Ok(self.cpu_bandwidth(events)),
        };
        events.on(Event::End);
        let measured = measured?;
        if let Some(kept) = kept {
            kept.keep(measured, &environment::timestamp());
        }
        Ok(Known { measured, since: None })
    }

    /// The pool ends with the measurement, so that no thread of the parent is awake beside the workers. `None` where the
    /// memory for it cannot be had.
    fn cpu_bandwidth(&self, events: &dyn Listener) -> MeasuredBandwidth {
        let (isa, pool) = (Isa::detect(), Pool::new(self.share.threads));
        let _pinned = pool.pin_caller();
        let Ok(mut memory) = WorkingSet::new(&pool) else { return MeasuredBandwidth::default() };
        let read_gb_s = Some(memory.read_gb_s(isa, &pool));
        events.on(Event::Progress { done: 1 });
        MeasuredBandwidth { read_gb_s, copy_gb_s: Some(memory.copy_gb_s(isa, &pool)) }
    }

    fn outcomes(
        &self,
        case: &Case,
        order: Order,
        watch: &mut dyn Watch,
        events: &dyn Listener,
    ) -> Result<Vec<Outcome>> {
        let rows = case.rows();
        let start = |at: usize| self.worker(case, &rows[at], self.room.needs[at]);
        let mut stage = Stage { start: &start, n_workers: rows.len(), order, watch, events };
        let mut outcomes = schedule::measure(&mut stage, &case.protocol).map_err(into_error)?;
        for (outcome, needs) in outcomes.iter_mut().zip(&self.room.needs) {
            outcome.needed_bytes = needs.bytes();
        }
        Ok(outcomes)
    }

    /// A worker process, or for a precision that alone exceeds what is free, its refusal. A GPU is asked by trying.
    pub(super) fn worker(&self, case: &Case, row: &Row, needs: Needs) -> Box<dyn Worker> {
        let needed_bytes = needs.bytes();
        let room_bytes = [ProcessMemory::default().room_bytes(), case.protocol.memory_limit_bytes];
        let room_bytes = room_bytes.into_iter().flatten().min();
        let too_little = room_bytes.filter(|room| self.share.device == DeviceChoice::Cpu && needed_bytes > *room);
        if let Some(free_bytes) = too_little {
            return Box::new(TooLarge { label: row.label(), needed_bytes, free_bytes });
        }
        let job = Job::new(case, row, self.share, &self.workload);
        Box::new(ProcessWorker::new(job, needed_bytes, case.protocol.deadline))
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
        record::WeightFacts {
            source: info.source.name().to_owned(),
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
}

pub(super) fn workload_facts(workload: &Workload) -> record::Workload {
    let Workload { task, n_prompt, n_image, .. } = workload;
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

/// As records name it.
pub fn engine_facts(engine: Engine) -> record::Engine {
    let commit = match engine {
        Engine::Quantbench => option_env!("QUANTBENCH_COMMIT").unwrap_or("unknown"),
        Engine::Candle => "release",
    };
    record::Engine { name: engine.name().to_owned(), version: engine.version().to_owned(), commit: commit.to_owned() }
}
