//! A worker in a process of its own, seen from the parent: start, ask, and say how it died.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use super::deadline::{Deadline, Watched};
use super::memory::ProcessMemory;
use super::protocol::{Ask, Failure, Finished, Job, LoadFacts, Reply, Sample, Warmed};
use super::schedule::Worker;
use super::scoring::{Scored, Scoring};
use super::{DeviceChoice, Row};
use crate::engine::memory::MeasuredBandwidth;
use crate::error::OutOfMemory;
use crate::events::{Listener, Silent};
use crate::kernels::nvml::Gpu;

/// The hidden subcommand that runs [`super::worker_main`].
pub const SUBCOMMAND: &str = "worker";

/// Bytes of a dead worker's last words that are kept.
const LAST_WORDS_BYTES: usize = 64 << 10;

/// Buffers from this size on go back to the system as soon as they are freed. glibc otherwise raises the bound while it loads
/// and keeps memory that is not in use, which would count as resident.
const MMAP_THRESHOLD_BYTES: &str = "1048576";

pub struct ProcessWorker {
    job: Job,
    /// Of the row that it measures.
    label: String,
    /// Whose code runs; `None`: this program's.
    binary: Option<PathBuf>,
    /// Weights and cache: what a worker that runs out of memory wanted.
    needed_bytes: u64,
    deadline: Option<Deadline>,
    /// `None` until [`Worker::load`].
    running: Option<Running>,
}

struct Running {
    child: Watched,
    asks: ChildStdin,
    replies: BufReader<ChildStdout>,
    last_words: Option<JoinHandle<Vec<u8>>>,
}

impl ProcessWorker {
    pub fn new(job: Job, needed_bytes: u64, deadline: Option<Deadline>) -> Self {
        let label = Row { engine: job.engine, precision: job.precision.clone() }.label();
        Self { job, label, binary: None, needed_bytes, deadline, running: None }
    }

    /// The same in the worker process of another build.
    pub fn of_binary(self, binary: PathBuf) -> Self {
        Self { binary: Some(binary), ..self }
    }

    fn ask(&mut self, ask: &Ask, events: &dyn Listener) -> Result<Reply, Failure> {
        let running = self.running.as_mut().ok_or_else(|| error("the worker was not started"))?;
        let needed_bytes = self.needed_bytes;
        running
            .send(ask)
            .and_then(|()| running.reply(events))
            .unwrap_or_else(|_| Err(running.cause_of_death(needed_bytes)))
            .map_err(|failure| with_sizes(failure, needed_bytes, || free_bytes(self.job.device)))
    }
}

/// Of the memory that a worker's weights and cache are in.
fn free_bytes(device: DeviceChoice) -> Option<u64> {
    match device {
        DeviceChoice::Cuda(ordinal) => {
            Gpu::open(ordinal)?.memory_bytes().map(|(used, total)| total.saturating_sub(used))
        }
        DeviceChoice::Cpu | DeviceChoice::Auto => ProcessMemory::default().room_bytes(),
    }
}

/// A worker that was refused memory knows neither what it needs in all nor what is free.
fn with_sizes(failure: Failure, wanted_bytes: u64, free: impl Fn() -> Option<u64>) -> Failure {
    match failure {
        Failure::OutOfMemory { message, wanted_bytes: 0, .. } => {
            let free_bytes = free().unwrap_or(0);
            let oom = OutOfMemory { wanted_bytes, free_bytes };
            Failure::OutOfMemory { message: format!("{oom}; {message}"), wanted_bytes, free_bytes }
        }
        other => other,
    }
}

