//! What the tests share: workers in this process, on a fake session, a fake clock and a scripted watch.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;

use quantbench::engine::fake::{FakeRun, FakeSession, FakeTime};
use quantbench::engine::{Alone, Engine};
use quantbench::events::{Listener, Silent};
use quantbench::harness::assemble::records;
use quantbench::harness::load::LoadReport;
use quantbench::harness::measure::Bench;
use quantbench::harness::measured::{FinishReport, Sample, WarmupReport};
use quantbench::harness::schedule::{RunOrder, ScheduleContext, VariantOutcome, WorkerHandle};
use quantbench::harness::served::ServedSession;
use quantbench::harness::task::{Task, Wait};
use quantbench::harness::watch::energy::Mark;
use quantbench::harness::watch::{NoWatch, Watch, Watched};
use quantbench::harness::{
    Case, DeviceChoice, MeasurementProtocol, PrecisionSelection, PromptChoice, RunContext, schedule,
};
use quantbench::os::cpu_usage::{CpuAccounts, CpuUsage};
use quantbench::os::memory::ProcessMemory;
use quantbench::protocol::{Encode, Failure};
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::record::metrics::find;
use quantbench::record::{self, Record};
use quantbench::weights::{ModelRequest, WeightsChoice};

pub const N_GEN: usize = 4;
pub const N_PROMPT: usize = 8;

/// Which precision did what, in order.
pub type Journal = Rc<RefCell<Vec<String>>>;

/// A worker in this process, on a fake session.
pub struct Local {
    pub precision: String,
    pub bench: Bench<FakeTime>,
    pub served: ServedSession<FakeTime>,
    pub journal: Journal,
    pub loading: Result<LoadReport, Failure>,
    pub load: Option<CpuUsage>,
    pub pid: Option<u32>,
}

impl Local {
    pub fn new(precision: &str, task: Task, runs: Vec<FakeRun>, journal: &Journal) -> Self {
        Self::with_alone(precision, task, runs, journal, None)
    }

    /// The same on a session that can tell what its steps take alone.
    pub fn with_alone(
        precision: &str,
        task: Task,
        runs: Vec<FakeRun>,
        journal: &Journal,
        alone: Option<Alone>,
    ) -> Self {
        let time = FakeTime::default();
        let nowhere = PathBuf::from("no such folder");
        let session = FakeSession::new(time.clone(), runs).with_alone(alone).with_sequences(task.sequences);
        let served = ServedSession::new(Box::new(session), time.clone(), Vec::new(), task.sequences);
        let bench = Bench::new(time, ProcessMemory::below(&nowhere), CpuAccounts::below(&nowhere), task, None);
        let loading = Ok(LoadReport { load_s: 2.5, ..LoadReport::default() });
        Self {
            precision: precision.to_owned(),
            bench,
            served,
            journal: journal.clone(),
            loading,
            load: None,
            pid: None,
        }
    }

    fn note(&self, what: &str) {
        self.journal.borrow_mut().push(format!("{what} {}", self.precision));
    }
}

impl WorkerHandle for Local {
    fn label(&self) -> &str {
        &self.precision
    }

    fn pid(&self) -> Option<u32> {
        self.pid
    }

    fn load(&mut self, _events: &dyn Listener) -> Result<LoadReport, Failure> {
        self.note("load");
        self.loading.clone()
    }

    fn warm_up(&mut self, _events: &dyn Listener) -> Result<WarmupReport, Failure> {
        self.note("warm");
        self.bench.warm_up(&mut self.served)
    }

    fn repeat(&mut self, _events: &dyn Listener) -> Result<Sample, Failure> {
        self.note("repeat");
        let sample = self.bench.repeat(&mut self.served)?;
        Ok(Sample { load: self.load, ..sample })
    }

    fn finish(&mut self, _events: &dyn Listener) -> Result<FinishReport, Failure> {
        self.note("finish");
        self.bench.finish(&mut self.served, (None, None))
    }
}

pub fn task() -> Task {
    Task {
        sequences: 1,
        depth: vec![1, 2],
        encode: Encode::Nothing,
        prompt: vec![3; N_PROMPT],
        n_gen: N_GEN,
        stop_at: Vec::new(),
        warmup: Some(0),
        max_time_s: 20.0,
        wait: Wait::AtEnd,
        stream: false,
    }
}

/// The run that fills the cache to the depth, which no sample may show.
pub fn filling() -> FakeRun {
    FakeRun { prefill_ns: 999_999_999_999, ..FakeRun::default() }
}

/// A run in milliseconds.
pub fn run_ms(prefill: u64, steps: &[u64]) -> FakeRun {
    let step_ns = steps.iter().map(|ms| ms * 1_000_000).collect();
    FakeRun { prefill_ns: prefill * 1_000_000, step_ns, ..FakeRun::default() }
}

pub fn counted(repeats: usize) -> MeasurementProtocol {
    MeasurementProtocol { repeats: Some(repeats), ..MeasurementProtocol::default() }
}

pub fn case(precisions: &[&str], protocol: MeasurementProtocol) -> Case {
    Case {
        model: ModelRequest {
            model_id: "tiny".to_owned(),
            revision: None,
            offline: true,
            weights: WeightsChoice::Auto,
            seed: 1,
            outlier_channels: 0,
            strict_config: false,
        },
        precisions: precisions.iter().filter_map(|name| FormatId::named(name)).collect(),
        precision_selection: PrecisionSelection::ByName,
        engines: vec![Engine::Quantbench.into()],
        asked: Vec::new(),
        saved: None,
        engine_timeout_s: 60.0,
        format_options: FormatOptions::default(),
        device: DeviceChoice::Cpu,
        threads: 2,
        cuda_graph: true,
        sequences: 1,
        largest_batch: false,
        kv_format: None,
        prompt: PromptChoice::Default,
        chat: false,
        may_shorten: false,
        image: None,
        n_gen: N_GEN,
        n_depth: 2,
        stop_at_eos: false,
        protocol,
        stream: false,
        save_logits: None,
        keep_fp16: Vec::new(),
        quality: None,
        command: "quantbench --precision all".to_owned(),
    }
}

