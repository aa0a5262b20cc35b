//! How long a case takes, before it runs, and how many tokens it generates where nobody says how many.
//!
//! Both come from the model's size and the machine's make alone, so that the same command does the same work every time: nothing is measured.

use super::case::Case;
use super::measurement_protocol::{MeasurementProtocol, Method};
use super::prompt::TokenizedWorkload;
use super::room::MemoryBudget;
use super::stopping::MIN_SPREAD_REPEATS;
use crate::engine::Device;
use crate::engine::needs::Needs;
use crate::plan::Model;

/// Lengths that are tried where nobody says how many tokens to generate, longest first. The last one has seven steps of decoding.
const LENGTHS: [usize; 4] = [64, 32, 16, 8];

/// All repeats of all precisions together should not last longer than this, in seconds.
const BUDGET_S: f64 = 45.0;

/// Runs of a precision beside its repeats: two of warm-up, and one that looks at memory.
const OTHER_RUNS: usize = 3;

/// Bytes per second that a thread reads while it computes, and all threads at most. Between a laptop and a server, on the slow side.
const CPU_THREAD_BYTES_S: f64 = 10e9;
const CPU_MAX_BYTES_S: f64 = 250e9;
/// Multiplications and additions per second and thread in a prompt.
const CPU_THREAD_FLOPS: f64 = 40e9;
/// Weights made or read, cast and quantized, per second and thread.
const CPU_THREAD_LOAD_BYTES_S: f64 = 0.25e9;
/// Measuring the memory's bandwidth.
const CPU_BANDWIDTH_S: f64 = 3.0;

const GPU_BYTES_S: f64 = 1000e9;
const GPU_FLOPS: f64 = 50e12;
const GPU_LOAD_BYTES_S: f64 = 1e9;
/// A process and its context.
const GPU_START_S: f64 = 2.0;
/// A decode step is no shorter.
const STEP_S: f64 = 0.0002;

/// Inputs of the estimate.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// Needs of each variant.
    pub needs: &'a [Needs],
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of prompt and picture, whoever reads them.
    pub n_prompt: usize,
    pub n_depth: usize,
    /// Sequences of a run.
    pub sequences: usize,
    pub device: Device,
    pub threads: usize,
    /// A run more, which shows its text.
    pub streams: bool,
}

impl<'a> Work<'a> {
    pub fn new(room: &'a MemoryBudget, model: &Model, workload: &TokenizedWorkload, threads: usize) -> Self {
        Self {
            needs: &room.needs,
            parameters: model.parameters() as u64,
            n_prompt: workload.n_prompt + workload.n_image,
            n_depth: workload.task.n_depth(),
            sequences: workload.task.sequences,
            device: room.device,
            threads,
            streams: workload.task.stream,
        }
    }

    /// Seconds of one run of `n_gen` tokens, of each row.
    fn run_s(&self, n_gen: usize) -> Vec<f64> {
        self.run_of_s(n_gen, self.sequences)
    }

    /// The same of another number of sequences.
    fn run_of_s(&self, n_gen: usize, sequences: usize) -> Vec<f64> {
        let threads = self.threads.max(1) as f64;
        let (bytes_s, flops) = match self.device {
            Device::Cpu => ((CPU_THREAD_BYTES_S * threads).min(CPU_MAX_BYTES_S), CPU_THREAD_FLOPS * threads),
            Device::Cuda(_) => (GPU_BYTES_S, GPU_FLOPS),
        };
        let flops_s = |tokens: usize| 2.0 * self.parameters as f64 * (sequences * tokens) as f64 / flops;
        let prefill_s = flops_s(self.n_prompt);
        // Bytes decide for one sequence, arithmetic for many.
        let arithmetic_s = if sequences > 1 { flops_s(1) } else { 0.0 };
        let step_s = |needs: &Needs| {
            let kv_bytes = needs.kv_cache_bytes as f64 / self.sequences as f64 * sequences as f64;
            ((needs.weights_bytes as f64 + kv_bytes) / bytes_s).max(arithmetic_s).max(STEP_S)
        };
        self.needs.iter().map(|needs| prefill_s + n_gen as f64 * step_s(needs)).collect()
    }

