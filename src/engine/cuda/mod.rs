//! The CUDA engine. A decode step is one launch of the step kernel over fixed memory; token, position and next embedding stay on the
//! device. A prompt goes through cuBLAS, one operation after the other, as a graph from its second time on.
//!
//! fp16 activations and cache, fp32 sums and residual stream.

mod angles;
mod load;
mod load_chunks;
mod prefill_graphs;
mod step;
mod times;
mod token_ring;
mod trace;

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::f16;

use self::angles::DeviceAngles;
use self::prefill_graphs::{PrefillCall, PrefillGraphs};
use self::step::DecodeStep;
use self::times::StepTimes;
use self::token_ring::TokenRing;
use super::memory::{MemoryPool, named};
use super::needs::cuda_rows_of_call;
use super::{EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup, recompute};
use crate::call::{Batch, KvFormat};
use crate::events::Listener;
use crate::kernels::cuda::cublas::{WORKSPACE_BYTES, Workspace};
use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::matvec::{Epilogue, MatrixDesc, OutputType};
use crate::kernels::cuda::program;
use crate::kernels::cuda::step_kernel::DeviceProperties;
use crate::kernels::cuda::{open, probe};
use crate::lower::cuda::{
    self as lower, Addresses, BiasAt, CacheAt, CallInput, CallKind, CallResult, CallShape, SessionAt, padded,
    padded_floats, padded_head,
};
use crate::lower::prompt;
use crate::plan::{
    BiasId, CacheId, CacheScope, CacheShape, EncoderInputKind, MatrixId, Model, RelativeBias, Rope, RopeId, VectorId,
};
use crate::quant::CudaMatrix;

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

/// Memory that calls share: nothing here is allocated again after loading.
struct Weights {
    /// Before the device's other owners: it is taken from cuBLAS while that is there.
    _workspace: Workspace,
    device: CudaDevice,
    properties: DeviceProperties,
    model: Model,
    matrices: Vec<Box<dyn CudaMatrix>>,
    vectors: Vec<CudaSlice<f32>>,
    caches: Vec<Cache>,
    angles: Vec<DeviceAngles>,
    biases: Vec<BiasTable>,
    /// Token, position, step, rows of the encoder.
    state: CudaSlice<i32>,
    logits: CudaSlice<f32>,
    /// Features of the last picture, for rows of a prompt that stand for it: fp16 `[patches, width]`.
    features: Option<CudaSlice<f16>>,
    /// Zeros, as many as the widest norm has: the bias of norms that have none.
    zeros: CudaSlice<f32>,
    /// The count that LLM.int8 has found.
    outlier_columns: CudaSlice<u64>,
    token_ring: TokenRing,
    capacity: usize,
    encoder_capacity: usize,
}

/// Keys and values `[g, capacity, d_pad]`.
struct Cache {
    keys: CudaSlice<f16>,
    values: CudaSlice<f16>,
    capacity: usize,
    /// A head's elements and zeros up to whole 16-byte words.
    d_pad: usize,
}

/// A relative bias, as [`lower::by_distance`] lays it out.
struct BiasTable {
    values: CudaSlice<f32>,
    reach: usize,
}

/// Loads `setup` onto device `ordinal`.
pub fn load(setup: &Setup, ordinal: usize, events: &dyn Listener) -> Result<Loaded> {
    lower::CALLS.check(setup.sequences, setup.kv_format)?;
    let properties = probe(ordinal)?;
    let device = open(ordinal).with_context(|| format!("opening CUDA device {ordinal}"))?;
    // What no kernel computes is refused before any weight is read.
    lower::check(setup.model, DeviceProperties::of(device.as_cuda_device()?)?)?;
    let tensors = load::stream(setup, &device, events)?;
    let (matrices, learned): (Vec<_>, Vec<_>) = tensors.matrices.into_iter().unzip();
    let weights = Weights::new(setup, device.as_cuda_device()?.clone(), matrices, &learned, &tensors.vectors)?;
    let step = DecodeStep::new(&weights, &format!("{}-{}", setup.model.architecture, setup.formats.precision().name))?;
    weights.device.cuda_stream().synchronize()?;
    let (major, minor) = properties.compute_capability;
    let loaded = Loaded {
        session: Box::new(CudaSession {
            weights,
            step,
            prefill_graphs: PrefillGraphs::default(),
            times: StepTimes::default(),
            position: 0,
            encoded: 0,
            steps: 0,
            as_graph: setup.cuda_graph,
            rows_of_call: cuda_rows_of_call(setup.model, setup.formats),
            examined: OutlierColumns::default(),
        }),
        load: tensors.elapsed,
        quantize: tensors.quantize,
        fp16_overflow: tensors.fp16_overflow,
        isa: format!("sm_{major}{minor}"),
    };
    Ok(recompute::wrapped(setup, loaded))
}

