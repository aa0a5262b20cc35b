//! What a machine has for measuring, what is missing, and what to do about it: a page for people, or JSON.

use serde::Serialize;

use super::Terminal;
use super::case::{GIB, plain};
use super::grid::wrap;

/// All that was looked at.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Examination {
    pub build: Build,
    pub cpu: Cpu,
    pub memory: HostMemory,
    pub gpu: GpuSection,
    pub permissions: Permissions,
    /// Engines in Python that this binary has adapters for.
    pub engines: Vec<EngineFacts>,
    pub findings: Vec<Finding>,
}

/// Whether another engine can run here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineFacts {
    pub name: &'static str,
    pub can_run: bool,
    /// Packages with their versions.
    pub packages: Vec<String>,
    /// What to do where it cannot run; empty where it can.
    pub install: String,
}

impl EngineFacts {
    fn text(&self) -> String {
        match self.can_run {
            true => format!("yes: {}", self.packages.join(", ")),
            false => format!("no: {}", self.install),
        }
    }
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Build {
    pub version: String,
    pub features: Vec<String>,
    /// `debug` or `release`.
    pub profile: String,
    pub os: String,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Cpu {
    pub name: String,
    /// As the compiler names it.
    pub arch: String,
    /// What the kernels use here.
    pub isa: String,
    /// CPUs that this process may run on.
    pub allowed: usize,
    /// CPUs that the control group grants; `None`: no limit.
    pub group_limit: Option<f64>,
    /// What a run uses without `--threads`: physical cores within both.
    pub threads: usize,
    pub last_level_cache_bytes: Option<u64>,
    /// `None` where the clocks are not this system's to govern, as in most virtual machines.
    pub governor: Option<String>,
    /// Mean number of processes that ran or wanted to, over the last minute.
    pub load: Option<f64>,
    /// fp32 operations of all threads a second / 1e9, measured.
    pub gflop_s: Option<f64>,
    /// How many times as fast all threads compute as one: below their number where they share cores, whatever the system says.
    pub scaling: Option<f64>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct HostMemory {
    pub total_bytes: Option<u64>,
    /// Without swapping, within the limit of the control group.
    pub available_bytes: Option<u64>,
    /// Of the address space of one process.
    pub process_limit_bytes: Option<u64>,
    /// `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    pub read_gb_s: Option<f64>,
    pub copy_gb_s: Option<f64>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct GpuSection {
    /// Whether this build can use one.
    pub in_build: bool,
    /// Release of the kernel driver.
    pub driver: Option<String>,
    /// Whether `libcuda.so.1` can be opened.
    pub libcuda: bool,
    /// Whether `libnvidia-ml.so.1` can be opened: clocks, temperature, power and energy come from it.
    pub nvml: bool,
    /// Libraries that a build with CUDA opens.
    pub libraries: Vec<CudaLibrary>,
    /// Device files, and whether this process may use them.
    pub device_files: Vec<DeviceFile>,
    pub devices: Vec<GpuDevice>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaLibrary {
    pub file: String,
    /// Which search found it: `system`, `CUDA_HOME` or `Python packages`. No path, since the page is meant to be shown.
    pub found_in: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceFile {
    pub path: String,
    pub usable: bool,
}

/// A device as the driver describes it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GpuDevice {
    pub name: String,
    pub compute_capability: String,
    /// The newest CUDA that the driver supports.
    pub cuda: String,
    pub total_bytes: u64,
    pub sm_clock_mhz: Option<f64>,
    pub memory_clock_mhz: Option<f64>,
    pub bus_bits: Option<u32>,
    /// Whether the driver has memory pools, which exact peaks come from.
    pub pool: Option<bool>,
    /// Whether several processes may use it at once, as the workers of several precisions do.
    pub shared: Option<bool>,
}

/// What this process may do.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Permissions {
    /// Whether the kernel's high-water mark of memory can be reset, which makes peaks exact.
    pub peak_reset: bool,
    /// Whether the processor's energy counter can be read; `None`: there is none.
    pub energy_counter: Option<bool>,
}

/// Something that is missing or disturbs, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub what: String,
    pub advice: String,
}

impl Finding {
    pub fn new(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { what: what.into(), advice: advice.into() }
    }
}

impl Examination {
    /// The page: a block for each part, then what to do.
    pub fn page(&self, terminal: &Terminal) -> String {
        let engines: Vec<Line> = self.engines.iter().map(|engine| (engine.name, engine.text())).collect();
        let blocks = [
            block("build", &self.build.lines(), terminal),
            block("cpu", &self.cpu.lines(), terminal),
            block("memory", &self.memory.lines(), terminal),
            block("gpu", &self.gpu.lines(), terminal),
            block("permissions", &self.permissions.lines(), terminal),
            block("other engines", &engines, terminal),
        ];
        format!("{}\n{}", blocks.join("\n"), self.advice(terminal))
    }

    pub fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    fn advice(&self, terminal: &Terminal) -> String {
        if self.findings.is_empty() {
            return "what to do\n  nothing: all that quantbench uses is there\n".to_owned();
        }
        let wrapped = |text: String| wrap(&text, terminal.columns, 4) + "\n";
        let line = |finding: &Finding| {
            wrapped(format!("  {}", plain(&finding.what))) + &wrapped(format!("    {}", plain(&finding.advice)))
        };
        format!("what to do\n{}", self.findings.iter().map(line).collect::<String>())
    }
}

/// A name and what is known about it.
type Line = (&'static str, String);

fn block(title: &str, lines: &[Line], terminal: &Terminal) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line =
        |(name, value): &Line| wrap(&format!("  {name:<width$}  {}", plain(value)), terminal.columns, width + 4) + "\n";
    let text: String = lines.iter().map(line).collect();
    format!("{title}\n{text}")
}

fn gib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_owned(), |bytes| format!("{:.2} GiB", bytes as f64 / GIB))
}

fn or_unknown(value: &Option<String>) -> String {
    value.clone().unwrap_or_else(|| "unknown".to_owned())
}

fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

impl Build {
    fn lines(&self) -> Vec<Line> {
        let features = if self.features.is_empty() { "none".to_owned() } else { self.features.join(", ") };
        let version = format!("{}, {} build, features: {features}", self.version, self.profile);
        vec![("quantbench", version), ("system", self.os.clone())]
    }
}

impl Cpu {
    fn arithmetic(&self) -> String {
        let Some(rate) = self.gflop_s else { return "not measured".to_owned() };
        let scaling = self.scaling.filter(|_| self.threads > 1).map(|times| format!(", {times:.2} times one thread's"));
        format!("{rate:.0} GFLOP/s in fp32{}", scaling.unwrap_or_default())
    }

