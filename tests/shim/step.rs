//! Whole decode steps of tiny models, each one launch as the engine has it, against the reference runs in tests/golden.

use std::path::Path;

use half::f16;
use quantbench::events::Silent;
use quantbench::kernels::cuda::attention::{Attention, Split};
use quantbench::kernels::cuda::matvec::{Epilogue, Input, Mode, NORM_LAYER, NORM_RMS, Product, Puts, Streamed};
use quantbench::kernels::cuda::program::{COUNTERS, Facts, Head, Jobs, Planned, tagged_float};
use quantbench::plan::fusion::{self, Join, fuse};
use quantbench::plan::{ActivationKind, BiasId, BufferId, MatrixId, Model, NormKind, Op, RelativeBias, VectorId};
use quantbench::quant::{FormatOptions, HalfMatrix, Stored};
use quantbench::weights::policy::Formats;
use quantbench::weights::spec::VectorKind;
use quantbench::weights::{self, Request};
use safetensors::SafeTensors;

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::place::place;

/// Tokens that are generated behind a prompt.
const N_GEN: usize = 5;
/// Steps of a golden run.
const GOLDEN_STEPS: usize = 16;
const CAPACITY: usize = 80;
const SLOTS: usize = 64;

/// A precision, the golden logits that it is compared with, and how far they may be off.
type Case = (&'static str, &'static str, &'static str, f32);
/// fp16 compute moves logits by up to 0.04 on these models (tests/golden/README.md).
const RUNS: [Case; 2] = [("fp16", "golden", "", 0.1), ("nf4", "quant_golden", "nf4_f32.", 0.1)];
/// An activation that crosses a rounding boundary moves logits by up to 0.7: once in the prompt, whose outliers are found token by
/// token here, and once in the step; and fp16 as above.
const INT8: Case = ("int8", "quant_golden", "int8_f32.", 1.5);

pub fn decode_steps_follow_the_reference() {
    for (turn, model) in ["llama-tiny", "llama-odd", "phi-tiny", "phi-odd"].into_iter().enumerate() {
        for (offset, case) in RUNS.into_iter().enumerate() {
            decode(model, case, CHIPS[(turn + offset) % CHIPS.len()], [16, 5][turn % 2]);
        }
    }
}

/// Cross-attention, a relative bias and matrices in fp32, behind the output of an encoder in fp32; and LLM.int8.
pub fn decode_steps_of_every_kind_follow_the_reference() {
    decode("t5-tiny", RUNS[0], CHIPS[0], 16);
    decode("t5-odd", RUNS[0], CHIPS[1], 5);
    decode("t5-tied-relu", RUNS[0], CHIPS[2], 5);
    decode("llama-tiny", INT8, CHIPS[2], 5);
}

/// Every step hands token, position and embedding to the next one on the device.
fn decode(model: &str, (precision, file, prefix, tolerance): Case, chip: u32, multiprocessors: usize) {
    let memory = Memory::default();
    let host = Host { chip, memory: &memory };
    let session = Session::load(model, precision, &host, multiprocessors);
    let what = format!("{model} {precision}, chip {chip}, {multiprocessors} multiprocessors");
    let ids: Vec<u32> = golden(model, "golden", "p1.input_ids").iter().map(|id| *id as u32).collect();
    let ids = session.model.decoder_start.map_or(ids, |start| vec![start]);
    let expected = golden(model, file, &format!("{prefix}p1.step_logits"));
    let expected: Vec<&[f32]> = expected.chunks_exact(session.model.vocab).collect();
    assert_eq!(expected.len(), GOLDEN_STEPS);
    for (position, token) in ids.iter().enumerate() {
        session.place(*token, position);
        session.step();
    }
    for (step, expected) in expected[..N_GEN].iter().enumerate() {
        let logits: Vec<f32> = memory.read(session.logits, session.model.vocab);
        for (at, (logit, expected)) in logits.iter().zip(*expected).enumerate() {
            assert!(
                (logit - expected).abs() <= tolerance,
                "{what}: logit {at} of step {step} is {logit}, not {expected}"
            );
        }
        let state: Vec<i32> = memory.read(session.state, 4);
        assert_eq!(state[1] as usize, ids.len() + step, "{what}: step {step}");
        // A close call may part the runs.
        if !leads(expected, state[0] as usize, tolerance) {
            break;
        }
        session.step();
    }
}

/// Whether `token` is the reference's.
fn leads(logits: &[f32], token: usize, tolerance: f32) -> bool {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!(logits[token] >= largest - 2.0 * tolerance, "{} is no close call to {largest}", logits[token]);
    logits[token] == largest
}

/// Values of a golden tensor, fp32 or int32.
fn golden(model: &str, file: &str, name: &str) -> Vec<f32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/expected/{model}/{file}.safetensors"));
    let bytes = std::fs::read(path).expect("a golden file");
    let tensors = SafeTensors::deserialize(&bytes).expect("a golden file");
    let tensor = tensors.tensor(name).expect("a golden tensor");
    match tensor.dtype() {
        safetensors::Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        _ => tensor.data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
    }
}

