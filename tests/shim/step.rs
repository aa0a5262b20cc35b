//! Whole decode steps of tiny models, fused as the engine fuses them, against the reference runs in tests/golden.

use std::path::Path;

use half::f16;
use quantbench::events::Silent;
use quantbench::kernels::cuda::attention::{self, Attention, Split};
use quantbench::kernels::cuda::matvec::{Epilogue, Facts, Head, Input, Mode, NORM_LAYER, NORM_RMS, Product, Streamed};
use quantbench::plan::fusion::{self, Join, Launch, fuse};
use quantbench::plan::{ActivationKind, BufferId, MatrixId, Model, NormKind, VectorId};
use quantbench::quant::{FormatOptions, HalfMatrix};
use quantbench::weights::policy::Formats;
use quantbench::weights::spec::VectorKind;
use quantbench::weights::{self, Request};
use safetensors::SafeTensors;

use super::host::{CHIPS, Host};
use super::matvec::launch;
use super::memory::Memory;
use super::place::place;

/// fp16 compute moves logits by up to 0.04 on these models (tests/golden/README.md).
const LOGIT_TOLERANCE: f32 = 0.1;
/// Tokens that are generated behind a prompt.
const N_GEN: usize = 5;
/// Steps of a golden run.
const GOLDEN_STEPS: usize = 16;
const CAPACITY: usize = 80;
const SLOTS: usize = 64;

/// Every step hands token, position and embedding to the next one on the device.
pub fn decode_steps_follow_the_reference() {
    let runs = [("fp16", "golden", ""), ("nf4", "quant_golden", "nf4_f32.")];
    for (turn, model) in ["llama-tiny", "llama-odd", "phi-tiny", "phi-odd"].into_iter().enumerate() {
        for (offset, (precision, file, prefix)) in runs.into_iter().enumerate() {
            let memory = Memory::default();
            let host = Host { chip: CHIPS[(turn + offset) % 2], memory: &memory };
            let session = Session::load(model, precision, &host, [16, 5][turn % 2]);
            let ids: Vec<u32> = golden(model, "golden", "p1.input_ids").iter().map(|id| *id as u32).collect();
            let expected = golden(model, file, &format!("{prefix}p1.step_logits"));
            let expected: Vec<&[f32]> = expected.chunks_exact(session.model.vocab).collect();
            assert_eq!(expected.len(), GOLDEN_STEPS);
            for (position, token) in ids.iter().enumerate() {
                session.place(*token, position);
                session.step();
            }
            for (step, expected) in expected[..N_GEN].iter().enumerate() {
                let logits: Vec<f32> = memory.read(session.logits, session.model.vocab);
                let worst = logits.iter().zip(*expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= LOGIT_TOLERANCE, "{model} {precision} step {step}: logits differ by {worst}");
                let state: Vec<i32> = memory.read(session.state, 4);
                assert_eq!(state[1] as usize, ids.len() + step, "{model} {precision} step {step}");
                // A close call may part the runs.
                if !leads(expected, state[0] as usize) {
                    break;
                }
                session.step();
            }
        }
    }
}

