//! One decode step: the fused launches of a plan over fixed memory, replayed as one graph.

use anyhow::{Context, Result, bail};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, sys};
use half::f16;

use super::{Weights, activation_number};
use crate::engine::OutlierColumns;
use crate::kernels::cuda::attention::{self, Attention, Split};
use crate::kernels::cuda::launch::{address, dimension};
use crate::kernels::cuda::matvec::{Epilogue, Facts, Head, Input, Matvec, Mode, NORM_LAYER, NORM_RMS, Product};
use crate::plan::fusion::{self, Join, Launch, fuse};
use crate::plan::{BufferId, CacheId, MatrixId, NormKind, Op};

/// Launches of a step and the memory between them.
pub struct Step {
    launches: Vec<Ready>,
    graph: Option<CudaGraph>,
    memory: Memory,
    /// What one step looks through for outlier columns; the device counts those it finds.
    pub examines: OutlierColumns,
}

enum Ready {
    Matvec(Box<Matvec>),
    Attention(Attention),
}

/// What a step writes.
struct Memory {
    /// Row by row of the plan's buffers: fp32 where a residual lives, else fp16.
    buffers: Vec<Option<Buffer>>,
    partials: CudaSlice<f32>,
    /// One counter for each key/value head, then one for the head's blocks.
    arrived: CudaSlice<i32>,
    best: CudaSlice<u64>,
}

enum Buffer {
    Half(CudaSlice<f16>),
    Float(CudaSlice<f32>),
}

impl Buffer {
    fn address(&self, device: &CudaDevice) -> u64 {
        match self {
            Buffer::Half(values) => address(values, device),
            Buffer::Float(values) => address(values, device),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Buffer::Half(values) => 2 * values.len(),
            Buffer::Float(values) => 4 * values.len(),
        }
    }
}

/// Where a token is written and the next embedding is read, whoever finds the token.
pub fn head(weights: &Weights, embedding: u64, advance: usize) -> Result<Head> {
    let Some((table, scale)) = weights.model.decoder.ops.iter().find_map(|op| match op {
        Op::Embed { table, scale, .. } => Some((*table, *scale)),
        _ => None,
    }) else {
        bail!("a decoder without an embedding")
    };
    let streamed = weights.matrices[table.0].streamed();
    Ok(Head {
        logits: address(&weights.logits, &weights.device),
        best: 0,
        arrived: 0,
        state: address(&weights.state, &weights.device),
        host: weights.ring.address(),
        table: streamed.weight,
        embedding,
        table_scale: scale,
        table_stride: dimension(streamed.stride_bytes / size_of::<f16>())?,
        hidden: dimension(streamed.k)?,
        host_slots: super::ring::SLOTS as i32,
        advance: dimension(advance)?,
    })
}

impl Step {
    pub fn new(weights: &Weights) -> Result<Self> {
        let format_of = |id: MatrixId| weights.matrices[id.0].streamed().family.kernels[0];
        let launches = fuse(&weights.model.decoder, &format_of)?;
        let memory = Memory::new(weights, &launches)?;
        let mut step = Self { launches: Vec::new(), graph: None, memory, examines: OutlierColumns::default() };
        for launch in &launches {
            if let Some(ready) = step.ready(weights, launch).with_context(|| format!("at {launch:?}"))? {
                if let Ready::Matvec(matvec) = &ready {
                    let (rows, elements) = matvec.examines();
                    step.examines += OutlierColumns { calls: rows as u64, columns: 0, examined: elements as u64 };
                }
                step.launches.push(ready);
            }
        }
        Ok(step)
    }

    /// Where the embedding of the next token goes.
    pub fn embedding(&self, weights: &Weights) -> Result<u64> {
        let out = weights.model.decoder.ops.iter().find_map(|op| match op {
            Op::Embed { out, .. } => Some(*out),
            _ => None,
        });
        self.memory.at(out.context("a decoder without an embedding")?, weights)
    }

    /// Memory for the head's blocks, for a call that finds its token outside of a step.
    pub fn place_head(&self, head: &mut Head, weights: &Weights) {
        head.best = address(&self.memory.best, &weights.device);
        head.arrived = address(&self.memory.arrived, &weights.device) + 4 * weights.most_kv_heads() as u64;
    }

    pub fn bytes(&self) -> usize {
        let buffers: usize = self.memory.buffers.iter().flatten().map(Buffer::bytes).sum();
        buffers + 4 * self.memory.partials.len() + 4 * self.memory.arrived.len() + 8 * self.memory.best.len()
    }

