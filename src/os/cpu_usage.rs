//! Processor time of this and other processes, from Linux' accounts in clock ticks.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Accounts below a root folder: `/` but in tests.
#[derive(Debug, Clone)]
pub struct CpuAccounts {
    root: PathBuf,
    /// Below /proc: `self` or a number.
    process: String,
}

impl Default for CpuAccounts {
    fn default() -> Self {
        Self::below("/")
    }
}

/// Ticks since the machine began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuReading {
    n_cpus: u64,
    /// Over all processors, idle included.
    total: u64,
    busy: u64,
    /// Ticks of the process.
    own: u64,
}

/// Ticks between two readings; spans add up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct CpuUsage {
    pub n_cpus: u64,
    pub total: u64,
    pub busy: u64,
    pub own: u64,
}

impl CpuAccounts {
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), process: "self".to_owned() }
    }

    /// Accounts in which `own` are the ticks of another process.
    pub fn of(root: impl Into<PathBuf>, pid: u32) -> Self {
        Self { root: root.into(), process: pid.to_string() }
    }

    /// `None` where the system keeps no such accounts.
    pub fn read(&self) -> Option<CpuReading> {
        let machine = self.text("proc/stat")?;
        let mut lines = machine.lines();
        let ticks: Vec<u64> = lines.next()?.strip_prefix("cpu ")?.split_whitespace().flat_map(str::parse).collect();
        // user nice system idle iowait irq softirq steal; the guest columns after them are within user and nice.
        let total: u64 = ticks.iter().take(8).sum();
        let idle = ticks.get(3)? + ticks.get(4)?;
        let n_cpus = lines.take_while(|line| line.starts_with("cpu")).count() as u64;
        Some(CpuReading { n_cpus, total, busy: total - idle, own: self.own_ticks()? })
    }

    /// User and system ticks: fields 14 and 15 of the line, counted after the name, which may hold spaces.
    fn own_ticks(&self) -> Option<u64> {
        let own = self.text(&format!("proc/{}/stat", self.process))?;
        let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    }

    fn text(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(Path::new(file))).ok()
    }
}

/// Ticks of all processes of a group so far; those that have ended are not counted.
pub fn group_ticks(group: u32) -> u64 {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let ticks = |stat: String| {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        (number(2)? == u64::from(group)).then_some(number(11)? + number(12)?)
    };
    stats.filter_map(ticks).sum()
}

impl CpuReading {
    pub fn since(&self, before: CpuReading) -> CpuUsage {
        CpuUsage {
            n_cpus: self.n_cpus,
            total: self.total.saturating_sub(before.total),
            busy: self.busy.saturating_sub(before.busy),
            own: self.own.saturating_sub(before.own),
        }
    }
}

impl CpuUsage {
    pub fn sum(spans: impl IntoIterator<Item = CpuUsage>) -> CpuUsage {
        spans.into_iter().fold(CpuUsage::default(), |sum, span| CpuUsage {
            n_cpus: span.n_cpus,
            total: sum.total + span.total,
            busy: sum.busy + span.busy,
            own: sum.own + span.own,
        })
    }

    /// Processors that others kept busy on average. `None` for a span that is too short: under half a second a tick of
    /// 10 ms, won or lost at each end, is over 2 % of a processor.
    pub fn others_cpus(&self) -> Option<f64> {
        let wall_ticks = self.total as f64 / self.n_cpus.max(1) as f64;
        (wall_ticks >= 50.0).then(|| self.busy.saturating_sub(self.own) as f64 / wall_ticks)
    }

    /// True where other processes took from `threads` of ours: by needing more processors than were left, or, through the
    /// shared memory, by using over a quarter of the machine.
    pub fn disturbs(&self, threads: u64) -> bool {
        let n_cpus = self.n_cpus as f64;
        self.others_cpus().is_some_and(|others| {
            let crowded = others >= 0.1 && others + threads as f64 > n_cpus + 0.05;
            crowded || others > n_cpus / 4.0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::root;
    use super::*;

    #[test]
    fn accounts_are_read() {
        let stat = "cpu  100 10 20 500 5 1 2 3 9 9\ncpu0 50 0 0 0 0 0 0 0 0 0\ncpu1 50 0 0 0 0 0 0 0 0 0\nintr 5\n";
        let own = "77 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0 1 0";
        let root = root(&[("proc/stat", stat), ("proc/self/stat", own)]);
        let reading = CpuAccounts::below(root.path()).read().unwrap();
        assert_eq!(reading, CpuReading { n_cpus: 2, total: 641, busy: 136, own: 42 });
        assert_eq!(CpuAccounts::below(root.path().join("absent")).read(), None);
    }

    #[test]
    fn others_disturb_when_they_crowd_or_share_the_memory() {
        let span = |n_cpus, others_share: f64, threads: u64| {
            let wall = 1000;
            let own = wall * threads;
            CpuUsage { n_cpus, total: n_cpus * wall, own, busy: own + (others_share * wall as f64) as u64 }
        };
        for (n_cpus, others, threads, expected) in [
            (2, 0.0, 2, false),
            (2, 0.04, 2, false),
            (2, 0.5, 2, true),
            (2, 1.0, 1, true),
            (2, 0.3, 1, false),
            (64, 2.0, 16, false),
            (64, 20.0, 16, true),
        ] {
            assert_eq!(
                span(n_cpus, others, threads).disturbs(threads),
                expected,
                "{others} of {n_cpus}, {threads} ours"
            );
        }
        assert_eq!(CpuUsage { n_cpus: 2, total: 20, busy: 20, own: 0 }.others_cpus(), None, "too short");
    }
}
