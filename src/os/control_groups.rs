//! Linux' control groups: the limits of a process's own group and of every group above it, and how many processes the kernel
//! killed there for want of memory.

use std::path::{Path, PathBuf};

/// Accounts below a root folder, `/` but in tests, of the process called `process` below /proc: `self` or a number.
pub struct ControlGroups<'a> {
    pub root: &'a Path,
    pub process: &'a str,
}

/// Names of one version of Linux' control groups.
struct Version {
    /// Controller that a line of /proc/PID/cgroup must name; none for the one line of version 2.
    controller: &'static str,
    /// Mount points of the hierarchy: by itself, and beside version 1.
    mounts: &'static [&'static str],
    /// Each a limit, what it is a limit of, and what of that the kernel gives back when asked.
    limits: &'static [LimitFiles],
    /// The file that counts processes killed for want of memory.
    events: &'static str,
}

struct LimitFiles {
    limit: &'static str,
    used: &'static str,
    /// A line of `memory.stat`: page cache that was not read lately, which is dropped before anything is refused.
    dropped: &'static str,
}

/// Version 2. Above `memory.high` a group is slowed down until it is below it again: nothing can be measured there.
const UNIFIED: Version = Version {
    controller: "",
    mounts: &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
    limits: &[
        LimitFiles { limit: "memory.max", used: "memory.current", dropped: "inactive_file " },
        LimitFiles { limit: "memory.high", used: "memory.current", dropped: "inactive_file " },
    ],
    events: "memory.events",
};

