//! Everything of a case before the first worker starts: checks, the opened model, the prompt's ids, memory and bandwidth.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;

use super::bandwidth_cache::{BandwidthCache, DeviceBandwidth};
use super::case::{Case, Variant};
use super::checks::{self, Chosen};
use super::compared::{ComparedLogits, WrittenIds};
use super::environment::{self, Machine};
use super::estimate::{self, Work};
use super::exports::Exports;
use super::load::DeviceAssignment;
use super::open_model::{self, OpenModel};
use super::prompt::{self, TokenizedWorkload, Words};
use super::quality::EvalText;
use super::room::{MemoryBudget, NeverStarted};
use super::run_context::RunContext;
use super::schedule::{self, RunOrder, ScheduleContext, VariantOutcome, WorkerHandle};
use super::streaming::Streaming;
use super::task::Task;
use super::warnings::Warning;
use super::watch::Watch;
use super::watch::machine::Sensors;
use super::worker_process::{self, ProcessWorker};
use crate::call::{Batch, CacheScope, KvFormat};
use crate::engine::cpu::throughput::matmul_gflop_s;
use crate::engine::memory::MeasuredBandwidth;
use crate::engine::needs::Needs;
use crate::engine::{self, Device, Engine};
use crate::engines::EngineProgram;
use crate::events::{Collector, Event, Listener, Unit};
use crate::ipc::{self, Turns};
use crate::kernels::cpu::bandwidth::WorkingSet;
use crate::kernels::cpu::pool::{Pool, default_threads};
use crate::kernels::cpu::topology::last_level_cache_bytes;
use crate::kernels::isa::Isa;
use crate::kernels::nvml::Gpu;
use crate::os::memory::ProcessMemory;
use crate::plan::Model;
use crate::protocol::{self, Failure, Load};
use crate::quality::rows;
use crate::record;

/// Source of a device's bandwidth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BandwidthSource {
    /// An earlier run, where one is cached.
    Cache,
    /// A measurement by this run.
    Measurement,
}

/// The bandwidth that this process measured, and its number of threads.
static CPU_BANDWIDTH: Mutex<Option<(usize, MeasuredBandwidth)>> = Mutex::new(None);

/// A checked case and its opened model.
pub struct PreparedCase {
    opened: OpenModel,
    pub assignment: DeviceAssignment,
    pub workload: TokenizedWorkload,
    pub room: MemoryBudget,
    /// Warnings of the device's choice and of the model's files.
    warnings: Vec<Warning>,
    /// What other engines load.
    pub exports: Exports,
    /// Set where another engine is measured: whoever waits is stopped.
    turns: Option<Turns>,
    /// What variants wrote, for comparing engines.
    ids: WrittenIds,
}

impl PreparedCase {
    /// Finds the model, downloading what is missing, and gives the case as that model allows it.
    pub fn open(case: &Case, chosen: Chosen, events: &dyn Listener) -> Result<(Case, Self)> {
        let collector = Collector::new(events);
        let mut opened = open_model::open(&case.model, &collector)?;
        opened.select(&case.selection())?;
        let case = checks::as_saved(case, &opened.checkpoint)?;
        checks::check_engines(&case)?;
        checks::on_device(&case, chosen.device)?;
        let (case, mut prepared) = Self::new(&case, chosen.device, opened)?;
        for message in case.not_offered() {
            events.on(Event::Hint { message });
        }
        if let Some(message) = Words::of(&prepared.opened.checkpoint).hint(&case) {
            events.on(Event::Hint { message: message.to_owned() });
        }
        let collected = collector.warnings().into_iter();
        let of_model = collected.map(|(name, message)| Warning::Model { name, message });
        prepared.warnings = chosen.warning.into_iter().chain(of_model).collect();
        Ok((case, prepared))
    }

    /// The checks that need the model but no weights in memory, and the case with as many tokens as it affords.
    fn new(case: &Case, device: Device, opened: OpenModel) -> Result<(Case, Self)> {
        if case.has(Engine::Candle) {
            engine::candle::check(&opened.model, &opened.checkpoint.config)?;
        }
        let workload = prompt::workload(case, Words::of(&opened.checkpoint), &opened.model)?;
        // Fails early on a picture that cannot be read; the workers read it again.
        open_model::pixels(&opened.model, &opened.checkpoint, &workload.task.encode)?;
        let threads = if case.threads == 0 { default_threads() } else { case.threads };
        let assignment = DeviceAssignment { device, threads };
        let room = MemoryBudget::new(case, (&opened.model, &workload), device)?;
        let case =
            Case { n_gen: estimate::n_gen(case, &Work::new(&room, &opened.model, &workload, threads)), ..case.clone() };
        // A shorter workload needs less of everything.
        let workload = prompt::workload(&case, Words::of(&opened.checkpoint), &opened.model)?;
        let room = MemoryBudget::new(&case, (&opened.model, &workload), device)?;
        let turns = case.has_others().then(Turns::default);
        let (exports, ids) = (Exports::default(), WrittenIds::default());
        Ok((case, Self { opened, assignment, workload, room, warnings: Vec::new(), exports, turns, ids }))
    }

