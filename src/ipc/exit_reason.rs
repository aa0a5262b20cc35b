//! The reason why a process ended: it ran out of memory only where its allocator, the driver or the kernel reports it.

use std::io;
use std::process::ExitStatus;

use crate::error::size;
use crate::os::memory::{OomKills, ProcessMemory};
use crate::protocol::Failure;

/// Kills by the kernel so far, to compare with those after a process ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OomBaseline {
    kills: OomKills,
    /// Seconds since the machine started.
    uptime_s: f64,
}

impl OomBaseline {
    pub fn now() -> Self {
        Self { kills: ProcessMemory::default().oom_kills(), uptime_s: uptime_s() }
    }
}

/// All that is known of a process that ended.
#[derive(Debug, Clone, Copy)]
struct End<'a> {
    role: &'a str,
    signal: Option<i32>,
    /// The standard library's text.
    status: &'a str,
    /// The tail of its standard error.
    stderr: &'a str,
    /// The kernel's record shows that it killed the process, or one beside it meanwhile, for want of memory.
    killed_for_memory: bool,
}

/// The failure of a process that ended, by its role and number. `sizes` are the bytes that it needed and those that are free; 0 where
/// unknown.
pub fn exit_reason(
    (role, pid): (&str, u32),
    status: io::Result<ExitStatus>,
    stderr: &[u8],
    baseline: &OomBaseline,
    sizes: (u64, u64),
) -> Failure {
    let status = match status {
        Ok(status) => status,
        Err(cause) => return Failure::Error { message: format!("waiting for the {role}: {cause}") },
    };
    let signal = signal(status);
    let killed_for_memory = signal == Some(SIGKILL)
        && (ProcessMemory::default().oom_kills().grew_since(baseline.kills) || logged(pid, baseline.uptime_s));
    let (stderr, status) = (String::from_utf8_lossy(stderr), status.to_string());
    failure(End { role, signal, status: &status, stderr: &stderr, killed_for_memory }, sizes)
}

/// Message of a failure for want of memory: the cause, what is needed in all, and what is free.
pub fn out_of_memory(cause: &str, needed_bytes: u64, free_bytes: u64) -> String {
    let sizes = match (needed_bytes, free_bytes) {
        (0, 0) => String::new(),
        (needed, 0) => format!("{} are needed {IN_ALL}", size(needed)),
        (0, free) => format!("{} free", size(free)),
        (needed, free) => format!("{} are needed {IN_ALL}, {} free", size(needed), size(free)),
    };
    let parts: Vec<&str> = [cause, &sizes].into_iter().filter(|part| !part.is_empty()).collect();
    match parts.is_empty() {
        true => "out of memory".to_owned(),
        false => format!("out of memory: {}", parts.join("; ")),
    }
}

const IN_ALL: &str = "in all";

/// True for a message of [`out_of_memory`] that has sizes.
pub fn has_sizes(message: &str) -> bool {
    message.starts_with("out of memory: ") && (message.contains(IN_ALL) || message.ends_with(" free"))
}

const SIGKILL: i32 = 9;

/// Decides by the signal, the stderr tail and the kernel's record. Rust aborts when an allocation fails and names the bytes; C++ throws.
fn failure(end: End, (needed_bytes, free_bytes): (u64, u64)) -> Failure {
    let End { role, signal, status, stderr, killed_for_memory } = end;
    let oom = |cause: &str, wanted_bytes| {
        let message = out_of_memory(cause, needed_bytes, free_bytes);
        Failure::OutOfMemory { message, wanted_bytes, free_bytes }
    };
    if let Some(bytes) = refused_bytes(stderr) {
        return oom(&format!("an allocation of {} failed", size(bytes)), bytes);
    }
    if killed_for_memory {
        return oom(&format!("the kernel killed the {role}"), 0);
    }
    let refusals = [
        ("CUDA_ERROR_OUT_OF_MEMORY", "the device has too little free memory (CUDA_ERROR_OUT_OF_MEMORY)"),
        ("std::bad_alloc", "an allocation failed"),
        ("Cannot allocate memory", "the system refused more"),
    ];
    // A process that was killed from outside did not end because of its last output.
    let by_itself = signal.is_none_or(|signal| signal == SIGABRT);
    if let Some((_, cause)) = refusals.iter().find(|(said, _)| by_itself && stderr.contains(said)) {
        return oom(cause, 0);
    }
    let said = last_line(stderr);
    let ended = match signal {
        Some(signal) => format!("the {role} was killed by signal {signal}{}", in_brackets(signal)),
        None => format!("the {role} ended with {status}"),
    };
    Failure::Error {
        message: match (signal, said) {
            (_, Some(said)) => format!("{ended}: {said}"),
            (Some(_), None) => ended,
            (None, None) => format!("{ended}: it wrote no error"),
        },
    }
}

