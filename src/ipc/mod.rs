//! Child processes of this program that speak JSON lines: the parent's side. [`serve`] is the child's side.
//!
//! A child reads one request a line from its standard input and writes [`Message`]s to its standard output. It ends when the
//! parent closes the pipe. What it computes is its caller's.

mod deadline;
mod exit_reason;
mod serve;

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::path::Path;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::deadline::Deadline;
use self::deadline::KilledAtDeadline;
use self::exit_reason::OomBaseline;
pub use self::exit_reason::{has_sizes, out_of_memory};
pub use self::serve::serve;
use crate::events::{Event, Listener};
use crate::protocol::{Failure, Message};

/// Bytes of a child's standard error that are kept for its exit reason.
const STDERR_TAIL_BYTES: usize = 64 << 10;

/// Kills by the kernel for want of memory that count as the child's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OomScope {
    /// Every kill since the last request.
    Request,
    /// Every kill since the last phase ended: before that, the kernel may have killed the child's own children.
    Phase,
}

/// A running child. Dropping it kills the process.
pub struct Child {
    /// Its role in messages, such as `worker`.
    role: &'static str,
    process: KilledAtDeadline,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
    stderr_tail: Option<JoinHandle<Vec<u8>>>,
    oom_scope: OomScope,
    oom_baseline: OomBaseline,
}

impl Child {
    /// Starts `subcommand` of `binary`, by default of this program, with further environment variables. The process is killed at
    /// the deadline.
    pub fn start(
        (role, subcommand): (&'static str, &str),
        (binary, environment): (Option<&Path>, &[(&str, &str)]),
        deadline: Option<Deadline>,
        oom_scope: OomScope,
    ) -> Result<Self, Failure> {
        let start = || {
            let program = binary.map_or_else(std::env::current_exe, |binary| Ok(binary.to_owned()))?;
            let mut child = Command::new(program)
                .arg(subcommand)
                .envs(environment.iter().copied())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            let missing = || Error::other("a pipe is missing");
            let requests = child.stdin.take().ok_or_else(missing)?;
            let replies = BufReader::new(child.stdout.take().ok_or_else(missing)?);
            let stderr = child.stderr.take().ok_or_else(missing)?;
            let stderr_tail = Some(std::thread::spawn(move || stderr_tail(stderr)));
            let (process, oom_baseline) = (KilledAtDeadline::new(child, deadline), OomBaseline::now());
            Ok(Self { role, process, requests, replies, stderr_tail, oom_scope, oom_baseline })
        };
        start().map_err(|cause: Error| error(format!("starting a {role} process: {cause}")))
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a request and gives its reply, after handing on the events before it. A child that ended gives its exit reason;
    /// `sizes` are the bytes that it needed and those that are free now, 0 where unknown.
    pub fn ask<Q: Serialize, R: DeserializeOwned>(
        &mut self,
        request: &Q,
        events: &dyn Listener,
        sizes: impl FnOnce() -> (u64, u64),
    ) -> Result<R, Failure> {
        let reply = self.send(request).and_then(|()| self.reply(events));
        reply.unwrap_or_else(|_| Err(self.exit_reason(sizes)))
    }

    fn send<Q: Serialize>(&mut self, request: &Q) -> std::io::Result<()> {
        self.oom_baseline = OomBaseline::now();
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.requests.write_all(line.as_bytes())?;
        self.requests.flush()
    }

    /// An error means that the child is gone.
    fn reply<R: DeserializeOwned>(&mut self, events: &dyn Listener) -> std::io::Result<Result<R, Failure>> {
        loop {
            let mut line = String::new();
            if self.replies.read_line(&mut line)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match serde_json::from_str(&line) {
                Ok(Message::Event(event)) => {
                    if event == Event::End && self.oom_scope == OomScope::Phase {
                        self.oom_baseline = OomBaseline::now();
                    }
                    events.on(event);
                }
                Ok(Message::Failed(failure)) => return Ok(Err(failure)),
                Ok(Message::Reply(reply)) => return Ok(Ok(reply)),
                Err(_) => {
                    return Ok(Err(error(format!("the {} wrote `{}` to its output", self.role, line.trim()))));
                }
            }
        }
    }

    fn exit_reason(&mut self, sizes: impl FnOnce() -> (u64, u64)) -> Failure {
        let status = self.process.wait();
        if let Some(deadline) = self.process.overran() {
            return Failure::Timeout { message: deadline.message() };
        }
        let stderr = self.stderr_tail.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        exit_reason::exit_reason((self.role, self.process.id()), status, &stderr, &self.oom_baseline, sizes())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn error(message: String) -> Failure {
    Failure::Error { message }
}

/// Reads to the end and keeps the last part.
fn stderr_tail(mut stderr: ChildStderr) -> Vec<u8> {
    let (mut kept, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = stderr.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        let surplus = kept.len().saturating_sub(STDERR_TAIL_BYTES);
        kept.drain(..surplus);
    }
    kept
}
