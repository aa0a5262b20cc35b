//! Readings of the machine while a repeat runs, by a thread of the parent. The worker reads nothing meanwhile.

pub mod energy;
pub mod machine;

use energy::{EnergyWindow, Mark};

/// A sample whose clock is below this share of the default is discarded.
const SLOW_CLOCK: f64 = 0.75;

/// Watches the machine while repeats run, one at a time.
pub trait Watch {
    /// A repeat of the process `worker` begins; `run_pids` are all processes of this run.
    fn begin(&mut self, worker: Option<u32>, run_pids: &[u32]);

    /// The repeat ended: gives its readings.
    fn end(&mut self) -> Watched;

    /// Lets the machine recover before a discarded repeat is taken again.
    fn pause(&mut self);

    /// True once the user asked for the end: no further repeat starts.
    fn is_interrupted(&self) -> bool {
        false
    }

    /// The shortest window that the energy counter can be trusted with; `None` without a counter.
    fn energy_window_s(&self) -> Option<f64> {
        None
    }

    /// Waits for the energy counter's next update, no longer than a few of them take, and reads it. Nothing else is read between two marks.
    fn energy_mark(&mut self) -> Option<Mark> {
        None
    }
}

/// A watch without readings.
pub struct NoWatch;

impl Watch for NoWatch {
    fn begin(&mut self, _worker: Option<u32>, _crew: &[u32]) {}

    fn end(&mut self) -> Watched {
        Watched::default()
    }

    fn pause(&mut self) {}
}

/// One repeat: the first reading is from before it, the last from after it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Watched {
    pub readings: Vec<MachineReading>,
}

/// The machine at one moment. A quantity that cannot be read is `None` or empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MachineReading {
    /// Time since watching began.
    pub at_ns: u64,
    /// Resident set of the worker.
    pub rss_bytes: Option<u64>,
    /// Clock of each core.
    pub core_mhz: Vec<u32>,
    pub cpu_celsius: Option<f64>,
    /// Thermal throttling events of the processor since the machine started.
    pub cpu_throttle_count: Option<u64>,
    /// Reading of a counter that only grows, with any start.
    pub energy_j: Option<f64>,
    pub gpu: Option<GpuReading>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct GpuReading {
    pub sm_mhz: Option<u32>,
    /// Clock of the streaming multiprocessors unless something holds them down.
    pub default_sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
    pub celsius: Option<u32>,
    pub watts: Option<f64>,
    /// Reasons why clocks are below the requested ones.
    pub throttled_by: Vec<&'static str>,
    /// Memory in use on the device, by all processes.
    pub used_bytes: Option<u64>,
    /// Memory of the worker on the device.
    pub process_bytes: Option<u64>,
    /// Processes on the device that are not of this run.
    pub n_others: u32,
}

/// One value of a reading. The unit ends the name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Channel {
    pub name: &'static str,
    /// Index of the core; `None` for a quantity of the whole machine.
    pub index: Option<usize>,
    pub value: f64,
}

impl MachineReading {
    /// All levels of the reading, for ranges and series.
    pub fn channels(&self) -> Vec<Channel> {
        let gpu = self.gpu.clone().unwrap_or_default();
        let single = [
            ("rss_bytes", self.rss_bytes.map(|bytes| bytes as f64)),
            ("cpu_temperature_c", self.cpu_celsius),
            ("sm_mhz", gpu.sm_mhz.map(f64::from)),
            ("memory_mhz", gpu.memory_mhz.map(f64::from)),
            ("gpu_temperature_c", gpu.celsius.map(f64::from)),
            ("power_w", gpu.watts),
            ("device_used_bytes", gpu.used_bytes.map(|bytes| bytes as f64)),
            ("device_process_bytes", gpu.process_bytes.map(|bytes| bytes as f64)),
        ];
        let single = single.into_iter().filter_map(|(name, value)| Some(Channel { name, index: None, value: value? }));
        let core =
            |(index, mhz): (usize, &u32)| Channel { name: "cpu_mhz", index: Some(index), value: f64::from(*mhz) };
        single.chain(self.core_mhz.iter().enumerate().map(core)).collect()
    }
}

impl Watched {
    /// Readings from within the repeat or just after it: before it, the device may have been idle and its clocks low.
    fn under_load(&self) -> &[MachineReading] {
        self.readings.get(1..).unwrap_or_default()
    }

    fn gpus(&self) -> impl Iterator<Item = &GpuReading> {
        self.under_load().iter().filter_map(|reading| reading.gpu.as_ref())
    }