    /// Queues one step: as a graph, or launch by launch.
    pub fn run(&mut self, device: &CudaDevice, as_graph: bool) -> Result<()> {
        if !as_graph {
            return self.launch_all(device);
        }
        if self.graph.is_none() {
            let stream = device.cuda_stream();
            stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
            let launched = self.launch_all(device);
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

    fn launch_all(&self, device: &CudaDevice) -> Result<()> {
        for launch in &self.launches {
            // SAFETY: all addresses come from the session's own memory, which lives as long as this step.
            unsafe {
                match launch {
                    Ready::Matvec(matvec) => matvec.launch(device)?,
                    Ready::Attention(attention) => attention.launch(device)?,
                }
            }
        }
        Ok(())
    }

    fn ready(&self, weights: &Weights, launch: &Launch) -> Result<Option<Ready>> {
        Ok(match launch {
            Launch::Embed { .. } => None,
            Launch::Matvec { inputs, parts, join } => {
                Some(Ready::Matvec(Box::new(self.matvec(weights, inputs, parts, *join)?)))
            }
            Launch::Attention { q, append, cache, out, scale, bias } => {
                let job = attention::Job {
                    q: self.memory.at(*q, weights)?,
                    out: self.memory.at(*out, weights)?,
                    scale: *scale,
                    ..self.attention_job(weights, *cache, *q)?
                };
                let job = match append {
                    Some(append) => attention::Job {
                        k: self.memory.at(append.k, weights)?,
                        v: self.memory.at(append.v, weights)?,
                        ..job
                    },
                    None => job,
                };
                let job = match append.and_then(|append| append.rotate) {
                    Some(rotate) => attention::Job {
                        angles: address(&weights.angles[rotate.rope.0], &weights.device),
                        rotary: dimension(weights.model.ropes[rotate.rope.0].rotary_dim)?,
                        ..job
                    },
                    None => job,
                };
                let job = match bias {
                    Some(bias) => attention::Job {
                        bias: weights.biases[bias.0].address(&weights.device),
                        reach: dimension(weights.biases[bias.0].reach)?,
                        ..job
                    },
                    None => job,
                };
                let kv_heads = weights.model.caches[cache.0].kv_heads;
                Some(Ready::Attention(Attention::new(&weights.device, kv_heads, job)?))
            }
        })
    }

    fn attention_job(&self, weights: &Weights, cache: CacheId, q: BufferId) -> Result<attention::Job> {
        let spec = weights.model.caches[cache.0];
        let cache = &weights.caches[cache.0];
        let split = Split::new(cache.capacity, spec.kv_heads, Facts::of(&weights.device)?);
        let group = weights.model.decoder.buffers[q.0].width / spec.head_dim / spec.kv_heads;
        let state = address(&weights.state, &weights.device);
        Ok(attention::Job {
            keys: address(&cache.keys, &weights.device),
            values: address(&cache.values, &weights.device),
            // The state is token, position, step and the encoder's rows.
            position: state + 4,
            length: state + 12,
            partials: address(&self.memory.partials, &weights.device),
            arrived: address(&self.memory.arrived, &weights.device),
            group: dimension(group)?,
            d: dimension(spec.head_dim)?,
            d_pad: dimension(cache.d_pad)?,
            capacity: dimension(cache.capacity)?,
            span: dimension(split.span)?,
            splits: dimension(split.splits)?,
            ..attention::Job::default()
        })
    }

    fn matvec(
        &self,
        weights: &Weights,
        inputs: &[fusion::Input],
        parts: &[fusion::Part],
        join: Join,
    ) -> Result<Matvec> {
        let vector = |id: crate::plan::VectorId| address(&weights.vectors[id.0], &weights.device);
        let input = |input: &fusion::Input| -> Result<Input> {
            let x = self.memory.at(input.x, weights)?;
            let plain = Input { x, scale: input.scale, ..Input::default() };
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
        let plain =
            Epilogue { outlier_columns: address(&weights.outlier_columns, &weights.device), ..Epilogue::default() };
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
                let mut head = head(weights, self.embedding(weights)?, 1)?;
                self.place_head(&mut head, weights);
                (Mode::Apart, products, Epilogue { head, ..plain })
            }
        };
        let inputs = inputs.iter().map(input).collect::<Result<Vec<_>>>()?;
        Ok(Matvec::new(&weights.device, mode, inputs, &products, epilogue)?)
    }
}

impl Memory {
    fn new(weights: &Weights, launches: &[Launch]) -> Result<Self> {
        let (device, model) = (&weights.device, &weights.model);
        let facts = Facts::of(device)?;
        let width = |id: BufferId| model.decoder.buffers[id.0].width;
        let mut memory = Self {
            buffers: (0..model.decoder.buffers.len()).map(|_| None).collect(),
            partials: device.alloc_zeros(1)?,
            arrived: device.alloc_zeros(weights.most_kv_heads() + 1)?,
            best: device.alloc_zeros(facts.multiprocessors)?,
        };
        let mut partials = 1;
        for launch in launches {
            let halves = match launch {
                Launch::Embed { out, .. } => {
                    memory.buffers[out.0] = Some(Buffer::Float(device.alloc_zeros(width(*out))?));
                    vec![]
                }
                Launch::Attention { q, cache, out, .. } => {
                    let spec = model.caches[cache.0];
                    let group = width(*q) / spec.head_dim / spec.kv_heads;
                    let split = Split::new(weights.caches[cache.0].capacity, spec.kv_heads, facts);
                    partials = partials.max(split.partials(spec.kv_heads, group, spec.head_dim));
                    vec![*out]
                }
                Launch::Matvec { parts, join, .. } => match join {
                    Join::Apart => parts.iter().map(|part| part.out).collect(),
                    Join::Gated { out, .. } => vec![*out],
                    Join::Residual { .. } | Join::Argmax => vec![],
                },
            };
            for id in halves {
                memory.buffers[id.0] = Some(Buffer::Half(device.alloc_zeros(width(id))?));
            }
        }
        memory.partials = device.alloc_zeros(partials)?;
        Ok(memory)
    }

    fn at(&self, id: BufferId, weights: &Weights) -> Result<u64> {
        let buffer = self.buffers[id.0].as_ref().context("a launch reads what no other writes")?;
        Ok(buffer.address(&weights.device))
    }

    /// 0 for a buffer that fusion has left out.
    fn optional(&self, id: BufferId, weights: &Weights) -> u64 {
        self.buffers[id.0].as_ref().map_or(0, |buffer| buffer.address(&weights.device))
    }
}
