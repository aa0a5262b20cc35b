//! A worker in a process of its own, seen from the parent: start, ask, and say how it died.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use super::deadline::{Deadline, Watched};
use super::exit_reason::{self, Before};
use super::memory::ProcessMemory;
use super::protocol::{Ask, Failure, Finished, Job, LoadFacts, Reply, Sample, Warmed};
use super::schedule::Worker;
use super::scoring::{Scored, Scoring};
use super::{DeviceChoice, Row};
use crate::engine::memory::MeasuredBandwidth;
use crate::events::{Listener, Silent};
use crate::kernels::nvml::Gpu;

/// The hidden subcommand that runs [`super::worker_main`].
pub const SUBCOMMAND: &str = "worker";

/// Bytes of a dead worker's last words that are kept.
const STDERR_TAIL_BYTES: usize = 64 << 10;

/// Buffers from this size on go back to the system as soon as they are freed. glibc otherwise raises the bound while it loads
/// and keeps memory that is not in use, which would count as resident.
const MMAP_THRESHOLD_BYTES: &str = "1048576";

pub struct ProcessWorker {
    job: Job,
    /// Of the row that it measures.
    label: String,
    /// Whose code runs; `None`: this program's.
    binary: Option<PathBuf>,
    /// What the worker will hold by the estimate.
    needed_bytes: u64,
    deadline: Option<Deadline>,
    /// `None` until [`Worker::load`].
    running: Option<Running>,
}

struct Running {
    child: Watched,
    asks: ChildStdin,
    replies: BufReader<ChildStdout>,
    stderr_tail: Option<JoinHandle<Vec<u8>>>,
    /// Noted at each ask: what happened since then may be why it died.
    before: Before,
}

impl ProcessWorker {
    pub fn new(job: Job, needed_bytes: u64, deadline: Option<Deadline>) -> Self {
        let label = Row { engine: job.engine, precision: job.precision }.label();
        Self { job, label, binary: None, needed_bytes, deadline, running: None }
    }

    /// The same in the worker process of another build.
    pub fn of_binary(self, binary: PathBuf) -> Self {
        Self { binary: Some(binary), ..self }
    }

    fn ask(&mut self, ask: &Ask, events: &dyn Listener) -> Result<Reply, Failure> {
        let running = self.running.as_mut().ok_or_else(|| error("the worker was not started"))?;
        let (needed_bytes, device) = (self.needed_bytes, self.job.device);
        running
            .send(ask)
            .and_then(|()| running.reply(events))
            .unwrap_or_else(|_| Err(running.exit_reason(needed_bytes, free_bytes(device))))
            .map_err(|failure| with_sizes(failure, needed_bytes, || free_bytes(device)))
    }
}

/// Of the memory that a worker's weights and cache are in. Asks the driver without a context, which would take some of it.
pub(super) fn free_bytes(device: DeviceChoice) -> Option<u64> {
    match device {
        DeviceChoice::Cuda(ordinal) => Gpu::open(ordinal)?.free_bytes(),
        DeviceChoice::Cpu | DeviceChoice::Auto => ProcessMemory::default().room_bytes(),
    }
}

/// A worker that was refused memory knows neither what it needs in all nor what is free.
fn with_sizes(failure: Failure, needed_bytes: u64, free: impl Fn() -> Option<u64>) -> Failure {
    match failure {
        Failure::OutOfMemory { message, wanted_bytes, free_bytes: 0 } if !exit_reason::has_sizes(&message) => {
            let free_bytes = free().unwrap_or(0);
            let cause = message.strip_prefix("out of memory").map(|rest| rest.trim_start_matches([':', ' ']));
            let message = exit_reason::out_of_memory(cause.unwrap_or(&message), needed_bytes, free_bytes);
            Failure::OutOfMemory { message, wanted_bytes, free_bytes }
        }
        other => other,
    }
}

/// Read and copy bandwidth of a CUDA device, measured by a process that ends with it: a context takes memory.
pub fn bandwidth(ordinal: usize, deadline: Option<Deadline>) -> Result<MeasuredBandwidth, Failure> {
    let mut running = start(None, 1, deadline)?;
    let asked = running.send(&Ask::Bandwidth(ordinal)).and_then(|()| running.reply(&Silent));
    match asked.unwrap_or_else(|_| Err(running.exit_reason(0, free_bytes(DeviceChoice::Cuda(ordinal)))))? {
        Reply::Bandwidth(bandwidth) => Ok(bandwidth),
        other => unexpected(other),
    }
}

