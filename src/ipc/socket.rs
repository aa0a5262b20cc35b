//! A process that speaks the engine protocol over a Unix socket: the parent's side.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, BufReader, ErrorKind};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use tempfile::TempDir;

use super::deadline::{Deadline, Killed, KilledAtDeadline, signal_group};
use super::exit_reason::{OomBaseline, exit_reason};
use super::lines;
use super::stderr_tail::Tail;
use crate::events::Listener;
use crate::os::cpu_usage::group_ticks;
use crate::protocol::{self, EngineReply, EngineRequest, Failure, Hello, SOCKET_VARIABLE};

/// Longest line of an engine. The stamps of a million tokens take 20 MB.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Time that a process that closed its connection has to end by itself.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// How often a process that has not connected yet is looked at.
const CONNECT_POLL: Duration = Duration::from_millis(2);

/// How a process is started.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineCommand {
    /// Its role in messages, such as `worker`.
    pub role: &'static str,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub environment: Vec<(&'static str, OsString)>,
    /// Longest time for an answer; `None`: no limit.
    pub timeout: Option<Duration>,
}

/// The engine whose turn it is, of those that are measured together. The process groups of the others are stopped.
#[derive(Debug, Clone, Default)]
pub struct Turns(Arc<Mutex<Running>>);

#[derive(Debug, Default)]
struct Running {
    leader: Option<u32>,
    /// Ticks of each stopped group when it was stopped.
    stopped: HashMap<u32, u64>,
}

/// A group goes on that was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewTurn {
    /// Clock ticks that it used meanwhile.
    pub waited_ticks: u64,
}

impl Turns {
    /// Stops whoever had the turn and continues the group that `id` leads; `None` where it has the turn.
    fn take(&self, id: u32) -> Option<NewTurn> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if running.leader == Some(id) {
            return None;
        }
        if let Some(other) = running.leader.replace(id) {
            // It may have ended.
            let _ = signal_group(other, Signal::STOP);
            running.stopped.insert(other, group_ticks(other));
        }
        let before = running.stopped.remove(&id);
        let waited_ticks = before.map_or(0, |before| group_ticks(id).saturating_sub(before));
        let _ = signal_group(id, Signal::CONT);
        Some(NewTurn { waited_ticks })
    }

    /// The group has ended.
    fn leave(&self, id: u32) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if running.leader == Some(id) {
            running.leader = None;
        }
        running.stopped.remove(&id);
    }
}

/// A running engine. Dropping it kills its process group.
pub struct EngineProcess {
    command: EngineCommand,
    hello: Hello,
    process: KilledAtDeadline,
    stream: BufReader<UnixStream>,
    stderr: Tail,
    /// The socket and the engine's arrays.
    directory: TempDir,
    oom_baseline: OomBaseline,
    turns: Option<Turns>,
}

