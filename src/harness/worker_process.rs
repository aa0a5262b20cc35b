//! A worker in a process of its own, seen from the parent.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::case::Variant;
use super::clock::Monotonic;
use super::compared::ComparedLogits;
use super::load::{LoadReport, LoadRequest, OwnLoaded};
use super::measure::Bench;
use super::measured::{FinishReport, Sample, WarmupReport};
use super::port::EnginePort;
use super::room::free_bytes;
use super::schedule::WorkerHandle;
use super::served::OwnRows;
use super::task::{Task, Wait};
use crate::engine::memory::MeasuredBandwidth;
use crate::engine::{Device, Footprint, OutlierColumns};
use crate::events::{Event, Listener, Silent};
use crate::ipc::{self, Deadline, EngineCommand, EngineProcess, Turns};
use crate::kernels::nvml::Gpu;
use crate::os::cpu_usage::CpuAccounts;
use crate::os::memory::ProcessMemory;
use crate::protocol::{
    BandwidthReport, BandwidthRequest, Encode, EngineReply, EngineRequest, Failure, Finish, Finished, HeldModel, Load,
    Logits, MemoryReport, MemoryRequest, RowsReply, RunReport, RunRequest, Score, capability,
};

/// The hidden subcommand that runs [`super::worker_main`].
pub const SUBCOMMAND: &str = "worker";

/// Buffers from this size on go back to the system as soon as they are freed. glibc otherwise raises the bound while it loads
/// and keeps memory that is not in use, which would count as resident.
const MMAP_THRESHOLD_BYTES: &str = "1048576";

/// The role of our own worker in messages.
const OWN_ROLE: &str = "worker";

pub struct ProcessWorker {
    /// Label of the variant that it measures.
    label: String,
    command: EngineCommand,
    load: Load,
    task: Task,
    device: Device,
    /// Estimate of the memory that the worker will hold.
    needed_bytes: u64,
    deadline: Option<Deadline>,
    /// File of the user's for the logits of an untimed pass after the last repeat.
    save_logits: Option<PathBuf>,
    /// File for logits that engines are compared by.
    compared_logits: Option<ComparedLogits>,
    /// The others that it is measured beside, where they are stopped meanwhile.
    turns: Option<Turns>,
    /// `None` until [`WorkerHandle::load`].
    running: Option<Running>,
}

/// A loaded engine.
struct Running {
    engine: EngineProcess,
    bench: Bench<Monotonic>,
    /// What another engine holds; `None` for our own.
    held: Option<HeldModel>,
    waited_ticks: u64,
}

impl ProcessWorker {
    /// A worker of our own engines.
    pub fn new(request: LoadRequest, needed_bytes: u64, deadline: Option<Deadline>) -> Result<Self, Failure> {
        let variant = Variant::Own { engine: request.options.engine, precision: request.precision };
        let load = request.wire().map_err(|cause| error(format!("writing the request to load: {cause}")))?;
        let command = command(request.threads)?;
        let (task, device) = (request.task, request.device);
        Ok(Self { deadline, ..Self::of(variant.label(), command, (load, task, device), needed_bytes) })
    }

    /// Another engine.
    pub fn of(label: String, command: EngineCommand, work: (Load, Task, Device), needed_bytes: u64) -> Self {
        let (load, task, device) = work;
        let (save_logits, compared_logits, deadline, turns, running) = (None, None, None, None, None);
        Self {
            label,
            command,
            load,
            task,
            device,
            needed_bytes,
            deadline,
            save_logits,
            compared_logits,
            turns,
            running,
        }
    }

    /// The same in the worker process of another build.
    pub fn with_binary(mut self, binary: PathBuf) -> Self {
        self.command.program = binary;
        self
    }

    /// The same beside others that are stopped while it runs.
    pub fn with_turns(self, turns: Option<Turns>) -> Self {
        Self { turns, ..self }
    }

    pub fn with_deadline(self, deadline: Option<Deadline>) -> Self {
        Self { deadline, ..self }
    }

    /// The same with files for the logits of a pass after the last repeat: the user's, and one to compare engines by.
    pub fn with_logits(self, save_logits: Option<PathBuf>, compared_logits: Option<ComparedLogits>) -> Self {
        Self { save_logits, compared_logits, ..self }
    }