pub fn facts(case: &Case) -> RunContext {
    let (name, n_gen) = ("tiny".to_owned(), N_GEN as u64);
    let weights = record::WeightFacts {
        source: "local".to_owned(),
        dtype: "bf16".to_owned(),
        seed: None,
        hash: "xxh3:0".to_owned(),
        fp16_overflow: 0,
        fp16_overflow_by_tensor: Default::default(),
    };
    RunContext {
        engine: record::EngineInfo { name: "quantbench".to_owned(), version: "0".to_owned(), commit: "c".to_owned() },
        command: case.command.clone(),
        timestamp: "2026-01-01T00:00:00Z".to_owned(),
        model: record::ModelFacts {
            id: name,
            revision: None,
            architecture: "llama".to_owned(),
            parameters: 9,
            experts: None,
        },
        weights,
        device: record::DeviceFacts { kind: "cpu".to_owned(), name: "some CPU".to_owned() },
        workload: record::Workload {
            n_prompt: N_PROMPT as u64,
            n_gen,
            n_depth: 2,
            n_image: 0,
            image: None,
            batch_size: 1,
        },
        largest_batch: false,
        n_before: 2 + N_PROMPT as u64,
        flops_per_step: 40,
        environment: record::Environment { threads: 2, ..record::Environment::default() },
        keep_fp16: Vec::new(),
        format_options: case.format_options,
        protocol: case.protocol.clone(),
        order: RunOrder::Interleaved,
        resolve_s: 0.5,
        read_gb_s: Some(1e-3),
        matmul_gflop_s: Some(0.5),
        copy_gb_s: Some(5e-4),
        bandwidth_since: None,
        theoretical_gb_s: Ok(1.1e-3),
        cache_bytes: Some(100),
        counter: None,
        warnings: Vec::new(),
    }
}

/// Runs each precision's script and makes the records.
pub fn measured(protocol: MeasurementProtocol, scripts: &[(&str, Vec<FakeRun>)]) -> Vec<Record> {
    let names: Vec<&str> = scripts.iter().map(|(name, _)| *name).collect();
    let case = case(&names, protocol);
    let outcomes = outcomes(&case.protocol, RunOrder::Interleaved, scripts, &Journal::default());
    records(&facts(&case), &case, &outcomes, &|_| None)
}

pub fn outcomes(
    protocol: &MeasurementProtocol,
    order: RunOrder,
    scripts: &[(&str, Vec<FakeRun>)],
    journal: &Journal,
) -> Vec<VariantOutcome> {
    watched_outcomes(protocol, order, scripts, journal, &mut NoWatch)
}

pub fn watched_outcomes(
    protocol: &MeasurementProtocol,
    order: RunOrder,
    scripts: &[(&str, Vec<FakeRun>)],
    journal: &Journal,
    watch: &mut dyn Watch,
) -> Vec<VariantOutcome> {
    let worker = |at: usize| -> Box<dyn WorkerHandle> {
        let (name, runs) = &scripts[at];
        let runs = [vec![filling()], runs.clone()].concat();
        Box::new(Local::new(name, task(), runs, journal))
    };
    let mut stage = ScheduleContext { start: &worker, n_workers: scripts.len(), order, watch, events: &Silent };
    schedule::measure(&mut stage, protocol).unwrap()
}

/// Runs workers that were made already, in one launch.
pub fn measure(
    workers: Vec<Box<dyn WorkerHandle>>,
    protocol: &MeasurementProtocol,
    order: RunOrder,
    events: &dyn Listener,
) -> Result<Vec<VariantOutcome>, Failure> {
    let n_workers = workers.len();
    let ready = RefCell::new(workers.into_iter().map(Some).collect::<Vec<_>>());
    let start = |at: usize| ready.borrow_mut()[at].take().expect("one launch");
    let mut stage = ScheduleContext { start: &start, n_workers, order, watch: &mut NoWatch, events };
    schedule::measure(&mut stage, protocol)
}

/// Sees what was scripted, one entry a repeat; nothing behind the end.
#[derive(Default)]
pub struct Scripted {
    pub script: VecDeque<Watched>,
    pub n_pauses: usize,
    /// The shortest window of the energy counter, where there is one, and its marks.
    pub energy_window_s: Option<f64>,
    pub marks: VecDeque<Mark>,
    /// Who was watched, and beside whom.
    pub crews: Vec<(Option<u32>, Vec<u32>)>,
}

impl Watch for Scripted {
    fn begin(&mut self, worker: Option<u32>, run_pids: &[u32]) {
        self.crews.push((worker, run_pids.to_vec()));
    }

    fn end(&mut self) -> Watched {
        self.script.pop_front().unwrap_or_default()
    }

    fn pause(&mut self) {
        self.n_pauses += 1;
    }

    fn energy_window_s(&self) -> Option<f64> {
        self.energy_window_s
    }

    fn energy_mark(&mut self) -> Option<Mark> {
        self.marks.pop_front()
    }
}

pub fn metric(record: &Record, key: &str) -> Option<f64> {
    find(key).unwrap().value(record)
}
