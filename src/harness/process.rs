//! A worker in a process of its own, seen from the parent: start, ask, and say how it died.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use super::memory::ProcessMemory;
use super::protocol::{Ask, Failure, Finished, Job, LoadFacts, Reply, Sample, Warmed};
use super::schedule::Worker;
use super::scoring::{Scored, Scoring};
use crate::error::OutOfMemory;
use crate::events::{Listener, Silent};

/// The hidden subcommand that runs [`super::worker_main`].
pub const SUBCOMMAND: &str = "worker";

/// Bytes of a dead worker's last words that are kept.
const LAST_WORDS_BYTES: usize = 4096;

/// Buffers from this size on go back to the system as soon as they are freed. glibc otherwise raises the bound while it loads
/// and keeps memory that is not in use, which would count as resident.
const MMAP_THRESHOLD_BYTES: &str = "1048576";

pub struct ProcessWorker {
    job: Job,
    /// Whose code runs; `None`: this program's.
    binary: Option<PathBuf>,
    /// Weights and cache: what a worker that runs out of memory wanted.
    needed_bytes: u64,
    /// `None` until [`Worker::load`].
    running: Option<Running>,
}

struct Running {
    child: Child,
    asks: ChildStdin,
    replies: BufReader<ChildStdout>,
    last_words: Option<JoinHandle<Vec<u8>>>,
}

impl ProcessWorker {
    pub fn new(job: Job, needed_bytes: u64) -> Self {
        Self { job, binary: None, needed_bytes, running: None }
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
    }
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
    fn precision(&self) -> &str {
        &self.job.precision
    }

    fn load(&mut self, events: &dyn Listener) -> Result<LoadFacts, Failure> {
        let started = Running::start(self.binary.as_deref())
            .map_err(|cause| error(format!("starting a worker process: {cause}")))?;
        self.running = Some(started);
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
    fn start(binary: Option<&Path>) -> std::io::Result<Self> {
        let program = binary.map_or_else(std::env::current_exe, |binary| Ok(binary.to_owned()))?;
        let mut child = Command::new(program)
            .arg(SUBCOMMAND)
            .env("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD_BYTES)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let missing = || std::io::Error::other("a pipe is missing");
        let asks = child.stdin.take().ok_or_else(missing)?;
        let replies = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        let stderr = child.stderr.take().ok_or_else(missing)?;
        let last_words = Some(std::thread::spawn(move || last_words(stderr)));
        Ok(Self { child, asks, replies, last_words })
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
        let words = self.last_words.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let free_bytes = ProcessMemory::default().room_bytes().unwrap_or(0);
        let oom = OutOfMemory { wanted_bytes, free_bytes };
        match status {
            Ok(status) => death(signal(status), &status.to_string(), &String::from_utf8_lossy(&words), oom),
            Err(cause) => error(format!("waiting for the worker: {cause}")),
        }
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
fn last_words(mut stderr: ChildStderr) -> Vec<u8> {
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
fn death(signal: Option<i32>, status: &str, words: &str, oom: OutOfMemory) -> Failure {
    const SIGKILL: i32 = 9;
    let refused = |line: &str| Some(line.strip_prefix("memory allocation of ")?.split(' ').next()?.to_owned());
    let cause = match words.lines().rev().find_map(refused) {
        Some(bytes) => format!("an allocation of {bytes} bytes failed"),
        None if signal == Some(SIGKILL) => "the worker was killed".to_owned(),
        None if words.contains("Cannot allocate memory") => "the system refused more".to_owned(),
        None => return error(format!("the worker ended with {status}: {}", said(words))),
    };
    let OutOfMemory { wanted_bytes, free_bytes } = oom;
    Failure::OutOfMemory { message: format!("{oom}; {cause}"), wanted_bytes, free_bytes }
}

/// The last line of substance.
fn said(words: &str) -> &str {
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
            (Some(9), "", "the worker was killed"),
            (None, "thread panicked: Cannot allocate memory (os error 12)", "the system refused more"),
        ] {
            let message = format!("out of memory: wanted 3.00 GiB, 1.00 GiB free; {cause}");
            let expected = Failure::OutOfMemory { message, wanted_bytes: 3 << 30, free_bytes: 1 << 30 };
            assert_eq!(death(signal, "status", words, oom), expected);
        }
        let other = death(Some(11), "signal: 11 (SIGSEGV)", "the last line\nnote: run with a backtrace\n", oom);
        assert_eq!(other.message(), "the worker ended with signal: 11 (SIGSEGV): the last line");
        assert_eq!(
            death(None, "exit status: 1", "", oom).message(),
            "the worker ended with exit status: 1: it said nothing"
        );
    }
}
