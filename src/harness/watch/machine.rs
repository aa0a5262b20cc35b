//! The real watch: files below /proc and /sys, and NVML where there is a GPU, read ten times a second.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::energy::{Counter, Mark, shortest_window_s};
use super::{GpuReading, MachineReading, Watch, Watched};
use crate::kernels::nvml::Gpu;
use crate::os::interrupt;
use crate::os::memory::ProcessMemory;

/// Time between two readings. One opens a handful of files of some 0.02 ms each, so that even with the clocks of 64 cores it takes about
/// 1 % of one.
pub const INTERVAL: Duration = Duration::from_millis(100);

/// Least time that an overheated device needs to recover.
const PAUSE: Duration = Duration::from_secs(1);

/// NVML's energy counter moves every 20 to 100 ms, by device.
const NVML_PERIOD_S: f64 = 0.1;

/// RAPL's counter moves every millisecond.
const RAPL_PERIOD_S: f64 = 0.001;

/// The idle window is this many periods of the counter, and at least half a second.
const IDLE_PERIODS: f64 = 20.0;

/// Time between two polls for the counter's next update, and so the largest delay of a mark.
const MARK_INTERVAL: Duration = Duration::from_millis(1);

/// Periods that a mark waits for an update at most.
const MARK_PERIODS: f64 = 3.0;

/// Watches this machine.
pub struct MachineWatch {
    /// `None` while the thread has it.
    sensors: Option<Sensors>,
    running: Option<Running>,
    /// Start of the times of energy marks.
    created: Instant,
}

struct Running {
    stop: Sender<()>,
    thread: JoinHandle<(Sensors, Vec<MachineReading>)>,
    began: Instant,
    run_pids: RunProcesses,
}

/// The worker whose memory is read, and all processes of the run.
#[derive(Debug, Clone, Default)]
struct RunProcesses {
    worker: Option<u32>,
    all: Vec<u32>,
}

impl MachineWatch {
    pub fn new(sensors: Sensors) -> Self {
        Self { sensors: Some(sensors), running: None, created: Instant::now() }
    }
}

impl Watch for MachineWatch {
    fn is_interrupted(&self) -> bool {
        interrupt::is_requested()
    }

    fn begin(&mut self, worker: Option<u32>, run_pids: &[u32]) {
        let Some(mut sensors) = self.sensors.take() else { return };
        let (stop, stopped) = channel::<()>();
        let run_pids = RunProcesses { worker, all: run_pids.to_vec() };
        let began = Instant::now();
        let mut readings = vec![sensors.read(began, &run_pids)];
        let own = run_pids.clone();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                readings.push(sensors.read(began, &own));
            }
            (sensors, readings)
        });
        self.running = Some(Running { stop, thread, began, run_pids });
    }

    fn end(&mut self) -> Watched {
        let Some(Running { stop, thread, began, run_pids }) = self.running.take() else { return Watched::default() };
        drop(stop);
        let Ok((mut sensors, mut readings)) = thread.join() else { return Watched::default() };
        readings.push(sensors.read(began, &run_pids));
        self.sensors = Some(sensors);
        Watched { readings }
    }

    fn pause(&mut self) {
        std::thread::sleep(PAUSE);
    }

    fn energy_window_s(&self) -> Option<f64> {
        self.sensors.as_ref()?.counter_period_s.map(shortest_window_s)
    }

    fn energy_mark(&mut self) -> Option<Mark> {
        let created = self.created;
        self.sensors.as_mut()?.mark(created)
    }
}

/// Sources of readings below a root folder, `/` but in tests.
pub struct Sensors {
    root: PathBuf,
    core_clocks: Vec<PathBuf>,
    temperature: Option<PathBuf>,
    throttle_count: PathBuf,
    rapl: Vec<Package>,
    gpu: Option<Gpu>,
    /// Period of the energy counter, once [`Self::counter`] has found one.
    counter_period_s: Option<f64>,
}

impl Sensors {
    /// `gpu` is the device that is measured, if one is.
    pub fn below(root: impl Into<PathBuf>, gpu: Option<Gpu>) -> Self {
        let root = root.into();
        let cpus = root.join("sys/devices/system/cpu");
        Self {
            core_clocks: numbered(&cpus, "cpu").into_iter().map(|cpu| cpu.join("cpufreq/scaling_cur_freq")).collect(),
            temperature: temperature_file(&root),
            throttle_count: cpus.join("cpu0/thermal_throttle/package_throttle_count"),
            rapl: numbered(&root.join("sys/class/powercap"), "intel-rapl:")
                .into_iter()
                .filter_map(Package::open)
                .collect(),
            root,
            gpu,
            counter_period_s: None,
        }
    }

