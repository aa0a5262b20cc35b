//! Finding and opening a device, with an answer for every machine that has none.

use std::ffi::{CStr, c_void};

use anyhow::Result;
use candle_core::cuda_backend::cudarc::cublas;
use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};
use candle_core::{CudaDevice, Device};

use super::cublas::multiply;
use super::gemm::Gemm;
use super::launch::{Fatbin, Grid, Launcher, launch};
use super::{libraries, memory};
use crate::error::BadInput;

/// A device as records describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    pub name: String,
    /// Major and minor, as (9, 0).
    pub compute_capability: (u32, u32),
    /// Release of the kernel driver, as `580.95.05`; none where unknown.
    pub driver: Option<String>,
    /// The newest CUDA that the driver supports, as `13.0`.
    pub cuda: String,
    pub total_bytes: u64,
}

/// CUDA release that this build is made with and needs, as the driver counts: 1000 · major + 10 · minor.
const NEEDED_CUDA: i32 = 13000;
/// First driver for that release.
const NEEDED_DRIVER: &str = "580";
/// Turing: the oldest chip that the embedded kernels are compiled for.
const NEEDED_CAPABILITY: (u32, u32) = (7, 5);
const GO_ON: &str = "`--device cpu` measures on the processor";

/// Facts of device `ordinal`, without making a context on it. Fails with [`BadInput`] where this machine lacks a CUDA
/// library, has too old a driver, no such device or too old a chip.
pub fn probe(ordinal: usize) -> Result<DeviceFacts> {
    libraries::check(GO_ON)?;
    let version = driver_version();
    check_driver(version.and_then(|version| result::init().map(|()| version)))?;
    let count = result::device::get_count().unwrap_or(0);
    check_ordinal(ordinal, count)?;
    let properties = read_facts(ordinal, version.unwrap_or(0)).map_err(|error| {
        BadInput::new(format!("CUDA device {ordinal} does not answer: {}", name_of(error))).hint(GO_ON)
    })?;
    check_capability(&properties)?;
    Ok(properties)
}

/// Opens device `ordinal` with a stream of its own, fp32 sums in every cuBLAS product, and a pool that keeps freed memory.
pub fn open(ordinal: usize) -> Result<Device> {
    probe(ordinal)?;
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    forbid_half_sums(cuda)?;
    memory::set_release_threshold(cuda, u64::MAX)?;
    // SAFETY: everything runs on the one stream of this device, so that no event is needed to order it.
    unsafe { cuda.disable_event_tracking() };
    Ok(device)
}

/// Left alone, cuBLAS may add the parts of a split fp16 product in fp16.
fn forbid_half_sums(device: &CudaDevice) -> Result<()> {
    let mode = cublas::sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    let blas = device.cublas_handle();
    // SAFETY: the handle lives as long as `blas`, and the mode is one that cuBLAS names.
    let status = unsafe { cublas::sys::cublasSetMathMode(*blas.handle(), mode) };
    anyhow::ensure!(status == cublas::sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS, "cublasSetMathMode: {status:?}");
    Ok(())
}

/// `seen` is the driver's CUDA release once it has initialised, or why it has not.
fn check_driver(seen: Result<i32, DriverError>) -> Result<(), BadInput> {
    use sys::cudaError_enum as code;
    let needed = release(NEEDED_CUDA);
    let update = format!("install NVIDIA driver {NEEDED_DRIVER} or newer; {GO_ON}");
    match seen {
        Ok(version) if version >= NEEDED_CUDA => Ok(()),
        Ok(version) => {
            let seen = release(version);
            Err(BadInput::new(format!("the NVIDIA driver supports CUDA {seen}; this build needs {needed}"))
                .hint(update))
        }
        Err(DriverError(code::CUDA_ERROR_STUB_LIBRARY)) => {
            let message = "no NVIDIA driver: the libcuda that was found is a stub for building";
            Err(BadInput::new(message).hint(update))
        }
        Err(DriverError(code::CUDA_ERROR_NO_DEVICE)) => {
            Err(BadInput::new("the NVIDIA driver sees no GPU").hint(format!("check `nvidia-smi`; {GO_ON}")))
        }
        Err(error) => {
            let message = format!("the NVIDIA driver does not start: {}", name_of(error));
            Err(BadInput::new(message).hint(format!("check `nvidia-smi`; {GO_ON}")))
        }
    }
}

fn check_ordinal(ordinal: usize, count: i32) -> Result<(), BadInput> {
    match usize::try_from(count) {
        Ok(0) | Err(_) => {
            Err(BadInput::new("the NVIDIA driver sees no GPU").hint(format!("check `nvidia-smi`; {GO_ON}")))
        }
        Ok(count) if ordinal < count => Ok(()),
        Ok(1) => Err(BadInput::new(format!("no device `cuda:{ordinal}`; the only one is `cuda:0`")).hint(GO_ON)),
        Ok(count) => {
            let message = format!("no device `cuda:{ordinal}`; there are `cuda:0` to `cuda:{}`", count - 1);
            Err(BadInput::new(message).hint(GO_ON))
        }
    }
}

