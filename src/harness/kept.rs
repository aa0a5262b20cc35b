//! Memory bandwidth of GPUs, kept between runs: measuring it takes a process with a context on the device, and it does not
//! change while device, driver and this program stay the same.

use std::path::{Path, PathBuf};
use std::{env, fs};

use serde::{Deserialize, Serialize};

use super::assemble::SLOW_READ;
use crate::engine::memory::MeasuredBandwidth;
use crate::kernels::nvml::Gpu;
use crate::report::write_file;

/// What is known of a device's bandwidth.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    pub measured: MeasuredBandwidth,
    /// When, where that was in an earlier run.
    pub since: Option<String>,
}

/// The place of one device in the user's file.
pub struct Kept {
    path: PathBuf,
    identity: Identity,
    theoretical_gb_s: Option<f64>,
}

/// What must be the same for a bandwidth to hold.
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

impl Kept {
    /// `None` where the driver does not tell devices apart, or the user has no folder for caches.
    pub fn of(gpu: &Gpu) -> Option<Self> {
        let identity = Identity { device: gpu.uuid()?, driver: gpu.driver()?, version: version() };
        Some(Self { path: path()?, identity, theoretical_gb_s: gpu.theoretical_gb_s() })
    }

    /// What an earlier run measured. A file that cannot be read holds nothing.
    pub fn recall(&self) -> Option<Known> {
        let entry = entries(&self.path).into_iter().find(|entry| entry.identity == self.identity)?;
        Some(Known { measured: entry.bandwidth, since: Some(entry.measured) })
    }

    /// Keeps a complete measurement that nothing has visibly disturbed. Where it cannot be written the next run measures again.
    pub fn keep(&self, bandwidth: MeasuredBandwidth, timestamp: &str) {
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

    fn kept(folder: &Path, device: &str, driver: &str) -> Kept {
        let identity = Identity { device: device.to_owned(), driver: driver.to_owned(), version: version() };
        Kept { path: folder.join("quantbench/bandwidth.json"), identity, theoretical_gb_s: Some(4800.0) }
    }

    fn bandwidth(read_gb_s: f64) -> MeasuredBandwidth {
        MeasuredBandwidth { read_gb_s: Some(read_gb_s), copy_gb_s: Some(4000.0) }
    }

    #[test]
    fn a_bandwidth_is_recalled_for_the_same_device_and_driver() {
        let folder = tempfile::tempdir().unwrap();
        let of = |device, driver| kept(folder.path(), device, driver);
        assert_eq!(of("GPU-1", "580").recall(), None, "no file yet");
        of("GPU-1", "580").keep(bandwidth(4500.0), "first");
        of("GPU-2", "580").keep(bandwidth(4400.0), "second");
        let known =
            |read_gb_s, since: &str| Some(Known { measured: bandwidth(read_gb_s), since: Some(since.to_owned()) });
        assert_eq!(of("GPU-1", "580").recall(), known(4500.0, "first"));
        assert_eq!(of("GPU-2", "580").recall(), known(4400.0, "second"));
        assert_eq!(of("GPU-1", "590").recall(), None, "another driver");
        of("GPU-1", "590").keep(bandwidth(4600.0), "third");
        assert_eq!(of("GPU-1", "590").recall(), known(4600.0, "third"));
        assert_eq!(of("GPU-1", "580").recall(), None, "one entry a device");
    }

    #[test]
    fn what_was_disturbed_or_is_incomplete_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let kept = kept(folder.path(), "GPU-1", "580");
        kept.keep(bandwidth(0.84 * 4800.0), "slow");
        kept.keep(MeasuredBandwidth { copy_gb_s: None, ..bandwidth(4500.0) }, "half");
        assert_eq!(kept.recall(), None);
    }

    #[test]
    fn a_file_that_is_no_list_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let kept = kept(folder.path(), "GPU-1", "580");
        fs::create_dir_all(kept.path.parent().unwrap()).unwrap();
        fs::write(&kept.path, "{").unwrap();
        assert_eq!(kept.recall(), None);
        kept.keep(bandwidth(4500.0), "now");
        assert!(kept.recall().is_some());
    }
}
