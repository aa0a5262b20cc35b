//! One precision in its process: warm-up, repeats and the passes that are not timed, over any session and clock.
//!
//! Inside the timed region there are only the session's calls and the stamps: nothing is allocated, checked or sent.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use super::clock::Clock;
use super::logits;
use super::stopping::warm_up_ended;
use crate::engine::memory::PoolUse;
use crate::engine::{Alone, EncoderInput, Session};
use crate::os::cpu_usage::CpuAccounts;
use crate::os::memory::ProcessMemory;
use crate::protocol::{Encode, FinishReport, Sample, Task, Wait, WarmupEnd, WarmupReport};

/// Least time of a session's [`Session::alone`], in decode steps: three rounds, each of which runs a step and its parts twice.
const ALONE_STEPS: u64 = 18;

/// A loaded session, with the clock and the accounts that measure it.
pub struct Bench<C: Clock> {
    session: Box<dyn Session>,
    clock: C,
    memory: ProcessMemory,
    load: CpuAccounts,
    task: Task,
    /// The picture that is encoded; empty without one.
    pixels: Vec<f32>,
    stamps: Stamps,
    /// Highest resident set seen between repeats: the peak where the kernel's mark cannot be reset.
    seen_peak_bytes: Option<u64>,
    peak_is_exact: bool,
    /// Use of the device's memory pool at the end of each phase so far.
    pool: BTreeMap<String, PoolUse>,
}

/// Room for the times and tokens of one run, filled without allocating.
#[derive(Default)]
struct Stamps {
    start_ns: u64,
    /// Time at which the encoder was done; the start where there is none.
    encoded_ns: u64,
    /// Time at which each token was known on the host, the first token included.
    token_ns: Vec<u64>,
    ids: Vec<u32>,
}

impl Stamps {
    fn clear(&mut self, n_gen: usize) {
        self.token_ns.clear();
        self.ids.clear();
        self.token_ns.reserve(n_gen);
        self.ids.reserve(n_gen);
    }

    fn push(&mut self, id: u32, ns: u64) {
        self.ids.push(id);
        self.token_ns.push(ns);
    }

    fn step_ns(&self) -> Vec<u64> {
        self.token_ns.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    fn end_to_end_ns(&self) -> u64 {
        self.token_ns.last().map_or(0, |last| last - self.start_ns)
    }
}

impl<C: Clock> Bench<C> {
    /// `pixels` is the picture of [`Encode::Picture`], `[3, size, size]`.
    pub fn new(
        session: Box<dyn Session>,
        clock: C,
        memory: ProcessMemory,
        load: CpuAccounts,
        task: Task,
        pixels: Vec<f32>,
    ) -> Self {
        let stamps = Stamps::default();
        let pool = BTreeMap::new();
        Self { session, clock, memory, load, task, pixels, stamps, seen_peak_bytes: None, peak_is_exact: false, pool }
    }

    /// Records the device memory of loading.
    pub fn loaded(&mut self) -> Result<()> {
        self.end_phase("load")
    }

