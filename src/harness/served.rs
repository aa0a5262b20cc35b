//! A session of our own as an engine of the protocol: the worker's side of a run.
//!
//! Inside the timed region there are only the session's calls and the stamps: nothing is allocated, checked or sent.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::logits;
use super::port::EnginePort;
use crate::call::Batch;
use crate::engine::memory::PoolUse;
use crate::engine::{Alone, EncoderInput, Footprint, OutlierColumns, Session};
use crate::ipc::failure_of;
use crate::protocol::{
    Encode, Failure, Finish, Finished, Logits, MemoryReport, MemoryRequest, RowsReply, RunReport, RunRequest, RunWait,
    Score,
};
use crate::quality::CallPath;
use crate::quality::pass::{self, WindowInput};
use crate::quality::rows::RowWriter;

/// Least time of a session's [`Session::alone`], in decode steps: three rounds, each of which runs a step and its parts twice.
const ALONE_STEPS: u64 = 18;

/// A loaded session with the clock that stamps it.
pub struct ServedSession<C: Clock> {
    session: Box<dyn Session>,
    clock: C,
    /// The pictures that are encoded, `[sequences, 3, size, size]`; empty without any.
    pixels: Vec<f32>,
    /// Ids that the caches begin with.
    filled: Vec<u32>,
    /// Ids of the last prefill, one a sequence.
    next: Vec<u32>,
    stamps: Stamps,
}

/// What our own worker alone understands of a [`Finish`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OwnFinish {
    /// The parts of a step are measured apart where that takes no longer.
    pub alone_max_s: f64,
}

/// What our own worker alone says at the end.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OwnFinished {
    pub footprint: Footprint,
    pub outliers: OutlierColumns,
    pub release_threshold_bytes: Option<u64>,
    pub alone: Option<Alone>,
}

/// What our own worker alone says of rows.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OwnRows {
    /// Outlier columns of all calls since the worker started.
    pub outliers: OutlierColumns,
}

/// Room for the times and tokens of one run, filled without allocating.
#[derive(Default)]
struct Stamps {
    start_ns: u64,
    /// Time at which the encoder was done; `None` without one.
    encoded_ns: Option<u64>,
    /// Time at which the tokens of each step were known on the host, the first ones included.
    token_ns: Vec<u64>,
    /// Those of a step together.
    ids: Vec<u32>,
}

impl Stamps {
    fn clear(&mut self, n_gen: usize, sequences: usize) {
        self.encoded_ns = None;
        self.token_ns.clear();
        self.ids.clear();
        self.token_ns.reserve(n_gen);
        self.ids.reserve(n_gen * sequences);
    }

    fn push(&mut self, ids: &[u32], ns: u64) {
        self.ids.extend_from_slice(ids);
        self.token_ns.push(ns);
    }
}

impl<C: Clock> ServedSession<C> {
    /// A session of `sequences` sequences.
    pub fn new(session: Box<dyn Session>, clock: C, pixels: Vec<f32>, sequences: usize) -> Self {
        let (filled, next, stamps) = (Vec::new(), vec![0; sequences], Stamps::default());
        Self { session, clock, pixels, filled, next, stamps }
    }

    /// One run, and the checks of it that are not timed. One that streams gives `show` each token of the first sequence as it comes.
    pub fn run(&mut self, run: &RunRequest, show: &mut dyn FnMut(u32)) -> Result<RunReport> {
        if run.proceed {
            return self.proceed(run.n_gen);
        }
        self.fill(&run.depth)?;
        let Some(further) = run.n_gen.checked_sub(1) else { return Ok(RunReport::default()) };
        match run.stream {
            true => self.streamed(run, further, show)?,
            false => self.timed(run, further)?,
        }
        self.report()
    }

    fn streamed(&mut self, run: &RunRequest, further: usize, show: &mut dyn FnMut(u32)) -> Result<()> {
        let Self { session, clock, pixels, next, stamps, .. } = self;
        stamps.clear(run.n_gen, next.len());
        stamps.start_ns = clock.now_ns();
        encode(session.as_mut(), &run.encode, pixels)?;
        let mut push = |ids: &[u32]| {
            stamps.push(ids, clock.now_ns());
            show(ids[0]);
        };
        prefill(session.as_mut(), &run.prompt, next)?;
        push(next);
        session.decode_batch(further, &mut push)?;
        session.synchronize()
    }