    fn lines(&self) -> Vec<Line> {
        let limit = self.group_limit.map_or_else(|| "no limit".to_owned(), |cpus| format!("{cpus:.2} CPUs"));
        let cache = self.last_level_cache_bytes.map(|bytes| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64));
        vec![
            ("model", self.name.clone()),
            ("instructions", format!("{} on {}", self.isa, self.arch)),
            ("threads", format!("{} of {} CPUs that this process may use", self.threads, self.allowed)),
            ("control group", limit),
            ("last-level cache", or_unknown(&cache)),
            ("arithmetic", self.arithmetic()),
            ("governor", self.governor.clone().unwrap_or_else(|| "none here".to_owned())),
            ("load", self.load.map_or_else(|| "unknown".to_owned(), |load| format!("{load:.2} over the last minute"))),
        ]
    }
}

impl HostMemory {
    fn lines(&self) -> Vec<Line> {
        let limit = self.process_limit_bytes.map_or_else(|| "no limit".to_owned(), |bytes| gib(Some(bytes)));
        let rate = |gb_s: Option<f64>| gb_s.map_or_else(|| "not measured".to_owned(), |x| format!("{x:.1} GB/s"));
        vec![
            ("installed", gib(self.total_bytes)),
            ("available", gib(self.available_bytes)),
            ("process limit", limit),
            ("huge pages", or_unknown(&self.huge_pages)),
            ("read", rate(self.read_gb_s)),
            ("copy", rate(self.copy_gb_s)),
        ]
    }
}

impl GpuSection {
    fn lines(&self) -> Vec<Line> {
        let build = if self.in_build { "with CUDA" } else { "without CUDA" };
        let files: Vec<_> = self.device_files.iter().map(DeviceFile::text).collect();
        let mut lines = vec![
            ("this build", build.to_owned()),
            ("driver", self.driver.clone().unwrap_or_else(|| "none".to_owned())),
            ("libcuda.so.1", yes(self.libcuda)),
            ("NVML", format!("{} (libnvidia-ml.so.1)", yes(self.nvml))),
            ("device files", if files.is_empty() { "none".to_owned() } else { files.join(", ") }),
        ];
        if !self.libraries.is_empty() {
            let libraries: Vec<_> = self.libraries.iter().map(CudaLibrary::text).collect();
            lines.push(("CUDA libraries", libraries.join(", ")));
        }
        lines.extend(self.devices.iter().map(|device| ("device", device.text())));
        lines
    }
}

impl CudaLibrary {
    fn text(&self) -> String {
        format!("{} ({})", self.file, self.found_in.as_deref().unwrap_or("missing"))
    }
}

impl DeviceFile {
    fn text(&self) -> String {
        if self.usable { self.path.clone() } else { format!("{} (no permission)", self.path) }
    }
}

impl GpuDevice {
    fn text(&self) -> String {
        let mut text = format!(
            "{}, {}, compute capability {}, CUDA {}",
            self.name,
            gib(Some(self.total_bytes)),
            self.compute_capability,
            self.cuda
        );
        if let Some(mhz) = self.sm_clock_mhz {
            text += &format!(", {mhz:.0} MHz");
        }
        if let (Some(mhz), Some(bits)) = (self.memory_clock_mhz, self.bus_bits) {
            text += &format!(", memory {mhz:.0} MHz × {bits} bit");
        }
        match self.pool {
            Some(true) => text + ", memory pool",
            _ => text,
        }
    }
}

impl Permissions {
    fn lines(&self) -> Vec<Line> {
        let energy = match self.energy_counter {
            None => "there is none".to_owned(),
            Some(readable) => yes(readable),
        };
        vec![("reset peak memory", yes(self.peak_reset)), ("read energy counter", energy)]
    }
}