    /// Fills the cache to the depth, finds where the text ends if it may end early, and runs at full shape and length until
    /// flat. Afterwards `peak` starts again. A task that streams gives `show` each token of its first run, and then `None`.
    pub fn warm_up(&mut self, show: &mut dyn FnMut(Option<u32>)) -> Result<WarmupReport> {
        if let Some(pool) = self.session.pool() {
            // Memory that only loading needed.
            pool.release_unused()?;
        }
        self.session.rewind(0);
        if !self.task.depth.is_empty() {
            self.session.prefill(&self.task.depth).context("filling the cache to the depth")?;
        }
        let began_ns = self.clock.now_ns();
        self.first_run(show)?;
        let mut runs_ns = Vec::new();
        let ended = loop {
            let elapsed_s = (self.clock.now_ns() - began_ns) as f64 / 1e9;
            if let Some(ended) = warm_up_ended(&runs_ns, self.task.warmup, elapsed_s, self.task.max_time_s) {
                break ended;
            }
            self.run(self.task.wait)?;
            runs_ns.push(self.stamps.end_to_end_ns());
        };
        let duration_s = (self.clock.now_ns() - began_ns) as f64 / 1e9;
        let warmup_peak_bytes = self.memory.peak_bytes();
        self.peak_is_exact = self.memory.reset_peak();
        let (prefill_peak_bytes, decode_peak_bytes) = match ended {
            // Without a warm-up the next run must be the first.
            WarmupEnd::Count if runs_ns.is_empty() => (None, None),
            _ => self.peaks_of_a_run()?,
        };
        let start_bytes = self.memory.resident_bytes();
        self.seen_peak_bytes = start_bytes;
        self.end_phase("start")?;
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
    fn peaks_of_a_run(&mut self) -> Result<(Option<u64>, Option<u64>)> {
        if !self.peak_is_exact && self.session.pool().is_none() {
            return Ok((None, None));
        }
        self.end_phase("warmup")?;
        self.session.rewind(self.task.depth.len());
        encode(self.session.as_mut(), &self.task, &self.pixels)?;
        self.session.prefill(&self.task.prompt)?;
        let prefill = self.end_peak("prefill")?;
        self.session.decode(self.task.n_gen - 1, &mut |_| {})?;
        self.session.synchronize()?;
        Ok((prefill, self.end_peak("decode")?))
    }

    /// The resident set's highest value since the last mark, where marks can be reset.
    fn end_peak(&mut self, phase: &str) -> Result<Option<u64>> {
        self.end_phase(phase)?;
        let peak = self.peak_is_exact.then(|| self.memory.peak_bytes()).flatten();
        self.peak_is_exact = self.peak_is_exact && self.memory.reset_peak();
        Ok(peak)
    }

    /// Records the use of the device's pool and resets its high-water marks.
    fn end_phase(&mut self, phase: &str) -> Result<()> {
        let Some(pool) = self.session.pool() else { return Ok(()) };
        self.pool.insert(phase.to_owned(), pool.read()?);
        pool.reset_high_marks()
    }

    /// The untimed run of a text that is shown or may end early; else none. Greedy decoding always ends at the same token, so one run finds
    /// the length and the measured runs are of that fixed count.
    fn first_run(&mut self, show: &mut dyn FnMut(Option<u32>)) -> Result<()> {
        match (self.task.stream, self.task.stop_at.is_empty()) {
            (true, _) => self.stream(show)?,
            (false, false) => self.run(self.task.wait)?,
            (false, true) => return Ok(()),
        }
        let end = self.stamps.ids.iter().position(|id| self.task.stop_at.contains(id));
        self.task.n_gen = end.map_or(self.task.n_gen, |at| at + 1);
        Ok(())
    }

    /// A run that gives `show` each token as it comes, up to the end of the text.
    fn stream(&mut self, show: &mut dyn FnMut(Option<u32>)) -> Result<()> {
        let Self { session, task, pixels, stamps, .. } = self;
        session.rewind(task.depth.len());
        stamps.clear(task.n_gen);
        encode(session.as_mut(), task, pixels)?;
        let mut has_ended = false;
        let mut push = |id: u32| {
            stamps.ids.push(id);
            if !has_ended {
                show(Some(id));
                has_ended = task.stop_at.contains(&id);
            }
        };
        push(session.prefill(&task.prompt)?);
        let decoded = session.decode(task.n_gen - 1, &mut push);
        show(None);
        decoded?;
        session.synchronize()
    }

    /// One counted repeat, and the checks of it that are not timed.
    pub fn repeat(&mut self) -> Result<Sample> {
        let load_before = self.load.read();
        self.run(self.task.wait)?;
        let load = load_before.zip(self.load.read()).map(|(before, after)| after.since(before));
        self.seen_peak_bytes = self.seen_peak_bytes.max(self.memory.resident_bytes());
        // A value that is not finite stays in the key/value cache and reaches the logits of every later step, so that
        // looking at the last ones is enough.
        let finite_logits = self.session.logits()?.iter().all(|logit| logit.is_finite());
        let device_step_ns = self.session.device_step_ns()?;
        let stamps = &self.stamps;
        let prefill_ns = stamps.token_ns.first().map_or(0, |first| first - stamps.start_ns);
        let sample = Sample {
            encode_ns: stamps.encoded_ns - stamps.start_ns,
            prefill_ns,
            step_ns: stamps.step_ns(),
            end_to_end_ns: stamps.end_to_end_ns(),
            device_step_ns,
            synced_step_ns: Vec::new(),
            ids: stamps.ids.clone(),
            finite_logits,
            load,
        };
        if self.task.wait != Wait::BothWays {
            return Ok(sample);
        }
        self.run(Wait::EachToken)?;
        Ok(Sample { synced_step_ns: self.stamps.step_ns(), ..sample })
    }

    /// The timed run.
    fn run(&mut self, wait: Wait) -> Result<()> {
        let Self { session, clock, task, pixels, stamps, .. } = self;
        session.rewind(task.depth.len());
        stamps.clear(task.n_gen);
        session.synchronize()?;
        stamps.start_ns = clock.now_ns();
        encode(session.as_mut(), task, pixels)?;
        stamps.encoded_ns = if task.encode == Encode::Nothing { stamps.start_ns } else { clock.now_ns() };
        let first = session.prefill(&task.prompt)?;
        stamps.push(first, clock.now_ns());
        match wait {
            Wait::AtEnd | Wait::BothWays => {
                session.decode(task.n_gen - 1, &mut |id| stamps.push(id, clock.now_ns()))?;
            }
            Wait::EachToken => {
                for _ in 1..task.n_gen {
                    let mut token = first;
                    session.decode(1, &mut |id| token = id)?;
                    session.synchronize()?;
                    stamps.push(token, clock.now_ns());
                }
            }
        }
        session.synchronize()
    }

    /// The session with the task's input in its encoder, for what is not measured.
    pub fn encoded(&mut self) -> Result<&mut dyn Session> {
        encode(self.session.as_mut(), &self.task, &self.pixels)?;
        Ok(self.session.as_mut())
    }

    /// Decode steps in the middle of the run beside their parts alone. It runs after all that is timed and after memory was read, since it takes some.
    /// Not where the rounds would take longer than the time that the user gives to one precision. What cannot be measured is not known; the
    /// repeats count all the same.
    fn alone(&mut self) -> Option<Alone> {
        let mut steps_ns = self.stamps.step_ns();
        steps_ns.sort_unstable();
        let step_ns = *steps_ns.get(steps_ns.len() / 2)?;
        if (ALONE_STEPS * step_ns) as f64 / 1e9 > self.task.max_time_s {
            return None;
        }
        let middle = self.session.position().saturating_sub(steps_ns.len().div_ceil(2));
        self.session.alone(middle).ok().flatten()
    }

    /// Reads memory and outliers once after the last repeat, and runs the passes that are not timed.
    pub fn finish(&mut self, save_logits: Option<&Path>) -> Result<FinishReport> {
        self.end_phase("run")?;
        let end_bytes = self.memory.resident_bytes();
        let exact_peak = self.peak_is_exact.then(|| self.memory.peak_bytes()).flatten();
        let (outliers, footprint) = (self.session.outlier_columns()?, self.session.footprint());
        let alone = self.alone();
        let saved = save_logits.map_or(Ok(()), |path| self.save_logits(path));
        Ok(FinishReport {
            end_bytes,
            peak_bytes: exact_peak.or(self.seen_peak_bytes.max(end_bytes)),
            peak_is_exact: exact_peak.is_some(),
            footprint,
            outliers,
            alone,
            release_threshold_bytes: self.session.pool().map(|pool| pool.release_threshold_bytes()),
            pool: std::mem::take(&mut self.pool),
            // What was measured is there all the same.
            logits_problem: saved.err().map(|error| format!("{error:#}")),
        })
    }

    fn save_logits(&mut self, path: &Path) -> Result<()> {
        self.session.rewind(self.task.depth.len());
        encode(self.session.as_mut(), &self.task, &self.pixels)?;
        self.session.prefill(&self.task.prompt)?;
        logits::save(self.session.as_mut(), self.task.n_gen, path)
    }
}

/// The encoder where there is one, until the device is done, so that its time is its own.
fn encode(session: &mut dyn Session, task: &Task, pixels: &[f32]) -> Result<()> {
    match &task.encode {
        Encode::Nothing => return Ok(()),
        Encode::Tokens(tokens) => session.encode(EncoderInput::Tokens(tokens))?,
        Encode::Picture { .. } => session.encode(EncoderInput::Pixels(pixels))?,
    }
    session.synchronize()
}
