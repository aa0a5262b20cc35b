//! A child that speaks over its standard input and output: the parent's side.
//!
//! It reads one request a line from its standard input and writes [`Message`]s to its standard output. It ends when the
//! parent closes the pipe.

use std::io::{BufReader, Error};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::deadline::{Deadline, Killed, KilledAtDeadline};
use super::exit_reason::{self, OomBaseline};
use super::lines;
use super::stderr_tail::Tail;
use crate::events::{Event, Listener};
use crate::protocol::Failure;

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
    stderr: Tail,
    oom_scope: OomScope,
    oom_baseline: OomBaseline,
}

impl Child {
    /// Starts `subcommand` of this program. The process is killed at the deadline.
    pub fn start(
        (role, subcommand): (&'static str, &str),
        deadline: Option<Deadline>,
        oom_scope: OomScope,
    ) -> Result<Self, Failure> {
        let start = || {
            let mut child = Command::new(std::env::current_exe()?)
                .arg(subcommand)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            let missing = || Error::other("a pipe is missing");
            let requests = child.stdin.take().ok_or_else(missing)?;
            let replies = BufReader::new(child.stdout.take().ok_or_else(missing)?);
            let stderr = Tail::of(child.stderr.take().ok_or_else(missing)?);
            let process = KilledAtDeadline::new(child, deadline, Killed::Process);
            Ok(Self { role, process, requests, replies, stderr, oom_scope, oom_baseline: OomBaseline::now() })
        };
        start().map_err(|cause: Error| Failure::error(format!("starting a {role} process: {cause}")))
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
        self.oom_baseline = OomBaseline::now();
        let reply = lines::send(&mut self.requests, request).and_then(|()| self.reply(events));
        reply.unwrap_or_else(|_| Err(self.exit_reason(sizes)))
    }

    /// An error means that the child is gone.
    fn reply<R: DeserializeOwned>(&mut self, events: &dyn Listener) -> std::io::Result<Result<R, Failure>> {
        let Self { role, replies, oom_scope, oom_baseline, .. } = self;
        let on_event = |event| {
            if event == Event::End && *oom_scope == OomScope::Phase {
                *oom_baseline = OomBaseline::now();
            }
            events.on(event);
        };
        let unreadable = |line: &str| Failure::error(format!("the {role} wrote `{line}` to its output"));
        lines::receive(replies, u64::MAX, on_event, unreadable)
    }

    fn exit_reason(&mut self, sizes: impl FnOnce() -> (u64, u64)) -> Failure {
        let status = self.process.wait();
        if let Some(deadline) = self.process.overran() {
            return Failure::Timeout { message: deadline.message() };
        }
        let stderr = self.stderr.bytes();
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
