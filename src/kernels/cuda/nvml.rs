//! What the NVIDIA driver tells about a device without a context on it: clocks, temperature, power, memory, processes. Both
//! libraries are opened at run time, so that every build can ask and a machine without them answers `None`.

use std::ffi::{CStr, c_char, c_void};

use libloading::Library;

const NVML: &str = "libnvidia-ml.so.1";
const DRIVER: &str = "libcuda.so.1";

/// `NVML_SUCCESS` and `CUDA_SUCCESS`.
const SUCCESS: i32 = 0;
/// `NVML_ERROR_INSUFFICIENT_SIZE`
const TOO_SMALL: i32 = 7;

/// `NVML_CLOCK_SM` and `NVML_CLOCK_MEM`
const CLOCK_SM: u32 = 1;
const CLOCK_MEMORY: u32 = 2;
/// `NVML_TEMPERATURE_GPU`
const TEMPERATURE_GPU: u32 = 0;

/// `CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE`
const ATTRIBUTE_L2_BYTES: i32 = 38;

/// Bits of the clock event reasons that hold clocks below what was asked for. Idle (bit 0) and settings of the user's (bits 1, 4
/// and 8) do not count.
const THROTTLES: [(u64, &str); 5] = [
    (0x04, "power cap"),
    (0x08, "hardware slowdown"),
    (0x20, "temperature"),
    (0x40, "temperature, by hardware"),
    (0x80, "power brake"),
];

/// Room for the processes of a busy device; more are counted and not listed.
const MAX_PROCESSES: usize = 64;

/// A device of this machine.
pub struct Gpu {
    /// Never closed: neither library is made to be loaded twice.
    nvml: &'static Library,
    /// `nvmlDevice_t`, an opaque pointer that NVML keeps valid until it is shut down.
    device: usize,
    /// Of the last-level cache.
    pub l2_bytes: Option<u64>,
}

/// A process with a context on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub bytes: Option<u64>,
}

/// `nvmlProcessInfo_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProcessInfo {
    pid: u32,
    used_bytes: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

/// `nvmlMemory_t`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryInfo {
    total_bytes: u64,
    free_bytes: u64,
    used_bytes: u64,
}

impl Gpu {
    /// The device that CUDA numbers `ordinal`, found by its place on the bus, since NVML numbers devices in another order. `None`
    /// where the libraries or the device are missing.
    pub fn open(ordinal: usize) -> Option<Self> {
        let (bus_id, l2_bytes) = of_driver(ordinal)?;
        // SAFETY: loading NVML runs nothing but its own initialisers.
        let nvml: &'static Library = Box::leak(Box::new(unsafe { Library::new(NVML) }.ok()?));
        // SAFETY: `nvmlInit_v2(void)`.
        let initialised = unsafe { nvml.get::<extern "C" fn() -> i32>(b"nvmlInit_v2\0").ok()?() };
        if initialised != SUCCESS {
            return None;
        }
        let mut device = std::ptr::null_mut::<c_void>();
        type ByBus = extern "C" fn(*const c_char, *mut *mut c_void) -> i32;
        // SAFETY: `nvmlDeviceGetHandleByPciBusId_v2(const char *, nvmlDevice_t *)`; the text ends with a zero.
        let found = unsafe {
            nvml.get::<ByBus>(b"nvmlDeviceGetHandleByPciBusId_v2\0").ok()?(bus_id.as_ptr().cast(), &mut device)
        };
        (found == SUCCESS).then_some(Self { nvml, device: device as usize, l2_bytes })
    }

    /// As the vendor sells it.
    pub fn name(&self) -> Option<String> {
        self.text_of_device(b"nvmlDeviceGetName\0")
    }

    /// No other device has it; parts of a device that is shared by MIG have one each.
    pub fn uuid(&self) -> Option<String> {
        self.text_of_device(b"nvmlDeviceGetUUID\0")
    }