    /// The counter that energy comes from: the GPU's own where one is measured, the processor packages' else. Takes up to two seconds
    /// to see what the idle machine needs; nothing may run yet. `None` where no counter can be read.
    pub fn counter(&mut self) -> Option<Counter> {
        self.energy_j()?;
        let (name, period_s) = match self.gpu {
            Some(_) => ("nvml", NVML_PERIOD_S),
            None => ("rapl", RAPL_PERIOD_S),
        };
        self.counter_period_s = Some(period_s);
        let (before, began) = (self.energy_j()?, Instant::now());
        std::thread::sleep(Duration::from_secs_f64((IDLE_PERIODS * period_s).max(0.5)));
        let idle_watts = self.energy_j().map(|after| (after - before) / began.elapsed().as_secs_f64());
        Some(Counter { name, period_s, idle_watts })
    }

    fn read(&mut self, began: Instant, run_pids: &RunProcesses) -> MachineReading {
        let mhz = |path: &PathBuf| Some((number(path)? / 1000) as u32);
        MachineReading {
            rss_bytes: run_pids.worker.and_then(|pid| ProcessMemory::of(&self.root, pid).resident_bytes()),
            core_mhz: self.core_clocks.iter().filter_map(mhz).collect(),
            cpu_celsius: self.temperature.as_deref().and_then(number).map(|millidegrees| millidegrees as f64 / 1e3),
            cpu_throttle_count: number(&self.throttle_count),
            gpu: self.gpu.as_ref().map(|gpu| gpu_reading(gpu, run_pids)),
            energy_j: self.energy_j(),
            at_ns: began.elapsed().as_nanos() as u64,
        }
    }

    /// The energy counter at its next update. One that does not move for some periods is read as it is.
    fn mark(&mut self, since: Instant) -> Option<Mark> {
        let longest = Duration::from_secs_f64(MARK_PERIODS * self.counter_period_s?);
        let (before, began) = (self.energy_j()?, Instant::now());
        loop {
            let joules = self.energy_j()?;
            if joules != before || began.elapsed() > longest {
                return Some(Mark { at_ns: since.elapsed().as_nanos() as u64, joules });
            }
            std::thread::sleep(MARK_INTERVAL);
        }
    }

    fn energy_j(&mut self) -> Option<f64> {
        match &self.gpu {
            Some(gpu) => gpu.energy_mj().map(|millijoules| millijoules as f64 / 1e3),
            None if self.rapl.is_empty() => None,
            None => self.rapl.iter_mut().map(Package::joules).sum(),
        }
    }
}

fn gpu_reading(gpu: &Gpu, run_pids: &RunProcesses) -> GpuReading {
    let processes = gpu.processes().unwrap_or_default();
    let of_crew = |pid: u32| run_pids.all.contains(&pid);
    let bytes_of = |pid: u32| processes.iter().find(|process| process.pid == pid).and_then(|process| process.bytes);
    // In a container the driver may number processes as the host does; then only their count is known.
    let numbered_alike = processes.iter().any(|process| of_crew(process.pid));
    let n_others = match numbered_alike {
        true => processes.iter().filter(|process| !of_crew(process.pid)).count(),
        false => processes.len().saturating_sub(run_pids.all.len()),
    };
    let process_bytes = match processes.as_slice() {
        [only] if !numbered_alike && run_pids.all.len() == 1 => only.bytes,
        _ => run_pids.worker.and_then(bytes_of),
    };
    GpuReading {
        sm_mhz: gpu.sm_mhz(),
        default_sm_mhz: gpu.default_sm_mhz(),
        memory_mhz: gpu.memory_mhz(),
        celsius: gpu.celsius(),
        watts: gpu.milliwatts().map(|milliwatts| f64::from(milliwatts) / 1e3),
        throttled_by: gpu.throttled_by(),
        used_bytes: gpu.memory_bytes().map(|(used, _)| used),
        process_bytes,
        n_others: n_others as u32,
    }
}

/// A processor package's energy counter, which starts again from 0 at its range.
struct Package {
    counter: PathBuf,
    range_uj: u64,
    last_uj: u64,
    total_uj: u64,
}

impl Package {
    /// `None` where the counter cannot be read: most systems let only root do it.
    fn open(folder: PathBuf) -> Option<Self> {
        let counter = folder.join("energy_uj");
        let range_uj = number(folder.join("max_energy_range_uj"))?;
        Some(Self { last_uj: number(&counter)?, counter, range_uj, total_uj: 0 })
    }

    /// Since [`Self::open`].
    fn joules(&mut self) -> Option<f64> {
        let now_uj = number(&self.counter)?;
        let behind_the_range = if now_uj < self.last_uj { self.range_uj } else { 0 };
        self.total_uj += (now_uj + behind_the_range).saturating_sub(self.last_uj);
        self.last_uj = now_uj;
        Some(self.total_uj as f64 / 1e6)
    }
}

