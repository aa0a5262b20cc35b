//! Examines this machine's fitness for measuring: facts, and for each that is missing or disturbs, what to do.

#[cfg(feature = "cuda")]
mod gpus;
#[cfg(not(feature = "cuda"))]
#[path = "no_gpus.rs"]
mod gpus;

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use super::environment::Machine;
use crate::engines::{self, ADAPTERS, Adapter, Probe};
use crate::error::BadInput;
use crate::kernels::cpu::arithmetic;
use crate::kernels::cpu::bandwidth::WorkingSet;
use crate::kernels::cpu::libraries::can_open;
use crate::kernels::cpu::pool::{Pool, default_threads};
use crate::kernels::cpu::topology::last_level_cache_bytes;
use crate::kernels::isa::Isa;
use crate::os::memory::ProcessMemory;
use crate::report::doctor::{
    Build, Cpu, DeviceFile, EngineFacts, Examination, Finding, GpuDevice, GpuSection, HostMemory, Permissions,
};

/// A mean load below half a CPU is the system itself.
const BUSY_LOAD: f64 = 0.5;

/// Two threads of one core compute hardly more than one; clocks that fall as cores join take less than this.
const SHARED_CORES: f64 = 0.7;

/// Examines everything and measures the memory bandwidth. Nothing here can fail: a missing part is a finding.
pub fn examine(python: Option<&Path>) -> Examination {
    let system = System::default();
    let (threads, isa) = (default_threads(), Isa::detect());
    let (devices, problem) = match gpus::devices() {
        Ok(devices) => (devices, None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    let mut examination = Examination {
        build: system.build(),
        cpu: system.cpu(isa, threads),
        memory: system.memory(),
        gpu: system.gpu(devices),
        permissions: system.permissions(),
        engines: engines(python),
        findings: Vec::new(),
    };
    let pool = Pool::new(threads);
    let _pinned = pool.pin_caller();
    let rates = [1, threads].map(|threads| arithmetic::gflop_s(isa, &pool, threads));
    (examination.cpu.gflop_s, examination.cpu.scaling) = (Some(rates[1]), Some(rates[1] / rates[0]));
    if let Ok(mut memory) = WorkingSet::new(&pool) {
        examination.memory.read_gb_s = Some(memory.read_gb_s(isa, &pool));
        examination.memory.copy_gb_s = Some(memory.copy_gb_s(isa, &pool));
    }
    examination.findings = findings(&examination, problem);
    // `name: what; advice`
    examination.findings.extend(system.machine.warnings().iter().map(|warning| {
        let text = warning.to_string();
        let (what, advice) = text.split_once("; ").unwrap_or((&text, "see docs/method.md"));
        Finding::new(what, advice)
    }));
    examination
}

/// Which adapters the Python that was named, or the usual one, has the packages for. Looked at before anything is measured.
fn engines(python: Option<&Path>) -> Vec<EngineFacts> {
    let python = engines::find_python(python);
    let facts = |adapter: &'static Adapter| {
        let Probe { found, missing, too_old, problem } = engines::probe(adapter, &python);
        let packages = found.iter().map(|(package, version)| format!("{package} {version}")).collect();
        // No path: the page is meant to be shown.
        // What is too old is named with the version that will do.
        let missing: Vec<String> = missing.into_iter().chain(too_old).collect();
        let install = match (problem, missing.as_slice()) {
            (Some(_), _) => {
                "no Python was found; name one with QUANTBENCH_PYTHON, or make one with scripts/engines.sh".to_owned()
            }
            (None, []) => String::new(),
            (None, missing) => {
                format!("install {} for that Python, or make one with scripts/engines.sh", missing.join(", "))
            }
        };
        EngineFacts { name: adapter.name, can_run: install.is_empty(), packages, install }
    };
    ADAPTERS.iter().map(facts).collect()
}

/// Checks that this build can use the GPU of this number. Fails with the reason why it cannot. Creates no context.
pub fn gpu(ordinal: usize) -> Result<(), BadInput> {
    gpus::check(ordinal)
}

/// The files of a system below a root: `/` but in tests.
struct System {
    root: PathBuf,
    machine: Machine,
}

impl Default for System {
    fn default() -> Self {
        Self::below("/")
    }
}

impl System {
    fn below(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self { machine: Machine::below(&root), root }
    }

    fn build(&self) -> Build {
        let environment = self.machine.environment("", 0);
        Build {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: environment.features,
            profile: environment.build_profile,
            os: environment.os,
        }
    }

    fn cpu(&self, isa: Isa, threads: usize) -> Cpu {
        let first = |file: &str| self.text(file)?.split_whitespace().next().map(str::to_owned);
        Cpu {
            name: self.machine.cpu_name(),
            arch: std::env::consts::ARCH.to_owned(),
            isa: isa.name().to_owned(),
            allowed: std::thread::available_parallelism().map_or(1, usize::from),
            group_limit: self.group_limit(),
            threads,
            last_level_cache_bytes: last_level_cache_bytes().map(|bytes| bytes as u64),
            governor: first("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            load: first("proc/loadavg").and_then(|load| load.parse().ok()),
            gflop_s: None,
            scaling: None,
        }
    }

    /// CPUs that the control group grants, by either version's files, seen from inside a container as well.
    fn group_limit(&self) -> Option<f64> {
        let groups = self.text("proc/self/cgroup").unwrap_or_default();
        let path = |line: &str| groups.lines().find_map(|text| text.split_once(line)).map_or("", |(_, path)| path);
        let unified = |folder: String| {
            let text = self.text(&format!("{folder}/cpu.max"))?;
            quotient(text.split_whitespace())
        };
        let legacy = |folder: String| {
            let read = |name: &str| self.text(&format!("{folder}/{name}"));
            let (quota, period) = (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?);
            quotient([quota.trim(), period.trim()].into_iter())
        };
        let limits = [
            unified(format!("sys/fs/cgroup{}", path("0::"))),
            unified("sys/fs/cgroup".to_owned()),
            legacy(format!("sys/fs/cgroup/cpu{}", path("cpu,cpuacct:"))),
            legacy("sys/fs/cgroup/cpu".to_owned()),
        ];
        limits.into_iter().flatten().reduce(f64::min)
    }

    fn memory(&self) -> HostMemory {
        let memory = ProcessMemory::below(&self.root);
        // `always [madvise] never`: the one in brackets holds.
        let chosen = |text: String| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned());
        HostMemory {
            total_bytes: memory.total_bytes(),
            available_bytes: memory.available_bytes(),
            process_limit_bytes: memory.process_limit_bytes(),
            huge_pages: self.text("sys/kernel/mm/transparent_hugepage/enabled").and_then(chosen),
            read_gb_s: None,
            copy_gb_s: None,
        }
    }

    fn gpu(&self, devices: Vec<GpuDevice>) -> GpuSection {
        let is_release = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        let version = self.text("proc/driver/nvidia/version").unwrap_or_default();
        GpuSection {
            in_build: cfg!(feature = "cuda"),
            driver: version.split_whitespace().find(is_release).map(str::to_owned),
            libcuda: can_open(c"libcuda.so.1"),
            nvml: can_open(c"libnvidia-ml.so.1"),
            libraries: gpus::libraries(),
            device_files: self.device_files(),
            devices,
        }
    }

    /// Those of `/dev/nvidia…` that computing needs.
    fn device_files(&self) -> Vec<DeviceFile> {
        let Ok(entries) = std::fs::read_dir(self.root.join("dev")) else { return Vec::new() };
        let files = entries.flatten().map(|entry| entry.path()).filter(|path| !path.is_dir());
        let named = files.filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), path)));
        let is_needed = |name: &str| match name.strip_prefix("nvidia") {
            Some("ctl" | "-uvm") => true,
            Some(number) => !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()),
            None => false,
        };
        let mut found: Vec<DeviceFile> = named
            .filter(|(name, _)| is_needed(name))
            .map(|(name, path)| DeviceFile {
                path: format!("/dev/{name}"),
                usable: OpenOptions::new().read(true).write(true).open(path).is_ok(),
            })
            .collect();
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found
    }

    fn permissions(&self) -> Permissions {
        let counter = self.root.join("sys/class/powercap/intel-rapl:0/energy_uj");
        Permissions {
            peak_reset: ProcessMemory::below(&self.root).reset_peak(),
            energy_counter: counter.exists().then(|| std::fs::read(&counter).is_ok()),
        }
    }

    fn text(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(file)).ok()
    }
}