    /// Announces the work and its estimated time before it starts.
    fn announcement(&self, case: &Case) -> String {
        let work = Work::new(&self.room, self.model(), &self.workload, self.assignment.threads);
        estimate::announcement(case, &work, &self.opened.checkpoint.id)
    }

    pub fn model(&self) -> &Model {
        &self.opened.model
    }

    /// Operations of the matrix products in a decode step in the middle of a run.
    fn flops_per_step(&self) -> u64 {
        let task = &self.workload.task;
        let middle = task.n_before() + task.n_gen / 2;
        let batch = Batch { sequences: task.sequences, positions: (middle..middle + 1).into() };
        self.model().decoder.flops(self.model(), batch) as u64
    }

    /// Layers of the decoder.
    pub fn layers(&self) -> usize {
        self.model().cache_specs(KvFormat::Fp16).filter(|cache| cache.scope == CacheScope::Decoder).count()
    }

    /// The text that quality is measured on; `None` where quality was not asked for. Fails on a model whose quality cannot be measured.
    pub fn eval_text(&self, case: &Case) -> Result<Option<EvalText>> {
        case.quality.as_ref().map(|choice| EvalText::new(choice, &self.opened, &self.workload)).transpose()
    }

    /// The text of `ids`; `None` without a tokenizer.
    pub fn text(&self, ids: &[u32]) -> Option<String> {
        self.opened.checkpoint.tokenizer.as_ref()?.decode(ids, true).ok()
    }

    /// Properties that all records of the run share. Measures the memory's bandwidth, or takes it from the cache.
    pub fn context(&self, case: &Case, events: &dyn Listener) -> Result<RunContext> {
        events.on(Event::Note { message: self.announcement(case) });
        let mut context = self.unmeasured_context(case);
        if context.order == RunOrder::InTurn {
            let (needed_bytes, free_bytes) = (self.room.together_bytes(), self.room.free_bytes.unwrap_or(0));
            context.warnings.push(Warning::UnpairedRatios { needed_bytes, free_bytes });
        }
        if self.assignment.device == Device::Cpu {
            context.cache_bytes = last_level_cache_bytes().map(|bytes| bytes as u64);
        }
        let source =
            if case.protocol.measure_bandwidth { BandwidthSource::Measurement } else { BandwidthSource::Cache };
        let DeviceBandwidth { measured, since } = self.bandwidth(case, source, events)?;
        (context.read_gb_s, context.copy_gb_s, context.bandwidth_since) =
            (measured.read_gb_s, measured.copy_gb_s, since);
        context.matmul_gflop_s = measured.matmul_gflop_s;
        Ok(context)
    }

    /// Opens what is read while repeats run, and completes `context` by what the driver knows of the device. Nothing may run yet:
    /// the idle power is measured.
    pub fn sensors(&self, context: &mut RunContext) -> Sensors {
        let gpu = match self.assignment.device {
            Device::Cuda(ordinal) => Gpu::open(ordinal),
            Device::Cpu => None,
        };
        if self.assignment.device != Device::Cpu {
            let theoretical_gb_s = gpu.as_ref().and_then(Gpu::theoretical_gb_s);
            let unknown = || "NVML does not report the memory's clock and bus width".to_owned();
            context.theoretical_gb_s = theoretical_gb_s.ok_or_else(unknown);
        }
        if let Some(gpu) = &gpu {
            context.cache_bytes = gpu.l2_bytes;
            context.environment.gpu = gpu.name();
            context.environment.isa = gpu.isa().unwrap_or_default();
            if let (Some(name), Device::Cuda(ordinal)) = (gpu.name(), self.assignment.device) {
                context.device.name = format!("{name} (cuda:{ordinal})");
            }
            context.environment.driver = gpu.driver();
            context.environment.cuda = gpu.cuda();
        }
        let mut sensors = Sensors::below("/", gpu);
        context.counter = sensors.counter();
        sensors
    }