/// Folders named `prefix` and a number, by number.
fn numbered(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok();
    let mut found: Vec<(u32, PathBuf)> =
        entries.filter_map(|entry| Some((number(&entry.path())?, entry.path()))).collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// The processor's own sensor: by the drivers that read it, or the thermal zone of the package.
fn temperature_file(root: &Path) -> Option<PathBuf> {
    let is_one_of =
        |file: PathBuf, names: &[&str]| std::fs::read_to_string(file).is_ok_and(|text| names.contains(&text.trim()));
    let drivers = numbered(&root.join("sys/class/hwmon"), "hwmon").into_iter();
    let driver =
        drivers.filter(|folder| is_one_of(folder.join("name"), &["coretemp", "k10temp", "zenpower", "cpu_thermal"]));
    let zones = numbered(&root.join("sys/class/thermal"), "thermal_zone").into_iter();
    let zone = zones.filter(|folder| is_one_of(folder.join("type"), &["x86_pkg_temp", "cpu-thermal"]));
    let files = driver.map(|folder| folder.join("temp1_input")).chain(zone.map(|folder| folder.join("temp")));
    files.into_iter().find(|file| number(file).is_some())
}

fn number(path: impl AsRef<Path>) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::testing::root;

    #[test]
    fn what_the_machine_shows_is_read() {
        let root = root(&[
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "2400000\n"),
            ("sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq", "1100000\n"),
            ("sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq", "1200000\n"),
            ("sys/devices/system/cpu/cpufreq/boost", "1\n"),
            ("sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "3\n"),
            ("sys/class/hwmon/hwmon0/name", "nvme\n"),
            ("sys/class/hwmon/hwmon0/temp1_input", "90000\n"),
            ("sys/class/hwmon/hwmon1/name", "k10temp\n"),
            ("sys/class/hwmon/hwmon1/temp1_input", "61500\n"),
            ("proc/7/status", "VmRSS:\t 2000 kB\n"),
        ]);
        let mut sensors = Sensors::below(root.path(), None);
        let run_pids = RunProcesses { worker: Some(7), all: vec![7] };
        let reading = sensors.read(Instant::now(), &run_pids);
        assert_eq!((reading.core_mhz, reading.rss_bytes), (vec![2400, 1200, 1100], Some(2000 * 1024)));
        assert_eq!((reading.cpu_celsius, reading.cpu_throttle_count), (Some(61.5), Some(3)));
        assert_eq!((reading.energy_j, reading.gpu), (None, None));
        assert_eq!(sensors.counter(), None);
    }

    #[test]
    fn a_machine_that_shows_nothing_is_no_error() {
        let mut sensors = Sensors::below("no such folder", None);
        let reading = sensors.read(Instant::now(), &RunProcesses::default());
        assert_eq!(MachineReading { at_ns: 0, ..reading }, MachineReading::default());
    }

    #[test]
    fn an_energy_counter_goes_on_behind_its_range() {
        let package = "sys/class/powercap/intel-rapl:0";
        let root = root(&[
            (&format!("{package}/energy_uj"), "9000000"),
            (&format!("{package}/max_energy_range_uj"), "10000000"),
            ("sys/class/powercap/intel-rapl:0:0/energy_uj", "1"),
            ("sys/class/powercap/intel-rapl:0:0/max_energy_range_uj", "1"),
        ]);
        let mut sensors = Sensors::below(root.path(), None);
        assert_eq!(sensors.rapl.len(), 1, "a part of a package is in it already");
        for (now, joules) in [("9500000", 0.5), ("250000", 1.25), ("250000", 1.25)] {
            std::fs::write(root.path().join(package).join("energy_uj"), now).unwrap();
            assert_eq!(sensors.energy_j(), Some(joules));
        }
    }

    #[test]
    fn a_mark_is_at_an_update_of_the_counter() {
        let package = "sys/class/powercap/intel-rapl:0";
        let root = root(&[
            (&format!("{package}/energy_uj"), "1000000"),
            (&format!("{package}/max_energy_range_uj"), "10000000"),
        ]);
        let mut watch = MachineWatch::new(Sensors::below(root.path(), None));
        assert_eq!((watch.energy_window_s(), watch.energy_mark()), (None, None), "no counter was found yet");
        let counter = watch.sensors.as_mut().unwrap().counter().unwrap();
        assert_eq!(watch.energy_window_s(), Some(20.0 * counter.period_s));
        // It stands still: read as it is.
        let first = watch.energy_mark().unwrap();
        std::fs::write(root.path().join(package).join("energy_uj"), "3500000").unwrap();
        let second = watch.energy_mark().unwrap();
        assert_eq!((first.joules, second.joules), (0.0, 2.5));
        assert!(second.at_ns > first.at_ns);
        // Another one comes while it waits.
        let path = root.path().join(package).join("energy_uj");
        watch.sensors.as_mut().unwrap().counter_period_s = Some(20.0);
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            // Renamed into its place, as a counter is never seen half written.
            std::fs::write(path.with_extension("new"), "4000000").unwrap();
            std::fs::rename(path.with_extension("new"), &path).unwrap();
        });
        assert_eq!(watch.energy_mark().unwrap().joules, 3.0);
        writer.join().unwrap();
    }

    #[test]
    fn a_watch_gives_a_reading_before_and_one_behind() {
        let mut watch = MachineWatch::new(Sensors::below("no such folder", None));
        for _ in 0..2 {
            watch.begin(None, &[]);
            let readings = watch.end().readings;
            assert!(readings.len() >= 2 && readings[0].at_ns <= readings[1].at_ns);
        }
        assert_eq!(watch.end(), Watched::default(), "nothing runs");
    }
}
