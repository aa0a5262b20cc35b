//! Readings of the NVIDIA driver about a device without a context on it: clocks, temperature, power, memory, processes. Both
//! libraries are opened at run time, so that every build can ask and a machine without them answers `None`.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use libloading::Library;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};

const DRIVER: &str = "libcuda.so.1";

/// `CUDA_SUCCESS` and `NVML_SUCCESS`.
const SUCCESS: i32 = 0;

/// `CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE`
const ATTRIBUTE_L2_BYTES: i32 = 38;

/// The reasons that hold clocks below what was asked for. Idle, settings of the user's and the clocks of a group do not count.
const THROTTLES: [(ThrottleReasons, &str); 5] = [
    (ThrottleReasons::SW_POWER_CAP, "power cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hardware slowdown"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "temperature"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "temperature, by hardware"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power brake"),
];

/// A device of this machine.
pub struct Gpu {
    nvml: &'static Nvml,
    device: Device<'static>,
    /// Of the last-level cache.
    pub l2_bytes: Option<u64>,
}

/// A process with a context on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub bytes: Option<u64>,
}

/// NVML, loaded and initialised once and never shut down; `None` where it is missing.
fn nvml() -> Option<&'static Nvml> {
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    NVML.get_or_init(|| Nvml::init().ok()).as_ref()
}

impl Gpu {
    /// The device that CUDA numbers `ordinal`, found by its place on the bus, since NVML numbers devices in another order. `None`
    /// where the libraries or the device are missing.
    pub fn open(ordinal: usize) -> Option<Self> {
        let (bus_id, l2_bytes) = of_driver(ordinal)?;
        let nvml = nvml()?;
        let device = nvml.device_by_pci_bus_id(bus_id).ok()?;
        Some(Self { nvml, device, l2_bytes })
    }

    /// As the vendor sells it.
    pub fn name(&self) -> Option<String> {
        self.device.name().ok()
    }

    /// No other device has it; parts of a device that is shared by MIG have one each.
    pub fn uuid(&self) -> Option<String> {
        self.device.uuid().ok()
    }

    /// Release of the kernel driver.
    pub fn driver(&self) -> Option<String> {
        self.nvml.sys_driver_version().ok()
    }

    /// The newest CUDA that the driver supports, as `13.0`.
    pub fn cuda(&self) -> Option<String> {
        let version = self.nvml.sys_cuda_driver_version().ok()?;
        Some(format!("{}.{}", cuda_driver_version_major(version), cuda_driver_version_minor(version)))
    }

    pub fn sm_mhz(&self) -> Option<u32> {
        self.device.clock_info(Clock::SM).ok()
    }

    /// What applications get unless something holds the clock down; the highest clock where the device has no such setting.
    pub fn default_sm_mhz(&self) -> Option<u32> {
        let default = self.device.default_applications_clock(Clock::SM);
        default.or_else(|_| self.device.max_clock_info(Clock::SM)).ok()
    }

    pub fn memory_mhz(&self) -> Option<u32> {
        self.device.clock_info(Clock::Memory).ok()
    }

    /// What the memory can give: two transfers a clock at its highest, over the width of its bus, in 1e9 bytes a second.
    pub fn theoretical_gb_s(&self) -> Option<f64> {
        let mhz = self.device.max_clock_info(Clock::Memory).ok()?;
        let bus_bits = self.device.memory_bus_width().ok()?;
        Some(2.0 * f64::from(mhz) * 1e6 * f64::from(bus_bits) / 8.0 / 1e9)
    }

    pub fn celsius(&self) -> Option<u32> {
        self.device.temperature(TemperatureSensor::Gpu).ok()
    }

    pub fn milliwatts(&self) -> Option<u32> {
        self.device.power_usage().ok()
    }

    /// Since the driver was loaded.
    pub fn energy_mj(&self) -> Option<u64> {
        self.device.total_energy_consumption().ok()
    }