/// A model in host memory, as the engine has it on a device.
struct Session<'a> {
    host: &'a Host<'a>,
    facts: Facts,
    model: Model,
    matrices: Vec<Streamed>,
    vectors: Vec<u64>,
    /// Keys and values.
    caches: Vec<[u64; 2]>,
    angles: Vec<u64>,
    /// By distance, and its reach.
    biases: Vec<(u64, usize)>,
    /// By buffer of the plan; 0 for what no job writes.
    buffers: Vec<u64>,
    state: u64,
    logits: u64,
    zeros: u64,
    partials: u64,
    arrived: u64,
    head: Head,
    launch: Option<Planned>,
}

impl<'a> Session<'a> {
    fn load(name: &str, precision: &str, host: &'a Host<'a>, multiprocessors: usize) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name);
        let checkpoint = weights::open(&Request::of(folder.display().to_string()), &Silent).expect("a golden model");
        let model = quantbench::models::build(&checkpoint.config).expect("a golden model");
        let source = checkpoint.source(&model.matrices, &model.vectors).expect("a golden model");
        let formats = Formats::new(precision, FormatOptions::default()).expect("a precision");
        let (memory, read) = (host.memory, |name: &str, rows: usize, len: usize| {
            let mut data = vec![f16::ZERO; len];
            source.read_rows(name, 0..rows, &mut data).expect("a golden tensor");
            data
        });
        let stored = model.matrices.iter().map(|spec| {
            let data = read(&spec.name, spec.n, spec.n * spec.k);
            formats.of(spec.role).quantize(HalfMatrix { n: spec.n, k: spec.k, data }).expect("quantize")
        });
        let stored: Vec<Box<dyn Stored>> = stored.collect();
        let matrices = model.matrices.iter().zip(&stored).map(|(spec, stored)| {
            place(memory, formats.of(spec.role).name(), &**stored, FormatOptions::default().int8_threshold)
        });
        let matrices: Vec<Streamed> = matrices.collect();
        let vectors = model.vectors.iter().map(|spec| {
            let offset = if spec.kind == VectorKind::NormOffset { 1.0 } else { 0.0 };
            let values = read(&spec.name, spec.len, spec.len);
            let mut values: Vec<f32> = values.iter().map(|value| value.to_f32() + offset).collect();
            values.resize(values.len().next_multiple_of(2), 0.0);
            memory.hold(&values)
        });
        let vectors = vectors.collect();
        let caches = model.caches.iter().map(|spec| {
            let zeros = vec![f16::ZERO; spec.kv_heads * CAPACITY * spec.head_dim.next_multiple_of(8)];
            [memory.hold(&zeros), memory.hold(&zeros)]
        });
        let angles = model.ropes.iter().map(|rope| {
            let values = (0..CAPACITY).flat_map(|position| rope.turns(position)).flat_map(|(cos, sin)| [cos, sin]);
            memory.hold(&values.collect::<Vec<f32>>())
        });
        let biases = model.biases.iter().map(|bias| {
            let table = stored[bias.table.0].dequantize();
            (memory.hold(&by_distance(bias, &table, model.matrices[bias.table.0].n)), CAPACITY)
        });
        let format_of = |id: MatrixId| matrices[id.0].family.name;
        let fused = fuse(&model.decoder, &format_of).expect("a decoder");
        let (state, logits) = (memory.hold(&[0; 4]), memory.room::<f32>(model.vocab));
        let mut session = Self {
            host,
            facts: host.facts(multiprocessors),
            vectors,
            caches: caches.collect(),
            angles: angles.collect(),
            biases: biases.collect(),
            buffers: vec![0; model.decoder.buffers.len()],
            state,
            logits,
            zeros: memory.hold(&vec![0.0f32; 4096]),
            partials: memory.room::<f32>(1 << 16),
            arrived: memory.hold(&[0; 64]),
            head: Head::default(),
            launch: None,
            matrices,
            model,
        };
        session.place_buffers(&fused);
        session.encode(name, &stored);
        session.plan(&fused);
        session
    }

    /// What the golden encoder leaves for the decoder: keys and values of its output.
    fn encode(&self, name: &str, stored: &[Box<dyn Stored>]) {
        let Some(encoder) = &self.model.encoder else { return };
        let x = golden(name, "golden", "p1.encoder.final_norm");
        let linears =
            encoder.plan.ops.iter().filter_map(|op| if let Op::Linear { parts, .. } = op { Some(parts) } else { None });
        let linears: Vec<_> = linears.flatten().collect();
        for op in &encoder.plan.ops {
            let Op::Append { k, v, cache, .. } = op else { continue };
            let spec = self.model.caches[cache.0];
            let (d, rows) = (spec.head_dim, x.len() / self.model.matrices[linears[0].weight.0].k);
            self.host.memory.write(self.state + 12, &[rows as i32]);
            for (at, of) in self.caches[cache.0].into_iter().zip([k, v]) {
                let weight = linears.iter().find(|part| part.out == *of).expect("a product").weight;
                let y = stored[weight.0].multiply(&x, rows);
                for (row, y) in y.chunks_exact(spec.kv_heads * d).enumerate() {
                    for (head, y) in y.chunks_exact(d).enumerate() {
                        let place = (head * CAPACITY + row) * d.next_multiple_of(8);
                        let halves: Vec<f16> = y.iter().map(|value| f16::from_f32(*value)).collect();
                        self.host.memory.write(at + 2 * place as u64, &halves);
                    }
                }
            }
        }
    }

    /// Tagged fp32 for the residual stream, tagged fp16 for everything else, and what the head writes.
    fn place_buffers(&mut self, fused: &[fusion::Job]) {
        let width = |id: BufferId| self.model.decoder.buffers[id.0].width;
        for job in fused {
            let halves = match job {
                fusion::Job::Embed { table, scale, out } => {
                    self.buffers[out.0] = self.host.memory.hold(&vec![0u64; width(*out).next_multiple_of(2)]);
                    let table = self.matrices[table.0];
                    self.head = Head {
                        best: self.host.memory.room::<u64>(self.facts.multiprocessors),
                        state: self.state,
                        host: self.host.memory.hold(&[0u64; SLOTS]),
                        table: table.weight,
                        embedding: self.buffers[out.0],
                        table_scale: *scale,
                        table_stride: (table.stride_bytes / size_of::<f16>()) as i32,
                        hidden: table.k as i32,
                        host_slots: SLOTS as i32,
                        advance: 1,
                    };
                    vec![]
                }
                fusion::Job::Attention { out, .. } => vec![*out],
                fusion::Job::Matvec { parts, join: Join::Apart, .. } => parts.iter().map(|part| part.out).collect(),
                fusion::Job::Matvec { join: Join::Gated { out, .. }, .. } => vec![*out],
                fusion::Job::Matvec { .. } => vec![],
            };
            halves.into_iter().for_each(|id| self.buffers[id.0] = self.host.memory.hold(&vec![0u32; width(id)]));
        }
    }

    /// Puts `token` at `position`, as a prompt's.
    fn place(&self, token: u32, position: usize) {
        let head = self.head;
        let stride = head.table_stride as usize;
        let table: Vec<f16> = self.host.memory.read(head.table, (token as usize + 1) * stride);
        let row = &table[token as usize * stride..][..head.hidden as usize];
        let embedding: Vec<u64> = row.iter().map(|value| tagged_float(value.to_f32() * head.table_scale)).collect();
        self.host.memory.write(head.embedding, &embedding);
        self.host.memory.write(self.state, &[token as i32, position as i32, position as i32]);
    }

    fn plan(&mut self, fused: &[fusion::Job]) {
        let mut jobs = Jobs::new(self.facts);
        for job in fused {
            match job {
                fusion::Job::Embed { .. } => {}
                fusion::Job::Matvec { inputs, parts, join } => self.multiply(&mut jobs, inputs, parts, *join),
                fusion::Job::Attention { .. } => self.attend(&mut jobs, job),
            }
        }
        let mut planned = jobs.plan(self.host.memory.hold(jobs.list())).expect("a plan");
        planned.program.ended = self.host.memory.hold(&[0u32; COUNTERS]);
        planned.program.head = self.head;
        self.launch = Some(planned);
    }

    fn step(&self) {
        let planned = self.launch.expect("a plan");
        // SAFETY: every address in it is of the host's memory.
        unsafe { planned.launch_on(self.host) }.unwrap_or_else(|error| panic!("chip {}: {error}", self.host.chip));
    }

    fn vector(&self, id: VectorId) -> u64 {
        self.vectors[id.0]
    }

    fn input(&self, input: &fusion::Input) -> Input {
        let plain = Input { x: self.buffers[input.x.0], scale: input.scale, is_tagged: 1, ..Input::default() };
        let Some(norm) = input.norm else { return plain };
        let (kind, norm_bias) = match norm.kind {
            NormKind::Rms => (NORM_RMS, self.zeros),
            NormKind::Layer { bias } => (NORM_LAYER, self.vector(bias)),
        };
        Input { norm_weight: self.vector(norm.weight), norm_bias, epsilon: norm.epsilon, norm: kind, ..plain }
    }

    fn multiply(&self, jobs: &mut Jobs, inputs: &[fusion::Input], parts: &[fusion::Part], join: Join) {
        let product = |part: &fusion::Part, out: BufferId, activation: Option<ActivationKind>| Product {
            matrix: self.matrices[part.weight.0],
            bias: part.bias.map_or(0, |bias| self.vector(bias)),
            out: self.buffers[out.0],
            activation: activation.map_or(0, number),
        };
        let all = |of: &dyn Fn(&fusion::Part) -> Product| parts.iter().map(of).collect::<Vec<_>>();
        let own = all(&|part| product(part, part.out, part.activation));
        let plain = Epilogue { puts: Puts::TaggedHalves, ..Epilogue::default() };
        let (mode, products, epilogue) = match join {
            Join::Apart => (Mode::Apart, own, plain),
            Join::Gated { kind, out } => (Mode::Gated, all(&|part| product(part, out, Some(kind))), plain),
            Join::Residual { x } => (Mode::Joined, own, Epilogue { residual: self.buffers[x.0], ..plain }),
            Join::Argmax => (Mode::Apart, own, Epilogue { logits: self.logits, ..plain }),
        };
        let inputs = inputs.iter().map(|input| self.input(input)).collect();
        jobs.multiply(mode, inputs, &products, epilogue).expect("a job");
    }

    fn attend(&self, jobs: &mut Jobs, job: &fusion::Job) {
        let fusion::Job::Attention { q, append, cache, out, scale, bias } = job else { panic!("{job:?}") };
        let spec = self.model.caches[cache.0];
        let group = self.model.decoder.buffers[q.0].width / spec.head_dim / spec.kv_heads;
        let split = Split::new(CAPACITY, spec.kv_heads * group, spec.head_dim.next_multiple_of(8), self.facts);
        let rope = append.and_then(|append| append.rotate).map(|rotate| rotate.rope.0);
        let (bias, reach) = bias.map_or((0, 0), |BiasId(bias)| self.biases[bias]);
        let job = Attention {
            q: self.buffers[q.0],
            k: append.map_or(0, |append| self.buffers[append.k.0]),
            v: append.map_or(0, |append| self.buffers[append.v.0]),
            keys: self.caches[cache.0][0],
            values: self.caches[cache.0][1],
            out: self.buffers[out.0],
            angles: rope.map_or(0, |rope| self.angles[rope]),
            bias,
            reach: reach as i32,
            position: self.state + 4,
            length: self.state + 12,
            partials: self.partials,
            arrived: self.arrived,
            scale: *scale,
            kv_heads: spec.kv_heads as i32,
            group: group as i32,
            d: spec.head_dim as i32,
            d_pad: spec.head_dim.next_multiple_of(8) as i32,
            rotary: rope.map_or(0, |rope| self.model.ropes[rope].rotary_dim as i32),
            capacity: CAPACITY as i32,
            span: split.span as i32,
            splits: split.splits as i32,
            ..Attention::default()
        };
        jobs.attend(job).expect("a job");
    }
}

/// A relative bias as attention reads it: `[h, 2 · CAPACITY + 1]`.
fn by_distance(bias: &RelativeBias, table: &[f32], buckets: usize) -> Vec<f32> {
    let (heads, reach) = (table.len() / buckets, CAPACITY as i64);
    let of_head = |head| (-reach..=reach).map(move |distance| table[bias.bucket(distance, buckets) * heads + head]);
    (0..heads).flat_map(of_head).collect()
}

/// `enum Activation` of job.cuh.
fn number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Silu => 1,
        ActivationKind::GeluTanh => 2,
        ActivationKind::Relu => 3,
    }
}
