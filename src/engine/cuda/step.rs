//! One decode step: the fused jobs of a plan over fixed memory, as one launch, replayed as a graph.

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, sys};
use half::f16;

use super::{Weights, activation_number};
use crate::engine::OutlierColumns;
use crate::kernels::cuda::attention::{Attention, Split};
use crate::kernels::cuda::launch::{address, dimension};
use crate::kernels::cuda::matvec::{Epilogue, Input, Mode, NORM_LAYER, NORM_RMS, Product, Puts};
use crate::kernels::cuda::program::{COUNTERS, Head, Job, Jobs, Ready};
use crate::plan::fusion::{self, Append, Join, fuse};
use crate::plan::{BiasId, BufferId, CacheId, CacheSpec, MatrixId, NormKind, Op};

/// The launch of a step and the memory between its jobs.
pub struct Step {
    launch: Ready,
    graph: Option<CudaGraph>,
    memory: Memory,
    /// What the launch reads.
    jobs: CudaSlice<Job>,
    /// What one step looks through for outlier columns; the device counts those it finds.
    pub examines: OutlierColumns,
}

/// What a step writes.
struct Memory {
    /// By the plan's buffers, one row each, in words of 4 bytes: tagged fp32 where a residual lives, which has two, else tagged fp16.
    buffers: Vec<Option<CudaSlice<u32>>>,
    partials: CudaSlice<f32>,
    /// Counters of attention.
    arrived: CudaSlice<i32>,
    /// The head's, one for each block.
    best: CudaSlice<u64>,
    /// [`COUNTERS`].
    ended: CudaSlice<u32>,
}

/// Values of an fp32 vector that kernels read two at a time: zeros behind it.
pub fn padded_floats(len: usize) -> usize {
    len.next_multiple_of(2)
}

impl Step {
    pub fn new(weights: &Weights) -> Result<Self> {
        let family_of = |id: MatrixId| weights.matrices[id.0].streamed().family.name;
        let fused = fuse(&weights.model.decoder, &family_of)?;
        let memory = Memory::new(weights, &fused)?;
        let mut planner = Planner { weights, memory: &memory, jobs: Jobs::new(weights.facts) };
        for job in &fused {
            planner.add(job).with_context(|| format!("at {job:?}"))?;
        }
        let planned = planner.jobs;
        let mut examines = OutlierColumns::default();
        for (rows, elements) in planned.list().iter().map(Job::examines) {
            examines += OutlierColumns { calls: rows as u64, columns: 0, examined: elements as u64 };
        }
        let jobs = weights.device.clone_htod(planned.list())?;
        let mut planned = planned.plan(address(&jobs, &weights.device))?;
        planned.program.ended = address(&memory.ended, &weights.device);
        planned.program.head = memory.head(weights, 1)?;
        Ok(Self { launch: planned.ready(&weights.device)?, graph: None, memory, jobs, examines })
    }

    /// Where a call outside of a step puts the token that it finds, `advance` positions further on.
    pub fn head(&self, weights: &Weights, advance: usize) -> Result<Head> {
        self.memory.head(weights, advance)
    }

    /// The counters that launches share.
    pub fn ended(&self, device: &CudaDevice) -> u64 {
        address(&self.memory.ended, device)
    }

    pub fn bytes(&self) -> usize {
        self.memory.bytes() + self.jobs.num_bytes()
    }

    /// Queues one step: as a graph, or as it is.
    pub fn run(&mut self, device: &CudaDevice, as_graph: bool) -> Result<()> {
        if !as_graph {
            return self.launch(device);
        }
        if self.graph.is_none() {
            let stream = device.cuda_stream();
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
            let launched = self.launch(device);
            let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
            launched?;
            let graph = graph?.context("capturing a step gave no graph")?;
            graph.upload()?;
            self.graph = Some(graph);
        }
        match &self.graph {
            Some(graph) => Ok(graph.launch()?),
            None => bail!("a step without its graph"),
        }
    }

    fn launch(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: all addresses come from the session's own memory, which lives as long as this step.
        Ok(unsafe { self.launch.launch(device) }?)
    }
}

/// Makes the kernel's jobs of fusion's.
struct Planner<'a> {
    weights: &'a Weights,
    memory: &'a Memory,
    jobs: Jobs,
}

