//! The CUDA engine. A decode step is one launch of the step kernel over fixed memory; token, position and next embedding stay on the
//! device. A prompt goes through cuBLAS, one operation after the other, as a graph from its second time on; so does a step of several sequences
//! ([`batch`]).
//!
//! fp16 activations and cache, fp32 sums and residual stream.

mod angles;
mod batch;
mod load;
mod load_chunks;
mod prefill_graphs;
mod step;
mod times;
mod token_ring;
mod trace;
mod weights;

use anyhow::{Context, Result, bail};
use half::f16;

use self::batch::BatchSession;
use self::prefill_graphs::{PrefillCall, PrefillGraphs};
use self::step::DecodeStep;
use self::times::StepTimes;
use self::weights::Weights;
use super::memory::MemoryPool;
use super::needs::cuda_rows_of_call;
use super::{EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup, recompute};
use crate::call::Batch;
use crate::events::Listener;
use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::matvec::{Epilogue, OutputType};
use crate::kernels::cuda::program;
use crate::kernels::cuda::step_kernel::DeviceProperties;
use crate::kernels::cuda::{open, probe};
use crate::lower::cuda::{self as lower, CallInput, CallKind, CallResult, CallShape};
use crate::lower::prompt;
use crate::plan::EncoderInputKind;

/// Weights, caches and the step of one loaded model.
pub struct CudaSession {
    weights: Weights,
    step: DecodeStep,
    prefill_graphs: PrefillGraphs,
    times: StepTimes,
    /// Tokens in the decoder's caches.
    position: usize,
    /// Rows of the last encoder call.
    encoded: usize,
    /// Tokens that were asked of the device since the session began: the number of the last one.
    steps: u32,
    as_graph: bool,
    /// Longer prompts are cut.
    rows_of_call: usize,
    /// Without the columns found, which the device counts.
    examined: OutlierColumns,
}

/// Loads `setup` onto device `ordinal`.
pub fn load(setup: &Setup, ordinal: usize, events: &dyn Listener) -> Result<Loaded> {
    lower::CALLS.check(setup.sequences, setup.kv_format)?;
    lower::check_sequences(setup.model, setup.sequences)?;
    let properties = probe(ordinal)?;
    let device = open(ordinal).with_context(|| format!("opening CUDA device {ordinal}"))?;
    // What no kernel computes is refused before any weight is read.
    lower::check(setup.model, DeviceProperties::of(device.as_cuda_device()?)?)?;
    let tensors = load::stream(setup, &device, events)?;
    let (matrices, learned): (Vec<_>, Vec<_>) = tensors.matrices.into_iter().unzip();
    let weights = Weights::new(setup, device.as_cuda_device()?.clone(), matrices, &learned, &tensors.vectors)?;
    let stream = weights.device.cuda_stream();
    let rows_of_call = cuda_rows_of_call(setup.model, setup.formats);
    let session: Box<dyn Session> = if setup.sequences == 1 {
        let name = format!("{}-{}", setup.model.architecture, setup.formats.precision().name);
        Box::new(CudaSession {
            step: DecodeStep::new(&weights, &name)?,
            weights,
            prefill_graphs: PrefillGraphs::default(),
            times: StepTimes::default(),
            position: 0,
            encoded: 0,
            steps: 0,
            as_graph: setup.cuda_graph,
            rows_of_call,
            examined: OutlierColumns::default(),
        })
    } else {
        Box::new(BatchSession::new(weights, rows_of_call, setup.cuda_graph))
    };
    stream.synchronize()?;
    let (major, minor) = properties.compute_capability;
    let loaded = Loaded {
        session,
        load: tensors.elapsed,
        quantize: tensors.quantize,
        fp16_overflow: tensors.fp16_overflow,
        isa: format!("sm_{major}{minor}"),
    };
    Ok(recompute::wrapped(setup, loaded))
}