fn start(binary: Option<&Path>, threads: usize, deadline: Option<Deadline>) -> Result<Running, Failure> {
    Running::start(binary, threads, deadline).map_err(|cause| error(format!("starting a worker process: {cause}")))
}

/// A reply of another kind than asked for: two versions of the program met.
fn unexpected<T>(reply: Reply) -> Result<T, Failure> {
    Err(error(format!("the worker gave an unexpected answer: {reply:?}")))
}

fn error(message: impl Into<String>) -> Failure {
    Failure::Error { message: message.into() }
}

impl ProcessWorker {
    /// One window of a text, after [`Worker::load`].
    pub fn score(&mut self, scoring: Scoring) -> Result<Scored, Failure> {
        match self.ask(&Ask::Score(Box::new(scoring)), &Silent)? {
            Reply::Scored(scored) => Ok(scored),
            other => unexpected(other),
        }
    }
}

impl Worker for ProcessWorker {
    fn label(&self) -> &str {
        &self.label
    }

    fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.child.id())
    }

    fn load(&mut self, events: &dyn Listener) -> Result<LoadFacts, Failure> {
        self.running = Some(start(self.binary.as_deref(), self.job.threads, self.deadline)?);
        match self.ask(&Ask::Load(Box::new(self.job.clone())), events)? {
            Reply::Loaded(facts) => Ok(facts),
            other => unexpected(other),
        }
    }

    fn warm_up(&mut self, events: &dyn Listener) -> Result<Warmed, Failure> {
        match self.ask(&Ask::WarmUp, events)? {
            Reply::Warmed(warmed) => Ok(warmed),
            other => unexpected(other),
        }
    }

    fn repeat(&mut self, events: &dyn Listener) -> Result<Sample, Failure> {
        match self.ask(&Ask::Repeat, events)? {
            Reply::Sample(sample) => Ok(sample),
            other => unexpected(other),
        }
    }

    fn finish(&mut self, events: &dyn Listener) -> Result<Finished, Failure> {
        match self.ask(&Ask::Finish, events)? {
            Reply::Finished(finished) => Ok(finished),
            other => unexpected(other),
        }
    }
}

impl Running {
    fn start(binary: Option<&Path>, threads: usize, deadline: Option<Deadline>) -> std::io::Result<Self> {
        let program = binary.map_or_else(std::env::current_exe, |binary| Ok(binary.to_owned()))?;
        let mut child = Command::new(program)
            .arg(SUBCOMMAND)
            .env("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD_BYTES)
            // What candle's own kernels take for the number of threads.
            .env("RAYON_NUM_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let missing = || std::io::Error::other("a pipe is missing");
        let asks = child.stdin.take().ok_or_else(missing)?;
        let replies = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        let stderr = child.stderr.take().ok_or_else(missing)?;
        let stderr_tail = Some(std::thread::spawn(move || stderr_tail(stderr)));
        Ok(Self { child: Watched::new(child, deadline), asks, replies, stderr_tail, before: Before::now() })
    }

    fn send(&mut self, ask: &Ask) -> std::io::Result<()> {
        self.before = Before::now();
        let mut line = serde_json::to_string(ask)?;
        line.push('\n');
        self.asks.write_all(line.as_bytes())?;
        self.asks.flush()
    }

    /// The next reply, after relaying the events before it. An error means that the worker is gone.
    fn reply(&mut self, events: &dyn Listener) -> std::io::Result<Result<Reply, Failure>> {
        loop {
            let mut line = String::new();
            if self.replies.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            match serde_json::from_str(&line) {
                Ok(Reply::Event(event)) => events.on(event),
                Ok(Reply::Failed(failure)) => return Ok(Err(failure)),
                Ok(reply) => return Ok(Ok(reply)),
                Err(_) => return Ok(Err(error(format!("the worker wrote `{}` to its output", line.trim())))),
            }
        }
    }

    /// `free_bytes` are those of the device, now that the worker is gone.
    fn exit_reason(&mut self, needed_bytes: u64, free_bytes: Option<u64>) -> Failure {
        let status = self.child.wait();
        if let Some(deadline) = self.child.overran() {
            return Failure::Timeout { message: deadline.message() };
        }
        let words = self.stderr_tail.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let sizes = (needed_bytes, free_bytes.unwrap_or(0));
        exit_reason::exit_reason(("worker", self.child.id()), status, &words, &self.before, sizes)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a worker that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads to the end and keeps the last part.
pub fn stderr_tail(mut stderr: ChildStderr) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = stderr.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        let surplus = kept.len().saturating_sub(STDERR_TAIL_BYTES);
        kept.drain(..surplus);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_does_not_know_is_added() {
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