impl Planner<'_> {
    fn add(&mut self, job: &fusion::Job) -> Result<()> {
        match job {
            fusion::Job::Embed { .. } => Ok(()),
            fusion::Job::Matvec { inputs, parts, join } => self.multiply(inputs, parts, *join),
            fusion::Job::Attention { q, append, cache, out, scale, bias } => {
                let (q_at, out) = (self.memory.at(*q, self.weights)?, self.memory.at(*out, self.weights)?);
                let plain = Attention { q: q_at, out, scale: *scale, ..self.cached(*cache, *q)? };
                let appending = append.as_ref().map_or(Ok(plain), |append| self.appending(append, plain))?;
                let attention = bias.map_or(Ok(appending), |bias| self.biased(bias, appending))?;
                Ok(self.jobs.attend(attention)?)
            }
        }
    }

    fn cached(&self, cache: CacheId, q: BufferId) -> Result<Attention> {
        let Self { weights, memory, .. } = self;
        let device = &weights.device;
        let (spec, split) = (weights.model.caches[cache.0], split(weights, cache, q));
        let cache = &weights.caches[cache.0];
        let state = address(&weights.state, device);
        Ok(Attention {
            keys: address(&cache.keys, device),
            values: address(&cache.values, device),
            // The state is token, position, step and the encoder's rows.
            position: state + 4,
            length: state + 12,
            partials: address(&memory.partials, device),
            arrived: address(&memory.arrived, device),
            kv_heads: dimension(spec.kv_heads)?,
            group: dimension(group(weights, spec, q))?,
            d: dimension(spec.head_dim)?,
            d_pad: dimension(cache.d_pad)?,
            capacity: dimension(cache.capacity)?,
            span: dimension(split.span)?,
            splits: dimension(split.splits)?,
            ..Attention::default()
        })
    }

    fn appending(&self, append: &Append, job: Attention) -> Result<Attention> {
        let weights = self.weights;
        let (k, v) = (self.memory.at(append.k, weights)?, self.memory.at(append.v, weights)?);
        let job = Attention { k, v, ..job };
        let Some(rotate) = append.rotate else { return Ok(job) };
        let angles = address(&weights.angles[rotate.rope.0], &weights.device);
        Ok(Attention { angles, rotary: dimension(weights.model.ropes[rotate.rope.0].rotary_dim)?, ..job })
    }

    fn biased(&self, bias: BiasId, job: Attention) -> Result<Attention> {
        let table = &self.weights.biases[bias.0];
        Ok(Attention { bias: table.address(&self.weights.device), reach: dimension(table.reach)?, ..job })
    }

    fn multiply(&mut self, inputs: &[fusion::Input], parts: &[fusion::Part], join: Join) -> Result<()> {
        let weights = self.weights;
        let vector = |id: crate::plan::VectorId| address(&weights.vectors[id.0], &weights.device);
        let input = |input: &fusion::Input| -> Result<Input> {
            let x = self.memory.at(input.x, weights)?;
            let plain = Input { x, scale: input.scale, is_tagged: 1, ..Input::default() };
            Ok(match input.norm {
                None => plain,
                Some(norm) => {
                    let (kind, norm_bias) = match norm.kind {
                        NormKind::Rms => (NORM_RMS, address(&weights.zeros, &weights.device)),
                        NormKind::Layer { bias } => (NORM_LAYER, vector(bias)),
                    };
                    let norm_weight = vector(norm.weight);
                    Input { norm_weight, norm_bias, epsilon: norm.epsilon, norm: kind, ..plain }
                }
            })
        };
        let product = |part: &fusion::Part, out: BufferId, activation| -> Result<Product> {
            Ok(Product {
                matrix: weights.matrices[part.weight.0].streamed(),
                bias: part.bias.map_or(0, vector),
                out: self.memory.optional(out, weights),
                activation,
            })
        };
        let outlier_columns = address(&weights.outlier_columns, &weights.device);
        let plain = Epilogue { outlier_columns, puts: Puts::TaggedHalves, ..Epilogue::default() };
        let number = |part: &fusion::Part| part.activation.map_or(0, activation_number);
        let (mode, products, epilogue) = match join {
            Join::Gated { kind, out } => {
                let products = parts.iter().map(|part| product(part, out, activation_number(kind)));
                (Mode::Gated, products.collect::<Result<Vec<_>>>()?, plain)
            }
            Join::Residual { x } => {
                let products = parts.iter().map(|part| product(part, part.out, 0)).collect::<Result<Vec<_>>>()?;
                let residual = self.memory.at(x, weights)?;
                (Mode::Joined, products, Epilogue { residual, ..plain })
            }
            Join::Apart => {
                let products = parts.iter().map(|part| product(part, part.out, number(part)));
                (Mode::Apart, products.collect::<Result<Vec<_>>>()?, plain)
            }
            Join::Argmax => {
                let products = parts.iter().map(|part| product(part, part.out, 0)).collect::<Result<Vec<_>>>()?;
                let logits = address(&weights.logits, &weights.device);
                (Mode::Apart, products, Epilogue { logits, ..plain })
            }
        };
        let inputs = inputs.iter().map(input).collect::<Result<Vec<_>>>()?;
        Ok(self.jobs.multiply(mode, inputs, &products, epilogue)?)
    }
}