    /// Release of the kernel driver.
    pub fn driver(&self) -> Option<String> {
        let mut text = [0u8; 80];
        type Version = extern "C" fn(*mut c_char, u32) -> i32;
        // SAFETY: `nvmlSystemGetDriverVersion(char *, unsigned int length)`.
        let code = unsafe {
            let version = self.nvml.get::<Version>(b"nvmlSystemGetDriverVersion\0").ok()?;
            version(text.as_mut_ptr().cast(), text.len() as u32)
        };
        (code == SUCCESS).then(|| text_of(&text)).flatten()
    }

    /// The newest CUDA that the driver supports, as `13.0`.
    pub fn cuda(&self) -> Option<String> {
        let mut version = 0;
        type Version = extern "C" fn(*mut i32) -> i32;
        // SAFETY: `nvmlSystemGetCudaDriverVersion_v2(int *)`.
        let code = unsafe { self.nvml.get::<Version>(b"nvmlSystemGetCudaDriverVersion_v2\0").ok()?(&mut version) };
        (code == SUCCESS).then(|| format!("{}.{}", version / 1000, version % 1000 / 10))
    }

    pub fn sm_mhz(&self) -> Option<u32> {
        self.of_kind(b"nvmlDeviceGetClockInfo\0", CLOCK_SM)
    }

    /// What applications get unless something holds the clock down; the highest clock where the device has no such setting.
    pub fn default_sm_mhz(&self) -> Option<u32> {
        let default = self.of_kind(b"nvmlDeviceGetDefaultApplicationsClock\0", CLOCK_SM);
        default.or_else(|| self.of_kind(b"nvmlDeviceGetMaxClockInfo\0", CLOCK_SM))
    }

    pub fn memory_mhz(&self) -> Option<u32> {
        self.of_kind(b"nvmlDeviceGetClockInfo\0", CLOCK_MEMORY)
    }

    /// What the memory can give: two transfers a clock at its highest, over the width of its bus, in 1e9 bytes a second.
    pub fn theoretical_gb_s(&self) -> Option<f64> {
        let mhz: u32 = self.of_kind(b"nvmlDeviceGetMaxClockInfo\0", CLOCK_MEMORY)?;
        let bus_bits: u32 = self.of_device(b"nvmlDeviceGetMemoryBusWidth\0")?;
        Some(2.0 * f64::from(mhz) * 1e6 * f64::from(bus_bits) / 8.0 / 1e9)
    }

    pub fn celsius(&self) -> Option<u32> {
        self.of_kind(b"nvmlDeviceGetTemperature\0", TEMPERATURE_GPU)
    }

    pub fn milliwatts(&self) -> Option<u32> {
        self.of_device(b"nvmlDeviceGetPowerUsage\0")
    }

    /// Since the driver was loaded.
    pub fn energy_mj(&self) -> Option<u64> {
        self.of_device(b"nvmlDeviceGetTotalEnergyConsumption\0")
    }