    /// Properties that all records share, as far as they are known without measuring the machine.
    pub fn unmeasured_context(&self, case: &Case) -> RunContext {
        let (machine, order) = (Machine::default(), self.room.order());
        let is_cpu = self.assignment.device == Device::Cpu;
        let isa = if is_cpu { Isa::detect().name() } else { "" };
        let threads = is_cpu.then(|| environment::too_many_threads(self.assignment.threads)).flatten();
        let cut = self.workload.longest_given;
        let cut = cut.map(|longest| Warning::PromptsCut { longest, n_prompt: self.workload.n_prompt });
        let warnings = [machine.warnings(), Vec::from_iter(threads), Vec::from_iter(cut), self.warnings.clone()];
        let warnings = warnings.concat();
        RunContext {
            engine: environment::engine_info(Engine::Quantbench),
            command: case.command.clone(),
            timestamp: environment::timestamp(),
            model: self.model_facts(),
            weights: self.weight_facts(),
            device: self.device_facts(&machine),
            workload: self.workload.recorded(),
            largest_batch: case.largest_batch,
            n_before: self.workload.task.n_before() as u64,
            flops_per_step: self.flops_per_step(),
            environment: machine.environment(isa, self.assignment.threads),
            format_options: case.format_options,
            keep_fp16: case.keep_fp16.clone(),
            protocol: case.protocol.clone(),
            order,
            resolve_s: self.opened.checkpoint.resolve_s,
            read_gb_s: None,
            copy_gb_s: None,
            matmul_gflop_s: None,
            bandwidth_since: None,
            theoretical_gb_s: Err("the memory's speed is in DMI tables, which only root may read".to_owned()),
            cache_bytes: None,
            counter: None,
            warnings,
        }
    }

    /// Bandwidth of the device that is measured. Fails where there is none.
    pub fn bandwidth(&self, case: &Case, source: BandwidthSource, events: &dyn Listener) -> Result<DeviceBandwidth> {
        let cache = match self.assignment.device {
            Device::Cuda(ordinal) => Gpu::open(ordinal).as_ref().and_then(BandwidthCache::of),
            // What a machine gives to processors varies from run to run.
            Device::Cpu => None,
        };
        if source == BandwidthSource::Cache
            && let Some(known) = cache.as_ref().and_then(BandwidthCache::load)
        {
            return Ok(known);
        }
        events.on(Event::Begin { label: "memory bandwidth".to_owned(), total: 2, unit: Unit::Runs });
        let measured = match self.assignment.device {
            Device::Cuda(ordinal) => match worker_process::bandwidth(ordinal, case.protocol.deadline) {
                Err(bad @ Failure::BadInput { .. }) => Err(ipc::into_error(bad)),
                // The precisions can do without it, and fail on their own where the device does.
                measured => Ok(measured.unwrap_or_default()),
            },
            Device::Cpu => Ok(self.cpu_bandwidth(source, events)),
        };
        events.on(Event::End);
        let measured = measured?;
        if let Some(cache) = cache {
            cache.store(measured, &environment::timestamp());
        }
        Ok(DeviceBandwidth { measured, since: None })
    }

    /// The pool ends with the measurement, so that no thread of the parent is awake beside the workers. `None` where the
    /// memory for it cannot be had.
    ///
    /// Several cases of one run share what the first one measured.
    fn cpu_bandwidth(&self, source: BandwidthSource, events: &dyn Listener) -> MeasuredBandwidth {
        let mut known = CPU_BANDWIDTH.lock().unwrap_or_else(PoisonError::into_inner);
        match *known {
            Some((threads, measured)) if source == BandwidthSource::Cache && threads == self.assignment.threads => {
                measured
            }
            _ => {
                let measured = self.measure_cpu_bandwidth(events);
                *known = Some((self.assignment.threads, measured));
                measured
            }
        }
    }

    fn measure_cpu_bandwidth(&self, events: &dyn Listener) -> MeasuredBandwidth {
        let (isa, pool) = (Isa::detect(), Pool::new(self.assignment.threads));
        let _pinned = pool.pin_caller();
        let Ok(mut memory) = WorkingSet::new(&pool) else { return MeasuredBandwidth::default() };
        let read_gb_s = Some(memory.read_gb_s(isa, &pool));
        events.on(Event::Progress { done: 1 });
        let copy_gb_s = Some(memory.copy_gb_s(isa, &pool));
        MeasuredBandwidth { read_gb_s, copy_gb_s, matmul_gflop_s: Some(matmul_gflop_s(isa, &pool)) }
    }

    pub fn outcomes(
        &self,
        case: &Case,
        order: RunOrder,
        watch: &mut dyn Watch,
        events: &dyn Listener,
    ) -> Result<Vec<VariantOutcome>> {
        let variants = case.variants();
        let start = |at: usize| self.worker(case, &variants[at], self.room.needs[at]);
        let decode = |ids: &[u32]| self.text(ids);
        let events = &Streaming::new(events, &decode);
        let mut schedule_context = ScheduleContext { start: &start, n_workers: variants.len(), order, watch, events };
        let mut outcomes = schedule::measure(&mut schedule_context, &case.protocol).map_err(ipc::into_error)?;
        for (outcome, needs) in outcomes.iter_mut().zip(&self.room.needs) {
            outcome.needed_bytes = needs.bytes();
        }
        Ok(outcomes)
    }