impl EngineProcess {
    /// Starts a process and waits for its greeting. `turns`: the others that it is measured beside, which are stopped
    /// meanwhile; `None`: nobody is stopped.
    pub fn start(command: EngineCommand, deadline: Option<Deadline>, turns: Option<Turns>) -> Result<Self, Failure> {
        let role = command.role;
        let not_started = |cause: io::Error| Failure::error(format!("starting the {role} process: {cause}"));
        let directory = private_directory().map_err(not_started)?;
        let path = directory.path().join("socket");
        let listener =
            UnixListener::bind(&path).and_then(|l| l.set_nonblocking(true).map(|()| l)).map_err(not_started)?;
        let mut child = Command::new(&command.program)
            .args(&command.arguments)
            .envs(command.environment.iter().map(|(name, value)| (name, value)))
            .env(SOCKET_VARIABLE, &path)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|cause| match cause.kind() {
                ErrorKind::NotFound | ErrorKind::PermissionDenied => {
                    let program = command.program.file_name().unwrap_or(command.program.as_os_str()).to_string_lossy();
                    Failure::error(format!("starting the {role} `{program}`: {cause}"))
                }
                _ => not_started(cause),
            })?;
        let missing = || not_started(io::Error::other("a pipe is missing"));
        // Read, so that whoever writes there does not wait, and nothing of the protocol.
        drop(Tail::of(child.stdout.take().ok_or_else(missing)?));
        let stderr = Tail::of(child.stderr.take().ok_or_else(missing)?);
        // The kernel should end an engine, not the parent, when memory runs out. Raising a score needs no right.
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), "1000");
        let process = KilledAtDeadline::new(child, deadline, Killed::Group);
        if let Some(turns) = &turns {
            turns.take(process.id());
        }
        let starting = Starting { command: &command, process: &process, stderr: &stderr };
        let stream = starting.connection(&listener)?;
        let hello = Hello { protocol: 0, engine: String::new(), version: String::new(), capabilities: Vec::new() };
        let stream = BufReader::new(stream);
        let oom_baseline = OomBaseline::now();
        let mut engine = Self { command, hello, process, stream, stderr, directory, oom_baseline, turns };
        engine.hello = engine.greeting()?;
        Ok(engine)
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    pub fn can(&self, capability: &str) -> bool {
        self.hello.capabilities.iter().any(|word| word == capability)
    }

    /// A directory of the engine's own, which goes with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Stops the others and lets this one run; `None` where it runs.
    pub fn take_turn(&self) -> Option<NewTurn> {
        self.turns.as_ref()?.take(self.id())
    }

    /// Sends a request and gives its reply, after handing on the events before it. A process that ended gives its exit reason;
    /// `sizes` are the bytes that it needed and those that are free now, 0 where unknown.
    pub fn ask(
        &mut self,
        request: &EngineRequest,
        events: &dyn Listener,
        sizes: impl FnOnce() -> (u64, u64),
    ) -> Result<EngineReply, Failure> {
        self.take_turn();
        self.oom_baseline = OomBaseline::now();
        let sent = lines::send(self.stream.get_mut(), request);
        let reply = sent.and_then(|()| self.reply(events));
        let reply = reply.unwrap_or_else(|cause| Err(self.lost(&cause, request.name(), sizes)))?;
        match reply.name() == request.name() {
            true => Ok(reply),
            false => Err(self.error(format!("answered `{}` with `{}`", request.name(), reply.name()))),
        }
    }

    fn greeting(&mut self) -> Result<Hello, Failure> {
        let reply = self.reply(&crate::events::Silent);
        let reply = reply.unwrap_or_else(|cause| Err(self.lost(&cause, "hello", || (0, 0))))?;
        let EngineReply::Hello(hello) = reply else {
            return Err(self.error(format!("began with `{}` and not with `hello`", reply.name())));
        };
        if hello.protocol == 0 || hello.protocol > protocol::VERSION {
            return Err(self.error(format!(
                "speaks version {} of the engine protocol, and this build reads versions up to {}; measure with two builds of one \
                 version",
                hello.protocol,
                protocol::VERSION
            )));
        }
        Ok(hello)
    }

    fn error(&self, what: String) -> Failure {
        Failure::error(format!("the {} {what}", self.command.role))
    }

    /// An error means that the process is gone, or that it took too long.
    fn reply(&mut self, events: &dyn Listener) -> io::Result<Result<EngineReply, Failure>> {
        let role = self.command.role;
        let unreadable = |line: &str| {
            let shown: String = line.chars().take(SHOWN_CHARS).collect();
            Failure::error(format!("the {role} wrote `{shown}` to its socket, which is no message of the protocol"))
        };
        lines::receive(&mut self.stream, MAX_LINE_BYTES, |event| events.on(event), unreadable)
    }

    /// Why no answer came.
    fn lost(&mut self, cause: &io::Error, asked: &str, sizes: impl FnOnce() -> (u64, u64)) -> Failure {
        let role = self.command.role;
        if matches!(cause.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
            let _ = self.process.kill();
            return timed_out(&self.command, asked);
        }
        let began = Instant::now();
        while !has_ended(self.id()) && began.elapsed() < EXIT_GRACE {
            std::thread::sleep(CONNECT_POLL);
        }
        let closed_alone = !has_ended(self.id());
        // All of the group, while the ended leader still stands for it.
        let _ = self.process.kill();
        let status = self.process.wait();
        if let Some(deadline) = self.process.overran() {
            return Failure::Timeout { message: deadline.message() };
        }
        if closed_alone {
            return self.error(format!("closed its connection and ran on, asked for `{asked}`"));
        }
        exit_reason((role, self.id()), status, &self.stderr.bytes(), &self.oom_baseline, sizes())
    }
}