const SIGABRT: i32 = 6;

/// Bytes of the last allocation that Rust's allocator could not make. Threads that fail together write into each other's line.
fn refused_bytes(stderr: &str) -> Option<u64> {
    let bytes = |line: &str| line.strip_prefix("memory allocation of ")?.split(' ').find_map(|word| word.parse().ok());
    stderr.lines().rev().find_map(bytes)
}

/// The last line with a message, before a backtrace if there is one.
fn last_line(stderr: &str) -> Option<&str> {
    let messages = stderr.split("\nstack backtrace:").next().unwrap_or(stderr);
    let last = messages.lines().rfind(|line| !line.trim().is_empty() && !line.starts_with("note: "));
    last.map(str::trim)
}

/// Linux' names of signals, from 1.
const SIGNALS: [&str; 31] = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

fn in_brackets(signal: i32) -> String {
    let name = usize::try_from(signal - 1).ok().and_then(|at| SIGNALS.get(at)).filter(|_| cfg!(target_os = "linux"));
    name.map(|name| format!(" ({name})")).unwrap_or_default()
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_status: ExitStatus) -> Option<i32> {
    None
}

/// Seconds since the machine started; 0 where unknown.
fn uptime_s() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0)
}

/// True where the kernel's log may be read and names this process as killed for want of memory since then.
fn logged(pid: u32, since_s: f64) -> bool {
    kernel_log().iter().any(|line| is_kill(line, pid, since_s))
}

