//! A cache of the memory bandwidth of GPUs between runs: measuring it takes a process with a context on the device, and it does not
//! change while device, driver and this program stay the same.

use std::path::{Path, PathBuf};
use std::{env, fs};

use serde::{Deserialize, Serialize};

use crate::engine::memory::MeasuredBandwidth;
use crate::kernels::nvml::Gpu;
use crate::report::write_file;

/// Read bandwidth below this share of the theoretical one was disturbed, or the memory is not set up as it could be.
pub const SLOW_READ: f64 = 0.85;

/// The bandwidth of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceBandwidth {
    pub measured: MeasuredBandwidth,
    /// Time of the measurement where an earlier run made it.
    pub since: Option<String>,
}

/// The entry of one device in the user's file.
pub struct BandwidthCache {
    path: PathBuf,
    identity: Identity,
    theoretical_gb_s: Option<f64>,
}

/// Properties that must be the same for a cached bandwidth to be used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Identity {
    device: String,
    driver: String,
    version: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    identity: Identity,
    measured: String,
    #[serde(flatten)]
    bandwidth: MeasuredBandwidth,
}

impl BandwidthCache {
    /// `None` where the driver does not identify the device, or the user has no folder for caches.
    pub fn of(gpu: &Gpu) -> Option<Self> {
        let identity = Identity { device: gpu.uuid()?, driver: gpu.driver()?, version: version() };
        Some(Self { path: path()?, identity, theoretical_gb_s: gpu.theoretical_gb_s() })
    }

    /// The measurement of an earlier run. A file that cannot be read holds nothing.
    pub fn load(&self) -> Option<DeviceBandwidth> {
        let entry = entries(&self.path).into_iter().find(|entry| entry.identity == self.identity)?;
        Some(DeviceBandwidth { measured: entry.bandwidth, since: Some(entry.measured) })
    }

    /// Stores a complete measurement that nothing has visibly disturbed. Where it cannot be written the next run measures again.
    pub fn store(&self, bandwidth: MeasuredBandwidth, timestamp: &str) {
        let (Some(read_gb_s), Some(_)) = (bandwidth.read_gb_s, bandwidth.copy_gb_s) else { return };
        if self.theoretical_gb_s.is_some_and(|theoretical_gb_s| read_gb_s < SLOW_READ * theoretical_gb_s) {
            return;
        }
        let mut entries = entries(&self.path);
        entries.retain(|entry| entry.identity.device != self.identity.device);
        entries.push(Entry { identity: self.identity.clone(), measured: timestamp.to_owned(), bandwidth });
        let Ok(text) = serde_json::to_string_pretty(&entries) else { return };
        let _ = self.path.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok())
            && write_file(&self.path, &text).is_ok();
    }
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

fn entries(path: &Path) -> Vec<Entry> {
    fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// `quantbench/bandwidth.json` in the user's folder for caches.
fn path() -> Option<PathBuf> {
    let folder = |name: &str| env::var_os(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(caches.join("quantbench/bandwidth.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path, device: &str, driver: &str) -> BandwidthCache {
        let identity = Identity { device: device.to_owned(), driver: driver.to_owned(), version: version() };
        BandwidthCache { path: folder.join("quantbench/bandwidth.json"), identity, theoretical_gb_s: Some(4800.0) }
    }

    fn bandwidth(read_gb_s: f64) -> MeasuredBandwidth {
        MeasuredBandwidth { read_gb_s: Some(read_gb_s), copy_gb_s: Some(4000.0), matmul_gflop_s: None }
    }

    #[test]
    fn a_bandwidth_is_loaded_for_the_same_device_and_driver() {
        let folder = tempfile::tempdir().unwrap();
        let of = |device, driver| cache(folder.path(), device, driver);
        assert_eq!(of("GPU-1", "580").load(), None, "no file yet");
        of("GPU-1", "580").store(bandwidth(4500.0), "first");
        of("GPU-2", "580").store(bandwidth(4400.0), "second");
        let known = |read_gb_s, since: &str| {
            Some(DeviceBandwidth { measured: bandwidth(read_gb_s), since: Some(since.to_owned()) })
        };
        assert_eq!(of("GPU-1", "580").load(), known(4500.0, "first"));
        assert_eq!(of("GPU-2", "580").load(), known(4400.0, "second"));
        assert_eq!(of("GPU-1", "590").load(), None, "another driver");
        of("GPU-1", "590").store(bandwidth(4600.0), "third");
        assert_eq!(of("GPU-1", "590").load(), known(4600.0, "third"));
        assert_eq!(of("GPU-1", "580").load(), None, "one entry a device");
    }

    #[test]
    fn disturbed_or_incomplete_measurements_are_not_stored() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), "GPU-1", "580");
        cache.store(bandwidth(0.84 * 4800.0), "slow");
        cache.store(MeasuredBandwidth { copy_gb_s: None, ..bandwidth(4500.0) }, "half");
        assert_eq!(cache.load(), None);
    }

    #[test]
    fn a_file_that_is_no_list_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), "GPU-1", "580");
        fs::create_dir_all(cache.path.parent().unwrap()).unwrap();
        fs::write(&cache.path, "{").unwrap();
        assert_eq!(cache.load(), None);
        cache.store(bandwidth(4500.0), "now");
        assert!(cache.load().is_some());
    }
}