/// Characters of a bad line that a message shows.
const SHOWN_CHARS: usize = 120;

impl Drop for EngineProcess {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(turns) = &self.turns {
            turns.leave(self.id());
        }
    }
}

/// A process that has not connected yet.
struct Starting<'a> {
    command: &'a EngineCommand,
    process: &'a KilledAtDeadline,
    stderr: &'a Tail,
}

impl Starting<'_> {
    /// The connection of the process, which closes when the process ends, whoever else holds it open.
    fn connection(&self, listener: &UnixListener) -> Result<UnixStream, Failure> {
        let role = self.command.role;
        let failed = |cause: io::Error| {
            let _ = self.process.kill();
            let _ = self.process.wait();
            Failure::error(format!("connecting to the {role}: {cause}"))
        };
        let began = Instant::now();
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(cause) if cause.kind() != ErrorKind::WouldBlock => return Err(failed(cause)),
                Err(_) if has_ended(self.process.id()) => return Err(self.ended()),
                Err(_) if self.command.timeout.is_some_and(|limit| began.elapsed() > limit) => {
                    let _ = self.process.kill();
                    let _ = self.process.wait();
                    return Err(timed_out(self.command, "hello"));
                }
                Err(_) => std::thread::sleep(CONNECT_POLL),
            }
        };
        stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(self.command.timeout)).map_err(failed)?;
        let (watched, id) = (stream.try_clone().map_err(failed)?, self.process.id());
        std::thread::spawn(move || {
            let Some(pid) = pid(id) else { return };
            // It stays to be waited for, so that its number is nobody else's.
            let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            let _ = watched.shutdown(std::net::Shutdown::Both);
        });
        Ok(stream)
    }

    fn ended(&self) -> Failure {
        let _ = self.process.kill();
        let (status, role) = (self.process.wait(), self.command.role);
        if let Some(deadline) = self.process.overran() {
            return Failure::Timeout { message: deadline.message() };
        }
        if status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            let version = protocol::VERSION;
            return Failure::error(format!(
                "the {role} ended before it said `hello`: it does not speak version {version} of the engine protocol"
            ));
        }
        exit_reason((role, self.process.id()), status, &self.stderr.bytes(), &OomBaseline::now(), (0, 0))
    }
}

fn timed_out(command: &EngineCommand, asked: &str) -> Failure {
    let seconds = command.timeout.map_or(0.0, |limit| limit.as_secs_f64());
    Failure::Timeout { message: format!("timeout: the {} did not answer `{asked}` within {seconds} s", command.role) }
}

/// True for a child that has ended and was not waited for, and for one that is gone.
fn has_ended(id: u32) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    pid(id).is_none_or(|pid| !matches!(waitid(WaitId::Pid(pid), options), Ok(None)))
}

fn pid(id: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(id).ok()?)
}

/// Longest path of a socket on Linux and macOS, with room for the name.
const MAX_SOCKET_PATH: usize = 100;

/// A directory that only this user may enter, with a path that is short enough for a socket.
fn private_directory() -> io::Result<TempDir> {
    let make = |parent: &Path| tempfile::Builder::new().prefix("quantbench-").tempdir_in(parent);
    let directory = make(&std::env::temp_dir())?;
    match directory.path().as_os_str().len() + "/socket".len() <= MAX_SOCKET_PATH {
        true => Ok(directory),
        false => make(Path::new("/tmp")),
    }
}
