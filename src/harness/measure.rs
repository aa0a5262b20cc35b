//! One engine at one precision as the parent measures it: warm-up, repeats, and what is read between them, over any engine and
//! clock. The engine alone stamps its tokens; here each stamp is checked.

use std::collections::BTreeMap;
use std::path::Path;

use super::clock::Clock;
use super::compared::ComparedLogits;
use super::measured::{FinishReport, Sample, WarmupEnd, WarmupReport};
use super::port::EnginePort;
use super::served::{OwnFinish, OwnFinished};
use super::stopping::warm_up_ended;
use super::task::{Task, Wait};
use crate::engine::memory::PoolUse;
use crate::os::cpu_usage::CpuAccounts;
use crate::os::memory::ProcessMemory;
use crate::protocol::{Failure, Finish, Logits, RunReport, RunRequest, capability};
use crate::quality::rows;

/// A loaded engine, with the clock and the accounts that measure it.
pub struct Bench<C: Clock> {
    clock: C,
    memory: ProcessMemory,
    load: CpuAccounts,
    task: Task,
    /// End-to-end time of the run before.
    last_ns: u64,
    /// The engine does not say itself whether its logits are finite.
    wants_logits: bool,
    /// Highest resident set seen between repeats: the peak where the kernel's mark cannot be reset.
    seen_peak_bytes: Option<u64>,
    peak_is_exact: bool,
    /// Use of the device's memory pool at the end of each phase so far.
    pool: BTreeMap<String, PoolUse>,
}

impl<C: Clock> Bench<C> {
    /// `memory` and `load` are the accounts of the engine's process, `pool` the use of its device's pool after loading.
    pub fn new(clock: C, memory: ProcessMemory, load: CpuAccounts, task: Task, pool: Option<PoolUse>) -> Self {
        let pool = pool.into_iter().map(|pool| ("load".to_owned(), pool)).collect();
        Self {
            clock,
            memory,
            load,
            task,
            last_ns: 0,
            wants_logits: false,
            seen_peak_bytes: None,
            peak_is_exact: false,
            pool,
        }
    }

    /// Fills the cache to the depth, finds where the text ends if it may end early, and runs at full shape and length until
    /// flat. Afterwards `peak` starts again.
    pub fn warm_up(&mut self, engine: &mut dyn EnginePort) -> Result<WarmupReport, Failure> {
        if !self.task.depth.is_empty() {
            self.ask(engine, &RunRequest { prompt: Vec::new(), n_gen: 0, ..self.task.run(false) })?;
        }
        let began_ns = self.clock.now_ns();
        self.first_run(engine)?;
        let mut runs_ns = Vec::new();
        let ended = loop {
            let elapsed_s = (self.clock.now_ns() - began_ns) as f64 / 1e9;
            if let Some(ended) = warm_up_ended(&runs_ns, self.task.warmup, elapsed_s, self.task.max_time_s) {
                break ended;
            }
            self.run(engine)?;
            runs_ns.push(self.last_ns);
        };
        let duration_s = (self.clock.now_ns() - began_ns) as f64 / 1e9;
        let warmup_peak_bytes = self.memory.peak_bytes();
        self.peak_is_exact = self.memory.reset_peak();
        let (prefill_peak_bytes, decode_peak_bytes) = match ended {
            // Without a warm-up the next run must be the first.
            WarmupEnd::Count if runs_ns.is_empty() => (None, None),
            _ => self.peaks_of_a_run(engine)?,
        };
        let start_bytes = self.memory.resident_bytes();
        self.seen_peak_bytes = start_bytes;
        self.end_phase(engine, "start")?;
        let n_gen = self.task.n_gen;
        Ok(WarmupReport {
            runs_ns,
            ended,
            duration_s,
            n_gen,
            start_bytes,
            warmup_peak_bytes,
            prefill_peak_bytes,
            decode_peak_bytes,
        })
    }

    /// The highest memory of prefill and of decode, from a run that is not timed: reading memory between them takes time. Does nothing
    /// where no high-water mark can be reset.
    fn peaks_of_a_run(&mut self, engine: &mut dyn EnginePort) -> Result<(Option<u64>, Option<u64>), Failure> {
        if (!self.peak_is_exact && self.pool.is_empty()) || !engine.can(capability::PROCEED) {
            return Ok((None, None));
        }
        self.end_phase(engine, "warmup")?;
        let (first, further) = (self.task.run(false), self.task.n_gen - 1);
        self.ask(engine, &RunRequest { n_gen: 1, ..first })?;
        let prefill = self.end_peak(engine, "prefill")?;
        self.ask(engine, &RunRequest { proceed: true, n_gen: further, ..RunRequest::default() })?;
        Ok((prefill, self.end_peak(engine, "decode")?))
    }

