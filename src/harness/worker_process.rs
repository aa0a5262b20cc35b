//! A worker in a process of its own, seen from the parent.

use std::path::PathBuf;

use super::case::Variant;
use super::room::free_bytes;
use super::schedule::WorkerHandle;
use crate::engine::Device;
use crate::engine::memory::MeasuredBandwidth;
use crate::events::{Listener, Silent};
use crate::ipc::{self, Child, Deadline, OomScope};
use crate::protocol::{
    self, Failure, FinishReport, LoadReport, LoadRequest, Sample, ScoreReport, ScoreRequest, WarmupReport, WorkerReply,
    WorkerRequest,
};

/// The hidden subcommand that runs [`super::worker_main`].
pub const SUBCOMMAND: &str = "worker";

/// Buffers from this size on go back to the system as soon as they are freed. glibc otherwise raises the bound while it loads
/// and keeps memory that is not in use, which would count as resident.
const MMAP_THRESHOLD_BYTES: &str = "1048576";

pub struct ProcessWorker {
    request: LoadRequest,
    /// Label of the variant that it measures.
    label: String,
    /// The program of another build; `None`: this one.
    binary: Option<PathBuf>,
    /// Estimate of the memory that the worker will hold.
    needed_bytes: u64,
    deadline: Option<Deadline>,
    /// `None` until [`WorkerHandle::load`].
    child: Option<Child>,
}

impl ProcessWorker {
    pub fn new(request: LoadRequest, needed_bytes: u64, deadline: Option<Deadline>) -> Self {
        let label = Variant { engine: request.engine, precision: request.precision }.label();
        Self { request, label, binary: None, needed_bytes, deadline, child: None }
    }

    /// The same in the worker process of another build.
    pub fn with_binary(self, binary: PathBuf) -> Self {
        Self { binary: Some(binary), ..self }
    }

    fn ask(&mut self, request: &WorkerRequest, events: &dyn Listener) -> Result<WorkerReply, Failure> {
        let child = self.child.as_mut().ok_or_else(|| error("the worker was not started"))?;
        let (needed_bytes, device) = (self.needed_bytes, self.request.device);
        child
            .ask(request, events, || (needed_bytes, free_bytes(device).unwrap_or(0)))
            .map_err(|failure| with_sizes(failure, needed_bytes, || free_bytes(device)))
    }

    /// Scores one window of a text, after [`WorkerHandle::load`].
    pub fn score(&mut self, request: ScoreRequest) -> Result<ScoreReport, Failure> {
        match self.ask(&WorkerRequest::Score(Box::new(request)), &Silent)? {
            WorkerReply::Scored(report) => Ok(report),
            other => unexpected(&other),
        }
    }
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
    match start(None, 1, deadline)?.ask(&WorkerRequest::Bandwidth(ordinal), &Silent, || (0, free_bytes()))? {
        WorkerReply::Bandwidth(bandwidth) => Ok(bandwidth),
        other => unexpected(&other),
    }
}

fn start(binary: Option<&std::path::Path>, threads: usize, deadline: Option<Deadline>) -> Result<Child, Failure> {
    let threads = threads.to_string();
    let environment = [
        ("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD_BYTES),
        // The number of threads of candle's own kernels.
        ("RAYON_NUM_THREADS", threads.as_str()),
    ];
    Child::start(("worker", SUBCOMMAND), (binary, &environment), deadline, OomScope::Request)
}

/// Fails for a reply of another kind than the request: two versions of the program met.
fn unexpected<T>(reply: &WorkerReply) -> Result<T, Failure> {
    Err(error(format!("the worker gave an unexpected answer: {reply:?}")))
}

/// Fails for a worker whose replies this build may not understand.
fn check_version(report: LoadReport) -> Result<LoadReport, Failure> {
    match report.protocol_version {
        0..=protocol::VERSION => Ok(report),
        newer => Err(error(format!(
            "the worker speaks version {newer} of the worker protocol, and this build reads versions up to {}; measure with the newer \
             build",
            protocol::VERSION
        ))),
    }
}

fn error(message: impl Into<String>) -> Failure {
    Failure::Error { message: message.into() }
}

impl WorkerHandle for ProcessWorker {
    fn label(&self) -> &str {
        &self.label
    }

    fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn load(&mut self, events: &dyn Listener) -> Result<LoadReport, Failure> {
        self.child = Some(start(self.binary.as_deref(), self.request.threads, self.deadline)?);
        match self.ask(&WorkerRequest::Load(Box::new(self.request.clone())), events)? {
            WorkerReply::Loaded(report) => check_version(report),
            other => unexpected(&other),
        }
    }

    fn warm_up(&mut self, events: &dyn Listener) -> Result<WarmupReport, Failure> {
        match self.ask(&WorkerRequest::WarmUp, events)? {
            WorkerReply::Warmed(report) => Ok(report),
            other => unexpected(&other),
        }
    }

    fn repeat(&mut self, events: &dyn Listener) -> Result<Sample, Failure> {
        match self.ask(&WorkerRequest::Repeat, events)? {
            WorkerReply::Sample(sample) => Ok(sample),
            other => unexpected(&other),
        }
    }

    fn finish(&mut self, events: &dyn Listener) -> Result<FinishReport, Failure> {
        match self.ask(&WorkerRequest::Finish, events)? {
            WorkerReply::Finished(report) => Ok(report),
            other => unexpected(&other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_of_a_newer_protocol_is_refused_by_name() {
        let report = |protocol_version| LoadReport { protocol_version, ..LoadReport::default() };
        assert!(check_version(report(1)).is_ok());
        let refused = check_version(report(protocol::VERSION + 1)).unwrap_err();
        let expected = format!("speaks version {} of the worker protocol", protocol::VERSION + 1);
        assert!(refused.message().contains(&expected), "{refused:?}");
        let before_the_field: LoadReport = serde_json::from_str(r#"{"load_s": 2.5, "isa": "avx2"}"#).unwrap();
        assert_eq!((before_the_field.protocol_version, before_the_field.load_s), (1, 2.5));
    }

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
