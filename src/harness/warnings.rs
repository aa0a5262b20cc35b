//! Warnings about a result, each with advice.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::size;
use crate::events::Event;

/// The name of [`Warning::LogitsNotSaved`].
pub const LOGITS_NOT_SAVED: &str = "logits_not_saved";

/// Tensors that a warning names.
const NAMED_TENSORS: usize = 3;

#[derive(Debug, Clone, PartialEq)]
pub enum Warning {
    DebugBuild,
    /// Other processes used the processors during the repeats.
    BusyCpus {
        others_cpus: f64,
        n_cpus: u64,
    },
    PowersaveGovernor {
        governor: String,
    },
    OnBattery,
    FewRepeats {
        n: usize,
        min_repeats: usize,
    },
    /// The interval of the metric that ends the repeats.
    WideInterval {
        metric: &'static str,
        rel_ci: f64,
        wanted: f64,
    },
    WarmupNotFlat {
        n: usize,
    },
    Outliers {
        n: usize,
        of: usize,
    },
    /// A step reads less than twice the last-level cache holds, or faster than the memory can give.
    CacheResident {
        step_bytes: u64,
        cache_bytes: u64,
        mbu: Option<f64>,
    },
    UnpairedRatios {
        needed_bytes: u64,
        free_bytes: u64,
    },
    TokensDiffer {
        repeat: usize,
    },
    /// Logits of another engine that rounding does not explain.
    EnginesDisagree {
        logit_error: f64,
        explained: f64,
        kl: f64,
    },
    EndOfText {
        n_gen: usize,
        asked: usize,
    },
    /// Prompts of a batch that were cut to the length of the shortest.
    PromptsCut {
        longest: usize,
        n_prompt: usize,
    },
    UnequalLengths {
        n_gen: u64,
        fp16_n_gen: u64,
    },
    PeakNotExact,
    /// Weights beyond fp16, and how many are in which tensor.
    Fp16Overflow {
        count: u64,
        tensors: BTreeMap<String, u64>,
    },
    NoQuality {
        reason: String,
    },
    /// Too few starts of the worker for an interval.
    FewLaunches {
        n: usize,
        min_launches: usize,
    },
    /// Decode speed with and without a synchronisation after every token.
    SyncDiffers {
        tps: f64,
        synced_tps: f64,
    },
    /// The clocks were held down in `n` of the repeats.
    GpuThrottled {
        reasons: Vec<&'static str>,
        n: usize,
        of: usize,
    },
    /// Events of throttling during the repeats.
    CpuThrottled {
        count: u64,
    },
    /// The lowest of the repeats that count although the clock was held down in them.
    LowClock {
        mhz: f64,
        default_mhz: u32,
        n: usize,
        of: usize,
    },
    /// Repeats that were taken again.
    Discarded {
        n: usize,
    },
    /// Other processes use the GPU.
    GpuShared {
        n: u32,
    },
    SlowRead {
        read_gb_s: f64,
        theoretical_gb_s: f64,
    },
    /// The device was left open and this build's GPU cannot be used.
    NoGpu {
        problem: String,
    },
    /// More threads than CPUs that this process may use.
    TooManyThreads {
        threads: usize,
        cpus: usize,
    },
    /// The worker of this variant did not fit beside the others.
    RanAlone {
        label: String,
    },
    /// An engine used the processor while others were measured.
    WaitingEngine {
        label: String,
        ticks: u64,
    },
    /// Logits that were asked for were computed and could not be saved.
    LogitsNotSaved {
        problem: String,
    },
    /// A warning of opening the model: the hub, its files, its settings.
    Model {
        name: String,
        message: String,
    },
}