/// The records of /dev/kmsg: a read gives one, and fails when there is no more.
#[cfg(target_os = "linux")]
fn kernel_log() -> Vec<String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;

    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    let Ok(mut log) = opened else { return Vec::new() };
    let (mut lines, mut record) = (Vec::new(), [0u8; 8192]);
    loop {
        match log.read(&mut record) {
            Ok(n @ 1..) => lines.push(String::from_utf8_lossy(&record[..n]).into_owned()),
            // Overwritten before it was read: the next one is there.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(0) | Err(_) => return lines,
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn kernel_log() -> Vec<String> {
    Vec::new()
}

/// `6,1234,98765432,-;Memory cgroup out of memory: Killed process 77 (quantbench) …`: priority, number, microseconds since the start.
fn is_kill(line: &str, pid: u32, since_s: f64) -> bool {
    let Some((head, text)) = line.split_once(';') else { return false };
    let at_s = head.split(',').nth(2).and_then(|us| us.parse::<f64>().ok()).map(|us| us / 1e6);
    let is_later = at_s.is_some_and(|at_s| at_s >= since_s - CLOCKS_DIFFER_S);
    is_later && text.to_lowercase().contains("out of memory") && text.contains(&format!("illed process {pid} ("))
}

/// The log's clock and the uptime are read from different places.
const CLOCKS_DIFFER_S: f64 = 1.0;

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: (u64, u64) = (3 << 30, 1 << 30);

    fn end(signal: Option<i32>, stderr: &str, killed_for_memory: bool) -> Failure {
        failure(End { role: "worker", signal, status: "exit status: 101", stderr, killed_for_memory }, SIZES)
    }

    #[test]
    fn only_the_allocator_the_driver_or_the_kernel_makes_an_exit_an_oom() {
        let panic = "thread panicked: Cannot allocate memory (os error 12)";
        let driver = "called `unwrap()` on DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        for (signal, stderr, by_kernel, cause, wanted_bytes) in [
            (
                Some(6),
                "noise\nmemory allocation of 123 bytes failed\n",
                false,
                "an allocation of 123 bytes failed",
                123,
            ),
            (
                Some(6),
                "memory allocation of memory allocation of 4096 bytes failed",
                false,
                "an allocation of 4.0 KiB failed",
                4096,
            ),
            (Some(9), "", true, "the kernel killed the worker", 0),
            (None, panic, false, "the system refused more", 0),
            (None, driver, false, "the device has too little free memory (CUDA_ERROR_OUT_OF_MEMORY)", 0),
            (
                Some(6),
                "terminate called after throwing an instance of 'std::bad_alloc'",
                false,
                "an allocation failed",
                0,
            ),
        ] {
            let message = format!("out of memory: {cause}; 3.00 GiB are needed in all, 1.00 GiB free");
            let expected = Failure::OutOfMemory { message, wanted_bytes, free_bytes: 1 << 30 };
            assert_eq!(end(signal, stderr, by_kernel), expected);
        }
    }

    #[test]
    fn every_other_exit_is_an_error_that_names_the_signal() {
        let panic = "thread 'main' panicked at a.rs:1:2:\nno way\nstack backtrace:\n   0: main\n";
        for (signal, stderr, message) in [
            (Some(9), "", "the worker was killed by signal 9 (SIGKILL)"),
            (
                Some(9),
                "Cannot allocate memory\n",
                "the worker was killed by signal 9 (SIGKILL): Cannot allocate memory",
            ),
            (Some(15), "", "the worker was killed by signal 15 (SIGTERM)"),
            (
                Some(11),
                "the last line\nnote: run with a backtrace\n",
                "the worker was killed by signal 11 (SIGSEGV): the last line",
            ),
            (Some(7), "", "the worker was killed by signal 7 (SIGBUS)"),
            (Some(31), "", "the worker was killed by signal 31 (SIGSYS)"),
            (Some(64), "", "the worker was killed by signal 64"),
            (None, panic, "the worker ended with exit status: 101: no way"),
            (None, "", "the worker ended with exit status: 101: it wrote no error"),
        ] {
            assert_eq!(end(signal, stderr, false), Failure::Error { message: message.to_owned() });
        }
    }

    #[test]
    fn unknown_sizes_are_left_out() {
        for (cause, sizes, said) in [
            ("it broke", (0, 0), "out of memory: it broke"),
            ("it broke", (0, 1 << 30), "out of memory: it broke; 1.00 GiB free"),
            ("", (3 << 30, 0), "out of memory: 3.00 GiB are needed in all"),
            ("", (0, 0), "out of memory"),
        ] {
            assert_eq!(out_of_memory(cause, sizes.0, sizes.1), said);
            assert_eq!(has_sizes(said), sizes != (0, 0));
        }
    }

    #[test]
    fn the_kernel_log_names_whom_it_killed() {
        let line = |us: u64, text: &str| format!("3,1204,{us},-;{text}");
        let global = "Out of memory: Killed process 77 (quantbench) total-vm:1kB, anon-rss:1kB";
        let group = "Memory cgroup out of memory: Killed process 77 (quantbench) total-vm:1kB";
        for (text, us, killed) in [
            (global, 50_000_000, true),
            (group, 50_000_000, true),
            (global, 20_000_000, false),
            ("Out of memory: Killed process 778 (quantbench)", 50_000_000, false),
            ("oom_reaper: reaped process 77 (quantbench)", 50_000_000, false),
        ] {
            assert_eq!(is_kill(&line(us, text), 77, 40.0), killed, "{text} at {us}");
        }
        assert!(!is_kill("no record", 77, 0.0));
    }

    #[cfg(unix)]
    #[test]
    fn a_process_that_somebody_kills_did_not_run_out_of_memory() {
        let baseline = OomBaseline::now();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        child.kill().unwrap();
        let (pid, status) = (child.id(), child.wait());
        let cause = exit_reason(("worker", pid), status, b"", &baseline, SIZES);
        assert!(matches!(&cause, Failure::Error { message } if message.contains("signal 9")), "{cause:?}");
    }
}
