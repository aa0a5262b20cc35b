//! The numbers that tables, gates and reports can name: one row each.
//!
//! A row with a function is computed from a record's raw samples into [`Record::metrics`]; one without points at a number that
//! is elsewhere in the record.

use std::collections::BTreeMap;

use super::{Record, Summary};
use crate::stats;

/// A row of [`METRICS`].
pub struct Metric {
    /// Unique; as flags, columns and gates spell it.
    pub key: &'static str,
    pub unit: &'static str,
    pub better: Better,
    /// One sentence: what it is.
    pub doc: &'static str,
    /// Its place in a record: keys joined by dots.
    pub path: &'static str,
    pub values: Option<Values>,
}

/// Values of each repeat, from the raw samples; empty where the workload does not define the metric.
pub type Values = fn(&Record) -> Vec<Vec<f64>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

use Better::{Higher, Lower};

/// Every metric, in the order that wide tables show them.
pub static METRICS: &[Metric] = &[
    Metric {
        key: "decode_tps",
        unit: "tokens/s",
        better: Higher,
        doc: "tokens after the first over the time from the first to the last; of a batch those of all sequences",
        path: "metrics.decode_tps.median",
        values: Some(|r| per_repeat(r, |repeat| Some(batch(r) * repeat.n_steps()? / seconds(repeat.decode_ns())))),
    },
    Metric {
        key: "decode_tps_per_sequence",
        unit: "tokens/s",
        better: Higher,
        doc: "decode_tps over the sequences of the batch",
        path: "metrics.decode_tps_per_sequence.median",
        values: Some(|r| per_repeat(r, |repeat| Some(repeat.n_steps()? / seconds(repeat.decode_ns())))),
    },
    Metric {
        key: "prefill_tps",
        unit: "tokens/s",
        better: Higher,
        doc: "prompt and image tokens of all sequences over the prefill time",
        path: "metrics.prefill_tps.median",
        values: Some(|r| {
            let n_tokens = batch(r) * (r.workload.n_prompt + r.workload.n_image) as f64;
            per_repeat(r, |repeat| Some(n_tokens / seconds(repeat.prefill_ns)))
        }),
    },
    Metric {
        key: "output_tps",
        unit: "tokens/s",
        better: Higher,
        doc: "generated tokens over the end-to-end time, prefill included",
        path: "metrics.output_tps.median",
        values: Some(|r| per_repeat(r, |repeat| Some(batch(r) * repeat.n_gen / seconds(repeat.end_to_end_ns)))),
    },
    Metric {
        key: "ttft_ms",
        unit: "ms",
        better: Lower,
        doc: "start of prefill to the first tokens of all sequences known on the host",
        path: "metrics.ttft_ms.median",
        values: Some(|r| per_repeat(r, |repeat| Some(milliseconds(repeat.prefill_ns)))),
    },
    Metric {
        key: "tpot_ms",
        unit: "ms",
        better: Lower,
        doc: "time per output token after the first, one value a repeat",
        path: "metrics.tpot_ms.median",
        values: Some(|r| per_repeat(r, |repeat| Some(milliseconds(repeat.decode_ns()) / repeat.n_steps()?))),
    },
    Metric {
        key: "itl_ms",
        unit: "ms",
        better: Lower,
        doc: "inter-token latency, one value a decode step; its interval is over the repeats' medians",
        path: "metrics.itl_ms.median",
        values: Some(|r| {
            r.samples.decode_step_ns.iter().map(|s| s.iter().map(|&ns| milliseconds(ns)).collect()).collect()
        }),
    },
    Metric {
        key: "device_itl_ms",
        unit: "ms",
        better: Lower,
        doc: "inter-token latency by the device's own clock, one value a decode step",
        path: "metrics.device_itl_ms.median",
        values: Some(|r| {
            r.samples.device_step_ns.iter().map(|s| s.iter().map(|&ns| milliseconds(ns)).collect()).collect()
        }),
    },
    Metric {
        key: "decode_synced_tps",
        unit: "tokens/s",
        better: Higher,
        doc: "decode_tps of runs that wait for the device after every token",
        path: "metrics.decode_synced_tps.median",
        values: Some(|r| {
            let runs = r.samples.synced_step_ns.iter().filter(|steps| !steps.is_empty());
            runs.map(|steps| vec![batch(r) * steps.len() as f64 / seconds(steps.iter().sum())]).collect()
        }),
    },
    Metric {
        key: "joules_per_token",
        unit: "J",
        better: Lower,
        doc: "energy of back-to-back repeats above that of the idle machine over their generated tokens, prefill included",
        path: "metrics.joules_per_token.median",
        values: Some(joules_per_token),
    },
    Metric {
        key: "latency_s",
        unit: "s",
        better: Lower,
        doc: "end to end: start of prefill to the last token known on the host",
        path: "metrics.latency_s.median",
        values: Some(|r| per_repeat(r, |repeat| Some(seconds(repeat.end_to_end_ns)))),
    },
    Metric {
        key: "latency_per_token_ms",
        unit: "ms",
        better: Lower,
        doc: "end-to-end time over generated tokens",
        path: "metrics.latency_per_token_ms.median",
        values: Some(|r| per_repeat(r, |repeat| Some(milliseconds(repeat.end_to_end_ns) / repeat.n_gen))),
    },
    Metric {
        key: "load_s",
        unit: "s",
        better: Lower,
        doc: "first byte read to weights usable",
        path: "metrics.load_s.median",
        values: Some(|r| r.phases.get("load").map(|&s| vec![vec![s]]).unwrap_or_default()),
    },
    stored("speedup_vs_fp16", "x", Higher, "decode_tps over that of fp16 in the same run", "ratio_to_fp16.median"),
    stored(
        "bytes_ratio",
        "x",
        Higher,
        "bytes that a decode step reads at fp16 over those that it reads here",
        "ratio_to_fp16.by_bytes",
    ),
    stored("mbu", "share", Higher, "bytes a second that decoding reads over the read bandwidth", "bandwidth.mbu"),
    stored("achieved_gb_s", "GB/s", Higher, "bytes that a decode step reads over its time", "bandwidth.achieved_gb_s"),
    stored(
        "flops_per_step",
        "FLOP",
        Lower,
        "operations of the matrix products in a decode step of all sequences",
        "bandwidth.flops_per_step",
    ),
    stored(
        "achieved_gflop_s",
        "GFLOP/s",
        Higher,
        "flops_per_step over the time of a step",
        "bandwidth.achieved_gflop_s",
    ),
    stored(
        "matmul_gflop_s",
        "GFLOP/s",
        Higher,
        "operations a second of a large matrix product in the same run",
        "bandwidth.matmul_gflop_s",
    ),
    stored("mfu", "share", Higher, "achieved_gflop_s over matmul_gflop_s", "bandwidth.mfu"),
    stored("read_gb_s", "GB/s", Higher, "read bandwidth of the device in the same run", "bandwidth.read_gb_s"),
    stored("copy_gb_s", "GB/s", Higher, "copy bandwidth of the device in the same run", "bandwidth.copy_gb_s"),
    stored(
        "theoretical_gb_s",
        "GB/s",
        Higher,
        "two transfers a clock over the width of the memory's bus",
        "bandwidth.theoretical_gb_s",
    ),
    stored(
        "device_share",
        "share",
        Higher,
        "time of the decode steps by the device's own clock over that by the host's",
        "bandwidth.device_share",
    ),
    stored(
        "memory_alone_share",
        "share",
        Lower,
        "time to read what a decode step reads, without arithmetic, over the time of the step",
        "bandwidth.memory_alone_share",
    ),
    stored(
        "arithmetic_alone_share",
        "share",
        Lower,
        "time of a decode step whose matrices stay in the cache over the time of the step",
        "bandwidth.arithmetic_alone_share",
    ),
    stored(
        "weight_bytes_per_token",
        "bytes",
        Lower,
        "bytes of weights that one decode step of all sequences must read",
        "bandwidth.weight_bytes_per_token",
    ),
    stored(
        "kv_bytes_per_token",
        "bytes",
        Lower,
        "bytes of keys and values that one decode step of all sequences reads at the mean depth of the run",
        "bandwidth.kv_bytes_per_token",
    ),
    stored("start_bytes", "bytes", Lower, "memory after load and warm-up", "memory.start_bytes"),
    stored("end_bytes", "bytes", Lower, "memory after the run", "memory.end_bytes"),
    stored("peak_bytes", "bytes", Lower, "highest memory in the run", "memory.peak_bytes"),
    stored(
        "growth_bytes",
        "bytes",
        Lower,
        "what a process grew by from just before it loaded to the most in the run",
        "memory.growth_bytes",
    ),
    stored("load_peak_bytes", "bytes", Lower, "highest memory while loading", "memory.load_peak_bytes"),
    stored("prefill_peak_bytes", "bytes", Lower, "highest memory in a prefill", "memory.prefill_peak_bytes"),
    stored("decode_peak_bytes", "bytes", Lower, "highest memory in the decode steps", "memory.decode_peak_bytes"),
    stored("weights_bytes", "bytes", Lower, "weights in their stored formats", "memory.weights_bytes"),
    stored("kv_cache_bytes", "bytes", Lower, "key/value cache", "memory.kv_cache_bytes"),
    stored("scratch_bytes", "bytes", Lower, "activations and scratch", "memory.scratch_bytes"),
    stored(
        "context_bytes",
        "bytes",
        Lower,
        "what a process takes of a GPU beside its memory pool",
        "memory.context_bytes",
    ),
    stored(
        "device_process_bytes",
        "bytes",
        Lower,
        "the most that a process took of a GPU during the repeats, by NVML",
        "memory.device_process_bytes",
    ),
    stored(
        "process_peak_rss_bytes",
        "bytes",
        Lower,
        "highest resident set of the worker process from start to end",
        "memory.process_peak_rss_bytes",
    ),
    stored(
        "outlier_columns_mean",
        "columns",
        Lower,
        "LLM.int8's outlier columns per linear call",
        "int8.outlier_columns_mean",
    ),
    stored("kl_mean", "nats/token", Lower, "KL divergence from the reference's predictions, mean", "quality.kl_mean"),
    stored("kl_median", "nats/token", Lower, "the same, median over the tokens", "quality.kl_median"),
    stored("kl_p99", "nats/token", Lower, "the same, exceeded by 1 % of the tokens", "quality.kl_p99"),
    stored(
        "top1_agreement",
        "share",
        Higher,
        "tokens at which the reference and the precision expect the same one most",
        "quality.top1_agreement",
    ),
    stored("nll_mean", "nats/token", Lower, "negative log likelihood of the text, mean", "quality.nll_mean"),
    stored("perplexity", "tokens", Lower, "exp of nll_mean", "quality.perplexity"),
    stored("perplexity_ratio", "x", Lower, "perplexity over that of fp16 in the same run", "quality.perplexity_ratio"),
    stored("logit_error_max", "logits", Lower, "largest difference of a logit", "quality.logit_error_max"),
    stored(
        "agreement_kl_mean",
        "nats/token",
        Lower,
        "KL divergence from quantbench's own record in a run of several engines, mean of the steps",
        "agreement.kl_mean",
    ),
    stored(
        "agreement_top1",
        "share",
        Higher,
        "steps at which quantbench's own record and this one expect the same token most",
        "agreement.top1_agreement",
    ),
    stored(
        "host_ms_per_token",
        "ms",
        Lower,
        "time between two steps that another engine's host spends outside its model",
        "other_engine.host_ms_per_token",
    ),
];

