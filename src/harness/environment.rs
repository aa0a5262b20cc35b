//! Machine and build of a record, and what about them disturbs a measurement.

use std::path::PathBuf;

use super::warnings::Warning;
use crate::engine::Engine;
use crate::kernels::cpu::topology::usable_cpus;
use crate::record::{self, Environment};

/// The machine below a root folder: `/` but in tests.
#[derive(Debug, Clone)]
pub struct Machine {
    root: PathBuf,
}

impl Default for Machine {
    fn default() -> Self {
        Self::below("/")
    }
}

impl Machine {
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// No host name, user or path is in it.
    pub fn environment(&self, isa: &str, threads: usize) -> Environment {
        Environment {
            cpu: self.cpu_name(),
            isa: isa.to_owned(),
            threads: threads as u64,
            os: self.os(),
            build_profile: build_profile().to_owned(),
            features: features(),
            ..Environment::default()
        }
    }

    pub fn cpu_name(&self) -> String {
        let info = self.text("proc/cpuinfo").unwrap_or_default();
        let field =
            |line: &str| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned());
        info.lines().find_map(field).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
    }

    fn os(&self) -> String {
        let release = self.text("etc/os-release").unwrap_or_default();
        let name =
            release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"'));
        let kernel = self.text("proc/sys/kernel/osrelease").unwrap_or_default();
        let name = name.unwrap_or(std::env::consts::OS);
        format!("{name} {}", kernel.trim()).trim_end().to_owned()
    }

    /// Warnings that are known before anything is measured.
    pub fn warnings(&self) -> Vec<Warning> {
        let debug = (build_profile() == "debug").then_some(Warning::DebugBuild);
        [debug, self.slow_governor(), self.on_battery()].into_iter().flatten().collect()
    }

    /// `powersave` holds the lowest clock, but with the drivers that let the processor choose (intel_pstate,
    /// amd-pstate-epp) it is the ordinary setting and the energy preference decides.
    fn slow_governor(&self) -> Option<Warning> {
        let setting = |name: &str| self.text(&format!("sys/devices/system/cpu/cpu0/cpufreq/{name}"));
        let governor = setting("scaling_governor")?.trim().to_owned();
        let preference = setting("energy_performance_preference").unwrap_or_default();
        let slow = match preference.trim() {
            "" => governor == "powersave",
            preference => governor == "powersave" && matches!(preference, "power" | "balance_power"),
        };
        slow.then_some(Warning::PowersaveGovernor { governor })
    }

    fn on_battery(&self) -> Option<Warning> {
        let supplies = std::fs::read_dir(self.root.join("sys/class/power_supply")).ok()?;
        let discharging = |folder: PathBuf| {
            let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
            // A mouse has a battery too; its scope says so.
            read("type").trim() == "Battery"
                && read("scope").trim() != "Device"
                && read("status").trim() == "Discharging"
        };
        supplies.flatten().any(|supply| discharging(supply.path())).then_some(Warning::OnBattery)
    }

    fn text(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(file)).ok()
    }
}

/// Name, version and commit of an engine, for records.
pub fn engine_info(engine: Engine) -> record::EngineInfo {
    let commit = match engine {
        Engine::Quantbench => option_env!("QUANTBENCH_COMMIT").unwrap_or("unknown"),
        Engine::Candle => "release",
    };
    record::EngineInfo {
        name: engine.name().to_owned(),
        version: engine.version().to_owned(),
        commit: commit.to_owned(),
    }
}

/// More threads than CPUs that this process may use: its affinity, and the quota of its control group.
pub fn too_many_threads(threads: usize) -> Option<Warning> {
    let cpus = usable_cpus();
    (threads > cpus).then_some(Warning::TooManyThreads { threads, cpus })
}

fn build_profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}

fn features() -> Vec<String> {
    if cfg!(feature = "cuda") { vec!["cuda".to_owned()] } else { Vec::new() }
}

/// Seconds since 1970 as RFC 3339 in UTC, by the civil calendar in 400-year eras (Hinnant, chrono-compatible low-level date
/// algorithms).
pub fn rfc3339(unix_s: u64) -> String {
    let (days, rest) = (unix_s / 86_400 + 719_468, unix_s % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Now, for records.
pub fn timestamp() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    rfc3339(now.map_or(0, |since| since.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::testing::root;

    #[test]
    fn threads_beyond_the_cpus_are_warned_of() {
        let cpus = usable_cpus();
        assert_eq!(too_many_threads(cpus), None);
        let warning = too_many_threads(cpus + 1).expect("a warning");
        assert_eq!(warning, Warning::TooManyThreads { threads: cpus + 1, cpus });
        assert!(warning.taints() && warning.to_string().starts_with("too_many_threads: "), "{warning}");
    }

    #[test]
    fn dates_are_civil() {
        for (unix_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix_s), text);
        }
    }

    #[test]
    fn the_machine_is_named() {
        let root = root(&[
            ("proc/cpuinfo", "processor: 0\nmodel name\t: Some CPU 3000\n"),
            ("etc/os-release", "ID=x\nPRETTY_NAME=\"Some OS 1\"\n"),
            ("proc/sys/kernel/osrelease", "6.1.0\n"),
        ]);
        let machine = Machine::below(root.path());
        let environment = machine.environment("avx2", 2);
        assert_eq!((environment.cpu.as_str(), environment.os.as_str()), ("Some CPU 3000", "Some OS 1 6.1.0"));
        let bare = Machine::below(root.path().join("absent"));
        assert_eq!(bare.cpu_name(), std::env::consts::ARCH);
    }

    #[test]
    fn governor_and_battery_are_noticed() {
        let governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor";
        let preference = "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference";
        let kind = "sys/class/power_supply/BAT0/type";
        let status = "sys/class/power_supply/BAT0/status";
        let slow = || Some(Warning::PowersaveGovernor { governor: "powersave".to_owned() });
        let cases: [(&[(&str, &str)], Option<Warning>); 8] = [
            (&[], None),
            (&[(governor, "powersave\n")], slow()),
            (&[(governor, "performance\n")], None),
            (&[(governor, "powersave\n"), (preference, "balance_performance\n")], None),
            (&[(governor, "powersave\n"), (preference, "power\n")], slow()),
            (&[(kind, "Battery\n"), (status, "Discharging\n")], Some(Warning::OnBattery)),
            (&[(kind, "Battery\n"), (status, "Charging\n")], None),
            (
                &[(kind, "Battery\n"), (status, "Discharging\n"), ("sys/class/power_supply/BAT0/scope", "Device\n")],
                None,
            ),
        ];
        for (files, expected) in cases {
            let root = root(files);
            let machine = Machine::below(root.path());
            let found: Vec<_> = machine.warnings().into_iter().filter(|w| *w != Warning::DebugBuild).collect();
            assert_eq!(found, Vec::from_iter(expected), "{files:?}");
        }
    }
}
