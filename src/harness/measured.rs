//! Measurements of an engine: warm-up, repeats, and what is read once after the last repeat.

use std::collections::BTreeMap;

use super::compared::ComparedIds;
use crate::engine::memory::PoolUse;
use crate::engine::{Alone, Footprint, OutlierColumns};
use crate::os::cpu_usage::CpuUsage;

/// The warm-up of a worker.
#[derive(Debug, Clone, PartialEq)]
pub struct WarmupReport {
    /// End-to-end time of each run, in order.
    pub runs_ns: Vec<u64>,
    pub ended: WarmupEnd,
    pub duration_s: f64,
    /// Tokens that each repeat generates: what was asked, or up to the end of the text.
    pub n_gen: usize,
    pub start_bytes: Option<u64>,
    /// Highest resident set up to the end of the warm-up.
    pub warmup_peak_bytes: Option<u64>,
    /// Highest resident set of the prefill of an untimed run; `None` without a warm-up, and where the kernel's high-water mark
    /// cannot be reset.
    pub prefill_peak_bytes: Option<u64>,
    /// The same for its decode steps.
    pub decode_peak_bytes: Option<u64>,
}

/// The criterion that ended a warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmupEnd {
    /// The last two runs agree.
    Agreed,
    /// The user's own number of runs.
    Count,
    /// The most runs of an adaptive warm-up.
    Cap,
    /// The time for one precision.
    MaxTime,
}

impl std::fmt::Display for WarmupEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WarmupEnd::Agreed => "agreed",
            WarmupEnd::Count => "count",
            WarmupEnd::Cap => "cap",
            WarmupEnd::MaxTime => "max_time",
        })
    }
}

/// One counted repeat.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    /// The encoder's part of `prefill_ns`; 0 without one.
    pub encode_ns: u64,
    /// From the start to the first token.
    pub prefill_ns: u64,
    pub step_ns: Vec<u64>,
    pub end_to_end_ns: u64,
    /// Time of each decode step by the device's own clock; empty where it has none.
    pub device_step_ns: Vec<u64>,
    /// Time of each decode step that the host spent outside the engine's model; empty where unknown.
    pub host_step_ns: Vec<u64>,
    /// Decode steps of a second run, which waits for the device after every token; empty unless asked for.
    pub synced_step_ns: Vec<u64>,
    /// One a step and sequence: those of a step lie together.
    pub ids: Vec<u32>,
    pub finite_logits: bool,
    pub load: Option<CpuUsage>,
}

impl Sample {
    /// Tokens generated in the repeat, those of the second run included.
    pub fn n_tokens(&self) -> u64 {
        let again = if self.synced_step_ns.is_empty() { 0 } else { self.synced_step_ns.len() + 1 };
        (self.sequences() * (self.step_ns.len() + 1 + again)) as u64
    }

    /// Sequences that were generated at once.
    fn sequences(&self) -> usize {
        (self.ids.len() / (self.step_ns.len() + 1)).max(1)
    }

    /// The ids of each of `sequences` sequences.
    pub fn texts(&self, sequences: usize) -> Vec<Vec<u32>> {
        (0..sequences).map(|at| self.ids.iter().skip(at).step_by(sequences).copied().collect()).collect()
    }

    /// Time of both runs, without the prefill of the second.
    pub fn total_ns(&self) -> u64 {
        self.end_to_end_ns + self.synced_step_ns.iter().sum::<u64>()
    }
}

/// Memory, outliers and the untimed passes, read once after the last repeat.
#[derive(Debug, Clone, PartialEq)]
pub struct FinishReport {
    pub end_bytes: Option<u64>,
    pub peak_bytes: Option<u64>,
    /// False where the kernel's high-water mark could not be reset and the peak is the highest value seen between repeats.
    pub peak_is_exact: bool,
    pub footprint: Footprint,
    pub outliers: OutlierColumns,
    /// Use of the device's memory pool at the end of each phase, with the phase's maximum; empty on the CPU.
    pub pool: BTreeMap<String, PoolUse>,
    pub release_threshold_bytes: Option<u64>,
    /// Decode steps beside their arithmetic and their memory traffic alone. `None` where the engine cannot separate them, without a
    /// decode step, and where it would take too long.
    pub alone: Option<Alone>,
    /// Whether the logits of one more run hold numbers alone; `None` where every repeat said so itself.
    pub finite_logits: Option<bool>,
    /// The ids behind which the logits stand that rows are compared by; `None` without such logits.
    pub compared_ids: Option<ComparedIds>,
    /// Clock ticks of the processor that the engine's processes used while others were measured.
    pub waited_ticks: u64,
    /// Reason why the logits that were asked for are not in their file.
    pub logits_problem: Option<String>,
}

impl FinishReport {
    /// Merges two launches: the higher memory, the rounds of both, and the later one's other fields.
    pub fn highest(self, later: FinishReport) -> Self {
        Self {
            end_bytes: self.end_bytes.max(later.end_bytes),
            peak_bytes: self.peak_bytes.max(later.peak_bytes),
            peak_is_exact: self.peak_is_exact && later.peak_is_exact,
            logits_problem: self.logits_problem.or(later.logits_problem.clone()),
            finite_logits: self.finite_logits.and(later.finite_logits),
            waited_ticks: self.waited_ticks + later.waited_ticks,
            pool: highest(self.pool, later.pool),
            alone: match (self.alone, later.alone) {
                (Some(first), Some(later)) => Some(first.and(later)),
                (first, later) => first.or(later),
            },
            ..later
        }
    }
}

fn highest(mut pool: BTreeMap<String, PoolUse>, later: BTreeMap<String, PoolUse>) -> BTreeMap<String, PoolUse> {
    for (phase, later) in later {
        let known = pool.entry(phase).or_default();
        *known = PoolUse {
            used_bytes: known.used_bytes.max(later.used_bytes),
            used_high_bytes: known.used_high_bytes.max(later.used_high_bytes),
            reserved_bytes: known.reserved_bytes.max(later.reserved_bytes),
            reserved_high_bytes: known.reserved_high_bytes.max(later.reserved_high_bytes),
        };
    }
    pool
}
