//! A golden model in host memory, run by the lowering that the engine runs on a GPU.

use std::path::{Path, PathBuf};

use half::f16;
use quantbench::call::Batch;
use quantbench::events::Silent;
use quantbench::kernels::cuda::arena::{Arena, Layout};
use quantbench::kernels::cuda::launch::MemoryPlanner;
use quantbench::kernels::cuda::matvec::MatrixDesc;
use quantbench::kernels::cuda::place::DevicePlace;
use quantbench::kernels::cuda::rows::RowKernels;
use quantbench::kernels::cuda::step_kernel::DeviceProperties;
use quantbench::lower::cuda::step::{Allocation, StepMemory, StepProgram, fused};
use quantbench::lower::cuda::{
    self as lower, Addresses, BiasAt, CacheAt, CallInput, CallKind, CallShape, SessionAt, padded, padded_head, prefill,
};
use quantbench::plan::fuse::FusedOp;
use quantbench::plan::{BiasId, CacheId, EncoderInputKind, MatrixId, Model, RopeByLength, RopeId, VectorId};
use quantbench::quant::{FormatId, FormatOptions, HalfMatrix, OutlierColumns, Stored};
use quantbench::weights::policy::{Formats, Selection};
use quantbench::weights::spec::VectorKind;
use quantbench::weights::{self, ModelRequest};
use safetensors::SafeTensors;

use super::host::Host;
use super::place::place;

pub const CAPACITY: usize = 320;
pub const SLOTS: usize = 64;

pub struct Session<'a> {
    pub host: &'a Host<'a>,
    pub model: Model,
    pub formats: Formats,
    pub stored: Vec<Box<dyn Stored>>,
    pub fused: Vec<FusedOp>,
    pub buffers: StepMemory<u64>,
    /// Columns that prompts have examined for outliers.
    pub examined: OutlierColumns,
    properties: DeviceProperties,
    matrices: Vec<MatrixDesc>,
    vectors: Vec<u64>,
    caches: Vec<CacheAt>,
    /// Of steps, of calls, and [`lower::length_class`].
    angles: Vec<(u64, u64, usize)>,
    biases: Vec<BiasAt>,
    pub session: SessionAt,
    position: usize,
    encoded: usize,
    steps: usize,
    /// Where the sequences of a batch stand.
    pub places: Vec<DevicePlace>,
}

/// The folder of `name` in the first of the golden sets that has one.
fn find(places: [PathBuf; 2], name: &str) -> PathBuf {
    let [first, second] = places.map(|folder| folder.join(name));
    if first.exists() { first } else { second }
}

fn golden_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The families' models, as tests/architectures has them: `models/` and `golden/`.
pub fn architectures() -> PathBuf {
    std::env::var_os("QUANTBENCH_ARCHITECTURES").map_or(golden_root().join("architectures"), PathBuf::from)
}

/// The folder of a golden model.
pub fn folder(name: &str) -> PathBuf {
    find([golden_root().join("models"), architectures().join("models")], name)
}

/// Values of a golden tensor, fp32 or int32.
pub fn golden(model: &str, file: &str, name: &str) -> Vec<f32> {
    let folder = find([golden_root().join("expected"), architectures().join("golden")], model);
    let path = folder.join(format!("{file}.safetensors"));
    let bytes = std::fs::read(path).expect("a golden file");
    let tensors = SafeTensors::deserialize(&bytes).expect("a golden file");
    let tensor = tensors.tensor(name).expect("a golden tensor");
    match tensor.dtype() {
        safetensors::Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        _ => tensor.data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
    }
}

/// Whether transformers' reference at nf4 is the one that leaves experts as they are.
fn keeps_experts(name: &str) -> bool {
    name.starts_with("gpt_oss")
}

impl<'a> Session<'a> {
    pub fn load(name: &str, precision: &str, host: &'a Host<'a>, multiprocessors: usize) -> Self {
        Self::open(&folder(name), keeps_experts(name), precision, host, multiprocessors)
    }

    /// A session of several sequences.
    pub fn load_batch(name: &str, precision: &str, host: &'a Host<'a>, sequences: usize) -> Self {
        Self::open_batch(&folder(name), keeps_experts(name), precision, host, 16, sequences)
    }

    /// Loads the model of a folder.
    pub fn open(
        folder: &Path,
        keeps_experts: bool,
        precision: &str,
        host: &'a Host<'a>,
        multiprocessors: usize,
    ) -> Self {
        Self::open_batch(folder, keeps_experts, precision, host, multiprocessors, 1)
    }