/// The row of `key`.
pub fn find(key: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.key == key)
}

/// All computed metrics of a record, by key.
pub fn summaries(record: &Record) -> BTreeMap<String, Summary> {
    METRICS
        .iter()
        .filter_map(|metric| {
            let values = metric.groups(record)?;
            Some((metric.key.to_owned(), Summary::of(metric.unit, &values, &record.samples.launches)))
        })
        .collect()
}

/// One value a repeat of a computed metric, for ratios and stopping rules; empty where it is undefined.
pub fn repeats(record: &Record, key: &str) -> Vec<f64> {
    let values = find(key).and_then(|metric| metric.groups(record)).unwrap_or_default();
    values.iter().filter_map(|group| stats::median(group)).collect()
}

impl Metric {
    /// Values of each repeat: another tool's own, or from the raw samples. `None` for a metric that is not computed.
    fn groups(&self, record: &Record) -> Option<Vec<Vec<f64>>> {
        let values = self.values?;
        Some(match record.samples.imported.get(self.key) {
            Some(imported) => imported.iter().map(|&value| vec![value]).collect(),
            None => values(record),
        })
    }

    /// The number in a record; `None` where it is undefined.
    pub fn value(&self, record: &Record) -> Option<f64> {
        self.value_in(&serde_json::to_value(record).ok()?)
    }