impl Warning {
    /// Spelling in records and filters.
    pub fn name(&self) -> &str {
        match self {
            Warning::DebugBuild => "debug_build",
            Warning::BusyCpus { .. } => "busy_cpus",
            Warning::PowersaveGovernor { .. } => "powersave_governor",
            Warning::OnBattery => "on_battery",
            Warning::FewRepeats { .. } => "few_repeats",
            Warning::WideInterval { .. } => "wide_interval",
            Warning::WarmupNotFlat { .. } => "warmup_not_flat",
            Warning::Outliers { .. } => "outliers",
            Warning::CacheResident { .. } => "cache-resident",
            Warning::UnpairedRatios { .. } => "unpaired_ratios",
            Warning::TokensDiffer { .. } => "tokens_differ",
            Warning::EnginesDisagree { .. } => "engines_disagree",
            Warning::EndOfText { .. } => "end_of_text",
            Warning::PromptsCut { .. } => "prompts_cut",
            Warning::UnequalLengths { .. } => "unequal_lengths",
            Warning::PeakNotExact => "peak_not_exact",
            Warning::Fp16Overflow { .. } => "fp16_overflow",
            Warning::NoQuality { .. } => "no_quality",
            Warning::FewLaunches { .. } => "few_launches",
            Warning::SyncDiffers { .. } => "sync_differs",
            Warning::GpuThrottled { .. } => "gpu_throttled",
            Warning::CpuThrottled { .. } => "cpu_throttled",
            Warning::LowClock { .. } => "low_clock",
            Warning::Discarded { .. } => "discarded",
            Warning::GpuShared { .. } => "gpu_shared",
            Warning::SlowRead { .. } => "slow_read",
            Warning::NoGpu { .. } => "no_gpu",
            Warning::TooManyThreads { .. } => "too_many_threads",
            Warning::RanAlone { .. } => "ran_alone",
            Warning::WaitingEngine { .. } => "waiting_engine",
            Warning::LogitsNotSaved { .. } => LOGITS_NOT_SAVED,
            Warning::Model { name, .. } => name,
        }
    }

    /// The warning as an event, where no record keeps it.
    pub fn event(&self) -> Event {
        let text = self.to_string();
        let message = text.split_once(": ").map_or(text.as_str(), |(_, message)| message).to_owned();
        Event::Warning { name: self.name().to_owned(), message }
    }