    /// A worker process; a stand-in that refuses where the variant cannot be started, or of our own engines alone exceeds the free memory
    /// of the host. A GPU refuses by itself.
    pub fn worker(&self, case: &Case, variant: &Variant, needs: Needs) -> Box<dyn WorkerHandle> {
        let needed_bytes = needs.bytes();
        let room_bytes = [ProcessMemory::default().room_bytes(), case.protocol.memory_limit_bytes];
        let room_bytes = room_bytes.into_iter().flatten().min();
        let is_own_on_host = self.assignment.device == Device::Cpu && variant.own_engine().is_some();
        let too_little = room_bytes.filter(|room| is_own_on_host && needed_bytes > *room);
        if let Some(free_bytes) = too_little {
            return Box::new(NeverStarted::too_large(variant.label(), needed_bytes, free_bytes));
        }
        match self.process(case, variant, needed_bytes) {
            Ok(worker) => Box::new(worker),
            Err(failure) => Box::new(NeverStarted { label: variant.label(), failure }),
        }
    }

    /// The process of a variant, not started yet.
    pub fn process(&self, case: &Case, variant: &Variant, needed_bytes: u64) -> Result<ProcessWorker, Failure> {
        let worker = match variant {
            Variant::Own { engine, precision } => {
                let request = self.workload.load_request(case, (*engine, *precision), self.assignment);
                ProcessWorker::new(request, needed_bytes, case.protocol.deadline)?
            }
            Variant::Other { program, precision, .. } => {
                self.other(case, (program, precision), &self.workload.task, needed_bytes)?
            }
        };
        let compared = if case.engines == [Engine::Quantbench.into()] { None } else { self.compared(case, variant) };
        let saved = self.workload.logits_file(case, variant);
        Ok(worker.with_turns(self.turns.clone()).with_logits(saved, compared))
    }

    /// The logits that a variant is compared by. Of another engine they also show whether it computes numbers.
    fn compared(&self, case: &Case, variant: &Variant) -> Option<ComparedLogits> {
        let at = case.variants().iter().position(|known| known == variant)?;
        let path = self.exports.logits_file(&variant.label()).ok()?;
        let max_rows = rows::max_rows(self.model().vocab);
        let reference = case.compared_with(at).unwrap_or(at);
        Some(ComparedLogits { path, max_rows, variant: at, reference, ids: self.ids.clone() })
    }

    /// Another engine's process, with the same weights and ids; `needed_bytes` are 0 where unknown.
    pub fn other(
        &self,
        case: &Case,
        (program, precision): (&EngineProgram, &str),
        task: &Task,
        needed_bytes: u64,
    ) -> Result<ProcessWorker, Failure> {
        let DeviceAssignment { device, threads } = self.assignment;
        let task = self
            .exports
            .task(task, || open_model::pixels(&self.opened.model, &self.opened.checkpoint, &task.encode))?;
        let load = Load {
            protocol: protocol::VERSION,
            model: self.exports.model(program.form(), &self.opened)?.to_string_lossy().into_owned(),
            precision: precision.to_owned(),
            device: device.name(),
            threads,
            batch: task.sequences,
            capacity: task.capacity(),
            seed: case.model.seed,
            memory_limit_bytes: case.protocol.memory_limit_bytes,
            directory: PathBuf::new(),
            options: serde_json::Value::Null,
        };
        let timeout = Duration::try_from_secs_f64(case.engine_timeout_s).unwrap_or(Duration::MAX);
        let command = program.command(threads, timeout);
        let label = format!("{}-{precision}", program.name);
        let worker = ProcessWorker::of(label, command, (load, task, device), needed_bytes);
        Ok(worker.with_deadline(case.protocol.deadline))
    }

    fn model_facts(&self) -> record::ModelFacts {
        record::ModelFacts {
            id: self.opened.checkpoint.id.clone(),
            revision: self.opened.checkpoint.revision.clone(),
            architecture: self.opened.model.architecture.to_owned(),
            parameters: self.opened.model.parameters() as u64,
            experts: self
                .opened
                .model
                .experts()
                .map(|(per_token, total)| record::ExpertFacts { total: total as u64, per_token: per_token as u64 }),
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
            fp16_overflow_by_tensor: Default::default(),
        }
    }

    fn device_facts(&self, machine: &Machine) -> record::DeviceFacts {
        match self.assignment.device {
            Device::Cuda(ordinal) => record::DeviceFacts { kind: "cuda".to_owned(), name: format!("cuda:{ordinal}") },
            _ => record::DeviceFacts { kind: "cpu".to_owned(), name: machine.cpu_name() },
        }
    }
}