/// Version 1. `memsw` is memory and swap together.
const LEGACY: Version = Version {
    controller: "memory",
    mounts: &["sys/fs/cgroup/memory"],
    limits: &[
        LimitFiles { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", dropped: "total_inactive_file " },
        LimitFiles {
            limit: "memory.memsw.limit_in_bytes",
            used: "memory.memsw.usage_in_bytes",
            dropped: "total_inactive_file ",
        },
    ],
    events: "memory.oom_control",
};

static VERSIONS: [Version; 2] = [UNIFIED, LEGACY];

impl ControlGroups<'_> {
    /// Bytes that the process may still take: the tightest limit on the way from its group up to the root. `None` where
    /// nothing is limited.
    pub fn room_bytes(&self) -> Option<u64> {
        let folders =
            VERSIONS.iter().flat_map(|version| self.folders(version).into_iter().map(move |at| (version, at)));
        let rooms = folders.flat_map(|(version, folder)| {
            version.limits.iter().filter_map(|limit| self.room_in(&folder, limit)).collect::<Vec<u64>>()
        });
        rooms.min()
    }

    /// Processes of the group, and of those above it, that the kernel has killed for want of memory. `None` where no group
    /// counts them.
    pub fn oom_kills(&self) -> Option<u64> {
        let files = VERSIONS
            .iter()
            .flat_map(|version| self.folders(version).into_iter().map(|folder| folder.join(version.events)));
        files.filter_map(|file| self.field(&file, "oom_kill ")).reduce(u64::saturating_add)
    }

    /// The process's own group first, the root of the hierarchy last. In a container the group's own folder is often mounted as
    /// the root.
    fn folders(&self, version: &Version) -> Vec<PathBuf> {
        let groups = self.read(Path::new(&format!("proc/{}/cgroup", self.process))).unwrap_or_default();
        let own = groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers.split(',').any(|name| name == version.controller).then_some(path)
        });
        let Some(own) = own else { return Vec::new() };
        // A group outside of the container's own view is shown as `/../other`.
        let names: Vec<&str> = own.split('/').filter(|name| !matches!(*name, "" | "." | "..")).collect();
        let below = |mount: &&str| {
            let mount = PathBuf::from(mount);
            let names = names.clone();
            (0..=names.len())
                .rev()
                .map(move |depth| names[..depth].iter().fold(mount.clone(), |at, name| at.join(name)))
        };
        version.mounts.iter().flat_map(below).collect()
    }

    fn room_in(&self, folder: &Path, names: &LimitFiles) -> Option<u64> {
        let number = |file: &str| self.read(&folder.join(file))?.trim().parse::<u64>().ok();
        let (limit, used) = (number(names.limit)?, number(names.used)?);
        let dropped = self.field(&folder.join("memory.stat"), names.dropped).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(dropped)))
    }

    /// The number after `name` at the beginning of a line.
    fn field(&self, file: &Path, name: &str) -> Option<u64> {
        self.read(file)?.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    fn read(&self, file: &Path) -> Option<String> {
        std::fs::read_to_string(self.root.join(file)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::root;
    use super::*;

    /// Checks what is free below these files, and how many were killed.
    fn check(files: &[(&str, &str)], room_bytes: Option<u64>, oom_kills: Option<u64>) {
        let root = root(files);
        let groups = ControlGroups { root: root.path(), process: "self" };
        assert_eq!((groups.room_bytes(), groups.oom_kills()), (room_bytes, oom_kills), "{files:?}");
    }

    /// Files of one group of version 2.
    fn group(folder: &str, limit: &str, used: &str) -> Vec<(String, String)> {
        let file = |name: &str, text: &str| (format!("sys/fs/cgroup/{folder}/{name}"), format!("{text}\n"));
        vec![file("memory.max", limit), file("memory.current", used)]
    }

    fn borrowed(files: &[(String, String)]) -> Vec<(&str, &str)> {
        files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect()
    }

    #[test]
    fn the_limit_may_stand_at_any_group_on_the_way_up() {
        let own = ("proc/self/cgroup", "0::/a.slice/scope/job_7/step_0/user/task_0\n");
        let names = ["a.slice", "scope", "job_7", "step_0", "user", "task_0"];
        for at in 1..=names.len() {
            let mut files = group(&names[..at].join("/"), "3000000", "1000000");
            if at != names.len() {
                files.extend(group(&names.join("/"), "max", "1000000"));
            }
            check(&[vec![own], borrowed(&files)].concat(), Some(2_000_000), None);
        }
        // Another group's limit is not ours, and the tightest of several counts.
        let files = [
            group("a.slice", "9000000", "4500000"),
            group("a.slice/scope", "3000000", "1000000"),
            group("b.slice", "1000", "0"),
        ]
        .concat();
        check(&[vec![own], borrowed(&files)].concat(), Some(2_000_000), None);
        check(&[own], None, None);
        check(&[], None, None);
    }

    /// Slurm's cgroup v2: the job and its step are limited, the task's own group is not.
    #[test]
    fn the_step_of_a_job_is_limited_though_its_task_is_not() {
        let task = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0";
        let step = "system.slice/slurmstepd.scope/job_7/step_0/user";
        let own = format!("0::/{task}\n");
        let mut files = [group(step, "4194304000", "94304000"), group(task, "max", "94304000")].concat();
        files.push(("proc/self/cgroup".to_owned(), own));
        files.push(("proc/meminfo".to_owned(), "MemTotal: 64000000 kB\nMemAvailable: 48000000 kB\n".to_owned()));
        let root = root(&borrowed(&files));
        let memory = super::super::memory::ProcessMemory::below(root.path());
        assert_eq!(memory.available_bytes(), Some(4_100_000_000));
    }

    #[test]
    fn both_versions_and_their_mounts_are_read() {
        let one = |cgroup: &str, folder: &str, names: [&str; 2]| {
            let file = |name: &str, text: &str| (format!("{folder}/{name}"), text.to_owned());
            vec![
                ("proc/self/cgroup".to_owned(), cgroup.to_owned()),
                file(names[0], "9000000"),
                file(names[1], "8000000"),
                file("memory.stat", "inactive_file 100000\ntotal_inactive_file 300000\n"),
            ]
        };
        let (v1, v2) = (["memory.limit_in_bytes", "memory.usage_in_bytes"], ["memory.max", "memory.current"]);
        let swap = ["memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"];
        for (cgroup, folder, names, room_bytes) in [
            ("4:memory:/a/b\n0::/\n", "sys/fs/cgroup/memory", v1, 1_300_000),
            ("4:memory:/a/b\n", "sys/fs/cgroup/memory/a", v1, 1_300_000),
            ("4:memory:/a/b\n", "sys/fs/cgroup/memory/a/b", swap, 1_300_000),
            ("5:cpu,memory,pids:/a\n", "sys/fs/cgroup/memory/a", v1, 1_300_000),
            ("0::/\n", "sys/fs/cgroup", v2, 1_100_000),
            ("0::/\n", "sys/fs/cgroup/unified", v2, 1_100_000),
            ("0::/a:b\n", "sys/fs/cgroup/a:b", v2, 1_100_000),
            ("0::/../job\n", "sys/fs/cgroup/job", v2, 1_100_000),
            ("0::/a\n", "sys/fs/cgroup/a", ["memory.high", "memory.current"], 1_100_000),
        ] {
            check(&borrowed(&one(cgroup, folder, names)), Some(room_bytes), None);
        }
        check(&borrowed(&one("0::/\n", "sys/fs/cgroup/memory", v1)), None, None);
    }

    #[test]
    fn kills_are_counted_by_the_group_and_those_above_it() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 9\n";
        let own = ("proc/self/cgroup", "0::/a/b\n");
        check(&[own, ("sys/fs/cgroup/a/b/memory.events", events)], None, Some(2));
        check(
            &[own, ("sys/fs/cgroup/a/b/memory.events", events), ("sys/fs/cgroup/a/memory.events", events)],
            None,
            Some(4),
        );
        let legacy = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n";
        let own = ("proc/self/cgroup", "4:memory:/a\n");
        check(&[own, ("sys/fs/cgroup/memory/a/memory.oom_control", legacy)], None, Some(5));
    }
}