/// Whether `token` is the reference's.
fn leads(logits: &[f32], token: usize) -> bool {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert!(logits[token] >= largest - 2.0 * LOGIT_TOLERANCE, "{} is no close call to {largest}", logits[token]);
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
    multiprocessors: usize,
    model: Model,
    launches: Vec<Launch>,
    matrices: Vec<Streamed>,
    vectors: Vec<u64>,
    /// Keys and values.
    caches: Vec<[u64; 2]>,
    angles: Vec<u64>,
    /// By buffer of the plan; 0 for what no launch writes.
    buffers: Vec<u64>,
    state: u64,
    logits: u64,
    zeros: u64,
    partials: u64,
    arrived: u64,
    head: Head,
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
        let matrices: Vec<Streamed> = model
            .matrices
            .iter()
            .map(|spec| {
                let data = read(&spec.name, spec.n, spec.n * spec.k);
                let stored =
                    formats.of(spec.role).quantize(HalfMatrix { n: spec.n, k: spec.k, data }).expect("quantize");
                place(memory, formats.of(spec.role).name(), &*stored, FormatOptions::default().int8_threshold)
            })
            .collect();
        let vectors = model.vectors.iter().map(|spec| {
            let offset = if spec.kind == VectorKind::NormOffset { 1.0 } else { 0.0 };
            let values = read(&spec.name, spec.len, spec.len);
            memory.hold(&values.iter().map(|value| value.to_f32() + offset).collect::<Vec<_>>())
        });
        let vectors = vectors.collect();
        let caches = model.caches.iter().map(|spec| {
            let zeros = vec![f16::ZERO; spec.kv_heads * CAPACITY * spec.head_dim.next_multiple_of(8)];
            [memory.hold(&zeros), memory.hold(&zeros)]
        });
        let angles = model.ropes.iter().map(|rope| {
            let at = |position: usize| rope.inverse_frequencies.iter().map(move |f| position as f32 * f);
            let values = (0..CAPACITY).flat_map(at).flat_map(|angle| [angle.cos(), angle.sin()]);
            memory.hold(&values.collect::<Vec<f32>>())
        });
        let format_of = |id: MatrixId| matrices[id.0].family.kernels[0];
        let launches = fuse(&model.decoder, &format_of).expect("a decoder");
        let (state, logits) = (memory.hold(&[0; 4]), memory.room::<f32>(model.vocab));
        let mut session = Self {
            host,
            multiprocessors,
            vectors,
            caches: caches.collect(),
            angles: angles.collect(),
            buffers: vec![0; model.decoder.buffers.len()],
            state,
            logits,
            zeros: memory.hold(&vec![0.0f32; 4096]),
            partials: memory.room::<f32>(1 << 16),
            arrived: memory.hold(&[0; 64]),
            head: Head::default(),
            launches,
            matrices,
            model,
        };
        session.place_buffers();
        session
    }

    /// fp32 for the residual stream, fp16 for everything else, and what the head writes.
    fn place_buffers(&mut self) {
        let width = |id: BufferId| self.model.decoder.buffers[id.0].width;
        for launch in &self.launches {
            let halves = match launch {
                Launch::Embed { table, scale, out } => {
                    self.buffers[out.0] = self.host.memory.room::<f32>(width(*out));
                    let table = self.matrices[table.0];
                    self.head = Head {
                        logits: self.logits,
                        best: self.host.memory.room::<u64>(self.multiprocessors),
                        arrived: self.host.memory.hold(&[0]),
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
                Launch::Attention { out, .. } => vec![*out],
                Launch::Matvec { parts, join: Join::Apart, .. } => parts.iter().map(|part| part.out).collect(),
                Launch::Matvec { join: Join::Gated { out, .. }, .. } => vec![*out],
                Launch::Matvec { .. } => vec![],
            };
            halves.into_iter().for_each(|id| self.buffers[id.0] = self.host.memory.room::<f16>(width(id)));
        }
    }

    /// Puts `token` at `position`, as a prompt's.
    fn place(&self, token: u32, position: usize) {
        let head = self.head;
        let stride = head.table_stride as usize;
        let table: Vec<f16> = self.host.memory.read(head.table, (token as usize + 1) * stride);
        let row = &table[token as usize * stride..][..head.hidden as usize];
        let embedding: Vec<f32> = row.iter().map(|value| value.to_f32() * head.table_scale).collect();
        self.host.memory.write(head.embedding, &embedding);
        self.host.memory.write(self.state, &[token as i32, position as i32, position as i32, 0]);
    }

    fn step(&self) {
        for launch in &self.launches {
            match launch {
                Launch::Embed { .. } => {}
                Launch::Matvec { inputs, parts, join } => self.multiply(inputs, parts, *join),
                Launch::Attention { .. } => self.attend(launch),
            }
        }
    }

    fn vector(&self, id: VectorId) -> u64 {
        self.vectors[id.0]
    }

    fn input(&self, input: &fusion::Input) -> Input {
        let plain = Input { x: self.buffers[input.x.0], scale: input.scale, ..Input::default() };
        let Some(norm) = input.norm else { return plain };
        let (kind, norm_bias) = match norm.kind {
            NormKind::Rms => (NORM_RMS, self.zeros),
            NormKind::Layer { bias } => (NORM_LAYER, self.vector(bias)),
        };
        Input { norm_weight: self.vector(norm.weight), norm_bias, epsilon: norm.epsilon, norm: kind, ..plain }
    }

    fn multiply(&self, inputs: &[fusion::Input], parts: &[fusion::Part], join: Join) {
        let product = |part: &fusion::Part, out: BufferId, activation: Option<ActivationKind>| Product {
            matrix: self.matrices[part.weight.0],
            bias: part.bias.map_or(0, |bias| self.vector(bias)),
            out: self.buffers[out.0],
            activation: activation.map_or(0, number),
        };
        let all = |of: &dyn Fn(&fusion::Part) -> Product| parts.iter().map(of).collect::<Vec<_>>();
        let own = all(&|part| product(part, part.out, part.activation));
        let plain = Epilogue::default();
        let (mode, products, epilogue) = match join {
            Join::Apart => (Mode::Apart, own, plain),
            Join::Gated { kind, out } => (Mode::Gated, all(&|part| product(part, out, Some(kind))), plain),
            Join::Residual { x } => (Mode::Joined, own, Epilogue { residual: self.buffers[x.0], ..plain }),
            Join::Argmax => (Mode::Apart, own, Epilogue { head: self.head, ..plain }),
        };
        let inputs: Vec<_> = inputs.iter().map(|input| self.input(input)).collect();
        launch(self.host, self.multiprocessors, mode, &inputs, &products, epilogue);
    }

    fn attend(&self, launch: &Launch) {
        let Launch::Attention { q, append: Some(append), cache, out, scale, bias: None } = launch else {
            panic!("{launch:?} in a decoder without an encoder")
        };
        let spec = self.model.caches[cache.0];
        let split = Split::new(CAPACITY, spec.kv_heads, Facts { multiprocessors: self.multiprocessors });
        let group = self.model.decoder.buffers[q.0].width / spec.head_dim / spec.kv_heads;
        let rope = append.rotate.map(|rotate| rotate.rope.0);
        let job = attention::Job {
            q: self.buffers[q.0],
            k: self.buffers[append.k.0],
            v: self.buffers[append.v.0],
            keys: self.caches[cache.0][0],
            values: self.caches[cache.0][1],
            out: self.buffers[out.0],
            angles: rope.map_or(0, |rope| self.angles[rope]),
            position: self.state + 4,
            length: self.state + 12,
            partials: self.partials,
            arrived: self.arrived,
            scale: *scale,
            group: group as i32,
            d: spec.head_dim as i32,
            d_pad: spec.head_dim.next_multiple_of(8) as i32,
            rotary: rope.map_or(0, |rope| self.model.ropes[rope].rotary_dim as i32),
            capacity: CAPACITY as i32,
            span: split.span as i32,
            splits: split.splits as i32,
            ..attention::Job::default()
        };
        // SAFETY: every address in it is of the host's memory.
        unsafe { Attention::plan(spec.kv_heads, job).launch_on(self.host) }.expect("attention");
    }
}

/// `enum Activation` of matvec.cuh.
fn number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Silu => 1,
        ActivationKind::GeluTanh => 2,
        ActivationKind::Relu => 3,
    }
}
