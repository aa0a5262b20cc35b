//! The CUDA engine: a decode step is one launch of fused jobs over fixed memory, with the token, the position and the
//! next embedding on the device; a prompt goes through cuBLAS, one operation after the other, as a graph from its second time on.
//!
//! fp16 activations and cache, fp32 sums and residual stream.

mod load;
mod pieces;
mod prompt;
mod ring;
mod rows;
mod step;
mod times;

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::f16;

use self::prompt::{Call, Input, Kind, Prompts, Shape};
use self::ring::Ring;
use self::rows::Done;
use self::step::{Step, padded_floats};
use self::times::StepTimes;
use super::memory::Pool;
use super::{EncoderInput, Footprint, Loaded, OutlierColumns, Session, Setup, patch_rows};
use crate::events::Listener;
use crate::kernels::cuda::gemm::{WORKSPACE_BYTES, Workspace};
use crate::kernels::cuda::launch::address;
use crate::kernels::cuda::matvec::{self, Epilogue, Matvec, Mode, Product, Puts};
use crate::kernels::cuda::program::{self, Facts};
use crate::kernels::cuda::{open, probe};
use crate::plan::{ActivationKind, EncoderInputKind, Head, Holds, Model, Op, RelativeBias};
use crate::quant::CudaMatrix;

/// Weights, caches and the step of one loaded model.
pub struct CudaSession {
    weights: Weights,
    step: Step,
    prompts: Prompts,
    times: StepTimes,
    /// Tokens in the decoder's caches.
    position: usize,
    /// Rows of the last encoder call.
    encoded: usize,
    /// Tokens that were asked of the device since the session began: the number of the last one.
    steps: u32,
    as_graph: bool,
    /// Without the columns found, which the device counts.
    examined: OutlierColumns,
}

/// What calls share: nothing here is allocated again after loading.
struct Weights {
    /// Before the device's other owners: it is taken from cuBLAS while that is there.
    _workspace: Workspace,
    device: CudaDevice,
    facts: Facts,
    model: Model,
    matrices: Vec<Box<dyn CudaMatrix>>,
    vectors: Vec<CudaSlice<f32>>,
    caches: Vec<Cache>,
    /// Cosines and sines of each rope, `[capacity, rotary / 2, 2]`.
    angles: Vec<CudaSlice<f32>>,
    biases: Vec<BiasTable>,
    /// Token, position, step, rows of the encoder.
    state: CudaSlice<i32>,
    logits: CudaSlice<f32>,
    /// Of the last picture, for rows of a prompt that stand for it: fp16 `[patches, width]`.
    features: Option<CudaSlice<f16>>,
    /// As long as the widest norm: the bias of those that have none.
    zeros: CudaSlice<f32>,
    /// How many LLM.int8 has found.
    outlier_columns: CudaSlice<u64>,
    ring: Ring,
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

/// A relative bias by distance, fp32 `[h, 2 · reach + 1]`, distance 0 in the middle.
struct BiasTable {
    values: CudaSlice<f32>,
    reach: usize,
}

impl BiasTable {
    fn address(&self, device: &CudaDevice) -> u64 {
        address(&self.values, device)
    }
}

/// `enum Activation` of job.cuh.
fn activation_number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Silu => 1,
        ActivationKind::GeluTanh => 2,
        ActivationKind::Relu => 3,
    }
}

