//! Resident memory of this process and free memory of the machine, from Linux' own accounts; `None` elsewhere.

use std::path::{Path, PathBuf};

use super::control_groups::ControlGroups;

/// Memory accounts below a root folder: `/` but in tests.
#[derive(Debug, Clone)]
pub struct ProcessMemory {
    root: PathBuf,
    /// Below /proc: `self` or a number.
    process: String,
}

/// Processes killed for want of memory, since the machine or the group began; `None` where nothing counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OomKills {
    /// Kills in the control group and those above it.
    pub of_groups: Option<u64>,
    pub of_machine: Option<u64>,
}

impl OomKills {
    /// True where a process was killed since `before`. The groups' count is preferred: the machine's includes the kills of all
    /// others.
    pub fn grew_since(self, before: Self) -> bool {
        let grew = |now: Option<u64>, before: Option<u64>| Some(now? > before?);
        grew(self.of_groups, before.of_groups).or_else(|| grew(self.of_machine, before.of_machine)).unwrap_or(false)
    }
}

impl Default for ProcessMemory {
    fn default() -> Self {
        Self::below("/")
    }
}

impl ProcessMemory {
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), process: "self".to_owned() }
    }

    /// Accounts of another process, below `root`.
    pub fn of(root: impl Into<PathBuf>, pid: u32) -> Self {
        Self { root: root.into(), process: pid.to_string() }
    }

    /// Resident set now, of the process.
    pub fn resident_bytes(&self) -> Option<u64> {
        self.field(&format!("proc/{}/status", self.process), "VmRSS:")
    }

    /// Highest resident set since the process began or [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> Option<u64> {
        self.field(&format!("proc/{}/status", self.process), "VmHWM:")
    }

    /// Resets the peak; false where the kernel does not allow it.
    pub fn reset_peak(&self) -> bool {
        std::fs::write(self.root.join(format!("proc/{}/clear_refs", self.process)), "5").is_ok()
    }

    /// All memory of the machine.
    pub fn total_bytes(&self) -> Option<u64> {
        self.field("proc/meminfo", "MemTotal:")
    }

    /// Memory that can still be allocated without swapping: the machine's estimate within the tightest limit of the control
    /// group and of those above it.
    pub fn available_bytes(&self) -> Option<u64> {
        let machine = self.field("proc/meminfo", "MemAvailable:");
        [machine, self.groups().room_bytes()].into_iter().flatten().min()
    }

    /// Processes that the kernel has killed for want of memory, as far as it counts them.
    pub fn oom_kills(&self) -> OomKills {
        let text = self.read("proc/vmstat").unwrap_or_default();
        let of_machine = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        OomKills { of_groups: self.groups().oom_kills(), of_machine }
    }

    fn groups(&self) -> ControlGroups<'_> {
        ControlGroups { root: &self.root, process: &self.process }
    }

    /// Most memory that one process may take: the smaller of `ulimit -v` and `ulimit -d`.
    pub fn process_limit_bytes(&self) -> Option<u64> {
        let text = self.read("proc/self/limits")?;
        let soft = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        ["Max address space", "Max data size"].into_iter().filter_map(soft).min()
    }

    /// Memory that one more process can take.
    pub fn room_bytes(&self) -> Option<u64> {
        [self.available_bytes(), self.process_limit_bytes()].into_iter().flatten().min()
    }

    /// A line `name   123 kB`, in bytes.
    fn field(&self, file: &str, name: &str) -> Option<u64> {
        let text = self.read(file)?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(Path::new(file))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::root;
    use super::*;

    #[test]
    fn accounts_are_read_in_bytes() {
        let root = root(&[
            ("proc/self/status", "Name:\tx\nVmHWM:\t    3000 kB\nVmRSS:\t    2000 kB\n"),
            ("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:   7000 kB\n"),
        ]);
        let memory = ProcessMemory::below(root.path());
        assert_eq!(memory.resident_bytes(), Some(2000 * 1024));
        assert_eq!(memory.peak_bytes(), Some(3000 * 1024));
        assert_eq!(memory.available_bytes(), Some(7000 * 1024));
        assert!(memory.reset_peak());
        assert_eq!(std::fs::read_to_string(root.path().join("proc/self/clear_refs")).unwrap(), "5");
    }

    #[test]
    fn the_tightest_limit_counts() {
        let meminfo = ("proc/meminfo", "MemAvailable:   7000 kB\n");
        let unified = root(&[
            meminfo,
            ("proc/self/cgroup", "0::/box\n"),
            ("sys/fs/cgroup/box/memory.max", "1000000\n"),
            ("sys/fs/cgroup/box/memory.current", "600000\n"),
            ("sys/fs/cgroup/box/memory.stat", "anon 1\ninactive_file 100000\n"),
        ]);
        assert_eq!(ProcessMemory::below(unified.path()).available_bytes(), Some(500_000));
        let legacy = root(&[
            meminfo,
            ("proc/self/cgroup", "4:memory:/a/b\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "8000000\n"),
        ]);
        assert_eq!(ProcessMemory::below(legacy.path()).available_bytes(), Some(1_000_000));
        let unlimited = root(&[
            meminfo,
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
            ("sys/fs/cgroup/memory.current", "1\n"),
        ]);
        assert_eq!(ProcessMemory::below(unlimited.path()).available_bytes(), Some(7000 * 1024));
    }

    #[test]
    fn a_kill_is_known_by_the_groups_or_else_by_the_machine() {
        let kills = |of_groups, of_machine| OomKills { of_groups, of_machine };
        for (before, after, grew) in [
            (kills(Some(1), Some(5)), kills(Some(2), Some(6)), true),
            // Somebody else's.
            (kills(Some(1), Some(5)), kills(Some(1), Some(6)), false),
            (kills(None, Some(5)), kills(None, Some(6)), true),
            (kills(None, Some(5)), kills(None, Some(5)), false),
            (kills(None, None), kills(None, None), false),
        ] {
            assert_eq!(after.grew_since(before), grew, "{before:?} {after:?}");
        }
        let root = root(&[
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.events", "oom 1\noom_kill 3\n"),
            ("proc/vmstat", "nr_free_pages 9\noom_kill 7\n"),
        ]);
        assert_eq!(ProcessMemory::below(root.path()).oom_kills(), kills(Some(3), Some(7)));
    }

    #[test]
    fn the_limit_of_a_process_is_its_soft_one() {
        for (soft, expected) in [("300000", Some(300_000)), ("unlimited", None)] {
            let line =
                format!("Limit       Soft Limit  Hard Limit  Units\nMax address space   {soft}   unlimited   bytes\n");
            let root = root(&[("proc/self/limits", &line)]);
            assert_eq!(ProcessMemory::below(root.path()).process_limit_bytes(), expected);
        }
        let both = "Max data size  200000  unlimited  bytes\nMax address space  300000  unlimited  bytes\n";
        assert_eq!(
            ProcessMemory::below(root(&[("proc/self/limits", both)]).path()).process_limit_bytes(),
            Some(200_000)
        );
    }

    #[test]
    fn a_machine_without_accounts_gives_none() {
        let memory = ProcessMemory::below(root(&[]).path());
        assert_eq!((memory.resident_bytes(), memory.peak_bytes(), memory.available_bytes()), (None, None, None));
        assert!(!memory.reset_peak());
    }
}