    /// Empties the cache behind the depth, and fills it where it holds another one.
    fn fill(&mut self, depth: &[u32]) -> Result<()> {
        if self.filled == depth {
            self.session.rewind(depth.len() / self.next.len());
            return Ok(());
        }
        self.filled.clear();
        self.session.rewind(0);
        if !depth.is_empty() {
            prefill(self.session.as_mut(), depth, &mut self.next).context("filling the cache to the depth")?;
        }
        self.filled = depth.to_vec();
        Ok(())
    }

    /// The timed part; `further` tokens follow the first.
    fn timed(&mut self, run: &RunRequest, further: usize) -> Result<()> {
        let Self { session, clock, pixels, next, stamps, .. } = self;
        stamps.clear(run.n_gen, next.len());
        session.synchronize()?;
        stamps.start_ns = clock.now_ns();
        if run.encode != Encode::Nothing {
            encode(session.as_mut(), &run.encode, pixels)?;
            stamps.encoded_ns = Some(clock.now_ns());
        }
        prefill(session.as_mut(), &run.prompt, next)?;
        stamps.push(next, clock.now_ns());
        match run.wait {
            RunWait::AtEnd => session.decode_batch(further, &mut |ids| stamps.push(ids, clock.now_ns()))?,
            RunWait::EachToken => {
                for _ in 0..further {
                    session.decode_batch(1, &mut |ids| next.copy_from_slice(ids))?;
                    session.synchronize()?;
                    stamps.push(next, clock.now_ns());
                }
            }
        }
        session.synchronize()
    }

    fn proceed(&mut self, n_gen: usize) -> Result<RunReport> {
        let Self { session, clock, next, stamps, .. } = self;
        stamps.clear(n_gen, next.len());
        stamps.start_ns = clock.now_ns();
        session.decode_batch(n_gen, &mut |ids| stamps.push(ids, clock.now_ns()))?;
        session.synchronize()?;
        self.report()
    }

    fn report(&mut self) -> Result<RunReport> {
        // A value that is not finite stays in the key/value cache and reaches the logits of every later step, so that
        // looking at the last ones is enough.
        let finite_logits = Some(self.session.logits()?.iter().all(|logit| logit.is_finite()));
        let device_step_ns = self.session.device_step_ns()?;
        let Stamps { start_ns, encoded_ns, token_ns, ids } = &self.stamps;
        Ok(RunReport {
            start_ns: *start_ns,
            encoded_ns: *encoded_ns,
            token_ns: token_ns.clone(),
            ids: ids.clone(),
            finite_logits,
            device_step_ns,
            host_step_ns: Vec::new(),
        })
    }

    /// Use of the device's pool, whose high-water marks start anew; nothing on the CPU.
    pub fn memory(&mut self, _request: MemoryRequest) -> Result<MemoryReport> {
        let Some(PoolUse { used_bytes, used_high_bytes, reserved_bytes, reserved_high_bytes }) = self.pool()? else {
            return Ok(MemoryReport::default());
        };
        Ok(MemoryReport {
            used_bytes: Some(used_bytes),
            used_high_bytes: Some(used_high_bytes),
            reserved_bytes: Some(reserved_bytes),
            reserved_high_bytes: Some(reserved_high_bytes),
        })
    }

    /// Use of the device's pool, whose high-water marks start anew; `None` on the CPU.
    pub fn pool(&mut self) -> Result<Option<PoolUse>> {
        let Some(pool) = self.session.pool() else { return Ok(None) };
        let used = pool.read()?;
        pool.reset_high_marks()?;
        Ok(Some(used))
    }

    /// Gives memory that only loading needed back to the device.
    pub fn release_unused(&self) -> Result<()> {
        self.session.pool().map_or(Ok(()), |pool| pool.release_unused())
    }

    /// What the session counted, and the parts of a step alone.
    pub fn finish(&mut self, finish: &Finish) -> Result<Finished> {
        let own: OwnFinish = serde_json::from_value(finish.options.clone()).unwrap_or_default();
        let (outliers, footprint) = (self.session.outlier_columns()?, self.session.footprint());
        let release_threshold_bytes = self.session.pool().map(|pool| pool.release_threshold_bytes());
        let details = OwnFinished { footprint, outliers, release_threshold_bytes, alone: self.alone(own.alone_max_s) };
        Ok(Finished { details: serde_json::to_value(details)? })
    }