    fn port(&mut self) -> Result<(Port<'_>, &mut Bench<Monotonic>), Failure> {
        let Running { engine, bench, .. } = self.running.as_mut().ok_or_else(|| error("the worker was not started"))?;
        Ok((Port { engine, needed_bytes: self.needed_bytes, device: self.device, events: &Silent }, bench))
    }

    /// Writes the logits that predict the scored tokens of a window, after [`WorkerHandle::load`], and gives the outlier columns of all
    /// calls so far.
    pub fn score(&mut self, score: &Score) -> Result<OutlierColumns, Failure> {
        // A picture's values lie where the task says.
        let score = Score { encode: self.task.encode.clone(), ..score.clone() };
        let mut port = self.port()?.0;
        if !port.can(capability::SCORE) {
            return Err(error("this engine predicts no given text (it does not say `score`)"));
        }
        let rows = port.score(&score)?;
        Ok(serde_json::from_value::<OwnRows>(rows.details).unwrap_or_default().outliers)
    }

    /// Greedy ids of one run, after [`WorkerHandle::load`].
    pub fn generate(&mut self, run: &RunRequest) -> Result<Vec<u32>, Failure> {
        let mut run = RunRequest { encode: self.task.encode.clone(), ..run.clone() };
        if self.running.as_ref().is_some_and(|running| running.held.is_some()) {
            // What a picture's prompt is to our own cache is one text to another engine.
            run.prompt.splice(..0, std::mem::take(&mut run.depth));
        }
        Ok(self.port()?.0.run(&run)?.ids)
    }
}

/// Names the variant whose tokens pass, up to the end of its text.
struct StreamedText<'a> {
    label: String,
    stop_at: Vec<u32>,
    has_ended: AtomicBool,
    rest: &'a dyn Listener,
}

impl Listener for StreamedText<'_> {
    fn on(&self, event: Event) {
        let Event::Token { id, .. } = event else { return self.rest.on(event) };
        if !self.has_ended.load(Ordering::Relaxed) {
            self.rest.on(Event::Token { label: self.label.clone(), id });
            self.has_ended.store(self.stop_at.contains(&id), Ordering::Relaxed);
        }
    }
}

/// The engine of a worker, with what its failures need.
struct Port<'a> {
    engine: &'a mut EngineProcess,
    needed_bytes: u64,
    device: Device,
    events: &'a dyn Listener,
}

impl Port<'_> {
    fn ask(&mut self, request: &EngineRequest) -> Result<EngineReply, Failure> {
        let (needed_bytes, device) = (self.needed_bytes, self.device);
        self.engine
            .ask(request, self.events, || (needed_bytes, free_bytes(device).unwrap_or(0)))
            .map_err(|failure| with_sizes(failure, needed_bytes, || free_bytes(device)))
    }
}

