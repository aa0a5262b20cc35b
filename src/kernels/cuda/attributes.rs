//! Attributes of a device that not every run needs.

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use sys::CUdevice_attribute_enum as attribute;

/// `None` for what the driver does not report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The highest that it is allowed.
    pub sm_clock_khz: Option<i32>,
    pub memory_clock_khz: Option<i32>,
    pub bus_bits: Option<i32>,
    pub pool: Option<bool>,
    /// Several processes may use it at once.
    pub shared: Option<bool>,
}

impl Attributes {
    /// Bytes that memory transfers in a microsecond, by two transfers a clock.
    pub fn bytes_per_us(&self) -> Option<usize> {
        let clock_khz = usize::try_from(self.memory_clock_khz?).ok()?;
        Some(2 * usize::try_from(self.bus_bits?).ok()? / 8 * clock_khz / 1000)
    }
}

/// Devices that the driver sees, once it has initialised.
pub fn count() -> usize {
    result::device::get_count().ok().and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
}

/// Attributes of device `ordinal`; all unknown where it does not exist.
pub fn of(ordinal: usize) -> Attributes {
    let Some(device) = i32::try_from(ordinal).ok().and_then(|ordinal| result::device::get(ordinal).ok()) else {
        return Attributes::default();
    };
    // SAFETY: `device` was just handed out by the driver.
    let read = |attribute| unsafe { result::device::get_attribute(device, attribute) }.ok();
    Attributes {
        sm_clock_khz: read(attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE),
        memory_clock_khz: read(attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE),
        bus_bits: read(attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH),
        pool: read(attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED).map(|yes| yes != 0),
        // Compute mode 0 is the default, in which processes share.
        shared: read(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_MODE).map(|mode| mode == 0),
    }
}