    /// Decode steps in the middle of the run beside their parts alone. It runs after all that is timed and after memory was read, since it takes some.
    /// Not where the rounds would take longer than the time that the user gives to one precision. What cannot be measured is not known; the
    /// repeats count all the same.
    fn alone(&mut self, max_s: f64) -> Option<Alone> {
        let mut steps_ns: Vec<u64> = self.stamps.token_ns.windows(2).map(|pair| pair[1] - pair[0]).collect();
        steps_ns.sort_unstable();
        let step_ns = *steps_ns.get(steps_ns.len() / 2)?;
        if (ALONE_STEPS * step_ns) as f64 / 1e9 > max_s {
            return None;
        }
        let middle = self.session.position().saturating_sub(steps_ns.len().div_ceil(2));
        self.session.alone(middle).ok().flatten()
    }

    /// Runs without timing and writes the logits of every token of the first sequence.
    pub fn logits(&mut self, request: &Logits) -> Result<RowsReply> {
        let Logits { run, file } = request;
        self.fill(&run.depth)?;
        encode(self.session.as_mut(), &run.encode, &self.pixels)?;
        prefill(self.session.as_mut(), &run.prompt, &mut self.next)?;
        logits::save(self.session.as_mut(), (run.n_gen, self.next.len()), file)?;
        self.rows()
    }

    /// Runs a window and writes the logits of every scored token.
    pub fn score(&mut self, request: &Score) -> Result<RowsReply> {
        encode(self.session.as_mut(), &request.encode, &self.pixels)?;
        self.filled.clear();
        let path = if request.by_token { CallPath::Decode } else { CallPath::Prefill };
        let window = WindowInput { prefix: &request.prefix, tokens: &request.tokens, first: request.first, path };
        let n_rows = request.tokens.len().saturating_sub(request.first);
        let mut rows: Option<RowWriter> = None;
        pass::run(self.session.as_mut(), window, &mut |_, logits| {
            let writer = match &mut rows {
                Some(writer) => writer,
                none => none.insert(RowWriter::create(&request.file, n_rows, logits.len())?),
            };
            writer.write(logits)
        })?;
        let Some(rows) = rows else { bail!("no token of the window is scored") };
        rows.finish()?;
        self.rows()
    }

    fn rows(&mut self) -> Result<RowsReply> {
        Ok(RowsReply { details: serde_json::to_value(OwnRows { outliers: self.session.outlier_columns()? })? })
    }
}

/// A session in this process.
impl<C: Clock> EnginePort for ServedSession<C> {
    fn run(&mut self, run: &RunRequest) -> Result<RunReport, Failure> {
        ServedSession::run(self, run, &mut |_| {}).map_err(|error| failure_of(&error))
    }

    fn memory(&mut self) -> Result<MemoryReport, Failure> {
        ServedSession::memory(self, MemoryRequest {}).map_err(|error| failure_of(&error))
    }

    fn finish(&mut self, finish: &Finish) -> Result<Finished, Failure> {
        ServedSession::finish(self, finish).map_err(|error| failure_of(&error))
    }

    fn logits(&mut self, logits: &Logits) -> Result<RowsReply, Failure> {
        ServedSession::logits(self, logits).map_err(|error| failure_of(&error))
    }

    fn score(&mut self, score: &Score) -> Result<RowsReply, Failure> {
        ServedSession::score(self, score).map_err(|error| failure_of(&error))
    }
}

/// The ids of all sequences behind what their caches hold; their next tokens to `next`.
fn prefill(session: &mut dyn Session, ids: &[u32], next: &mut [u32]) -> Result<()> {
    let (position, sequences) = (session.position(), next.len());
    let positions = (position..position + ids.len() / sequences).into();
    session.prefill_batch(Batch { sequences, positions }, ids, next)
}

/// The encoder where there is one, until the device is done, so that its time is its own.
fn encode(session: &mut dyn Session, input: &Encode, pixels: &[f32]) -> Result<()> {
    match input {
        Encode::Nothing => return Ok(()),
        Encode::Tokens(tokens) => session.encode(EncoderInput::Tokens(tokens))?,
        Encode::Picture { .. } => session.encode(EncoderInput::Pixels(pixels))?,
    }
    session.synchronize()
}