    /// Why clocks are held down now.
    pub fn throttled_by(&self) -> Vec<&'static str> {
        let reasons = match self.device.current_throttle_reasons() {
            Err(NvmlError::FailedToLoadSymbol(_)) => self.event_reasons(),
            reasons => reasons.ok(),
        };
        throttles(reasons.unwrap_or(ThrottleReasons::empty()))
    }

    /// The same under the name that replaces it, which the wrapper does not call.
    fn event_reasons(&self) -> Option<ThrottleReasons> {
        let read = self.nvml.lib().nvmlDeviceGetCurrentClocksEventReasons.as_ref().ok()?;
        let mut bits = 0;
        // SAFETY: the binding's own signature; the handle is valid as long as NVML is, which is never shut down.
        let code = unsafe { read(self.device.handle(), &mut bits) };
        (code == SUCCESS as u32).then(|| ThrottleReasons::from_bits_truncate(bits))
    }

    /// Used and in all, over all processes; what the driver keeps for itself is used.
    pub fn memory_bytes(&self) -> Option<(u64, u64)> {
        self.device.memory_info().ok().map(|memory| (memory.total.saturating_sub(memory.free), memory.total))
    }

    /// What nobody holds: what the driver keeps for itself is neither free nor anybody's.
    pub fn free_bytes(&self) -> Option<u64> {
        self.device.memory_info().ok().map(|memory| memory.free)
    }

    /// The instruction set as our kernels' names have it: `sm_90`.
    pub fn isa(&self) -> Option<String> {
        self.device.cuda_compute_capability().ok().map(|of| format!("sm_{}{}", of.major, of.minor))
    }

    /// Processes that compute on the device.
    pub fn processes(&self) -> Option<Vec<Process>> {
        let bytes = |memory| match memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        let processes = self.device.running_compute_processes().ok()?;
        Some(processes.into_iter().map(|info| Process { pid: info.pid, bytes: bytes(info.used_gpu_memory) }).collect())
    }
}

/// The bus address of CUDA device `ordinal`, and the size of its last-level cache. Makes no context.
fn of_driver(ordinal: usize) -> Option<(String, Option<u64>)> {
    let (mut device, mut bus_id, mut l2_bytes) = (0, [0u8; 32], 0);
    let ordinal = i32::try_from(ordinal).ok()?;
    type Init = extern "C" fn(u32) -> i32;
    type Get = extern "C" fn(*mut i32, i32) -> i32;
    type BusId = extern "C" fn(*mut c_char, i32, i32) -> i32;
    type Attribute = extern "C" fn(*mut i32, i32, i32) -> i32;
    // SAFETY: `cuInit(unsigned)`, `cuDeviceGet(CUdevice *, int)`, `cuDeviceGetPCIBusId(char *, int length, CUdevice)` and
    // `cuDeviceGetAttribute(int *, enum, CUdevice)`, in this order; loading the driver runs its own initialisers alone.
    let (found, has_l2) = unsafe {
        let driver: &'static Library = Box::leak(Box::new(Library::new(DRIVER).ok()?));
        let codes = [
            driver.get::<Init>(b"cuInit\0").ok()?(0),
            driver.get::<Get>(b"cuDeviceGet\0").ok()?(&mut device, ordinal),
            driver.get::<BusId>(b"cuDeviceGetPCIBusId\0").ok()?(bus_id.as_mut_ptr().cast(), 31, device),
        ];
        let l2 = driver.get::<Attribute>(b"cuDeviceGetAttribute\0").ok()?(&mut l2_bytes, ATTRIBUTE_L2_BYTES, device);
        (codes == [SUCCESS; 3], l2 == SUCCESS)
    };
    let bus_id = CStr::from_bytes_until_nul(&bus_id).ok()?.to_str().ok()?.to_owned();
    found.then(|| (bus_id, u64::try_from(l2_bytes).ok().filter(|bytes| has_l2 && *bytes > 0)))
}

fn throttles(reasons: ThrottleReasons) -> Vec<&'static str> {
    THROTTLES.iter().filter(|(reason, _)| reasons.contains(*reason)).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_that_hold_clocks_down_are_named() {
        let named = |bits| throttles(ThrottleReasons::from_bits_truncate(bits));
        assert_eq!(named(0), [""; 0]);
        assert_eq!(named(0x01 | 0x02 | 0x10 | 0x100), [""; 0], "idle and settings are none");
        assert_eq!(named(0x04 | 0x08), ["power cap", "hardware slowdown"]);
        assert_eq!(named(0x20 | 0x40 | 0x80), ["temperature", "temperature, by hardware", "power brake"]);
    }

    #[test]
    fn a_machine_answers_whatever_it_has() {
        assert!(Gpu::open(usize::MAX).is_none());
        let Some(gpu) = Gpu::open(0) else {
            println!("skipped: no NVIDIA driver, or no device");
            return;
        };
        let identity = (gpu.name(), gpu.uuid(), gpu.driver(), gpu.cuda(), gpu.l2_bytes);
        let clocks = (gpu.sm_mhz(), gpu.default_sm_mhz(), gpu.memory_mhz(), gpu.theoretical_gb_s());
        let state = (gpu.celsius(), gpu.milliwatts(), gpu.energy_mj(), gpu.throttled_by());
        println!("{identity:?}\n{clocks:?}\n{state:?}\n{:?}\n{:?}", gpu.memory_bytes(), gpu.processes());
        assert!(identity.0.is_some_and(|name| !name.is_empty()));
        assert!(gpu.memory_bytes().is_some_and(|(used, total)| used <= total));
        let (free, total) = (gpu.free_bytes().unwrap(), gpu.memory_bytes().unwrap().1);
        assert!(free <= total, "{free} of {total}");
    }
}