    /// Why clocks are held down now.
    pub fn throttled_by(&self) -> Vec<&'static str> {
        let reasons = self.of_device(b"nvmlDeviceGetCurrentClocksThrottleReasons\0");
        throttles(reasons.or_else(|| self.of_device(b"nvmlDeviceGetCurrentClocksEventReasons\0")).unwrap_or(0))
    }

    /// Used and in all, over all processes.
    pub fn memory_bytes(&self) -> Option<(u64, u64)> {
        self.of_device(b"nvmlDeviceGetMemoryInfo\0").map(|memory: MemoryInfo| (memory.used_bytes, memory.total_bytes))
    }

    /// What nobody holds: what the driver keeps for itself is neither free nor anybody's.
    pub fn free_bytes(&self) -> Option<u64> {
        self.of_device(b"nvmlDeviceGetMemoryInfo\0").map(|memory: MemoryInfo| memory.free_bytes)
    }

    /// The instruction set as our kernels' names have it: `sm_90`.
    pub fn isa(&self) -> Option<String> {
        let (mut major, mut minor) = (0, 0);
        type Capability = extern "C" fn(*mut c_void, *mut i32, *mut i32) -> i32;
        // SAFETY: `nvmlDeviceGetCudaComputeCapability(nvmlDevice_t, int *major, int *minor)`.
        let code = unsafe {
            let capability = self.nvml.get::<Capability>(b"nvmlDeviceGetCudaComputeCapability\0").ok()?;
            capability(self.device as *mut c_void, &mut major, &mut minor)
        };
        (code == SUCCESS).then(|| format!("sm_{major}{minor}"))
    }

    /// Processes that compute on the device.
    pub fn processes(&self) -> Option<Vec<Process>> {
        let mut found = [ProcessInfo::default(); MAX_PROCESSES];
        let mut count = found.len() as u32;
        type Processes = extern "C" fn(*mut c_void, *mut u32, *mut ProcessInfo) -> i32;
        // SAFETY: `nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t, unsigned int *count, nvmlProcessInfo_t *)` writes at
        // most as many as `count` says.
        let code = unsafe {
            let processes = self.nvml.get::<Processes>(b"nvmlDeviceGetComputeRunningProcesses_v3\0").ok()?;
            processes(self.device as *mut c_void, &mut count, found.as_mut_ptr())
        };
        let known = |bytes: u64| (bytes != u64::MAX).then_some(bytes);
        let listed = found.iter().take(count as usize);
        matches!(code, SUCCESS | TOO_SMALL)
            .then(|| listed.map(|info| Process { pid: info.pid, bytes: known(info.used_bytes) }).collect())
    }

    /// Asks `name`, one of NVML's `(nvmlDevice_t, char *, unsigned int length)`.
    fn text_of_device(&self, name: &[u8]) -> Option<String> {
        let mut text = [0u8; 96];
        type Read = extern "C" fn(*mut c_void, *mut c_char, u32) -> i32;
        // SAFETY: the callers name functions of this signature, which write at most `length` bytes.
        let code = unsafe {
            let read = self.nvml.get::<Read>(name).ok()?;
            read(self.device as *mut c_void, text.as_mut_ptr().cast(), text.len() as u32)
        };
        (code == SUCCESS).then(|| text_of(&text)).flatten()
    }

    /// Asks `name`, one of NVML's `(nvmlDevice_t, T *)`.
    fn of_device<T: Default>(&self, name: &[u8]) -> Option<T> {
        let mut value = T::default();
        type Read<T> = extern "C" fn(*mut c_void, *mut T) -> i32;
        // SAFETY: the callers name functions of this signature with their `T`; the handle is NVML's own.
        let code = unsafe { self.nvml.get::<Read<T>>(name).ok()?(self.device as *mut c_void, &mut value) };
        (code == SUCCESS).then_some(value)
    }

    /// Asks `name`, one of NVML's `(nvmlDevice_t, enum, T *)`.
    fn of_kind<T: Default>(&self, name: &[u8], kind: u32) -> Option<T> {
        let mut value = T::default();
        type Read<T> = extern "C" fn(*mut c_void, u32, *mut T) -> i32;
        // SAFETY: as above.
        let code = unsafe { self.nvml.get::<Read<T>>(name).ok()?(self.device as *mut c_void, kind, &mut value) };
        (code == SUCCESS).then_some(value)
    }
}

/// The bus address of CUDA device `ordinal` as text that ends with a zero, and the size of its last-level cache. Makes no
/// context.
fn of_driver(ordinal: usize) -> Option<([u8; 32], Option<u64>)> {
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
    found.then(|| (bus_id, u64::try_from(l2_bytes).ok().filter(|bytes| has_l2 && *bytes > 0)))
}

fn text_of(bytes: &[u8]) -> Option<String> {
    CStr::from_bytes_until_nul(bytes).ok().map(|text| text.to_string_lossy().into_owned())
}

fn throttles(reasons: u64) -> Vec<&'static str> {
    THROTTLES.iter().filter(|(bit, _)| reasons & bit != 0).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_that_hold_clocks_down_are_named() {
        assert_eq!(throttles(0), [""; 0]);
        assert_eq!(throttles(0x01 | 0x02 | 0x100), [""; 0], "idle and settings are none");
        assert_eq!(throttles(0x04 | 0x40), ["power cap", "temperature, by hardware"]);
    }

    #[test]
    fn records_of_the_driver_have_their_layout() {
        assert_eq!((size_of::<ProcessInfo>(), size_of::<MemoryInfo>()), (24, 24));
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