impl CudaSession {
    /// Checks that `tokens` fit behind the cache.
    fn check_call(&self, tokens: &[u32]) -> Result<()> {
        let (n, capacity) = (tokens.len(), self.weights.capacity);
        if tokens.is_empty() || self.position + n > capacity {
            bail!("a call of {n} tokens at position {} does not fit a cache of {capacity}", self.position);
        }
        self.weights.check_tokens(tokens)
    }

    /// Runs the decoder over `tokens` and moves on behind them.
    fn call(&mut self, kind: CallKind, tokens: &[u32]) -> Result<CallResult> {
        self.check_call(tokens)?;
        let input = CallInput::tokens(&self.weights.model, tokens, 1, self.encoded)?;
        self.weights.set_state(0, self.position, self.steps, self.encoded)?;
        let batch = Batch::one(self.position..self.position + tokens.len());
        let shape = CallShape { kind, first: 0, batch, encoded: self.encoded };
        let done = self.run(shape, &input)?;
        self.position += tokens.len();
        Ok(done)
    }

    fn run(&mut self, shape: CallShape, input: &CallInput) -> Result<CallResult> {
        let call = PrefillCall { weights: &self.weights, step: Some(&self.step), shape };
        let done = self.prefill_graphs.run(&call, input, self.as_graph)?;
        self.examined += done.examined;
        Ok(done)
    }

    /// Whether tokens of a prompt are steps: which experts a token goes through is known on the device alone.
    fn goes_by_steps(&self) -> bool {
        self.weights.model.experts().is_some()
    }

    /// Runs `tokens` one by one; `on_step` is called behind each.
    fn run_by_steps(&mut self, tokens: &[u32], on_step: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        for &token in tokens {
            self.step.place(&self.weights, token, self.position, self.steps)?;
            self.step.run(&self.weights.device, self.as_graph)?;
            self.examined += self.step.examined;
            self.position += 1;
            self.steps += 1;
            on_step(self)?;
        }
        Ok(())
    }

    /// [`Session::score`] of one call.
    fn score_call(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let done = self.call(CallKind::Scored, tokens)?;
        let (weights, device) = (&self.weights, &self.weights.device);
        let head = weights.model.decoder.head().context("this plan has no head")?;
        let (logits, counters) = (address(&weights.logits, device), self.step.counters(device));
        for row in 0..tokens.len() {
            let x = lower::prefill::row_at(&weights.model, done, row)?;
            let epilogue = Epilogue { output_type: OutputType::Floats, ..Epilogue::default() };
            let planned = lower::head(weights, head, x, logits, epilogue, program::TokenOutput::default(), counters)?;
            // SAFETY: x is a row of the call's; all else is the session's.
            unsafe { planned.load(device)?.launch(device) }?;
            on_row(row, &device.clone_dtoh(&weights.logits)?);
        }
        Ok(())
    }
}

impl Session for CudaSession {
    fn position(&self) -> usize {
        self.position
    }

    fn rewind(&mut self, position: usize) {
        assert!(position <= self.position, "cannot rewind from {} to {position}", self.position);
        self.position = position;
    }

    fn encode(&mut self, input: EncoderInput) -> Result<()> {
        let Some(encoder) = &self.weights.model.encoder else { bail!("this model has no encoder") };
        let (rows, input) = match (encoder.input, input) {
            (EncoderInputKind::Tokens, EncoderInput::Tokens(tokens)) => {
                self.weights.check_tokens(tokens)?;
                (tokens.len(), CallInput::tokens(&self.weights.model, tokens, 1, 0)?)
            }
            (EncoderInputKind::Picture(picture), EncoderInput::Pixels(pixels)) => {
                let halves = picture.patch_rows(pixels)?.into_iter().map(f16::from_f32).collect();
                (picture.patches(), CallInput::Patches(halves))
            }
            _ => bail!("this model's encoder reads another kind of input"),
        };
        let capacity = self.weights.encoder_capacity;
        if rows == 0 || rows > capacity {
            bail!("an encoder call of {rows} rows does not fit a cache of {capacity}");
        }
        let shape = CallShape { kind: CallKind::Encoder, first: 0, batch: Batch::one(0..rows), encoded: rows };
        self.run(shape, &input)?;
        self.encoded = rows;
        Ok(())
    }