    fn open_batch(
        folder: &Path,
        keeps_experts: bool,
        precision: &str,
        host: &'a Host<'a>,
        multiprocessors: usize,
        sequences: usize,
    ) -> Self {
        let checkpoint =
            weights::open(&ModelRequest::of(folder.display().to_string()), &Silent).expect("a golden model");
        let mut model = quantbench::models::build(&checkpoint.config).expect("a golden model");
        if keeps_experts {
            let kept = ["experts", "router"].map(str::to_owned).to_vec();
            Selection::Without(kept).apply(&mut model.matrices).expect("groups of matrices");
        }
        let source = checkpoint.source(&model.matrices, &model.vectors).expect("a golden model");
        let formats = Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default());
        let (memory, read) = (host.memory, |name: &str, rows: usize, len: usize| {
            let mut data = vec![f16::ZERO; len];
            source.read_rows(name, 0..rows, &mut data).expect("a golden tensor");
            data
        });
        let stored = model.matrices.iter().map(|spec| {
            let data = read(&spec.name, spec.n, spec.n * spec.k);
            formats.of(spec).quantize(HalfMatrix { n: spec.n, k: spec.k, data }).expect("quantize")
        });
        let stored: Vec<Box<dyn Stored>> = stored.collect();
        let matrices = model.matrices.iter().zip(&stored).map(|(spec, stored)| {
            place(memory, formats.of(spec).id().name, &**stored, FormatOptions::default().int8_threshold)
        });
        let vectors = model.vectors.iter().map(|spec| {
            let offset = if spec.kind == VectorKind::NormOffset { 1.0 } else { 0.0 };
            let values = read(&spec.name, spec.len, spec.len);
            let values: Vec<f32> = values.iter().map(|value| value.to_f32() + offset).collect();
            memory.hold(&padded(&values))
        });
        let caches = model.caches.iter().map(|spec| {
            let d_pad = padded_head(spec.head_dim);
            let zeros = vec![f16::ZERO; sequences * spec.kv_heads * CAPACITY * d_pad];
            CacheAt { keys: memory.hold(&zeros), values: memory.hold(&zeros), capacity: CAPACITY, d_pad }
        });
        let biases = model.biases.iter().map(|bias| {
            let (learned, buckets) = (stored[bias.table.0].dequantize(), model.matrices[bias.table.0].n);
            let address = memory.hold(&lower::by_distance(bias, &learned, buckets, CAPACITY));
            BiasAt { address, reach: CAPACITY }
        });
        let patches = match model.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => picture.patches(),
            _ => 0,
        };
        let session = SessionAt {
            state: memory.hold(&[0i32; 4]),
            logits: memory.room::<f32>(sequences * model.vocab),
            zeros: memory.hold(&vec![0.0f32; model.vectors.iter().map(|spec| spec.len).max().unwrap_or(1) + 1]),
            features: lower::features_width(&model).map_or(0, |width| memory.room::<f16>(sequences * patches * width)),
            outlier_columns: memory.hold(&[0u64]),
            host: memory.hold(&vec![0u64; sequences * SLOTS]),
            host_slots: SLOTS,
            sequences,
            places: memory.hold(&vec![DevicePlace::default(); sequences]),
            tokens: memory.room::<i32>(sequences),
        };
        let mut loaded = Self {
            host,
            properties: host.properties(multiprocessors),
            matrices: matrices.collect(),
            vectors: vectors.collect(),
            caches: caches.collect(),
            angles: model
                .ropes
                .iter()
                .map(|rope| {
                    let steps = memory.hold(&lower::step_angles(rope, CAPACITY, 0));
                    let has_others = matches!(rope.by_length, Some(RopeByLength::DynamicNtk { .. }));
                    let calls = if has_others { memory.hold(&lower::call_angles(rope, CAPACITY, 0)) } else { steps };
                    (steps, calls, lower::length_class(rope, 0))
                })
                .collect(),
            biases: biases.collect(),
            fused: Vec::new(),
            buffers: StepMemory {
                buffers: Vec::new(),
                views: Vec::new(),
                partials: 0,
                arrived: 0,
                best: 0,
                counters: 0,
                experts: 0,
            },
            examined: OutlierColumns::default(),
            position: 0,
            encoded: 0,
            steps: 0,
            places: vec![DevicePlace::default(); sequences],
            session,
            model,
            formats,
            stored,
        };
        loaded.fused = fused(&loaded).expect("a decoder");
        // Poison where nothing has to be zero.
        loaded.buffers = StepMemory::of(&loaded, &loaded.fused).map(|room: &Allocation| match room.is_zeroed {
            true => memory.hold(&vec![0u8; room.bytes]),
            false => memory.room::<u8>(room.bytes),
        });
        loaded
    }

    /// Runs the encoder over a prompt's tokens or the pixels of a picture.
    pub fn encode(&mut self, tokens: &[u32], pixels: &[f32]) {
        let (rows, input) = match self.model.encoder.as_ref().expect("an encoder").input {
            EncoderInputKind::Tokens => {
                (tokens.len(), CallInput::tokens(&self.model, tokens, 1, 0).expect("tokens without pictures"))
            }
            EncoderInputKind::Picture(picture) => {
                let rows = picture.patch_rows(pixels).expect("a picture");
                (picture.patches(), CallInput::Patches(rows.into_iter().map(f16::from_f32).collect()))
            }
        };
        self.call(CallShape { kind: CallKind::Encoder, first: 0, batch: Batch::one(0..rows), encoded: rows }, &input);
        self.encoded = rows;
    }

    /// Runs `tokens` in one call, which leaves token, position and embedding to the next step; a mixture's one by one.
    pub fn prefill(&mut self, tokens: &[u32]) {
        if self.model.experts().is_some() {
            for token in tokens {
                self.place(*token);
                self.step();
            }
            return;
        }
        let input =
            CallInput::tokens(&self.model, tokens, 1, self.encoded).expect("no more image tokens than features");
        let state = [0, self.position as i32, self.steps as i32, self.encoded as i32];
        self.host.memory.write(self.session.state, &state);
        let (rows, position, encoded) = (tokens.len(), self.position, self.encoded);
        self.set_length(position + rows);
        self.call(
            CallShape { kind: CallKind::Prompt, first: 0, batch: Batch::one(position..position + rows), encoded },
            &input,
        );
        self.position += rows;
        self.steps += 1;
    }

    /// Makes the tables those of a sequence that has `length` positions, as the engine does.
    pub fn set_length(&mut self, length: usize) {
        for ((steps, calls, class), rope) in self.angles.iter_mut().zip(&self.model.ropes) {
            let new = lower::length_class(rope, length);
            if new != std::mem::replace(class, new) {
                let angles = if steps == calls {
                    lower::step_angles(rope, CAPACITY, length)
                } else {
                    lower::call_angles(rope, length, length)
                };
                self.host.memory.write(*calls, &angles);
            }
        }
    }

    pub fn call(&mut self, shape: CallShape, input: &CallInput) {
        let memory = self.host.memory;
        let layout = Layout::of(|arena| {
            let region = arena.take::<u8>(input.bytes())?;
            prefill::run(self, shape, &MemoryPlanner, arena, region).map(|_| ())
        });
        let layout = layout.unwrap_or_else(|error| panic!("planning {shape:?}: {error:#}"));
        let arena = Arena::at(memory.room::<u8>(layout.bytes()), &layout);
        let region = arena.take::<u8>(input.bytes()).expect("as planned");
        match input {
            CallInput::Tokens(values) => memory.write(region.address, values),
            CallInput::Patches(values) => memory.write(region.address, values),
            CallInput::OnDevice => {}
        }
        let done = prefill::run(self, shape, self.host, &arena, region);
        let done = done.unwrap_or_else(|error| panic!("chip {}, {shape:?}: {error:#}", self.host.chip));
        self.examined += done.examined;
        if shape.kind == CallKind::Prompt && self.places.len() == 1 {
            let token = self.buffers.token_output(self, shape.rows()).expect("an embedding");
            let head = prefill::last_head(self, shape, done, token, self.buffers.counters).expect("a head");
            // SAFETY: every address in it is of the host's memory.
            unsafe { head.launch_on(self.host) }.unwrap_or_else(|error| panic!("chip {}: {error}", self.host.chip));
        }
    }

    /// Runs the first `n` operations of a step as one launch.
    pub fn run(&self, n: usize) {
        let program = StepProgram::new(self, &self.fused[..n], &self.buffers).expect("a step");
        self.host.memory.write(self.buffers.experts, program.experts());
        let at = self.host.memory.hold(program.instructions());
        let planned = program.plan(at).expect("a step");
        // SAFETY: every address in it is of the host's memory.
        unsafe { planned.launch_on(self.host) }.unwrap_or_else(|error| panic!("chip {}: {error}", self.host.chip));
    }

    pub fn step(&mut self) {
        self.run(self.fused.len());
        self.position += 1;
        self.steps += 1;
    }

    /// Puts `token` at the session's position, as if a step before had found it. Every call has other tags.
    pub fn place(&mut self, token: u32) {
        let output = self.buffers.token_output(self, 1).expect("an embedding");
        self.steps += 1;
        self.host.memory.write(self.session.state + 12, &[self.encoded as i32]);
        // SAFETY: all is of the host's memory, and the token in the table.
        unsafe { RowKernels { on: self.host }.place_token(&output, token, self.position, self.steps as u32) }
            .expect("a token");
    }

    pub fn logits(&self) -> Vec<f32> {
        self.host.memory.read(self.session.logits, self.model.vocab)
    }

    /// Token and position, as the device has them.
    pub fn state(&self) -> (u32, usize) {
        let state: Vec<i32> = self.host.memory.read(self.session.state, 2);
        (state[0] as u32, state[1] as usize)
    }

    /// Outlier columns that were found.
    pub fn outlier_columns(&self) -> u64 {
        self.host.memory.read::<u64>(self.session.outlier_columns, 1)[0]
    }
}

impl Addresses for Session<'_> {
    fn model(&self) -> &Model {
        &self.model
    }

    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn matrix(&self, id: MatrixId) -> MatrixDesc {
        self.matrices[id.0]
    }

    fn vector(&self, id: VectorId) -> u64 {
        self.vectors[id.0]
    }

    fn cache(&self, id: CacheId) -> CacheAt {
        self.caches[id.0]
    }

    fn step_angles(&self, id: RopeId) -> u64 {
        self.angles[id.0].0
    }

    fn call_angles(&self, id: RopeId) -> u64 {
        self.angles[id.0].1
    }

    fn bias(&self, id: BiasId) -> BiasAt {
        self.biases[id.0]
    }

    fn session(&self) -> SessionAt {
        self.session
    }
}
