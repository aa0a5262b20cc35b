//! The protocol of a measurement: number and length of its runs.

use serde::{Deserialize, Serialize};

use crate::ipc::Deadline;

/// Number of runs, their time limits and their method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeasurementProtocol {
    /// Warm-up runs at full shape and length; `None`: until the last two agree within 5 %, at most 5.
    pub warmup: Option<usize>,
    /// Counted repeats; `None`: adaptive.
    pub repeats: Option<usize>,
    pub min_repeats: usize,
    pub min_time_s: f64,
    /// No further repeat of a precision starts later, but for the first three.
    pub max_time_s: f64,
    /// Half width of the 95 % interval of the median over the median at which repeating ends.
    pub rel_ci: f64,
    /// Most bytes that each worker may allocate.
    pub memory_limit_bytes: Option<u64>,
    /// Time at which every worker that still runs is killed.
    #[serde(skip)]
    pub deadline: Option<Deadline>,
    /// Fresh starts of every worker, at least 1; they share the times, and each takes its own repeats.
    pub launches: usize,
    /// Each repeat is followed by a run that waits for the device after every token, as simple scripts do.
    pub sync_each_token: bool,
    pub method: Method,
    /// Every reading of the machine goes into the record.
    pub keep_series: bool,
    /// Measures the bandwidth anew instead of taking it from an earlier run.
    pub measure_bandwidth: bool,
}

/// The measuring method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Method {
    #[default]
    Quantbench,
    /// One run without a warm-up, its prefill included, that waits for the device after every token.
    SingleColdRun,
}

impl Method {
    /// Spelling in records.
    pub fn name(self) -> &'static str {
        match self {
            Method::Quantbench => "quantbench",
            Method::SingleColdRun => "single-cold-run",
        }
    }
}

impl MeasurementProtocol {
    /// One run without warm-up.
    pub fn single_cold_run() -> Self {
        Self { warmup: Some(0), repeats: Some(1), method: Method::SingleColdRun, ..Self::default() }
    }

    /// Protocol of one of the launches: an equal part of the times.
    pub fn one_launch(&self) -> Self {
        let n = self.launches.max(1) as f64;
        Self { min_time_s: self.min_time_s / n, max_time_s: self.max_time_s / n, ..self.clone() }
    }
}

impl Default for MeasurementProtocol {
    fn default() -> Self {
        Self {
            warmup: None,
            repeats: None,
            min_repeats: 6,
            min_time_s: 3.0,
            max_time_s: 20.0,
            rel_ci: 0.02,
            memory_limit_bytes: None,
            deadline: None,
            launches: 1,
            sync_each_token: false,
            method: Method::default(),
            keep_series: false,
            measure_bandwidth: false,
        }
    }
}