    /// The number in a record that is JSON already.
    pub fn value_in(&self, record: &serde_json::Value) -> Option<f64> {
        self.path.split('.').try_fold(record, |value, key| value.get(key))?.as_f64()
    }
}

/// A row for a number that is elsewhere in the record.
const fn stored(
    key: &'static str,
    unit: &'static str,
    better: Better,
    doc: &'static str,
    path: &'static str,
) -> Metric {
    Metric { key, unit, better, doc, path, values: None }
}

/// Joules per token of each window; empty where the counter's windows cannot be used.
fn joules_per_token(record: &Record) -> Vec<Vec<f64>> {
    let usable = record.energy.as_ref().filter(|energy| energy.refused.is_none());
    let Some(idle_watts) = usable.and_then(|energy| energy.idle_watts) else { return Vec::new() };
    let samples = &record.samples;
    // Records of earlier versions have a repeat in each window; a run that waits after every token lies in the same one.
    let n_runs = if samples.synced_step_ns.is_empty() { 1 } else { 2 };
    let of_a_repeat = n_runs * record.workload.n_gen;
    let tokens = samples.energy_tokens.iter().copied().chain(std::iter::repeat(of_a_repeat));
    let windows = samples.energy_j.iter().zip(&samples.energy_window_s).zip(tokens);
    windows.map(|((joules, seconds), tokens)| vec![(joules - idle_watts * seconds) / tokens as f64]).collect()
}

