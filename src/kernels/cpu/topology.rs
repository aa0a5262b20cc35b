//! CPUs as the operating system describes them: which ones this process may use, cores, last-level cache, free memory.

use std::collections::HashSet;
use std::fs;

/// Threads to compute with: physical cores that the affinity mask allows, no more than the cgroup's CPU limit.
pub fn default_threads() -> usize {
    let allowed = usable_cpus();
    match cores().len() {
        0 => allowed,
        cores => cores.min(allowed),
    }
}

/// CPUs that this process may use at once: its affinity mask within the quota of its control group and of those above it.
pub fn usable_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// One allowed CPU of each physical core, in rising order; empty where the system does not report them.
pub(super) fn cores() -> Vec<usize> {
    let mut seen = HashSet::new();
    affinity::allowed().into_iter().filter(|cpu| seen.insert(core_of(*cpu))).collect()
}

/// Names the physical core of a CPU: SMT siblings share it. A CPU of which the system says nothing is a core of its own.
pub(super) fn core_of(cpu: usize) -> String {
    let read = |name: &str| read_trimmed(&format!("/sys/devices/system/cpu/cpu{cpu}/topology/{name}"));
    read("core_cpus_list").or_else(|| read("thread_siblings_list")).unwrap_or_else(|| cpu.to_string())
}

/// Bytes of the last-level caches of all allowed CPUs together, each counted once; none where the system does not report them.
pub fn last_level_cache_bytes() -> Option<usize> {
    let mut seen = HashSet::new();
    let caches = affinity::allowed().into_iter().filter_map(last_level_cache);
    let bytes = caches.filter(|(sharers, _)| seen.insert(sharers.clone())).map(|(_, bytes)| bytes).sum();
    (bytes > 0).then_some(bytes)
}

/// Bytes of the second-level cache that a core has, its part where cores share one; none where the system does not report them.
pub fn core_cache_bytes() -> Option<usize> {
    let cpu = *affinity::allowed().first()?;
    let (_, sharers, bytes) = caches(cpu).into_iter().find(|(level, ..)| *level == 2)?;
    let mut cores: Vec<String> = cpus_of(&sharers).map(core_of).collect();
    cores.sort_unstable();
    cores.dedup();
    Some(bytes / cores.len().max(1))
}

/// The CPUs of a list such as `0-3,8`.
fn cpus_of(list: &str) -> impl Iterator<Item = usize> {
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<usize>().ok()?..=last.trim().parse().ok()?)
        })
        .flatten()
}

/// The CPUs that share the largest-numbered cache level with `cpu`, and its bytes.
fn last_level_cache(cpu: usize) -> Option<(String, usize)> {
    // Of several caches of the highest level the first.
    let last = caches(cpu).into_iter().rev().max_by_key(|(level, ..)| *level);
    last.map(|(_, sharers, bytes)| (sharers, bytes))
}

/// Level, sharers and bytes of the caches of `cpu` that hold data, as far as the system reports them.
fn caches(cpu: usize) -> Vec<(u32, String, usize)> {
    let mut found = Vec::new();
    for index in 0..16 {
        let read = |name: &str| read_trimmed(&format!("/sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{name}"));
        let Some(level) = read("level").and_then(|level| level.parse().ok()) else { break };
        let size = read("size").and_then(|size| parse_size(&size));
        if let (Some(sharers), Some(bytes)) = (read("shared_cpu_list"), size)
            && read("type").is_none_or(|kind| kind != "Instruction")
        {
            found.push((level, sharers, bytes));
        }
    }
    found
}

/// `32768K`, `32M` or plain bytes.
fn parse_size(text: &str) -> Option<usize> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

/// Bytes of memory that can be used without swapping; none where the system does not report them.
pub fn available_memory_bytes() -> Option<usize> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    parse_size(&line.replace(' ', "").replace("kB", "K"))
}

fn read_trimmed(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_string())
}

#[cfg(target_os = "linux")]
pub(super) mod affinity {
    //! The CPUs that a thread may run on.

    use std::mem::{size_of, zeroed};

    /// The CPUs that the calling thread may run on.
    #[derive(Clone, Copy)]
    pub(crate) struct Mask(libc::cpu_set_t);

    impl Mask {
        pub(crate) fn current() -> Option<Self> {
            // SAFETY: a cpu_set_t is plain bits, and the call writes at most the size it is given.
            unsafe {
                let mut set: libc::cpu_set_t = zeroed();
                (libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) == 0).then_some(Self(set))
            }
        }

        /// Just `cpu`; none if its number is too large for a mask.
        pub(crate) fn only(cpu: usize) -> Option<Self> {
            if cpu >= libc::CPU_SETSIZE as usize {
                return None;
            }
            // SAFETY: a cpu_set_t is plain bits; `cpu` is within it.
            unsafe {
                let mut set: libc::cpu_set_t = zeroed();
                libc::CPU_SET(cpu, &mut set);
                Some(Self(set))
            }
        }

        /// Lets the calling thread run on these only. A refusal costs speed and is not reported.
        pub(crate) fn apply(&self) {
            // SAFETY: the pointer and size are those of the set.
            unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) };
        }

        fn cpus(&self) -> Vec<usize> {
            // SAFETY: every index is below CPU_SETSIZE.
            (0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &self.0) }).collect()
        }
    }

    pub(crate) fn allowed() -> Vec<usize> {
        Mask::current().map_or(Vec::new(), |mask| mask.cpus())
    }

    /// The CPU that the calling thread is on right now.
    pub(crate) fn current_cpu() -> Option<usize> {
        // SAFETY: the call has no preconditions.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok()
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) mod affinity {
    //! Other systems place threads themselves.

    #[derive(Clone, Copy)]
    pub(crate) struct Mask;

    impl Mask {
        pub(crate) fn current() -> Option<Self> {
            None
        }
        pub(crate) fn only(_: usize) -> Option<Self> {
            None
        }
        pub(crate) fn apply(&self) {}
    }

    pub(crate) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    pub(crate) fn current_cpu() -> Option<usize> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_sysfs_and_meminfo_write_them() {
        for (text, bytes) in
            [("32768K", Some(32 << 20)), ("3M", Some(3 << 20)), ("64", Some(64)), ("1G", Some(1 << 30))]
        {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
        for text in ["", "K", "12X", "99999999999999999999K"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn lists_of_cpus_as_sysfs_writes_them() {
        assert_eq!(cpus_of("0-3,8,10-11").collect::<Vec<_>>(), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cpus_of("5").collect::<Vec<_>>(), [5]);
        assert_eq!(cpus_of("").count(), 0);
    }

    #[test]
    fn cores_are_allowed_and_distinct() {
        let cores = cores();
        let allowed = affinity::allowed();
        assert!(cores.iter().all(|cpu| allowed.contains(cpu)), "{cores:?} of {allowed:?}");
        assert!(cores.is_sorted_by(|a, b| a < b));
        assert!((1..=allowed.len().max(1)).contains(&default_threads()) || allowed.is_empty());
    }
}
