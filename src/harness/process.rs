//! A worker in a process of its own, seen from the parent: start, ask, and say how it died.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use super::memory::ProcessMemory;
use super::protocol::{Ask, Failure, Finished, Job, LoadFacts, Reply, Sample, Warmed};
use super::schedule::Worker;
use crate::events::Listener;

/// The hidden subcommand that runs [`super::worker_main`].
pub const SUBCOMMAND: &str = "worker";

/// Bytes of a dead worker's last words that are kept.
const LAST_WORDS_BYTES: usize = 4096;

/// Buffers from this size on go back to the system as soon as they are freed. glibc otherwise raises the bound while it loads
/// and keeps memory that is not in use, which would count as resident.
const MMAP_THRESHOLD_BYTES: &str = "1048576";

pub struct ProcessWorker {
    job: Job,
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
    pub fn new(job: Job) -> Self {
        Self { job, running: None }
    }

    fn ask(&mut self, ask: &Ask, events: &dyn Listener) -> Result<Reply, Failure> {
        let running = self.running.as_mut().ok_or_else(|| error("the worker was not started"))?;
        running.send(ask).and_then(|()| running.reply(events)).unwrap_or_else(|_| Err(running.cause_of_death()))
    }
}

/// A reply of another kind than asked for: two versions of the program met.
fn unexpected<T>(reply: Reply) -> Result<T, Failure> {
    Err(error(format!("the worker gave an unexpected answer: {reply:?}")))
}

fn error(message: impl Into<String>) -> Failure {
    Failure::Error { message: message.into() }
}

impl Worker for ProcessWorker {
    fn precision(&self) -> &str {
        &self.job.precision
    }

    fn load(&mut self, events: &dyn Listener) -> Result<LoadFacts, Failure> {
        let started = Running::start().map_err(|cause| error(format!("starting a worker process: {cause}")))?;
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
    fn start() -> std::io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
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

    fn cause_of_death(&mut self) -> Failure {
        let status = self.child.wait();
        let words = self.last_words.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let free_bytes = ProcessMemory::default().available_bytes().unwrap_or(0);
        match status {
            Ok(status) => death(signal(status), &status.to_string(), &String::from_utf8_lossy(&words), free_bytes),
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
/// kills with signal 9 when the machine or the control group has none left.
fn death(signal: Option<i32>, status: &str, words: &str, free_bytes: u64) -> Failure {
    const SIGKILL: i32 = 9;
    let refused = words.lines().rev().find_map(|line| line.strip_prefix("memory allocation of ")?.split(' ').next());
    if let Some(wanted_bytes) = refused.and_then(|bytes| bytes.parse().ok()) {
        let message = format!("out of memory: an allocation of {wanted_bytes} bytes failed");
        return Failure::OutOfMemory { message, wanted_bytes, free_bytes };
    }
    if signal == Some(SIGKILL) {
        let message = "the worker was killed, most likely because memory ran out".to_owned();
        return Failure::OutOfMemory { message, wanted_bytes: 0, free_bytes };
    }
    if words.contains("Cannot allocate memory") {
        let message = "out of memory: the system refused more".to_owned();
        return Failure::OutOfMemory { message, wanted_bytes: 0, free_bytes };
    }
    let said = words.lines().rfind(|line| !line.trim().is_empty() && !line.starts_with("note: "));
    error(format!("the worker ended with {status}: {}", said.unwrap_or("it said nothing").trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_are_told_apart() {
        let oom = |words: &str, signal| match death(signal, "status", words, 5) {
            Failure::OutOfMemory { wanted_bytes, free_bytes, .. } => Some((wanted_bytes, free_bytes)),
            _ => None,
        };
        assert_eq!(oom("noise\nmemory allocation of 123 bytes failed\n", Some(6)), Some((123, 5)));
        assert_eq!(oom("", Some(9)), Some((0, 5)));
        assert_eq!(oom("thread panicked: Cannot allocate memory (os error 12)", None), Some((0, 5)));
        let other = death(Some(11), "signal: 11 (SIGSEGV)", "the last line\nnote: run with a backtrace\n", 5);
        assert_eq!(other.message(), "the worker ended with signal: 11 (SIGSEGV): the last line");
        assert_eq!(
            death(None, "exit status: 1", "", 5).message(),
            "the worker ended with exit status: 1: it said nothing"
        );
    }
}