/// Quota over period in CPUs; `None` for `max` and `-1`, which are no limit.
fn quotient<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<f64> {
    let mut number = || words.next()?.parse::<f64>().ok().filter(|&us| us > 0.0);
    Some(number()? / number()?)
}

/// Findings that follow from the facts. `problem` is the reason why no GPU can be used in a build that could.
fn findings(seen: &Examination, problem: Option<BadInput>) -> Vec<Finding> {
    let (cpu, memory, gpu) = (&seen.cpu, &seen.memory, &seen.gpu);
    let mut found = Vec::new();
    if cpu.isa == Isa::Portable.name() {
        let what =
            "the kernels have no code for this CPU's instruction set and run as plain Rust, several times slower";
        found.push(Finding::new(what, "use an x86-64 CPU with AVX2, FMA and F16C"));
    }
    if let Some(limit) = cpu.group_limit.filter(|&limit| limit < cpu.threads as f64 || limit.fract() > 0.0) {
        let what = format!("the control group grants {limit:.2} CPUs: threads beyond them are throttled");
        found.push(Finding::new(what, format!("grant whole CPUs, or use `--threads {}`", (limit as usize).max(1))));
    }
    if let Some(load) = cpu.load.filter(|&load| load > BUSY_LOAD) {
        let what = format!("other programs run: the load was {load:.2} over the last minute");
        found.push(Finding::new(
            what,
            "stop it, or leave it CPUs with `--threads`; runs that it affects are marked `*`",
        ));
    }
    let scaling = cpu.scaling.filter(|&scaling| scaling < SHARED_CORES * cpu.threads as f64);
    // Where others run as well, nothing follows from it.
    if let (Some(scaling), true) = (scaling, cpu.load.is_none_or(|load| load <= BUSY_LOAD)) {
        let what = format!("{} threads compute {scaling:.2} times as fast as one: their CPUs share cores", cpu.threads);
        let advice = format!("`--threads {}` may be as fast", (scaling.round() as usize).max(1));
        found.push(Finding::new(what, advice));
    }
    if memory.huge_pages.as_deref() == Some("never") {
        let what = "huge pages are off: reading weights misses the translation cache more often";
        let advice = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
        found.push(Finding::new(what, advice));
    }
    if !seen.permissions.peak_reset {
        let what =
            "the kernel does not let a process reset its peak memory: peaks are the highest value between repeats";
        found.push(Finding::new(what, "allow writing /proc/self/clear_refs (some containers forbid it)"));
    }
    if seen.permissions.energy_counter == Some(false) {
        let what = "the processor counts energy, but not for this user";
        found.push(Finding::new(what, "as root: chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"));
    }
    found.extend(gpu_findings(gpu, problem));
    found
}