/// Sequences at a time: tokens/s count the tokens of all of them, a time per token is that of one sequence.
fn batch(record: &Record) -> f64 {
    record.workload.batch_size.max(1) as f64
}

/// The times of one repeat.
struct Repeat {
    n_gen: f64,
    prefill_ns: u64,
    end_to_end_ns: u64,
}

impl Repeat {
    fn decode_ns(&self) -> u64 {
        self.end_to_end_ns.saturating_sub(self.prefill_ns)
    }

    /// Decode steps; `None` where the first token was the only one.
    fn n_steps(&self) -> Option<f64> {
        (self.n_gen > 1.0).then_some(self.n_gen - 1.0)
    }
}

/// Applies a metric to each repeat. A repeat without a value, or with one that is not finite, is left out.
fn per_repeat(record: &Record, value: impl Fn(&Repeat) -> Option<f64>) -> Vec<Vec<f64>> {
    let samples = &record.samples;
    let times = samples.prefill_ns.iter().zip(&samples.end_to_end_ns);
    times
        .map(|(&prefill_ns, &end_to_end_ns)| Repeat { n_gen: record.workload.n_gen as f64, prefill_ns, end_to_end_ns })
        .filter_map(|repeat| value(&repeat).filter(|value| value.is_finite()))
        .map(|value| vec![value])
        .collect()
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn keys_and_paths_are_unique() {
        let keys: HashSet<_> = METRICS.iter().map(|metric| metric.key).collect();
        let paths: HashSet<_> = METRICS.iter().map(|metric| metric.path).collect();
        assert_eq!((keys.len(), paths.len()), (METRICS.len(), METRICS.len()));
    }

    #[test]
    fn computed_rows_point_into_metrics() {
        for metric in METRICS {
            let computed = format!("metrics.{}.median", metric.key);
            assert_eq!(metric.path == computed, metric.values.is_some(), "{}", metric.key);
        }
    }
}