    /// The longest of the usual lengths, at most `most`, with which every precision gets enough repeats within the budget; else the
    /// shortest. Of one sequence, so that all batches of a model have the same length.
    pub fn affordable_n_gen(&self, most: usize, protocol: &MeasurementProtocol) -> usize {
        let n_runs = (OTHER_RUNS + usize::from(self.streams) + protocol.min_repeats) as f64;
        let fits = |n_gen: &usize| n_runs * self.run_of_s(*n_gen, 1).iter().sum::<f64>() <= BUDGET_S;
        let shorter = LENGTHS.into_iter().filter(|n_gen| *n_gen < most);
        std::iter::once(most).chain(shorter).find(fits).unwrap_or(LENGTHS[LENGTHS.len() - 1].min(most))
    }

    /// Seconds from start to end, roughly: a machine may be twice as fast or slow.
    pub fn seconds(&self, n_gen: usize, protocol: &MeasurementProtocol) -> f64 {
        let runs = self.run_s(n_gen);
        // Precisions take turns, so that all have as many repeats as the slowest.
        let slowest_s = runs.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let quickest_s = runs.iter().copied().fold(f64::INFINITY, f64::min);
        let within = |seconds: f64, run_s: f64| (seconds / run_s).ceil() as usize;
        let adaptive = protocol.min_repeats.max(within(protocol.min_time_s, quickest_s));
        let capped = adaptive.min(within(protocol.max_time_s, slowest_s)).max(MIN_SPREAD_REPEATS);
        let repeats = protocol.repeats.unwrap_or(capped * protocol.launches.max(1));
        let others = protocol.warmup.map_or(OTHER_RUNS, |warmup| warmup + 1) + usize::from(self.streams);
        let runs_s = (repeats + others * protocol.launches.max(1)) as f64 * runs.iter().sum::<f64>();
        let waits = if protocol.sync_each_token { 2.0 } else { 1.0 };
        self.start_s(protocol) + waits * runs_s
    }

    /// Until the first run: bandwidth, loading, and what stands in the cache.
    fn start_s(&self, protocol: &MeasurementProtocol) -> f64 {
        let fp16_bytes = 2.0 * self.parameters as f64;
        let threads = self.threads.max(1) as f64;
        let n_rows = self.needs.len() as f64;
        let depth_share = self.n_depth as f64 / self.n_prompt.max(1) as f64;
        let depth_s = depth_share * self.run_s(0).iter().sum::<f64>();
        let load_s = match self.device {
            Device::Cpu => CPU_BANDWIDTH_S + n_rows * fp16_bytes / (CPU_THREAD_LOAD_BYTES_S * threads.min(16.0)),
            Device::Cuda(_) => n_rows * (GPU_START_S + fp16_bytes / GPU_LOAD_BYTES_S),
        };
        (load_s + depth_s) * protocol.launches.max(1) as f64
    }
}

/// The tokens that a case generates: what was asked for, or as many as let every precision have its repeats soon.
pub fn n_gen(case: &Case, work: &Work) -> usize {
    let is_free = case.may_shorten && case.protocol.repeats.is_none() && case.protocol.method == Method::Quantbench;
    if is_free { work.affordable_n_gen(case.n_gen, &case.protocol) } else { case.n_gen }
}

/// The tokens that nobody has to ask for.
pub const DEFAULT_N_GEN: usize = 64;

/// `phi-2 at nf4: 8 + 32 tokens (not 64, so that there are several repeats: \`-n 64\`), about 40 s`.
pub fn announcement(case: &Case, work: &Work, model_id: &str) -> String {
    let labels: Vec<String> = case.variants().iter().map(|variant| variant.label()).collect();
    let shorter = match case.may_shorten && case.n_gen < DEFAULT_N_GEN {
        true => {
            format!(" (not {DEFAULT_N_GEN}, so that there are several repeats soon; `-n {DEFAULT_N_GEN}` asks for all)")
        }
        false => String::new(),
    };
    let batch = if work.sequences > 1 { format!(", batch {}", work.sequences) } else { String::new() };
    let lengths = format!("{} prompt + {} new tokens{batch}{shorter}", work.n_prompt, case.n_gen);
    let takes = about(work.seconds(case.n_gen, &case.protocol));
    // How long other engines take is what the run finds out.
    let takes = if case.has_others() { format!("{takes} at quantbench's own speed") } else { takes };
    format!("{model_id} at {}: {lengths}, {takes}", labels.join(", "))
}