fn gpu_findings(gpu: &GpuSection, problem: Option<BadInput>) -> Vec<Finding> {
    let mut found = Vec::new();
    let has_driver = gpu.driver.is_some();
    if has_driver && !gpu.in_build {
        let advice = "build with `cargo build --release --features cuda` (scripts/cuda-toolkit.sh gets the toolkit)";
        found.push(Finding::new("there is an NVIDIA driver, and this build cannot use it", advice));
    }
    if let Some(problem) = problem {
        let advice = problem.hint_text().unwrap_or("`--device cpu` measures on the processor").to_owned();
        found.push(Finding::new(problem.to_string(), advice));
    }
    if has_driver && !gpu.nvml {
        let what = "libnvidia-ml.so.1 cannot be opened: no clocks, temperature, power or energy of the GPU";
        found.push(Finding::new(what, "install the driver's compute libraries (nvidia-utils), also in the container"));
    }
    for file in gpu.device_files.iter().filter(|file| !file.usable) {
        let advice = "give this user the group that owns it (video or render), or the container the device";
        found.push(Finding::new(format!("`{}` cannot be opened for reading and writing", file.path), advice));
    }
    if gpu.devices.iter().any(|device| device.shared == Some(false)) {
        let what = "a GPU is in exclusive-process mode, and each precision runs in a process of its own";
        found.push(Finding::new(what, "as root: nvidia-smi --compute-mode=DEFAULT"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::testing::root;

    #[test]
    fn limits_of_control_groups_are_read_in_either_version() {
        for (files, limit) in [
            (&[][..], None),
            (&[("sys/fs/cgroup/cpu.max", "max 100000\n")], None),
            (&[("sys/fs/cgroup/cpu.max", "150000 100000\n")], Some(1.5)),
            (&[("proc/self/cgroup", "0::/a\n"), ("sys/fs/cgroup/a/cpu.max", "200000 100000\n")], Some(2.0)),
            (
                &[
                    ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n"),
                    ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
                ],
                Some(0.5),
            ),
            (
                &[("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"), ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")],
                None,
            ),
        ] {
            assert_eq!(System::below(root(files).path()).group_limit(), limit, "{files:?}");
        }
    }

    #[test]
    fn each_lack_is_a_finding_with_advice() {
        let driver =
            || GpuSection { driver: Some("580.1".to_owned()), nvml: true, in_build: true, ..GpuSection::default() };
        let device = GpuDevice { shared: Some(false), ..GpuDevice::default() };
        let file = DeviceFile { path: "/dev/nvidia0".to_owned(), usable: false };
        let quiet = || Examination {
            permissions: Permissions { peak_reset: true, energy_counter: None },
            cpu: Cpu { threads: 2, ..Cpu::default() },
            ..Examination::default()
        };
        let with_cpu = |cpu: Cpu| Examination { cpu: Cpu { threads: 2, ..cpu }, ..quiet() };
        let with_gpu = |gpu: GpuSection| Examination { gpu, ..quiet() };
        let memory = HostMemory { huge_pages: Some("never".to_owned()), ..HostMemory::default() };
        let cases = [
            (with_cpu(Cpu { isa: "portable".to_owned(), ..Cpu::default() }), "plain Rust"),
            (with_cpu(Cpu { group_limit: Some(1.5), ..Cpu::default() }), "--threads 1"),
            (with_cpu(Cpu { load: Some(1.2), ..Cpu::default() }), "1.20"),
            (with_cpu(Cpu { scaling: Some(1.04), load: Some(0.1), ..Cpu::default() }), "--threads 1"),
            (Examination { memory, ..quiet() }, "madvise"),
            (Examination { permissions: Permissions::default(), ..quiet() }, "clear_refs"),
            (with_gpu(GpuSection { in_build: false, ..driver() }), "--features cuda"),
            (with_gpu(GpuSection { nvml: false, ..driver() }), "nvidia-utils"),
            (with_gpu(GpuSection { device_files: vec![file], ..driver() }), "/dev/nvidia0"),
            (with_gpu(GpuSection { devices: vec![device], ..driver() }), "compute-mode"),
        ];
        assert_eq!(findings(&quiet(), None), []);
        for (seen, part) in cases {
            let found = findings(&seen, None);
            let text = found.iter().map(|finding| format!("{}: {}", finding.what, finding.advice)).collect::<String>();
            assert!(found.len() == 1 && text.contains(part), "`{part}` is not in `{text}`");
        }
        let problem = BadInput::new("no NVIDIA driver").hint("install one");
        assert_eq!(findings(&quiet(), Some(problem)), [Finding::new("no NVIDIA driver", "install one")]);
    }
}