/// Loads `setup` onto device `ordinal`.
pub fn load(setup: &Setup, ordinal: usize, events: &dyn Listener) -> Result<Loaded> {
    let facts = probe(ordinal)?;
    let device = open(ordinal).with_context(|| format!("opening CUDA device {ordinal}"))?;
    let streamed = load::stream(setup, &device, events)?;
    let (matrices, learned): (Vec<_>, Vec<_>) = streamed.matrices.into_iter().unzip();
    let weights = Weights::new(setup, device.as_cuda_device()?.clone(), matrices, &learned, &streamed.vectors)?;
    let step = Step::new(&weights)?;
    weights.device.cuda_stream().synchronize()?;
    let (major, minor) = facts.compute_capability;
    Ok(Loaded {
        session: Box::new(CudaSession {
            weights,
            step,
            prompts: Prompts::default(),
            times: StepTimes::default(),
            position: 0,
            encoded: 0,
            steps: 0,
            as_graph: setup.cuda_graph,
            examined: OutlierColumns::default(),
        }),
        load: streamed.elapsed,
        quantize: streamed.quantize,
        fp16_overflow: streamed.fp16_overflow,
        isa: format!("sm_{major}{minor}"),
    })
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
        let cache = |spec: &crate::plan::CacheSpec| -> Result<Cache> {
            let capacity = if spec.holds == Holds::Decoder { setup.capacity } else { setup.encoder_capacity };
            let d_pad = spec.head_dim.next_multiple_of(8);
            let len = spec.kv_heads * capacity * d_pad;
            Ok(Cache { keys: device.alloc_zeros(len)?, values: device.alloc_zeros(len)?, capacity, d_pad })
        };
        let angles = |rope: &crate::plan::Rope| -> Result<CudaSlice<f32>> {
            let values =
                (0..setup.capacity).flat_map(|position| rope.turns(position)).flat_map(|(cos, sin)| [cos, sin]);
            Ok(device.clone_htod(&values.collect::<Vec<f32>>())?)
        };
        let vector = |values: &Vec<f32>| -> Result<CudaSlice<f32>> {
            let mut padded = values.clone();
            padded.resize(padded_floats(values.len()), 0.0);
            Ok(device.clone_htod(&padded)?)
        };
        let reach = setup.capacity.max(setup.encoder_capacity);
        let bias = |bias: &RelativeBias| -> Result<BiasTable> {
            let learned = learned[bias.table.0].as_ref().context("a bias without its table")?;
            let buckets = model.matrices[bias.table.0].n;
            let heads = learned.len() / buckets;
            let distances = -(reach as i64)..=reach as i64;
            let of_head = |head| distances.clone().map(move |at| learned[bias.bucket(at, buckets) * heads + head]);
            let values: Vec<f32> = (0..heads).flat_map(of_head).collect();
            Ok(BiasTable { values: device.clone_htod(&values)?, reach })
        };
        let features = match &model.encoder {
            Some(encoder) => match (encoder.input, encoder.plan.ops.last()) {
                (EncoderInputKind::Picture(picture), Some(Op::Features { x })) => {
                    Some(device.alloc_zeros(picture.patches() * encoder.plan.buffers[x.0].width)?)
                }
                _ => None,
            },
            None => None,
        };
        Ok(Self {
            _workspace: Workspace::new(&device)?,
            features,
            vectors: vectors.iter().map(vector).collect::<Result<_>>()?,
            caches: model.caches.iter().map(cache).collect::<Result<_>>()?,
            angles: model.ropes.iter().map(angles).collect::<Result<_>>()?,
            biases: model.biases.iter().map(bias).collect::<Result<_>>()?,
            state: device.alloc_zeros(4)?,
            logits: device.alloc_zeros(model.vocab)?,
            zeros: device.alloc_zeros(padded_floats(vectors.iter().map(Vec::len).max().unwrap_or(1)))?,
            outlier_columns: device.alloc_zeros(1)?,
            ring: Ring::new(&device)?,
            facts: Facts::of(&device)?,
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

    /// What a call over `tokens` reads, where the last encoder call had `encoded` rows.
    fn tokens(&self, tokens: &[u32], encoded: usize) -> Result<Input> {
        let image = match self.model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => Some(picture.token),
            _ => None,
        };
        let mut n_image = 0;
        let feature_of_row = tokens.iter().map(|token| {
            n_image += i32::from(Some(*token) == image);
            n_image - 1
        });
        let feature_of_row: Vec<i32> = feature_of_row.collect();
        if n_image as usize > encoded {
            bail!("the prompt has {n_image} image tokens, more than the picture has features");
        }
        Ok(Input::Tokens(tokens.iter().map(|token| *token as i32).chain(feature_of_row).collect()))
    }

    /// Multiplies one row of fp16 activations with the head's matrix; `place` is where the token goes, if one is wanted, and `ended`
    /// are the counters that launches share.
    fn run_head(
        &self,
        ended: u64,
        head: Head,
        x: u64,
        epilogue: Epilogue,
        out: u64,
        place: program::Head,
    ) -> Result<()> {
        let product = Product {
            matrix: self.matrices[head.weight.0].streamed(),
            bias: head.bias.map_or(0, |bias| address(&self.vectors[bias.0], &self.device)),
            out,
            activation: 0,
        };
        let input = matvec::Input { x, scale: head.scale, ..matvec::Input::default() };
        let mut planned = Matvec::plan(self.facts, Mode::Apart, vec![input], &[product], epilogue)?;
        planned.program.head = place;
        planned.program.ended = ended;
        // SAFETY: x is a row of the caller's; all else is the session's.
        Ok(unsafe { planned.ready(&self.device)?.launch(&self.device) }?)
    }

    /// Of a row that the head reads.
    fn row_bytes(&self, head: Head) -> usize {
        size_of::<f16>() * self.model.matrices[head.weight.0].k
    }

    /// Token, position, step and encoder rows, before all that is launched from now on.
    fn set_state(&mut self, token: u32, position: usize, step: u32, encoded: usize) -> Result<()> {
        let state = [token as i32, position as i32, step as i32, encoded as i32];
        Ok(self.device.memcpy_htod(&state, &mut self.state)?)
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
    fn call(&mut self, kind: Kind, tokens: &[u32]) -> Result<Done> {
        self.check_call(tokens)?;
        let input = self.weights.tokens(tokens, self.encoded)?;
        self.weights.set_state(0, self.position, self.steps, self.encoded)?;
        let shape = Shape { kind, rows: tokens.len(), position: self.position, encoded: self.encoded };
        let done = self.run(shape, &input)?;
        self.position += tokens.len();
        Ok(done)
    }

    fn run(&mut self, shape: Shape, input: &Input) -> Result<Done> {
        let call = Call { weights: &self.weights, step: &self.step, shape };
        let done = self.prompts.run(&call, input, self.as_graph)?;
        self.examined += done.examined;
        Ok(done)
    }

    fn head(&self) -> Result<Head> {
        self.weights.model.decoder.head().context("this plan has no head")
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
                (tokens.len(), self.weights.tokens(tokens, 0)?)
            }
            (EncoderInputKind::Picture(picture), EncoderInput::Pixels(pixels)) => {
                let halves = patch_rows(pixels, picture)?.into_iter().map(f16::from_f32).collect();
                (picture.patches(), Input::Patches(halves))
            }
            _ => bail!("this model's encoder reads another kind of input"),
        };
        let capacity = self.weights.encoder_capacity;
        if rows == 0 || rows > capacity {
            bail!("an encoder call of {rows} rows does not fit a cache of {capacity}");
        }
        self.run(Shape { kind: Kind::Encoder, rows, position: 0, encoded: rows }, &input)?;
        self.encoded = rows;
        Ok(())
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<u32> {
        self.times.restart();
        self.call(Kind::Prompt, tokens)?;
        self.steps += 1;
        self.weights.ring.wait(self.steps, &self.weights.device)
    }

    fn decode(&mut self, n: usize, on_token: &mut dyn FnMut(u32)) -> Result<()> {
        if self.position + n > self.weights.capacity {
            let capacity = self.weights.capacity;
            bail!("{n} steps at position {} do not fit a cache of {capacity}", self.position);
        }
        let first = self.steps;
        let mut arrived = 0;
        for queued in 1..=n {
            let (device, step, as_graph) = (&self.weights.device, &mut self.step, self.as_graph);
            self.times.around(device, || step.run(device, as_graph))?;
            self.steps = first + queued as u32;
            self.examined += self.step.examines;
            // All steps are queued at once, except that tokens are stamped as they come and the ring must not run over.
            while let Some(token) = self.weights.ring.token(first + arrived as u32 + 1).filter(|_| arrived < queued) {
                on_token(token);
                arrived += 1;
            }
            if queued - arrived >= ring::SLOTS / 2 {
                on_token(self.weights.ring.wait(first + arrived as u32 + 1, &self.weights.device)?);
                arrived += 1;
            }
        }
        while arrived < n {
            on_token(self.weights.ring.wait(first + arrived as u32 + 1, &self.weights.device)?);
            arrived += 1;
        }
        self.position += n;
        Ok(())
    }

    fn score(&mut self, tokens: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let (Done { x, .. }, head) = (self.call(Kind::Scored, tokens)?, self.head()?);
        let (weights, device) = (&self.weights, &self.weights.device);
        let (logits, ended) = (address(&weights.logits, device), self.step.ended(device));
        for row in 0..tokens.len() {
            let at = x + (row * weights.row_bytes(head)) as u64;
            let epilogue = Epilogue { puts: Puts::Floats, ..Epilogue::default() };
            weights.run_head(ended, head, at, epilogue, logits, program::Head::default())?;
            on_row(row, &device.clone_dtoh(&weights.logits)?);
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
        self.times.ns()
    }

    fn pool(&self) -> Option<&dyn Pool> {
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
            scratch_bytes: (self.step.bytes() + self.prompts.bytes() + WORKSPACE_BYTES + 4 * self.weights.logits.len())
                as u64,
            weight_bytes_per_token: model.weight_bytes_per_token(&stored) as u64,
            kv_bytes_per_position: model.kv_bytes_per_position(size_of::<f16>()) as u64,
            cross_kv_bytes: (model.cross_bytes_per_position(size_of::<f16>()) * self.encoded) as u64,
        }
    }

    fn outlier_columns(&mut self) -> Result<OutlierColumns> {
        let counted = self.weights.device.clone_dtoh(&self.weights.outlier_columns)?;
        Ok(OutlierColumns { columns: counted[0], ..self.examined })
    }
}