impl EnginePort for Port<'_> {
    fn can(&self, capability: &str) -> bool {
        self.engine.can(capability)
    }

    fn run(&mut self, run: &RunRequest) -> Result<RunReport, Failure> {
        match self.ask(&EngineRequest::Run(run.clone()))? {
            EngineReply::Run(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    fn memory(&mut self) -> Result<MemoryReport, Failure> {
        match self.ask(&EngineRequest::Memory(MemoryRequest {}))? {
            EngineReply::Memory(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    fn finish(&mut self, finish: &Finish) -> Result<Finished, Failure> {
        match self.ask(&EngineRequest::Finish(finish.clone()))? {
            EngineReply::Finish(finished) => Ok(finished),
            other => unexpected(&other),
        }
    }

    fn logits(&mut self, logits: &Logits) -> Result<RowsReply, Failure> {
        match self.ask(&EngineRequest::Logits(logits.clone()))? {
            EngineReply::Logits(rows) => Ok(rows),
            other => unexpected(&other),
        }
    }

    fn score(&mut self, score: &Score) -> Result<RowsReply, Failure> {
        match self.ask(&EngineRequest::Score(score.clone()))? {
            EngineReply::Score(rows) => Ok(rows),
            other => unexpected(&other),
        }
    }
}

/// Memory that a process has of a device, by its driver; `None` on the CPU.
fn device_bytes(device: Device, pid: u32) -> Option<u64> {
    let Device::Cuda(ordinal) = device else { return None };
    let processes = Gpu::open(ordinal)?.processes()?;
    // One without a context has none.
    processes.iter().find(|process| process.pid == pid).map_or(Some(0), |process| process.bytes)
}

/// Adds the sizes that a worker cannot know to its out-of-memory failure: what it needs in all, and what is free.
fn with_sizes(failure: Failure, needed_bytes: u64, free: impl Fn() -> Option<u64>) -> Failure {
    match failure {
        Failure::OutOfMemory { message, wanted_bytes, free_bytes: 0 } if !ipc::has_sizes(&message) => {
            let free_bytes = free().unwrap_or(0);
            let cause = message.strip_prefix("out of memory").map(|rest| rest.trim_start_matches([':', ' ']));
            let message = ipc::out_of_memory(cause.unwrap_or(&message), needed_bytes, free_bytes);
            Failure::OutOfMemory { message, wanted_bytes, free_bytes }
        }
        other => other,
    }
}

/// Read and copy bandwidth of a CUDA device, measured by a process that ends with it: a context takes memory.
pub fn bandwidth(ordinal: usize, deadline: Option<Deadline>) -> Result<MeasuredBandwidth, Failure> {
    let free_bytes = || free_bytes(Device::Cuda(ordinal)).unwrap_or(0);
    let mut engine = EngineProcess::start(command(1)?, deadline, None)?;
    let request = EngineRequest::Bandwidth(BandwidthRequest { device: ordinal });
    match engine.ask(&request, &Silent, || (0, free_bytes()))? {
        EngineReply::Bandwidth(BandwidthReport { read_gb_s, copy_gb_s }) => {
            Ok(MeasuredBandwidth { read_gb_s, copy_gb_s, matmul_gflop_s: None })
        }
        other => unexpected(&other),
    }
}

/// The worker of this build.
fn command(threads: usize) -> Result<EngineCommand, Failure> {
    Ok(EngineCommand {
        role: OWN_ROLE,
        program: std::env::current_exe().map_err(|cause| error(format!("finding this program: {cause}")))?,
        arguments: vec![SUBCOMMAND.into()],
        environment: vec![
            ("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD_BYTES.into()),
            // The number of threads of candle's own kernels.
            ("RAYON_NUM_THREADS", threads.to_string().into()),
        ],
        timeout: None,
    })
}

/// Fails for a reply of another kind than the request, which [`EngineProcess::ask`] checked.
fn unexpected<T>(reply: &EngineReply) -> Result<T, Failure> {
    Err(error(format!("the worker answered with `{}`", reply.name())))
}

fn error(message: impl Into<String>) -> Failure {
    Failure::error(message)
}

impl WorkerHandle for ProcessWorker {
    fn label(&self) -> &str {
        &self.label
    }

    fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.engine.id())
    }

    fn load(&mut self, events: &dyn Listener) -> Result<LoadReport, Failure> {
        self.running = None;
        let (needed_bytes, device) = (self.needed_bytes, self.device);
        let mut engine = EngineProcess::start(self.command.clone(), self.deadline, self.turns.clone())?;
        let is_own = self.command.role == OWN_ROLE;
        if !is_own {
            check_capabilities(&engine, &self.task)?;
        }
        let load = Load { directory: engine.directory().to_owned(), ..self.load.clone() };
        let memory = ProcessMemory::of("/", engine.id());
        let before_bytes = memory.resident_bytes();
        let before_device_bytes = device_bytes(device, engine.id());
        let mut port = Port { engine: &mut engine, needed_bytes, device, events };
        let began = Instant::now();
        let loaded = match port.ask(&EngineRequest::Load(Box::new(load)))? {
            EngineReply::Load(loaded) => *loaded,
            other => return unexpected(&other),
        };
        let seconds = began.elapsed().as_secs_f64();
        let own: OwnLoaded = serde_json::from_value(loaded.details).unwrap_or_default();
        let report = LoadReport {
            load_s: loaded.load_s.unwrap_or(seconds),
            isa: loaded.kernels,
            version: if is_own { String::new() } else { engine.hello().version.clone() },
            held: loaded.held.clone(),
            before_bytes,
            before_device_bytes,
            load_peak_bytes: own.load_peak_bytes.or_else(|| memory.peak_bytes()),
            own,
        };
        let accounts = CpuAccounts::of("/", engine.id());
        let bench = Bench::new(Monotonic::start(), memory, accounts, self.task.clone(), report.own.pool);
        let held = (!is_own).then_some(loaded.held);
        self.running = Some(Running { engine, bench, held, waited_ticks: 0 });
        Ok(report)
    }

    fn take_turn(&mut self, _events: &dyn Listener) -> Result<(), Failure> {
        let Some(turn) = self.running.as_ref().and_then(|running| running.engine.take_turn()) else { return Ok(()) };
        if let Some(running) = &mut self.running {
            running.waited_ticks += turn.waited_ticks;
        }
        let (mut port, bench) = self.port()?;
        bench.untimed(&mut port)
    }

    fn warm_up(&mut self, events: &dyn Listener) -> Result<WarmupReport, Failure> {
        let streamed = StreamedText {
            label: self.label.clone(),
            stop_at: self.task.stop_at.clone(),
            has_ended: AtomicBool::new(false),
            rest: events,
        };
        let (port, bench) = self.port()?;
        bench.warm_up(&mut Port { events: &streamed, ..port })
    }

    fn repeat(&mut self, _events: &dyn Listener) -> Result<Sample, Failure> {
        let (mut port, bench) = self.port()?;
        let sample = bench.repeat(&mut port)?;
        // Those of a batch are no text that `score` could predict.
        if let Some(compared) = self.compared_logits.as_ref().filter(|_| self.task.sequences == 1) {
            compared.keep(&sample.ids);
        }
        Ok(sample)
    }

    fn finish(&mut self, _events: &dyn Listener) -> Result<FinishReport, Failure> {
        let (saved, compared) = (self.save_logits.clone(), self.compared_logits.clone());
        let (mut port, bench) = self.port()?;
        let report = bench.finish(&mut port, (saved.as_deref(), compared.as_ref()))?;
        let Some(Running { held, waited_ticks, .. }) = &self.running else { return Ok(report) };
        let footprint = held.as_ref().map_or(report.footprint, footprint_of);
        Ok(FinishReport { footprint, waited_ticks: *waited_ticks, ..report })
    }
}

/// What another engine said that it holds, as far as our records have a place for it.
fn footprint_of(held: &HeldModel) -> Footprint {
    let weights_bytes = held.weights_by_format.values().sum();
    Footprint {
        weights_bytes,
        weights_resident_bytes: weights_bytes,
        kv_cache_bytes: held.kv_cache.as_ref().map_or(0, |cache| cache.bytes),
        weight_bytes_per_token: held.weight_bytes_per_token.unwrap_or(0),
        kv_bytes_per_position: held.kv_bytes_per_position.unwrap_or(0),
        ..Footprint::default()
    }
}

/// Fails for a task that an engine did not say it can do.
fn check_capabilities(engine: &EngineProcess, task: &Task) -> Result<(), Failure> {
    let needs = [
        (!task.depth.is_empty(), capability::DEPTH, "run behind a depth"),
        (matches!(task.encode, Encode::Tokens(_)), capability::ENCODE_TOKENS, "run an encoder over tokens"),
        (matches!(task.encode, Encode::Picture { .. }), capability::ENCODE_PICTURE, "run an encoder over a picture"),
        (task.wait != Wait::AtEnd, capability::WAIT, "wait for the device after every token"),
        (task.sequences > 1, capability::BATCH, "generate several sequences at once"),
    ];
    match needs.iter().find(|(is_needed, capability, _)| *is_needed && !engine.can(capability)) {
        None => Ok(()),
        Some((_, capability, what)) => {
            Err(error(format!("this engine cannot {what} (it does not say `{capability}`)")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_a_worker_does_not_know_are_added() {
        let free = || Some(1 << 30);
        let refused = |message: &str, wanted_bytes| Failure::OutOfMemory {
            message: message.to_owned(),
            wanted_bytes,
            free_bytes: 0,
        };
        for (message, wanted_bytes, said) in [
            ("no", 0, "out of memory: no; 3.00 GiB are needed in all, 1.00 GiB free"),
            ("out of memory", 0, "out of memory: 3.00 GiB are needed in all, 1.00 GiB free"),
            (
                "2.00 GiB for x could not be allocated",
                2 << 30,
                "out of memory: 2.00 GiB for x could not be allocated; \
              3.00 GiB are needed in all, 1.00 GiB free",
            ),
        ] {
            let expected = Failure::OutOfMemory { message: said.to_owned(), wanted_bytes, free_bytes: 1 << 30 };
            assert_eq!(with_sizes(refused(message, wanted_bytes), 3 << 30, free), expected);
            assert_eq!(with_sizes(expected.clone(), 3 << 30, free), expected, "once is enough");
        }
    }
}
