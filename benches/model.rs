//! Whole models on the CPU: built-in shape × format, with random weights. A decode step in bytes of weights per second, to be held
//! against `read` of the matvec benchmark, and a prefill in tokens per second.
//!
//! `cargo bench --bench model -- smollm2` takes the shapes of that name only. The largest at fp16 needs 6 GB.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quantbench::engine::{self, Device, EncoderInput, Session, Setup};
use quantbench::events::Silent;
use quantbench::plan::{EncoderInputKind, Model};
use quantbench::quant::{FORMATS, FormatId, FormatOptions};
use quantbench::weights::builtin::builtin_models;
use quantbench::weights::policy::Formats;
use quantbench::weights::spec::MatrixSpec;
use quantbench::weights::{self, ModelRequest, WeightsChoice};

/// Tokens in the cache when a step is timed, and of a timed prefill.
const PROMPT_TOKENS: usize = 64;
/// Steps until the cache is wound back.
const STEPS: usize = 16;

struct Loaded {
    plan: Model,
    session: Box<dyn Session>,
}

impl Loaded {
    fn new(name: &str, precision: &str) -> Self {
        let request = ModelRequest {
            model_id: name.to_owned(),
            revision: None,
            offline: true,
            weights: WeightsChoice::Auto,
            seed: 0,
            outlier_channels: 6,
            strict_config: false,
        };
        let checkpoint = weights::open(&request, &Silent).expect("a built-in shape");
        let plan = quantbench::models::build(&checkpoint.config).expect("a built-in shape");
        let source = checkpoint.source(&plan.matrices, &plan.vectors).expect("random weights");
        let setup = Setup {
            model: &plan,
            source: source.as_ref(),
            formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
            device: Device::Cpu,
            threads: quantbench::kernels::cpu::pool::default_threads(),
            sequences: 1,
            kv_format: Device::Cpu.kv_format(),
            capacity: patches(&plan).max(PROMPT_TOKENS) + PROMPT_TOKENS + STEPS,
            encoder_capacity: patches(&plan).max(PROMPT_TOKENS),
            cuda_graph: true,
        };
        let session = engine::load(&setup, &Silent).expect("memory for the model").session;
        let mut loaded = Self { plan, session };
        loaded.encode();
        loaded
    }

    fn encode(&mut self) {
        match self.plan.encoder.as_ref().map(|encoder| encoder.input) {
            None => {}
            Some(EncoderInputKind::Tokens) => {
                self.session.encode(EncoderInput::Tokens(&[7; PROMPT_TOKENS])).expect("an encoding");
            }
            Some(EncoderInputKind::Picture(picture)) => {
                let pixels = vec![0.5; 3 * picture.size * picture.size];
                self.session.encode(EncoderInput::Pixels(&pixels)).expect("an encoding");
            }
        }
    }

    /// The picture's tokens, if there is one, and as many others as of every prompt.
    fn prefill(&mut self) {
        let image = match self.plan.encoder.as_ref().map(|encoder| encoder.input) {
            Some(EncoderInputKind::Picture(picture)) => picture.token,
            _ => 0,
        };
        let mut prompt = vec![image; patches(&self.plan)];
        prompt.extend([7; PROMPT_TOKENS]);
        self.session.rewind(0);
        self.session.prefill(&prompt).expect("a prompt within the cache");
    }

    /// Time of `n` decode steps.
    fn decode(&mut self, n: u64) -> Duration {
        let mut elapsed = Duration::ZERO;
        self.prefill();
        let start = self.session.position();
        for first in (0..n as usize).step_by(STEPS) {
            self.session.rewind(start);
            let begin = Instant::now();
            self.session.decode(STEPS.min(n as usize - first), &mut |_| {}).expect("room in the cache");
            elapsed += begin.elapsed();
        }
        elapsed
    }
}

/// Tokens that a picture takes of the prompt.
fn patches(plan: &Model) -> usize {
    match plan.encoder.as_ref().map(|encoder| encoder.input) {
        Some(EncoderInputKind::Picture(picture)) => picture.patches(),
        _ => 0,
    }
}

/// Bytes of weights that a step reads.
fn weight_bytes(config: &serde_json::Value, precision: &str) -> u64 {
    let plan = quantbench::models::build(config).expect("a built-in shape");
    let formats = Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default());
    let bytes = |spec: &MatrixSpec| formats.of(spec).stored_bytes(spec.n, spec.k);
    let stored: Vec<usize> = plan.matrices.iter().map(bytes).collect();
    plan.weight_bytes_per_token(&stored) as u64
}

fn models(criterion: &mut Criterion) {
    for shape in builtin_models() {
        for format in FORMATS {
            // Loaded by the first benchmark that the filter lets run.
            let mut loaded: Option<Loaded> = None;
            let mut group = criterion.benchmark_group(shape.name);
            group.throughput(Throughput::Bytes(weight_bytes(&shape.config(), format.name)));
            group.bench_function(BenchmarkId::new("decode", format.name), |bencher| {
                let loaded = loaded.get_or_insert_with(|| Loaded::new(shape.name, format.name));
                bencher.iter_custom(|iterations| loaded.decode(iterations));
            });
            group.throughput(Throughput::Elements(PROMPT_TOKENS as u64));
            group.bench_function(BenchmarkId::new("prefill", format.name), |bencher| {
                let loaded = loaded.get_or_insert_with(|| Loaded::new(shape.name, format.name));
                bencher.iter(|| loaded.prefill());
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = models
}
criterion_main!(benches);