    /// Mean SM clock and the default, in MHz, where the clock was too low for the sample to count.
    pub fn slow_clock(&self) -> Option<(f64, u32)> {
        let clocks: Vec<f64> = self.gpus().filter_map(|gpu| gpu.sm_mhz).map(f64::from).collect();
        let default = self.gpus().find_map(|gpu| gpu.default_sm_mhz)?;
        let mean = crate::stats::mean(&clocks)?;
        (mean < SLOW_CLOCK * f64::from(default)).then_some((mean, default))
    }

    /// Reasons why the GPU's clocks were held down, each once.
    pub fn throttled_by(&self) -> Vec<&'static str> {
        let mut reasons: Vec<_> = self.gpus().flat_map(|gpu| gpu.throttled_by.iter().copied()).collect();
        reasons.sort_unstable();
        reasons.dedup();
        reasons
    }

    /// Thermal throttling events of the processor during the repeat.
    pub fn cpu_throttles(&self) -> u64 {
        let counts: Vec<u64> = self.readings.iter().filter_map(|reading| reading.cpu_throttle_count).collect();
        counts.last().zip(counts.first()).map_or(0, |(last, first)| last.saturating_sub(*first))
    }

    /// Most processes of others on the GPU at once.
    pub fn n_others(&self) -> u32 {
        let gpus = self.readings.iter().filter_map(|reading| reading.gpu.as_ref());
        gpus.map(|gpu| gpu.n_others).max().unwrap_or(0)
    }

    /// Most memory of the worker on the device.
    pub fn process_bytes(&self) -> Option<u64> {
        self.readings.iter().filter_map(|reading| reading.gpu.as_ref()?.process_bytes).max()
    }

    /// The energy counter's window over the repeat, which generated `tokens`.
    pub fn window(&self, tokens: u64) -> Option<EnergyWindow> {
        let mark = |reading: &MachineReading| Some(Mark { at_ns: reading.at_ns, joules: reading.energy_j? });
        Some(EnergyWindow::between(mark(self.readings.first()?)?, mark(self.readings.last()?)?, tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at_ns: u64, sm_mhz: u32) -> MachineReading {
        let gpu = GpuReading { sm_mhz: Some(sm_mhz), default_sm_mhz: Some(2000), ..GpuReading::default() };
        MachineReading { at_ns, gpu: Some(gpu), ..MachineReading::default() }
    }

    #[test]
    fn a_clock_counts_under_load_alone() {
        let slow =
            |clocks: &[u32]| Watched { readings: clocks.iter().map(|mhz| reading(0, *mhz)).collect() }.slow_clock();
        assert_eq!(slow(&[]), None);
        assert_eq!(slow(&[300, 2000]), None, "idle before the repeat");
        assert_eq!(slow(&[2000, 1500]), None, "three quarters are enough");
        assert_eq!(slow(&[2000, 1400, 1500]), Some((1450.0, 2000)));
        let unknown = Watched { readings: vec![MachineReading::default(); 3] };
        assert_eq!(unknown.slow_clock(), None);
    }

    #[test]
    fn causes_are_gathered_over_the_repeat() {
        let mut watched = Watched { readings: (0..3).map(|i| reading(i, 2000)).collect() };
        let set = |reading: &mut MachineReading, count, reasons: &[&'static str], n_others, process_bytes| {
            reading.cpu_throttle_count = Some(count);
            let gpu = reading.gpu.as_mut().unwrap();
            (gpu.throttled_by, gpu.n_others, gpu.process_bytes) = (reasons.to_vec(), n_others, Some(process_bytes));
        };
        set(&mut watched.readings[0], 5, &["idle"], 0, 7);
        set(&mut watched.readings[1], 6, &["power cap", "heat"], 2, 9);
        set(&mut watched.readings[2], 8, &["heat"], 1, 8);
        assert_eq!(watched.throttled_by(), ["heat", "power cap"]);
        assert_eq!((watched.cpu_throttles(), watched.n_others(), watched.process_bytes()), (3, 2, Some(9)));
    }

    #[test]
    fn channels_name_what_was_read() {
        let gpu = GpuReading { watts: Some(71.5), celsius: Some(40), ..GpuReading::default() };
        let reading = MachineReading {
            core_mhz: vec![2000, 2100],
            rss_bytes: Some(5),
            gpu: Some(gpu),
            ..MachineReading::default()
        };
        let names: Vec<_> = reading.channels().iter().map(|c| (c.name, c.index, c.value)).collect();
        let expected = [
            ("rss_bytes", None, 5.0),
            ("gpu_temperature_c", None, 40.0),
            ("power_w", None, 71.5),
            ("cpu_mhz", Some(0), 2000.0),
            ("cpu_mhz", Some(1), 2100.0),
        ];
        assert_eq!(names, expected);
    }
}