/// `about 50 s`, `about 3 minutes`, `about 2.5 hours`: no more digits than are known.
pub fn about(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => "a few seconds".to_owned(),
        s if s < 90.0 => format!("about {:.0} s", (s / 10.0).round() * 10.0),
        s if s < 5400.0 => format!("about {:.0} minutes", (s / 60.0).round()),
        s => format!("about {:.1} hours", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(gb: &[f64]) -> Vec<Needs> {
        gb.iter().map(|gb| Needs { weights_bytes: (gb * 1e9) as u64, ..Needs::default() }).collect()
    }

    fn work(needs: &[Needs], billions: f64, device: Device, threads: usize) -> Work<'_> {
        let (parameters, sequences) = ((billions * 1e9) as u64, 1);
        Work { needs, parameters, n_prompt: 8, n_depth: 0, sequences, device, threads, streams: false }
    }

    #[test]
    fn fewer_tokens_are_generated_where_each_takes_long() {
        let protocol = MeasurementProtocol::default();
        let n_gen = |gb: &[f64], billions: f64, threads: usize| {
            work(&needs(gb), billions, Device::Cpu, threads).affordable_n_gen(64, &protocol)
        };
        assert_eq!(n_gen(&[0.27, 0.165, 0.11], 0.135, 2), 64, "smollm2 on two cores");
        assert_eq!(n_gen(&[2.47, 1.5, 1.03], 1.24, 2), 16, "llama-3.2-1b on two cores");
        assert_eq!(n_gen(&[2.47, 1.5, 1.03], 1.24, 64), 64, "and on 64");
        assert_eq!(n_gen(&[1.8], 2.78, 2), 32, "phi-2 in 4 bits on two cores");
        assert_eq!(n_gen(&[140.0, 75.0, 40.0], 70.0, 8), 8, "the shortest, however long that takes");
        let gpu = needs(&[2.47, 1.5, 1.03]);
        assert_eq!(work(&gpu, 1.24, Device::Cuda(0), 1).affordable_n_gen(64, &protocol), 64);
        let small = needs(&[0.001]);
        assert_eq!(work(&small, 0.001, Device::Cpu, 1).affordable_n_gen(5, &protocol), 5, "never more than asked for");
    }

    #[test]
    fn the_estimate_counts_repeats_launches_and_loads() {
        let (needs, plain) = (needs(&[1.0]), MeasurementProtocol::default());
        let work = work(&needs, 0.5, Device::Cpu, 2);
        // A step of 0.05 s and a prompt of 8 · 1e9 / 80e9 = 0.1 s: a run of 18 tokens lasts 1 s. Loading 1 GB takes 2 s, bandwidth 3 s.
        let close = |protocol: &MeasurementProtocol, seconds: f64| {
            let seen = work.seconds(18, protocol);
            assert!((seen - seconds).abs() < 1e-6, "{seen} {seconds}");
        };
        close(&plain, 5.0 + 9.0);
        close(&MeasurementProtocol { repeats: Some(20), warmup: Some(0), ..plain.clone() }, 5.0 + 21.0);
        close(&MeasurementProtocol { launches: 2, ..plain.clone() }, 2.0 * (5.0 + 9.0));
        close(&MeasurementProtocol { sync_each_token: true, ..plain.clone() }, 5.0 + 18.0);
        assert!((Work { streams: true, ..work }.seconds(18, &plain) - 15.0).abs() < 1e-6, "a run more");
        // Three repeats, though the time allows one.
        close(&MeasurementProtocol { max_time_s: 0.5, min_time_s: 0.0, ..plain }, 5.0 + 6.0);
    }

    #[test]
    fn an_estimate_has_few_digits() {
        for (seconds, text) in [
            (3.0, "a few seconds"),
            (47.0, "about 50 s"),
            (100.0, "about 2 minutes"),
            (3000.0, "about 50 minutes"),
            (9000.0, "about 2.5 hours"),
        ] {
            assert_eq!(about(seconds), text);
        }
    }
}