fn check_capability(properties: &DeviceFacts) -> Result<(), BadInput> {
    if properties.compute_capability >= NEEDED_CAPABILITY {
        return Ok(());
    }
    let ((major, minor), (needed_major, needed_minor)) = (properties.compute_capability, NEEDED_CAPABILITY);
    let message = format!(
        "{} has compute capability {major}.{minor}; this build needs {needed_major}.{needed_minor} or newer",
        properties.name
    );
    Err(BadInput::new(message).hint(GO_ON))
}

fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the call writes one int and needs no initialised driver.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

fn read_facts(ordinal: usize, version: i32) -> Result<DeviceFacts, DriverError> {
    use sys::CUdevice_attribute_enum as attribute;
    let device = result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX))?;
    // SAFETY: `device` was just handed out by the driver.
    let read = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let major = read(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = read(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let total_bytes = unsafe { result::device::total_mem(device) }?;
    Ok(DeviceFacts {
        name: result::device::get_name(device)?,
        compute_capability: (major.unsigned_abs(), minor.unsigned_abs()),
        driver: std::fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(|text| driver_release(&text)),
        cuda: release(version),
        total_bytes: total_bytes as u64,
    })
}

/// The release in the first line of `/proc/driver/nvidia/version`: the first word of digits and two or more parts.
fn driver_release(text: &str) -> Option<String> {
    let is_release = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.lines().next()?.split_whitespace().find(is_release).map(str::to_owned)
}

/// 13000 is `13.0`, 12040 is `12.4`.
fn release(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The driver's name for an error, or its number where the driver cannot give it.
fn name_of(error: DriverError) -> String {
    let number = error.0 as u32;
    let name = error.error_name().map(CStr::to_string_lossy);
    name.map(|name| format!("{name} ({number})")).unwrap_or_else(|_| format!("error {number}"))
}

impl Launcher for CudaDevice {
    unsafe fn launch(
        &self,
        fatbin: &'static Fatbin,
        kernel: &'static str,
        grid: Grid,
        parameters: &mut [*mut c_void],
    ) -> candle_core::Result<()> {
        let kernel = fatbin.kernel(self, kernel)?;
        // SAFETY: the caller's promise.
        unsafe { launch(self, kernel, grid, parameters) }
    }

    unsafe fn multiply(&self, gemm: &Gemm) -> candle_core::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { multiply(gemm, self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(result: Result<(), BadInput>) -> String {
        match result {
            Ok(()) => "ok".into(),
            Err(error) => format!("{error} | {}", error.hint_text().unwrap_or("")),
        }
    }

    fn properties(compute_capability: (u32, u32)) -> DeviceFacts {
        let (name, cuda) = ("Chip".into(), "13.0".into());
        DeviceFacts { name, compute_capability, driver: None, cuda, total_bytes: 0 }
    }

    #[test]
    fn every_machine_without_a_usable_gpu_is_told_what_is_missing_and_how_to_go_on() {
        let refused = [
            (check_driver(Err(DriverError(sys::cudaError_enum::CUDA_ERROR_STUB_LIBRARY))), "stub"),
            (check_driver(Err(DriverError(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE))), "sees no GPU"),
            (check_driver(Err(DriverError(sys::cudaError_enum::CUDA_ERROR_UNKNOWN))), "999"),
            (check_driver(Ok(12040)), "supports CUDA 12.4; this build needs 13.0"),
            (check_ordinal(0, 0), "sees no GPU"),
            (check_ordinal(1, 1), "the only one is `cuda:0`"),
            (check_ordinal(4, 2), "`cuda:0` to `cuda:1`"),
            (check_capability(&properties((7, 0))), "Chip has compute capability 7.0; this build needs 7.5"),
        ];
        for (result, part) in refused {
            let said = text(result);
            assert!(said.contains(part) && said.contains("--device cpu"), "{said:?} lacks {part:?}");
        }
    }

    #[test]
    fn usable_machines_pass() {
        let accepted = [
            check_driver(Ok(13000)),
            check_driver(Ok(13020)),
            check_ordinal(1, 2),
            check_capability(&properties((7, 5))),
            check_capability(&properties((12, 0))),
        ];
        assert!(accepted.into_iter().map(text).all(|said| said == "ok"));
    }

    #[test]
    fn driver_release_is_read_from_the_kernel_modules_text() {
        let lines = [
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
                Some("550.54.15"),
            ),
            ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", Some("580.95.05")),
            ("", None),
        ];
        for (line, release) in lines {
            assert_eq!(driver_release(line).as_deref(), release);
        }
    }
}