impl Weights {
    fn new(
        setup: &Setup,
        device: CudaDevice,
        matrices: Vec<Box<dyn CudaMatrix>>,
        learned: &[Option<Vec<f32>>],
        vectors: &[Vec<f32>],
    ) -> Result<Self> {
        let model = setup.model.clone();
        let cache = |spec: &CacheShape| -> Result<Cache> {
            let capacity = if spec.scope == CacheScope::Decoder { setup.capacity } else { setup.encoder_capacity };
            let d_pad = padded_head(spec.head_dim);
            let len = spec.kv_heads * capacity * d_pad;
            let half =
                || named(device.alloc_zeros(len), len * size_of::<f16>(), || format!("a cache of {capacity} tokens"));
            Ok(Cache { keys: half()?, values: half()?, capacity, d_pad })
        };
        let angles = |rope: &Rope| DeviceAngles::new(rope, setup.capacity, &device);
        let vector = |values: &Vec<f32>| device.clone_htod(&padded(values));
        let reach = setup.capacity.max(setup.encoder_capacity);
        let bias = |bias: &RelativeBias| -> Result<BiasTable> {
            let learned = learned[bias.table.0].as_ref().context("a bias without its table")?;
            let buckets = model.matrices[bias.table.0].n;
            let values = lower::by_distance(bias, learned, buckets, reach);
            Ok(BiasTable { values: device.clone_htod(&values)?, reach })
        };
        let patches = match model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => picture.patches(),
            Some(EncoderInputKind::Tokens) | None => 0,
        };
        let features = lower::features_width(&model).map(|width| device.alloc_zeros(patches * width)).transpose()?;
        Ok(Self {
            _workspace: Workspace::new(&device)?,
            features,
            vectors: vectors.iter().map(vector).collect::<Result<_, _>>()?,
            caches: model.caches.iter().map(cache).collect::<Result<_>>()?,
            angles: model.ropes.iter().map(angles).collect::<Result<_>>()?,
            biases: model.biases.iter().map(bias).collect::<Result<_>>()?,
            state: device.alloc_zeros(4)?,
            logits: device.alloc_zeros(model.vocab)?,
            zeros: device.alloc_zeros(padded_floats(vectors.iter().map(Vec::len).max().unwrap_or(1)))?,
            outlier_columns: device.alloc_zeros(1)?,
            token_ring: TokenRing::new(&device)?,
            properties: DeviceProperties::of(&device)?,
            capacity: setup.capacity,
            encoder_capacity: setup.encoder_capacity,
            matrices,
            model,
            device,
        })
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token as usize >= self.model.vocab) {
            Some(token) => bail!("token {token} is outside the vocabulary of {}", self.model.vocab),
            None => Ok(()),
        }
    }

    /// Makes the calls and steps from now on those of a sequence that has `length` positions behind them.
    fn set_length(&mut self, length: usize) -> Result<()> {
        let Self { angles, model, capacity, device, .. } = self;
        let mut ropes = angles.iter_mut().zip(&model.ropes);
        ropes.try_for_each(|(angles, rope)| angles.set_length(rope, *capacity, length, device))
    }

    /// The same for steps alone: where each has its frequencies in the table, nothing changes.
    fn set_step_length(&mut self, length: usize) -> Result<()> {
        let Self { angles, model, capacity, device, .. } = self;
        let mut ropes = angles.iter_mut().zip(&model.ropes).filter(|(angles, _)| angles.calls.is_none());
        ropes.try_for_each(|(angles, rope)| angles.set_length(rope, *capacity, length, device))
    }

    /// Token, position, step and encoder rows, before all that is launched from now on.
    fn set_state(&mut self, token: u32, position: usize, step: u32, encoded: usize) -> Result<()> {
        let state = [token as i32, position as i32, step as i32, encoded as i32];
        Ok(self.device.memcpy_htod(&state, &mut self.state)?)
    }
}

impl Addresses for Weights {
    fn model(&self) -> &Model {
        &self.model
    }

    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn matrix(&self, id: MatrixId) -> MatrixDesc {
        self.matrices[id.0].desc()
    }

