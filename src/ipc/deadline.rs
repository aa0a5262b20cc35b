//! The time limit of a case. A thread that sleeps until then kills a process that still runs.

use std::convert::Infallible;
use std::io;
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// A point in time, with the limit that it comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Deadline {
    at: Instant,
    timeout_s: f64,
}

impl Deadline {
    /// The time `timeout_s` seconds from now; `None` where no clock reaches it.
    pub fn after_s(timeout_s: f64) -> Option<Self> {
        let at = Instant::now().checked_add(Duration::try_from_secs_f64(timeout_s).ok()?)?;
        Some(Self { at, timeout_s })
    }

    /// The same limit, enforced so much later: for a process that ends its children at the limit by itself.
    pub fn with_grace(self, grace: Duration) -> Self {
        Self { at: self.at.checked_add(grace).unwrap_or(self.at), ..self }
    }

    /// Reason for a process that was killed at the deadline.
    pub fn message(&self) -> String {
        format!("timeout: the case took longer than its limit of {} s", self.timeout_s)
    }
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Killed {
    Process,
    /// The process and those of its group, which it leads.
    Group,
}

/// A child process that does not outlive its deadline. Dropping this neither kills nor waits.
pub struct KilledAtDeadline {
    child: Arc<Mutex<Child>>,
    id: u32,
    scope: Killed,
    deadline: Option<Deadline>,
    killed: Arc<AtomicBool>,
    /// Wakes and ends the watching thread when it goes.
    _watcher: Option<Sender<Infallible>>,
}

impl KilledAtDeadline {
    pub fn new(child: Child, deadline: Option<Deadline>, scope: Killed) -> Self {
        let id = child.id();
        let (child, killed) = (Arc::new(Mutex::new(child)), Arc::new(AtomicBool::new(false)));
        let _watcher = deadline.map(|deadline| watch(deadline, (child.clone(), scope), killed.clone()));
        Self { child, id, scope, deadline, killed, _watcher }
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    /// The deadline, if it was what killed the process.
    pub fn overran(&self) -> Option<Deadline> {
        self.deadline.filter(|_| self.killed.load(Ordering::Acquire))
    }

    pub fn wait(&self) -> io::Result<ExitStatus> {
        lock(&self.child).wait()
    }

    /// Kills what runs; a process that has ended and was not waited for still stands for its group.
    pub fn kill(&self) -> io::Result<()> {
        kill(&mut lock(&self.child), self.scope)
    }
}

fn kill(child: &mut Child, scope: Killed) -> io::Result<()> {
    match scope {
        Killed::Process => child.kill(),
        Killed::Group => signal_group(child.id(), Signal::KILL),
    }
}

/// Sends a signal to the process group that a process leads.
pub fn signal_group(id: u32, signal: Signal) -> io::Result<()> {
    let leader = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(kill_process_group(leader, signal)?)
}

fn watch(
    deadline: Deadline,
    (child, scope): (Arc<Mutex<Child>>, Killed),
    killed: Arc<AtomicBool>,
) -> Sender<Infallible> {
    let (watching, ended) = channel();
    std::thread::spawn(move || {
        let left = deadline.at.saturating_duration_since(Instant::now());
        if ended.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            let mut child = lock(&child);
            // One that ended by itself keeps its own reason.
            if matches!(child.try_wait(), Ok(None)) {
                killed.store(true, Ordering::Release);
                let _ = kill(&mut child, scope);
            }
        }
    });
    watching
}

/// A thread that panicked with it held left a child that can still be killed.
fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_outlives_its_deadline_is_killed_and_nothing_else_is() {
        let start = |program: &str, args: &[&str]| Command::new(program).args(args).spawn().unwrap();
        let deadline = Deadline::after_s(0.0);
        let sleeper = start("sleep", &["600"]);
        // Waiting first would hold the lock that killing needs; a worker is waited for when its pipe has closed.
        let watched = KilledAtDeadline::new(sleeper, deadline, Killed::Process);
        while watched.overran().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(watched.wait().unwrap().signal(), Some(9));
        assert!(watched.overran().unwrap().message().contains("its limit of 0 s"));

        let quick = KilledAtDeadline::new(start("true", &[]), Deadline::after_s(600.0), Killed::Process);
        assert!(quick.wait().unwrap().success() && quick.overran().is_none());
        for never in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
            assert_eq!(Deadline::after_s(never), None);
        }
    }
}