    /// True where the machine disturbed the measurement, so that it should be repeated.
    pub fn taints(&self) -> bool {
        matches!(
            self,
            Warning::DebugBuild
                | Warning::BusyCpus { .. }
                | Warning::PowersaveGovernor { .. }
                | Warning::OnBattery
                | Warning::GpuThrottled { .. }
                | Warning::CpuThrottled { .. }
                | Warning::LowClock { .. }
                | Warning::GpuShared { .. }
                | Warning::TooManyThreads { .. }
                | Warning::WaitingEngine { .. }
        )
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name())?;
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        match self {
            Warning::DebugBuild => f.write_str("this is a debug build; measure with `cargo run --release`"),
            Warning::BusyCpus { others_cpus, n_cpus } => write!(
                f,
                "other processes kept {others_cpus:.1} of {n_cpus} CPUs busy during the repeats; stop them, or leave them \
                 CPUs with `--threads`"
            ),
            Warning::PowersaveGovernor { governor } => {
                write!(f, "the CPU governor `{governor}` holds clocks down; set it to `performance`")
            }
            Warning::OnBattery => f.write_str("the machine runs on its battery; plug it in"),
            Warning::FewRepeats { n, min_repeats } => {
                write!(f, "{n} repeats, fewer than {min_repeats}; give them more time with `--max-time`")
            }
            Warning::WideInterval { metric, rel_ci, wanted } => write!(
                f,
                "half the 95 % interval of {metric} is {:.1} % of its median (target {:.1} %, `--rel-ci`); stop other programs or raise \
                 `--max-time`",
                100.0 * rel_ci,
                100.0 * wanted
            ),
            Warning::WarmupNotFlat { n } => {
                write!(f, "the warm-up did not stabilise within 5 % after {n} runs; set its length with `--warmup N`")
            }
            Warning::Outliers { n, of } => {
                write!(
                    f,
                    "latency_s of {n} of {of} repeats is far from its median; another program may have interfered"
                )
            }
            Warning::CacheResident { step_bytes, cache_bytes, mbu } => {
                let share = mbu.map(|mbu| format!(", {:.0} % of the read bandwidth", 100.0 * mbu)).unwrap_or_default();
                write!(
                    f,
                    "a step reads {:.1} MiB{share}, and the last-level cache holds {:.1} MiB: part of it never leaves the \
                     cache, so the share of memory bandwidth means little",
                    mib(*step_bytes),
                    mib(*cache_bytes)
                )
            }
            Warning::UnpairedRatios { needed_bytes, free_bytes } => write!(
                f,
                "the precisions need {} together and {} are free, so they ran one after the other and drift does not cancel \
                 in their ratios",
                size(*needed_bytes),
                size(*free_bytes)
            ),
            Warning::EnginesDisagree { logit_error, explained, kl } => write!(
                f,
                "the first logits differ from quantbench's by up to {logit_error:.2}, where rounding explains {explained:.2} (KL {kl:.1e}): \
                 the engine computes another model, or these weights amplify rounding, as random T5s do"
            ),
            Warning::TokensDiffer { repeat } => write!(
                f,
                "repeat {repeat} generated other tokens than the first one, although greedy decoding is deterministic"
            ),
            Warning::EndOfText { n_gen, asked } => {
                write!(f, "the text ends after {n_gen} of {asked} tokens (`--stop-at-eos`)")
            }
            Warning::UnequalLengths { n_gen, fp16_n_gen } => {
                write!(f, "{n_gen} tokens against {fp16_n_gen} of fp16, so there is no ratio; drop `--stop-at-eos`")
            }
            Warning::PromptsCut { longest, n_prompt } => write!(
                f,
                "the prompts of the batch have up to {longest} tokens, and each was cut to the {n_prompt} of the shortest: sequences are timed \
                 at equal lengths"
            ),
            Warning::PeakNotExact => f.write_str(
                "the kernel's memory peak cannot be reset here; the peak is the highest value between repeats",
            ),
            Warning::NoQuality { reason } => write!(f, "no quality was measured: {reason}"),
            Warning::FewLaunches { n, min_launches } => {
                write!(f, "{n} launches are too few for an interval; use at least `--launches {min_launches}`")
            }
            Warning::SyncDiffers { tps, synced_tps } => write!(
                f,
                "decoding gives {tps:.1} tokens/s, and {synced_tps:.1} where the host waits for the device after every token"
            ),
            Warning::GpuThrottled { reasons, n, of } => write!(
                f,
                "the GPU's clocks were held down in {n} of {of} repeats ({}); cool it, or raise its power limit",
                reasons.join(", ")
            ),
            Warning::CpuThrottled { count } => {
                write!(
                    f,
                    "the processor was throttled by heat {count} times during the repeats; cool it, or use fewer `--threads`"
                )
            }
            Warning::LowClock { mhz, default_mhz, n, of } => write!(
                f,
                "the GPU ran at {mhz:.0} MHz instead of {default_mhz} in {n} of {of} repeats, even when they were repeated; \
                 let it cool down, or lock its clocks with `nvidia-smi -lgc`"
            ),
            Warning::Discarded { n } => write!(
                f,
                "{n} repeats were taken again because the GPU's clock was under 75 % of its default; let it cool down first"
            ),
            Warning::GpuShared { n } => {
                write!(f, "{n} other processes use the GPU; stop them, or choose another with `--device cuda:N`")
            }
            Warning::SlowRead { read_gb_s, theoretical_gb_s } => write!(
                f,
                "the memory was read at {read_gb_s:.1} GB/s, {:.0} % of the {theoretical_gb_s:.1} GB/s of its specification; \
                 stop other programs and measure again",
                100.0 * read_gb_s / theoretical_gb_s
            ),
            Warning::NoGpu { problem } => {
                write!(f, "{problem}, so the CPU was measured; `--device cuda` fails instead")
            }
            Warning::TooManyThreads { threads, cpus } => write!(
                f,
                "{threads} threads share the {cpus} CPUs that this process may use, and wait for each other; leave \
                 `--threads` out"
            ),
            Warning::RanAlone { label } => write!(
                f,
                "`{label}` did not fit in memory beside the others and ran alone after them, so drift does not cancel in its \
                 ratios"
            ),
            Warning::WaitingEngine { label, ticks } => write!(
                f,
                "`{label}` was stopped and still used {:.2} s of processor time while others were measured; look for processes that it \
                 started outside its group",
                *ticks as f64 / 100.0
            ),
            Warning::LogitsNotSaved { problem } => f.write_str(problem),
            Warning::Model { message, .. } => f.write_str(message),
            Warning::Fp16Overflow { count, tensors } => {
                write!(f, "{count} weights of the checkpoint exceed the range of fp16 and became infinite")?;
                let named = tensors.iter().take(NAMED_TENSORS).map(|(name, count)| format!("{count} in `{name}`"));
                let named: Vec<String> = named.collect();
                if !named.is_empty() {
                    write!(f, ": {}", named.join(", "))?;
                }
                match tensors.len().saturating_sub(NAMED_TENSORS) {
                    0 => Ok(()),
                    more => write!(f, ", and in {more} further tensors"),
                }
            }
        }
    }
}
