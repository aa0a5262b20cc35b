//! What was typed about how a run is measured, beside its counts and times.

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::request::positive;
use crate::error::BadInput;
use crate::harness::MeasurementProtocol;

/// Rarer choices of the protocol.
#[derive(Debug, Args)]
pub struct MethodArgs {
    /// Fresh starts of every worker, so that the intervals span what differs between starts.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Protocol")]
    pub launches: usize,

    /// Time each repeat once more with a wait for the device after every token; both speeds are reported where they differ.
    #[arg(long, help_heading = "Protocol")]
    pub sync_each_token: bool,

    /// `single-cold-run`: one run without a warm-up, prefill included, for comparison with numbers that were taken so.
    #[arg(
        long, value_name = "METHOD", value_enum, default_value_t = MethodWord::Quantbench, hide_possible_values = true,
        help_heading = "Protocol", conflicts_with_all = ["warmup", "repeats", "min_time", "max_time", "rel_ci"]
    )]
    pub method: MethodWord,

    /// Measure a GPU's memory bandwidth anew instead of taking it from an earlier run; a CPU's is measured in every run.
    #[arg(long, help_heading = "Protocol")]
    pub measure_bandwidth: bool,

    /// Keep every reading of clocks, temperature, power and memory in the record.
    #[arg(long, help_heading = "Output")]
    pub keep_series: bool,

    /// Exit with 0 where precisions did not fit into memory and nothing else failed.
    #[arg(long, help_heading = "Output")]
    pub allow_oom: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodWord {
    #[value(help = None)]
    Quantbench,
    #[value(help = None, alias = "seed")]
    SingleColdRun,
}

impl MethodArgs {
    /// Adds these choices to the counts and times of `plain`.
    pub(super) fn protocol(&self, plain: MeasurementProtocol) -> Result<MeasurementProtocol, BadInput> {
        let launches = positive("--launches", self.launches)?;
        let Self { sync_each_token, measure_bandwidth, keep_series, .. } = *self;
        if self.method == MethodWord::SingleColdRun && (launches > 1 || sync_each_token) {
            return Err(BadInput::new("`--method single-cold-run` is one run that waits after every token")
                .hint("drop `--launches` and `--sync-each-token`"));
        }
        let plain =
            if self.method == MethodWord::SingleColdRun { MeasurementProtocol::single_cold_run() } else { plain };
        Ok(MeasurementProtocol { launches, sync_each_token, measure_bandwidth, keep_series, ..plain })
    }
}