    /// The resident set's highest value since the last mark, where marks can be reset.
    fn end_peak(&mut self, engine: &mut dyn EnginePort, phase: &str) -> Result<Option<u64>, Failure> {
        self.end_phase(engine, phase)?;
        let peak = self.peak_is_exact.then(|| self.memory.peak_bytes()).flatten();
        self.peak_is_exact = self.peak_is_exact && self.memory.reset_peak();
        Ok(peak)
    }

    /// Records the use of the device's pool, whose high-water marks start anew.
    fn end_phase(&mut self, engine: &mut dyn EnginePort, phase: &str) -> Result<(), Failure> {
        if !engine.can(capability::MEMORY) {
            return Ok(());
        }
        let report = engine.memory()?;
        if let Some(used_bytes) = report.used_bytes {
            let used = PoolUse {
                used_bytes,
                used_high_bytes: report.used_high_bytes.unwrap_or(used_bytes),
                reserved_bytes: report.reserved_bytes.unwrap_or(used_bytes),
                reserved_high_bytes: report.reserved_high_bytes.unwrap_or(used_bytes),
            };
            self.pool.insert(phase.to_owned(), used);
        }
        Ok(())
    }

    /// The untimed run of a text that is shown or may end early; else none. Greedy decoding always ends at the same token, so one run finds
    /// the length and the measured runs are of that fixed count.
    fn first_run(&mut self, engine: &mut dyn EnginePort) -> Result<(), Failure> {
        let report = match (self.task.stream, self.task.stop_at.is_empty()) {
            (true, _) => self.ask(engine, &RunRequest { stream: true, ..self.task.run(false) })?,
            (false, false) => self.run(engine)?,
            (false, true) => return Ok(()),
        };
        // A batch goes on until the last of its texts has ended.
        let ends = (0..self.task.sequences).map(|sequence| {
            let mut own = report.ids.iter().skip(sequence).step_by(self.task.sequences);
            own.position(|id| self.task.stop_at.contains(id))
        });
        let end = ends.collect::<Option<Vec<_>>>().and_then(|ends| ends.into_iter().max());
        self.task.n_gen = end.map_or(self.task.n_gen, |at| at + 1);
        Ok(())
    }

    /// One counted repeat.
    pub fn repeat(&mut self, engine: &mut dyn EnginePort) -> Result<Sample, Failure> {
        let load_before = self.load.read();
        let report = self.run(engine)?;
        let load = load_before.zip(self.load.read()).map(|(before, after)| after.since(before));
        self.seen_peak_bytes = self.seen_peak_bytes.max(self.memory.resident_bytes());
        let end_to_end_ns = self.last_ns;
        let RunReport { start_ns, encoded_ns, token_ns, ids, finite_logits, device_step_ns, host_step_ns } = report;
        self.wants_logits |= finite_logits.is_none();
        let sample = Sample {
            encode_ns: encoded_ns.map_or(0, |encoded| encoded - start_ns),
            prefill_ns: token_ns.first().map_or(0, |first| first - start_ns),
            step_ns: steps(&token_ns),
            end_to_end_ns,
            device_step_ns,
            host_step_ns,
            synced_step_ns: Vec::new(),
            ids,
            finite_logits: finite_logits.unwrap_or(true),
            load,
        };
        if self.task.wait != Wait::BothWays {
            return Ok(sample);
        }
        let synced = self.ask(engine, &self.task.run(true))?;
        Ok(Sample { synced_step_ns: steps(&synced.token_ns), ..sample })
    }

    /// One run of the task that counts for nothing.
    pub fn untimed(&mut self, engine: &mut dyn EnginePort) -> Result<(), Failure> {
        self.run(engine).map(drop)
    }

    /// The timed run.
    fn run(&mut self, engine: &mut dyn EnginePort) -> Result<RunReport, Failure> {
        let report = self.ask(engine, &self.task.run(self.task.wait == Wait::EachToken))?;
        self.last_ns = report.token_ns.last().map_or(0, |last| last - report.start_ns);
        Ok(report)
    }

    /// A run whose stamps lie one behind the other between the request and its answer. Fails where they do not.
    fn ask(&self, engine: &mut dyn EnginePort, run: &RunRequest) -> Result<RunReport, Failure> {
        let sent_ns = self.clock.now_ns();
        let report = engine.run(run)?;
        let received_ns = self.clock.now_ns();
        check_stamps(&report, self.task.sequences, (sent_ns, received_ns))
            .map_err(|message| Failure::Invalid { message })?;
        Ok(report)
    }