/// Read and copy bandwidth of a CUDA device, measured by a process that ends with it: a context takes memory.
pub fn bandwidth(ordinal: usize, deadline: Option<Deadline>) -> Result<MeasuredBandwidth, Failure> {
    let mut running = start(None, 1, deadline)?;
    let asked = running.send(&Ask::Bandwidth(ordinal)).and_then(|()| running.reply(&Silent));
    match asked.unwrap_or_else(|_| Err(running.cause_of_death(0)))? {
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
        let last_words = Some(std::thread::spawn(move || last_words(stderr)));
        Ok(Self { child: Watched::new(child, deadline), asks, replies, last_words })
    }

    fn send(&mut self, ask: &Ask) -> std::io::Result<()> {
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

    fn cause_of_death(&mut self, wanted_bytes: u64) -> Failure {
        let status = self.child.wait();
        if let Some(deadline) = self.child.overran() {
            return Failure::Timeout { message: deadline.message() };
        }
        let words = self.last_words.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        cause_of_death("worker", status, &words, wanted_bytes)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a worker that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Why the process called `who` died, which wanted so many bytes; 0 where that is unknown.
pub fn cause_of_death(who: &str, status: std::io::Result<ExitStatus>, words: &[u8], wanted_bytes: u64) -> Failure {
    let free_bytes = ProcessMemory::default().room_bytes().unwrap_or(0);
    let oom = OutOfMemory { wanted_bytes, free_bytes };
    match status {
        Ok(status) => death(who, (signal(status), &status.to_string()), &String::from_utf8_lossy(words), oom),
        Err(cause) => error(format!("waiting for the {who}: {cause}")),
    }
}

/// Reads to the end and keeps the last part.
pub fn last_words(mut stderr: ChildStderr) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = stderr.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        let surplus = kept.len().saturating_sub(LAST_WORDS_BYTES);
        kept.drain(..surplus);
    }
    kept
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_status: ExitStatus) -> Option<i32> {
    None
}

/// Why a worker died, from its signal and its last words. Rust aborts when an allocation fails and names the bytes; Linux
/// kills with signal 9 when the machine or the control group has none left. `oom` is what to say then.
fn death(who: &str, (signal, status): (Option<i32>, &str), words: &str, oom: OutOfMemory) -> Failure {
    const SIGKILL: i32 = 9;
    // Threads that fail together write into each other's line.
    let is_number = |word: &&str| word.bytes().all(|byte| byte.is_ascii_digit());
    let refused =
        |line: &str| line.strip_prefix("memory allocation of ")?.split(' ').find(is_number).map(str::to_owned);
    let cause = match words.lines().rev().find_map(refused) {
        Some(bytes) => format!("an allocation of {bytes} bytes failed"),
        None if signal == Some(SIGKILL) => format!("the {who} was killed"),
        None if words.contains("Cannot allocate memory") => "the system refused more".to_owned(),
        None => return error(format!("the {who} ended with {status}: {}", said(words))),
    };
    let OutOfMemory { wanted_bytes, free_bytes } = oom;
    Failure::OutOfMemory { message: format!("{oom}; {cause}"), wanted_bytes, free_bytes }
}

/// The last line of substance: what stands before a backtrace, if there is one.
fn said(words: &str) -> &str {
    let words = words.split("\nstack backtrace:").next().unwrap_or(words);
    let said = words.lines().rfind(|line| !line.trim().is_empty() && !line.starts_with("note: "));
    said.unwrap_or("it said nothing").trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_are_told_apart() {
        let oom = OutOfMemory { wanted_bytes: 3 << 30, free_bytes: 1 << 30 };
        for (signal, words, cause) in [
            (Some(6), "noise\nmemory allocation of 123 bytes failed\n", "an allocation of 123 bytes failed"),
            (Some(6), "memory allocation of memory allocation of 41 bytes failed", "an allocation of 41 bytes failed"),
            (Some(9), "", "the worker was killed"),
            (None, "thread panicked: Cannot allocate memory (os error 12)", "the system refused more"),
        ] {
            let message = format!("out of memory: wanted 3.00 GiB, 1.00 GiB free; {cause}");
            let expected = Failure::OutOfMemory { message, wanted_bytes: 3 << 30, free_bytes: 1 << 30 };
            assert_eq!(death("worker", (signal, "status"), words, oom), expected);
        }
        let refused = Failure::OutOfMemory { message: "no".to_owned(), wanted_bytes: 0, free_bytes: 0 };
        let Failure::OutOfMemory { message, wanted_bytes, .. } = with_sizes(refused, 3 << 30, || Some(1 << 30)) else {
            panic!("oom")
        };
        assert_eq!((message.as_str(), wanted_bytes), ("out of memory: wanted 3.00 GiB, 1.00 GiB free; no", 3 << 30));
        let other =
            death("worker", (Some(11), "signal: 11 (SIGSEGV)"), "the last line\nnote: run with a backtrace\n", oom);
        assert_eq!(other.message(), "the worker ended with signal: 11 (SIGSEGV): the last line");
        let panic = "thread 'main' panicked at a.rs:1:2:\nno way\nstack backtrace:\n   0: main\n";
        let panicked = death("worker", (None, "exit status: 101"), panic, oom);
        assert_eq!(panicked.message(), "the worker ended with exit status: 101: no way");
        assert_eq!(
            death("worker", (None, "exit status: 1"), "", oom).message(),
            "the worker ended with exit status: 1: it said nothing"
        );
    }
}