    fn vector(&self, id: VectorId) -> u64 {
        address(&self.vectors[id.0], &self.device)
    }

    fn cache(&self, id: CacheId) -> CacheAt {
        let Cache { keys, values, capacity, d_pad } = &self.caches[id.0];
        let (keys, values) = (address(keys, &self.device), address(values, &self.device));
        CacheAt { keys, values, capacity: *capacity, d_pad: *d_pad }
    }

    fn step_angles(&self, id: RopeId) -> u64 {
        address(&self.angles[id.0].steps, &self.device)
    }

    fn call_angles(&self, id: RopeId) -> u64 {
        let DeviceAngles { steps, calls, .. } = &self.angles[id.0];
        address(calls.as_ref().unwrap_or(steps), &self.device)
    }

    fn bias(&self, id: BiasId) -> BiasAt {
        let BiasTable { values, reach } = &self.biases[id.0];
        BiasAt { address: address(values, &self.device), reach: *reach }
    }

    fn session(&self) -> SessionAt {
        let device = &self.device;
        SessionAt {
            state: address(&self.state, device),
            logits: address(&self.logits, device),
            zeros: address(&self.zeros, device),
            features: self.features.as_ref().map_or(0, |features| address(features, device)),
            outlier_columns: address(&self.outlier_columns, device),
            host: self.token_ring.address(),
            host_slots: token_ring::SLOTS,
        }
    }
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
        let input = CallInput::tokens(&self.weights.model, tokens, self.encoded)?;
        self.weights.set_state(0, self.position, self.steps, self.encoded)?;
        let batch = Batch::one(self.position..self.position + tokens.len());
        let shape = CallShape { kind, batch, encoded: self.encoded };
        let done = self.run(shape, &input)?;
        self.position += tokens.len();
        Ok(done)
    }

    fn run(&mut self, shape: CallShape, input: &CallInput) -> Result<CallResult> {
        let call = PrefillCall { weights: &self.weights, step: &self.step, shape };
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
                (tokens.len(), CallInput::tokens(&self.weights.model, tokens, 0)?)
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
        self.run(CallShape { kind: CallKind::Encoder, batch: Batch::one(0..rows), encoded: rows }, &input)?;
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
            next.fill(self.weights.token_ring.wait(self.steps, &self.weights.device)?);
            return Ok(());
        }
        let (before, last) = prompt::cut(tokens, self.rows_of_call);
        for part in before {
            self.call(CallKind::Scored, part)?;
        }
        self.call(CallKind::Prompt, last)?;
        self.steps += 1;
        next.fill(self.weights.token_ring.wait(self.steps, &self.weights.device)?);
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
                self.weights.token_ring.token(first + arrived as u32 + 1).filter(|_| arrived < queued)
            {
                on_tokens(&[token]);
                arrived += 1;
            }
            if queued - arrived >= token_ring::SLOTS / 2 {
                on_tokens(&[self.weights.token_ring.wait(first + arrived as u32 + 1, &self.weights.device)?]);
                arrived += 1;
            }
        }
        while arrived < n {
            on_tokens(&[self.weights.token_ring.wait(first + arrived as u32 + 1, &self.weights.device)?]);
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
        let Weights { model, matrices, .. } = &self.weights;
        let stored: Vec<usize> = matrices.iter().map(|m| m.stored_bytes()).collect();
        let resident: usize = matrices.iter().map(|m| m.resident_bytes()).sum();
        let vectors = model.vector_bytes();
        let caches: usize = self.weights.caches.iter().map(|cache| 2 * cache.keys.len() * size_of::<f16>()).sum();
        Footprint {
            weights_bytes: (stored.iter().sum::<usize>() + vectors) as u64,
            // Vectors are held in fp32.
            weights_resident_bytes: (resident + 2 * vectors) as u64,
            kv_cache_bytes: caches as u64,
            scratch_bytes: (self.step.bytes()
                + self.prefill_graphs.bytes()
                + WORKSPACE_BYTES
                + 4 * self.weights.logits.len()) as u64,
            weight_bytes_per_token: model.weight_bytes_per_token(&stored) as u64,
            ..Footprint::of_caches(model, KvFormat::Fp16, self.encoded)
        }
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        let counted = self.weights.device.clone_dtoh(&self.weights.outlier_columns)?;
        Ok(OutlierColumns { columns: counted[0], ..self.examined })
    }
}