impl Memory {
    fn new(weights: &Weights, fused: &[fusion::Job]) -> Result<Self> {
        let (device, model) = (&weights.device, &weights.model);
        let width = |id: BufferId| model.decoder.buffers[id.0].width;
        let mut memory = Self {
            buffers: (0..model.decoder.buffers.len()).map(|_| None).collect(),
            partials: device.alloc_zeros(1)?,
            arrived: device.alloc_zeros(1)?,
            best: device.alloc_zeros(weights.facts.multiprocessors)?,
            ended: device.alloc_zeros(COUNTERS)?,
        };
        let (mut partials, mut counters) = (1, 1);
        for job in fused {
            let halves = match job {
                fusion::Job::Embed { out, .. } => {
                    memory.buffers[out.0] = Some(device.alloc_zeros(2 * padded_floats(width(*out)))?);
                    vec![]
                }
                fusion::Job::Attention { q, cache, out, .. } => {
                    let spec = model.caches[cache.0];
                    let split = split(weights, *cache, *q);
                    let heads = width(*q) / spec.head_dim;
                    partials = partials.max(split.partials(heads, spec.head_dim));
                    counters = counters.max(heads);
                    vec![*out]
                }
                fusion::Job::Matvec { parts, join, .. } => match join {
                    Join::Apart => parts.iter().map(|part| part.out).collect(),
                    Join::Gated { out, .. } => vec![*out],
                    Join::Residual { .. } | Join::Argmax => vec![],
                },
            };
            for id in halves {
                memory.buffers[id.0] = Some(device.alloc_zeros(width(id))?);
            }
        }
        memory.partials = device.alloc_zeros(partials)?;
        memory.arrived = device.alloc_zeros(counters)?;
        Ok(memory)
    }

    /// Where a token is written and the next embedding is read, whoever finds the token.
    fn head(&self, weights: &Weights, advance: usize) -> Result<Head> {
        let Some((table, scale, out)) = weights.model.decoder.ops.iter().find_map(|op| match op {
            Op::Embed { table, scale, out, .. } => Some((*table, *scale, *out)),
            _ => None,
        }) else {
            bail!("a decoder without an embedding")
        };
        let streamed = weights.matrices[table.0].streamed();
        Ok(Head {
            best: address(&self.best, &weights.device),
            state: address(&weights.state, &weights.device),
            host: weights.ring.address(),
            table: streamed.weight,
            embedding: self.at(out, weights)?,
            table_scale: scale,
            table_stride: dimension(streamed.stride_bytes / size_of::<f16>())?,
            hidden: dimension(streamed.k)?,
            host_slots: super::ring::SLOTS as i32,
            advance: dimension(advance)?,
        })
    }

    fn bytes(&self) -> usize {
        let buffers: usize = self.buffers.iter().flatten().map(CudaSlice::num_bytes).sum();
        let counters = self.arrived.num_bytes() + self.best.num_bytes() + self.ended.num_bytes();
        buffers + self.partials.num_bytes() + counters
    }

    fn at(&self, id: BufferId, weights: &Weights) -> Result<u64> {
        let buffer = self.buffers[id.0].as_ref().context("a job reads what no other writes")?;
        Ok(address(buffer, &weights.device))
    }

    /// 0 for a buffer that fusion has left out.
    fn optional(&self, id: BufferId, weights: &Weights) -> u64 {
        self.buffers[id.0].as_ref().map_or(0, |buffer| address(buffer, &weights.device))
    }
}

/// Query heads of a key/value head.
fn group(weights: &Weights, spec: CacheSpec, q: BufferId) -> usize {
    weights.model.decoder.buffers[q.0].width / spec.head_dim / spec.kv_heads
}

fn split(weights: &Weights, cache: CacheId, q: BufferId) -> Split {
    let (spec, cache) = (weights.model.caches[cache.0], &weights.caches[cache.0]);
    Split::new(cache.capacity, spec.kv_heads * group(weights, spec, q), cache.d_pad, weights.facts)
}