    /// Reads memory and outliers once after the last repeat, and runs the passes that are not timed: logits for the user's file, and for a
    /// file that engines are compared by.
    pub fn finish(
        &mut self,
        engine: &mut dyn EnginePort,
        (save_logits, compared): (Option<&Path>, Option<&ComparedLogits>),
    ) -> Result<FinishReport, Failure> {
        self.end_phase(engine, "run")?;
        let end_bytes = self.memory.resident_bytes();
        let exact_peak = self.peak_is_exact.then(|| self.memory.peak_bytes()).flatten();
        let options = serde_json::to_value(OwnFinish { alone_max_s: self.task.max_time_s }).unwrap_or_default();
        let finished = engine.finish(&Finish { options })?;
        let own: OwnFinished = serde_json::from_value(finished.details).unwrap_or_default();
        let run = self.task.run(false);
        let save = |path: &Path| match engine.can(capability::LOGITS) {
            true => engine.logits(&Logits { run: run.clone(), file: path.to_owned() }).map(drop),
            false => Err(Failure::error("this engine gives no logits")),
        };
        let saved = save_logits.map_or(Ok(()), save);
        let compared_ids = compared.and_then(|compared| compared.write(engine, run));
        let written = compared.filter(|_| compared_ids.is_some() && self.wants_logits);
        let finite_logits = written.and_then(|compared| rows::all_finite(&compared.path).ok());
        Ok(FinishReport {
            end_bytes,
            peak_bytes: exact_peak.or(self.seen_peak_bytes.max(end_bytes)),
            peak_is_exact: exact_peak.is_some(),
            footprint: own.footprint,
            outliers: own.outliers,
            alone: own.alone,
            release_threshold_bytes: own.release_threshold_bytes,
            pool: std::mem::take(&mut self.pool),
            // What was measured is there all the same.
            finite_logits,
            compared_ids,
            waited_ticks: 0,
            logits_problem: saved.err().map(|failure| failure.message().to_owned()),
        })
    }
}

fn steps(token_ns: &[u64]) -> Vec<u64> {
    token_ns.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// Two processes that read one clock through anchors of their own differ by less: each anchor is off by 10 µs at most.
const CLOCK_SLACK_NS: u64 = 100_000;

/// Fails where an engine's stamps cannot be times of the run between `sent_ns` and `received_ns`, by the same clock.
fn check_stamps(report: &RunReport, sequences: usize, (sent_ns, received_ns): (u64, u64)) -> Result<(), String> {
    let RunReport { start_ns, encoded_ns, token_ns, ids, .. } = report;
    if sequences * token_ns.len() != ids.len() {
        let of = if sequences == 1 { String::new() } else { format!(" of a batch of {sequences}") };
        return Err(format!("the engine gave {} ids and {} stamps{of}", ids.len(), token_ns.len()));
    }
    let (Some(first), Some(last)) = (token_ns.first(), token_ns.last()) else { return Ok(()) };
    let outside = |what: &str, (early, late): (u64, u64)| {
        let off_ms = early.saturating_sub(late) as f64 / 1e6;
        Err(format!("the engine's clock is not CLOCK_MONOTONIC: {what} by {off_ms:.3} ms"))
    };
    if start_ns + CLOCK_SLACK_NS < sent_ns {
        return outside("its start lies before the request", (sent_ns, *start_ns));
    }
    if *last > received_ns + CLOCK_SLACK_NS {
        return outside("its last token lies behind the answer", (*last, received_ns));
    }
    let encoded_ns = encoded_ns.unwrap_or(*start_ns);
    if encoded_ns < *start_ns || *first < encoded_ns || token_ns.windows(2).any(|pair| pair[1] < pair[0]) {
        return Err("the engine's stamps run backwards".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_lie_in_order_between_request_and_answer() {
        let report = |start_ns, token_ns: &[u64]| RunReport {
            start_ns,
            token_ns: token_ns.to_vec(),
            ids: vec![1; token_ns.len()],
            ..RunReport::default()
        };
        let said = |report: RunReport| check_stamps(&report, 1, (1_000_000, 9_000_000)).err().unwrap_or_default();
        assert_eq!(said(report(1_000_000, &[1_000_000, 5_000_000, 9_000_000])), "");
        let clock = "the engine's clock is not CLOCK_MONOTONIC: ";
        assert_eq!(said(report(0, &[2_000_000])), format!("{clock}its start lies before the request by 1.000 ms"));
        let late = format!("{clock}its last token lies behind the answer by 0.500 ms");
        assert_eq!(said(report(1_000_000, &[2_000_000, 9_500_000])), late);
        let backwards = "the engine's stamps run backwards";
        assert_eq!(said(report(2_000_000, &[5_000_000, 4_000_000])), backwards);
        assert_eq!(said(RunReport { encoded_ns: Some(6_000_000), ..report(2_000_000, &[5_000_000]) }), backwards);
        let few = RunReport { ids: vec![1, 2], ..report(2_000_000, &[5_000_000]) };
        assert_eq!(said(few.clone()), "the engine gave 2 ids and 1 stamps");
        assert_eq!(check_stamps(&few, 2, (1_000_000, 9_000_000)), Ok(()));
        let three = check_stamps(&few, 3, (1_000_000, 9_000_000)).unwrap_err();
        assert_eq!(three, "the engine gave 2 ids and 1 stamps of a batch of 3");
    }
}