    fn prefill_batch(&mut self, batch: Batch, tokens: &[u32], next: &mut [u32]) -> Result<()> {
        lower::CALLS.check_batch(batch, tokens.len(), (1, self.position))?;
        self.times.restart();
        self.check_call(tokens)?;
        self.weights.set_length(self.position + tokens.len())?;
        if self.goes_by_steps() {
            self.run_by_steps(tokens, &mut |_| Ok(()))?;
            next.fill(self.weights.token_ring.wait(self.steps, 0, &self.weights.device)?);
            return Ok(());
        }
        let (before, last) = prompt::cut(tokens, self.rows_of_call);
        for part in before {
            self.call(CallKind::Scored, part)?;
        }
        self.call(CallKind::Prompt, last)?;
        self.steps += 1;
        next.fill(self.weights.token_ring.wait(self.steps, 0, &self.weights.device)?);
        Ok(())
    }

    fn decode_batch(&mut self, n: usize, on_tokens: &mut dyn FnMut(&[u32])) -> Result<()> {
        if self.position + n > self.weights.capacity {
            let capacity = self.weights.capacity;
            bail!("{n} steps at position {} do not fit a cache of {capacity}", self.position);
        }
        self.weights.set_step_length(self.position + n)?;
        let first = self.steps;
        let mut arrived = 0;
        for queued in 1..=n {
            let (device, step, as_graph) = (&self.weights.device, &mut self.step, self.as_graph);
            self.times.around(device, || step.run(device, as_graph))?;
            self.steps = first + queued as u32;
            self.examined += self.step.examined;
            // All steps are queued at once; tokens are stamped as they arrive, and the ring buffer must not overflow.
            while let Some(token) =
                self.weights.token_ring.token(first + arrived as u32 + 1, 0).filter(|_| arrived < queued)
            {
                on_tokens(&[token]);
                arrived += 1;
            }
            if queued - arrived >= self.weights.token_ring.slots() / 2 {
                on_tokens(&[self.weights.token_ring.wait(first + arrived as u32 + 1, 0, &self.weights.device)?]);
                arrived += 1;
            }
        }
        while arrived < n {
            on_tokens(&[self.weights.token_ring.wait(first + arrived as u32 + 1, 0, &self.weights.device)?]);
            arrived += 1;
        }
        self.position += n;
        Ok(())
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check_call(tokens)?;
        self.weights.set_length(self.position + tokens.len())?;
        if self.goes_by_steps() {
            let mut row = 0;
            return self.run_by_steps(tokens, &mut |session| {
                on_row(row, &session.weights.device.clone_dtoh(&session.weights.logits)?);
                row += 1;
                Ok(())
            });
        }
        let rows_of_call = self.rows_of_call;
        for (at, part) in tokens.chunks(rows_of_call).enumerate() {
            self.score_call(part, &mut |row, logits| on_row(at * rows_of_call + row, logits))?;
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        if self.steps == 0 {
            bail!("no token was run yet");
        }
        Ok(self.weights.device.clone_dtoh(&self.weights.logits)?)
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(self.weights.device.cuda_stream().synchronize()?)
    }

    fn device_step_ns(&mut self) -> Result<Vec<u64>> {
        self.synchronize()?;
        self.step.write_trace(&self.weights.device)?;
        self.times.ns()
    }

    fn pool(&self) -> Option<&dyn MemoryPool> {
        Some(&self.weights.device)
    }

    fn footprint(&self) -> Footprint {
        let scratch = self.step.bytes() + self.prefill_graphs.bytes();
        self.weights.footprint(scratch, self.encoded)
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        self.weights.outlier_columns(self.examined)
    }
}
