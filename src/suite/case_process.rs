//! A case in a process of its own, so that one that hangs, aborts or takes all the memory leaves the suite running.
//!
//! The suite writes one [`Ask`] and keeps the pipe open: when it closes, the process ends, and its workers with it. Answers are
//! lines of [`Reply`].

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::plan::Limits;
use super::row::{self, Facts};
use super::unmeasured;
use crate::events::{Event, Listener};
use crate::harness::protocol::Failure;
use crate::harness::{self, Before, Case, Deadline};
use crate::record::{Record, Status};
use crate::report;

/// The hidden subcommand that runs [`case_main`].
pub const SUBCOMMAND: &str = "case";

/// At its time limit a case kills its workers and writes what they gave. One that cannot even do that is killed this share of
/// the limit later.
const GRACE: f64 = 0.1;

/// Seconds that this is at least and at most: statistics of many repeats take a while.
const GRACE_S: (f64, f64) = (2.0, 30.0);

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    case: Case,
    facts: Facts,
    limits: Limits,
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Event(Event),
    /// Lines of the results, ready to append: numbers stay as they were written.
    Rows {
        text: String,
        statuses: Vec<Outcome>,
    },
    Failed(Failure),
}

/// How a row ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The precision, and the engine where the case has several.
    pub label: String,
    pub status: Status,
    pub reason: Option<String>,
}

/// The rows of a case, however it ended.
#[derive(Debug)]
pub struct Rows {
    /// Whole lines.
    pub text: String,
    pub outcomes: Vec<Outcome>,
}

impl Outcome {
    /// Of every row of a case.
    pub fn of(records: &[Record]) -> Vec<Self> {
        let of = |record: &Record| {
            let (label, status, reason) = (report::label(record, records), record.status, record.reason.clone());
            Self { label, status, reason }
        };
        records.iter().map(of).collect()
    }
}

/// Measures a case in a process of its own. Fails only where rows cannot be written as JSON.
pub fn measure(case: &Case, facts: &Facts, limits: Limits, events: &dyn Listener) -> Result<Rows> {
    let ask = Ask { case: case.clone(), facts: facts.clone(), limits };
    let reply = Process::start(&ask).and_then(|mut process| process.reply(limits, events));
    events.on(Event::End);
    let failure = match reply {
        Ok(Reply::Rows { text, statuses }) => return Ok(Rows { text, outcomes: statuses }),
        Ok(Reply::Failed(failure)) => failure,
        Ok(Reply::Event(_)) => Failure::Error { message: "the case ended without a result".to_owned() },
        Err(error) => Failure::of(&error),
    };
    let records = unmeasured::records(case, &failure);
    Ok(Rows { text: row::write(facts, &records)?, outcomes: Outcome::of(&records) })
}

/// The hidden subcommand: measures the one case that it is told. Nothing else may write to standard output.
pub fn case_main() -> Result<()> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).context("reading the case")?;
    let mut ask: Ask = serde_json::from_str(&line).context("the input of `quantbench case` comes from a suite")?;
    std::thread::spawn(end_with_parent);
    ask.case.protocol.deadline = ask.limits.timeout_s.and_then(Deadline::after_s);
    ask.case.protocol.memory_limit_bytes = ask.limits.memory_limit_bytes;
    let replies = Replies(Mutex::new(std::io::stdout()));
    replies.send(&reply(&ask, &replies).unwrap_or_else(|error| Reply::Failed(Failure::of(&error))));
    Ok(())
}

fn reply(ask: &Ask, events: &Replies) -> Result<Reply> {
    let records = harness::run(&ask.case, events)?;
    Ok(Reply::Rows { text: row::write(&ask.facts, &records)?, statuses: Outcome::of(&records) })
}

/// Waits in a read until the suite is gone or needs nothing more.
fn end_with_parent() {
    let mut rest = String::new();
    while std::io::stdin().read_line(&mut rest).is_ok_and(|n| n > 0) {}
    std::process::exit(0);
}

struct Process {
    child: Child,
    lines: Receiver<String>,
    stderr_tail: Option<JoinHandle<Vec<u8>>>,
    started: Instant,
    /// Noted anew when a phase ends: workers that the kernel kills meanwhile are not this process.
    before: Before,
}

impl Process {
    fn start(ask: &Ask) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting a process for the case")?;
        let started = Instant::now();
        let lines = lines(child.stdout.take().context("a pipe is missing")?);
        let stderr = child.stderr.take().context("a pipe is missing")?;
        let stderr_tail = Some(std::thread::spawn(move || harness::stderr_tail(stderr)));
        let mut process = Self { child, lines, stderr_tail, started, before: Before::now() };
        // The pipe stays open in the child's handle.
        let stdin = process.child.stdin.as_mut().context("a pipe is missing")?;
        stdin.write_all(format!("{}\n", serde_json::to_string(ask)?).as_bytes())?;
        stdin.flush()?;
        Ok(process)
    }

    /// The result, after relaying the events before it.
    fn reply(&mut self, limits: Limits, events: &dyn Listener) -> Result<Reply> {
        let end = limits.timeout_s.and_then(|timeout_s| {
            let grace_s = (timeout_s * GRACE).clamp(GRACE_S.0, GRACE_S.1);
            self.started.checked_add(Duration::try_from_secs_f64(timeout_s + grace_s).ok()?)
        });
        loop {
            let line = match end {
                None => self.lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(end) => self.lines.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            match line {
                Ok(line) => match serde_json::from_str(&line) {
                    Ok(Reply::Event(event)) => {
                        if event == Event::End {
                            self.before = Before::now();
                        }
                        events.on(event);
                    }
                    Ok(reply) => return Ok(reply),
                    Err(_) => anyhow::bail!("the case wrote `{}` to its output", line.trim()),
                },
                Err(RecvTimeoutError::Timeout) => return Ok(Reply::Failed(timed_out(limits))),
                Err(RecvTimeoutError::Disconnected) => return Ok(Reply::Failed(self.exit_reason())),
            }
        }
    }

    fn exit_reason(&mut self) -> Failure {
        let status = self.child.wait();
        let words = self.stderr_tail.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let who = ("process of the case", self.child.id());
        harness::exit_reason(who, status, &words, &self.before, (0, 0))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn timed_out(limits: Limits) -> Failure {
    let deadline = limits.timeout_s.and_then(Deadline::after_s);
    Failure::Timeout { message: deadline.map(|deadline| deadline.message()).unwrap_or_default() }
}

/// What the child says, read by a thread of its own so that waiting can end.
fn lines(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Standard output as a channel of replies; also the listener whose events the suite relays.
struct Replies(Mutex<std::io::Stdout>);

impl Replies {
    fn send(&self, reply: &Reply) {
        let mut line = serde_json::to_string(reply).unwrap_or_default();
        line.push('\n');
        let mut out = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A suite that no longer reads has closed the other pipe as well, which ends this process.
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }
}

impl Listener for Replies {
    fn on(&self, event: Event) {
        self.send(&Reply::Event(event));
    }
}
