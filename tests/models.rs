//! Tiny models against the reference runs in tests/golden: every executor, every instruction set, every precision.

mod coverage;
#[cfg(feature = "cuda")]
mod skips;

use std::path::{Path, PathBuf};

use candle_core::DType;
use coverage::combinations;
use quantbench::call::KvFormat;
use quantbench::engine::{self, Device, EncoderInput, Session, Setup};
use quantbench::events::Silent;
use quantbench::harness::picture::Preprocessor;
use quantbench::kernels::isa::Isa;
use quantbench::plan::{EncoderInputKind, Model};
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest};
use safetensors::SafeTensors;
use serde_json::Value;

const MODELS: [&str; 9] = [
    "llama-tiny",
    "llama-odd",
    "phi-tiny",
    "phi-odd",
    "t5-tiny",
    "t5-odd",
    "t5-tied-relu",
    "paligemma-tiny",
    "paligemma-odd",
];
const N_GEN: usize = 16;

/// fp32 against fp32: transformers itself moves by 3e-5 between eager, cached and fp64 (tests/golden/README.md).
const FP32_LOGIT_TOLERANCE: f32 = 2e-4;

/// NF4: a relative input change of 1e-6 moves logits by up to 1.6e-4 (tests/golden/README.md).
const NF4_LOGIT_TOLERANCE: f32 = 1e-3;

/// LLM.int8 where no activation lies near a rounding boundary (tests/golden/README.md).
const INT8_LOGIT_TOLERANCE: f32 = 1e-3;

#[derive(Debug, Clone, Copy)]
enum Executor {
    Reference,
    Cpu(Isa),
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Cuda,
    /// candle-transformers' own models.
    Candle(DType),
}

fn executors() -> Vec<Executor> {
    let cpu = Isa::available().into_iter().map(Executor::Cpu);
    std::iter::once(Executor::Reference).chain(cpu).collect()
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A loaded model and what its encoder reads beside the prompt.
struct Loaded {
    plan: Model,
    session: Box<dyn Session>,
    pixels: Vec<f32>,
}

fn load(model: &str, precision: &str, executor: Executor) -> Loaded {
    load_for(model, precision, executor, 320)
}

fn load_for(model: &str, precision: &str, executor: Executor, capacity: usize) -> Loaded {
    load_as((model, precision), executor, capacity, true)
}

fn load_as((model, precision): (&str, &str), executor: Executor, capacity: usize, cuda_graph: bool) -> Loaded {
    let folder = golden().join("models").join(model);
    let request = ModelRequest::of(folder.display().to_string());
    let checkpoint = weights::open(&request, &Silent).unwrap();
    let plan = quantbench::models::build(&checkpoint.config).unwrap();
    let source = checkpoint.source(&plan.matrices, &plan.vectors).unwrap();
    let device = if matches!(executor, Executor::Cuda) { Device::Cuda(0) } else { Device::Cpu };
    let setup = Setup {
        model: &plan,
        source: source.as_ref(),
        formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
        device,
        threads: 2,
        sequences: 1,
        kv_format: if matches!(executor, Executor::Candle(DType::F16)) { KvFormat::Fp16 } else { device.kv_format() },
        capacity,
        encoder_capacity: 256,
        cuda_graph,
    };
    let loaded = match executor {
        Executor::Reference => engine::reference::load(&setup, &Silent).unwrap(),
        Executor::Cpu(isa) => engine::cpu::load(&setup, isa, &Silent).unwrap(),
        Executor::Cuda => engine::load(&setup, &Silent).unwrap(),
        Executor::Candle(dtype) => engine::candle::load(&setup, &checkpoint.config, dtype, &Silent).unwrap(),
    };
    let pixels = match plan.encoder.as_ref().map(|encoder| encoder.input) {
        Some(EncoderInputKind::Picture(picture)) => {
            let config = std::fs::read_to_string(folder.join("preprocessor_config.json")).unwrap();
            let config = serde_json::from_str(&config).unwrap();
            let preprocessor = Preprocessor::new(Some(&config), picture.size).unwrap();
            preprocessor.open(&folder.join("image.png")).unwrap().values
        }
        _ => Vec::new(),
    };
    Loaded { plan, session: loaded.session, pixels }
}

impl Loaded {
    /// Encoder and first decoder call over `prompt`; returns the first token.
    fn begin(&mut self, prompt: &[u32]) -> u32 {
        self.session.rewind(0);
        match self.plan.encoder.as_ref().map(|encoder| encoder.input) {
            None => self.session.prefill(prompt).unwrap(),
            Some(EncoderInputKind::Tokens) => {
                self.session.encode(EncoderInput::Tokens(prompt)).unwrap();
                self.session.prefill(&[self.plan.decoder_start.unwrap()]).unwrap()
            }
            Some(EncoderInputKind::Picture(_)) => {
                self.session.encode(EncoderInput::Pixels(&self.pixels)).unwrap();
                self.session.prefill(prompt).unwrap()
            }
        }
    }

    /// Greedy generation: the ids and the logits of each step.
    fn generate(&mut self, prompt: &[u32]) -> (Vec<u32>, Vec<Vec<f32>>) {
        let mut ids = vec![self.begin(prompt)];
        let mut logits = vec![self.session.logits().unwrap()];
        while ids.len() < N_GEN {
            self.session.decode(1, &mut |id| ids.push(id)).unwrap();
            logits.push(self.session.logits().unwrap());
        }
        (ids, logits)
    }

    /// Logits of each step when the reference's own tokens are fed.
    fn forced(&mut self, prompt: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
        self.begin(prompt);
        let mut logits = vec![self.session.logits().unwrap()];
        for &token in &tokens[..tokens.len() - 1] {
            self.session.prefill(&[token]).unwrap();
            logits.push(self.session.logits().unwrap());
        }
        logits
    }
}

/// The prompts and tensors of one golden file.
struct Golden {
    facts: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn open(model: &str, file: &str) -> Self {
        let folder = golden().join("expected").join(model);
        let facts = std::fs::read_to_string(folder.join(format!("{file}.json"))).unwrap();
        let bytes = std::fs::read(folder.join(format!("{file}.safetensors"))).unwrap();
        Self { facts: serde_json::from_str(&facts).unwrap(), bytes }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Every step's logits and ids of a whole greedy run.
fn check_run(
    executor: Executor,
    (model, precision): (&str, &str),
    golden: &Golden,
    prompts: &Value,
    prefix: &str,
    tolerance: f32,
) {
    let reference = Golden::open(model, "golden");
    let mut loaded = load(model, precision, executor);
    for (i, prompt) in prompts.as_array().unwrap().iter().enumerate() {
        let case = format!("{model} {precision} {executor:?} prompt {i}");
        let input = ids(&reference.facts["prompts"][i]["input_ids"]);
        let (tokens, logits) = loaded.generate(&input);
        let expected = golden.floats(&format!("{prefix}p{i}.step_logits"));
        let vocab = expected.len() / N_GEN;
        assert_eq!(tokens, ids(&prompt["generated_ids"]), "{case}");
        for (step, logits) in logits.iter().enumerate() {
            let difference = largest_difference(logits, &expected[step * vocab..(step + 1) * vocab]);
            assert!(difference <= tolerance, "{case} step {step}: logits differ by {difference}");
        }
    }
}

#[test]
fn fp16_logits_and_ids_equal_the_reference() {
    for (model, executor) in combinations(&MODELS, &executors(), 0) {
        let golden = Golden::open(model, "golden");
        check_run(executor, (model, "fp16"), &golden, &golden.facts["prompts"], "", FP32_LOGIT_TOLERANCE);
    }
}

#[test]
fn nf4_logits_and_ids_equal_the_reference() {
    for (model, executor) in combinations(&MODELS, &executors(), 1) {
        let golden = Golden::open(model, "quant_golden");
        let prompts = &golden.facts["variants"]["nf4_f32"]["prompts"];
        check_run(executor, (model, "nf4"), &golden, prompts, "nf4_f32.", NF4_LOGIT_TOLERANCE);
    }
}

#[test]
fn int8_logits_equal_the_reference_where_they_are_stable_and_its_cost_elsewhere() {
    for (model, executor) in combinations(&MODELS, &executors(), 2) {
        let (reference, golden) = (Golden::open(model, "golden"), Golden::open(model, "quant_golden"));
        let mut loaded = load(model, "int8", executor);
        for (i, facts) in golden.facts["variants"]["int8_f32"]["prompts"].as_array().unwrap().iter().enumerate() {
            let case = format!("{model} int8 {executor:?} prompt {i}");
            let prompt = &reference.facts["prompts"][i];
            let fp32 = reference.floats(&format!("p{i}.step_logits"));
            let vocab = fp32.len() / N_GEN;
            let logits = loaded.forced(&ids(&prompt["input_ids"]), &ids(&prompt["generated_ids"]));

            let expected = golden.floats(&format!("int8_f32.p{i}.step_logits"));
            if facts["input_noise_1e-6"]["first_step_stable"].as_bool().unwrap() {
                let difference = largest_difference(&logits[0], &expected[..vocab]);
                assert!(difference <= INT8_LOGIT_TOLERANCE, "{case}: first logits differ by {difference}");
            }
            let kl: Vec<f64> =
                (0..N_GEN).map(|s| kl_divergence(&fp32[s * vocab..(s + 1) * vocab], &logits[s])).collect();
            let mean = kl.iter().sum::<f64>() / kl.len() as f64;
            let known = facts["forced_mean_kl"].as_f64().unwrap();
            let factor = int8_kl_factor(fp32.chunks_exact(vocab));
            let is_near = mean <= factor * known && mean >= known / factor;
            assert!(is_near, "{case}: mean KL {mean}, reference {known}, within {factor:.2} times");
        }
    }
}

/// How far the mean divergences of two int8 runs may lie apart as a factor, where activations that cross a rounding boundary make the
/// errors of their logits independent. An error e of all logits, each of variance v, diverges by half its variance under p,
/// Σ p (e − ē)² / 2: v / 2 · (1 − Σ p²) on average, with a standard deviation of v / 2 · √(2 Σ p² (1 − 2 p + Σ p²)). Means over the
/// steps of a run spread by the root of the sum of the squares over the sum; two runs spread √2 times that, and three of these are
/// allowed, as a power of e since divergences are positive.
fn int8_kl_factor<'a>(steps: impl Iterator<Item = &'a [f32]>) -> f64 {
    let (mut mean, mut variance) = (0.0, 0.0);
    for logits in steps {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f64> = logits.iter().map(|x| f64::from(x - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        let p: Vec<f64> = powers.iter().map(|power| power / sum).collect();
        let squares: f64 = p.iter().map(|p| p * p).sum();
        mean += 1.0 - squares;
        variance += 2.0 * p.iter().map(|p| p * p * (1.0 - 2.0 * p + squares)).sum::<f64>();
    }
    (3.0 * 2f64.sqrt() * variance.sqrt() / mean).exp()
}

/// `Σ p · ln(p / q)` over softmaxes of the logits, in nats.
fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |x: &[f32]| {
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let sum: f64 = x.iter().map(|&x| (x as f64 - largest).exp()).sum();
        x.iter().map(|&x| x as f64 - largest - sum.ln()).collect::<Vec<f64>>()
    };
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

#[test]
fn a_rewound_session_repeats_itself_bit_for_bit() {
    for precision in ["fp16", "int8", "nf4"] {
        let mut loaded = load("llama-tiny", precision, Executor::Cpu(Isa::detect()));
        let first = loaded.generate(&[1, 2, 3]);
        assert_eq!(first, loaded.generate(&[1, 2, 3]), "{precision}");
    }
}

/// Behind so many positions that they come in two calls, and one key/value head's (llama-odd) or the third of three (t5-odd) are shared by two
/// threads.
#[test]
fn long_contexts_equal_the_reference_executor() {
    const POSITIONS: u32 = 2100;
    let context: Vec<u32> = (0..POSITIONS).map(|i| 3 + i * 37 % 300).collect();
    for model in ["llama-odd", "t5-odd"] {
        let steps = |executor| {
            let Loaded { plan, mut session, .. } = load_for(model, "fp16", executor, POSITIONS as usize + 8);
            if plan.encoder.is_some() {
                session.encode(EncoderInput::Tokens(&[5, 6, 7, 8])).unwrap();
            }
            session.prefill(&context).unwrap();
            let step = |token| {
                session.prefill(&[token]).unwrap();
                session.logits().unwrap()
            };
            [9, 10, 11].map(step)
        };
        let expected = steps(Executor::Reference);
        for executor in executors() {
            for (step, (logits, expected)) in steps(executor).iter().zip(&expected).enumerate() {
                let difference = largest_difference(logits, expected);
                assert!(difference <= FP32_LOGIT_TOLERANCE, "{model} {executor:?} step {step}: {difference}");
            }
        }
    }
}

/// Scoring all rows of one call gives what prefill and decode give row by row: the same fp32 sums in another order.
#[test]
fn scored_rows_equal_the_decode_steps() {
    for model in ["llama-tiny", "phi-odd"] {
        for executor in executors() {
            let mut loaded = load(model, "nf4", executor);
            let tokens = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22];
            let steps = loaded.forced(&tokens[..1], &tokens[1..]);
            loaded.session.rewind(0);
            let mut seen = 0;
            let on_row = &mut |row: usize, logits: &[f32]| {
                let difference = steps.get(row).map_or(0.0, |step| largest_difference(logits, step));
                assert!(difference <= FP32_LOGIT_TOLERANCE, "{model} {executor:?} row {row}: {difference}");
                seen += 1;
            };
            loaded.session.score(&tokens, on_row).unwrap();
            assert_eq!((seen, steps.len()), (tokens.len(), tokens.len() - 1));
        }
    }
}

/// candle's own models, given the same tensors: another implementation of every architecture, in fp32.
#[test]
fn candle_logits_and_ids_equal_the_reference() {
    for model in MODELS {
        let golden = Golden::open(model, "golden");
        let candle = Executor::Candle(DType::F32);
        check_run(candle, (model, "fp16"), &golden, &golden.facts["prompts"], "", FP32_LOGIT_TOLERANCE);
    }
}

/// In the dtype that a run takes, fed the reference's own tokens. candle's Gemma computes its rotary angles in fp16, where the
/// position 255 times a frequency of 0.9 is off by up to 0.06: there is nothing to hold it to.
#[test]
fn candle_in_fp16_stays_near_the_reference() {
    for model in MODELS.into_iter().filter(|model| !model.starts_with("paligemma")) {
        let reference = Golden::open(model, "golden");
        let dtype = engine::candle::dtype(model.split_once('-').unwrap().0);
        let mut loaded = load(model, "fp16", Executor::Candle(dtype));
        for (i, prompt) in reference.facts["prompts"].as_array().unwrap().iter().enumerate() {
            let logits = loaded.forced(&ids(&prompt["input_ids"]), &ids(&prompt["generated_ids"]));
            let expected = reference.floats(&format!("p{i}.step_logits"));
            let steps = expected.chunks_exact(expected.len() / N_GEN).zip(&logits);
            let worst = steps.map(|(expected, seen)| largest_difference(seen, expected)).fold(0.0, f32::max);
            assert!(worst <= FP16_LOGIT_TOLERANCE, "{model} {dtype:?} prompt {i}: logits differ by {worst}");
        }
    }
}

/// Back to the empty cache, to where a prompt began behind others, and to anywhere else.
#[test]
fn a_rewound_candle_session_repeats_itself() {
    for model in ["llama-tiny", "phi-tiny"] {
        let session = &mut load(model, "fp16", Executor::Candle(DType::F32)).session;
        let run = |session: &mut Box<dyn Session>, position: usize| {
            session.rewind(position);
            let first = session.prefill(&[9]).unwrap();
            let mut ids = vec![first];
            session.decode(3, &mut |id| ids.push(id)).unwrap();
            assert_eq!(session.position(), position + 4);
            (ids, session.logits().unwrap())
        };
        let (at_0, at_2) = (run(session, 0), run(session, 2));
        // A prompt behind others, whose beginning is kept.
        session.rewind(0);
        assert_eq!(session.prefill(&[9]).unwrap(), at_0.0[0]);
        session.prefill(&at_0.0[..1]).unwrap();
        assert_eq!(run(session, 2).0, at_2.0, "{model}");
        for _ in 0..2 {
            let (ids, logits) = run(session, 2);
            assert_eq!(ids, at_2.0, "{model}");
            assert!(largest_difference(&logits, &at_2.1) <= FP32_LOGIT_TOLERANCE, "{model}");
            assert_eq!(run(session, 0), at_0, "{model}");
        }
    }
}

/// fp16 compute rounds what a layer passes on about 12 times, each by a relative 2⁻¹² · √(4/3) on average (uniform in ±2⁻¹¹): over 3
/// layers 1.7e-3 of the hidden state, 4.2e-3 of logits that deviate by 2.5. The largest of 10⁵ such errors is 4.4 times that, 0.02; norms
/// with a few large channels double it, as measured (0.04, tests/golden/README.md). Allowed are 12 deviations of that.
const FP16_LOGIT_TOLERANCE: f32 = 0.1;

/// Fed the reference's own tokens, so that a close call between two of them does not part the runs.
#[cfg(feature = "cuda")]
#[test]
fn cuda_logits_stay_near_the_reference() {
    let Some(_device) = device() else { return };
    for model in MODELS {
        let (reference, golden) = (Golden::open(model, "golden"), Golden::open(model, "quant_golden"));
        for precision in ["fp16", "nf4", "int8"] {
            let mut loaded = load(model, precision, Executor::Cuda);
            for (i, prompt) in reference.facts["prompts"].as_array().unwrap().iter().enumerate() {
                let case = format!("{model} {precision} cuda prompt {i}");
                let quantized = &golden.facts["variants"][format!("{precision}_f32")]["prompts"][i];
                let fed = if precision == "nf4" { quantized } else { prompt };
                let logits = loaded.forced(&ids(&prompt["input_ids"]), &ids(&fed["generated_ids"]));
                let expected = match precision {
                    "nf4" => golden.floats(&format!("nf4_f32.p{i}.step_logits")),
                    _ => reference.floats(&format!("p{i}.step_logits")),
                };
                let steps = expected.chunks_exact(expected.len() / N_GEN).zip(&logits);
                if precision == "int8" {
                    let mean = steps.map(|(expected, seen)| kl_divergence(expected, seen)).sum::<f64>() / N_GEN as f64;
                    let known = quantized["forced_mean_kl"].as_f64().unwrap();
                    let factor = int8_kl_factor(expected.chunks_exact(expected.len() / N_GEN));
                    let is_near = mean <= factor * known && mean >= known / factor;
                    assert!(is_near, "{case}: mean KL {mean}, reference {known}, within {factor:.2} times");
                    continue;
                }
                let worst = steps.map(|(expected, seen)| largest_difference(seen, expected)).fold(0.0, f32::max);
                println!("{case}: largest logit difference {worst}");
                assert!(worst <= FP16_LOGIT_TOLERANCE, "{case}: logits differ by {worst}");
            }
        }
    }
}

/// The device, for one test at a time: what another thread queues there would end a capture. Prints why there is none.
#[cfg(feature = "cuda")]
#[track_caller]
fn device() -> Option<std::sync::MutexGuard<'static, ()>> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    if let Err(error) = quantbench::kernels::cuda::probe(0) {
        skips::skip(error);
        return None;
    }
    Some(ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// A step has one order of sums: the graph gives the same bits each time, and the same as its launches one by one.
#[cfg(feature = "cuda")]
#[test]
fn cuda_replays_are_bit_equal_with_and_without_a_graph() {
    let Some(_device) = device() else { return };
    const REPLAYS: usize = 20;
    for (model, precision) in MODELS.into_iter().flat_map(|model| ["fp16", "int8", "nf4"].map(|p| (model, p))) {
        let prompt = ids(&Golden::open(model, "golden").facts["prompts"][0]["input_ids"]);
        let run = |cuda_graph, times| {
            let mut loaded = load_as((model, precision), Executor::Cuda, 320, cuda_graph);
            let first = loaded.generate(&prompt);
            (1..times)
                .for_each(|replay| assert!(loaded.generate(&prompt) == first, "{model} {precision}: replay {replay}"));
            first
        };
        assert!(run(true, REPLAYS) == run(false, 1), "{model} {precision}: graph and launches differ");
    }
}

/// The first call of a shape runs one launch after the other, the second is captured, later ones are replayed: all give the same
/// bits, also behind calls of other shapes, which take the same memory or move it.
#[cfg(feature = "cuda")]
#[test]
fn cuda_prompts_are_bit_equal_direct_captured_and_replayed() {
    let Some(_device) = device() else { return };
    /// Enough that attention goes through cuBLAS and LLM.int8 looks for outliers in a launch of its own.
    const LONG: usize = 40;
    for (model, precision) in MODELS.into_iter().flat_map(|model| ["fp16", "int8", "nf4"].map(|p| (model, p))) {
        let short = ids(&Golden::open(model, "golden").facts["prompts"][0]["input_ids"]);
        let run = |cuda_graph| {
            let mut loaded = load_as((model, precision), Executor::Cuda, 320, cuda_graph);
            let image = match loaded.plan.encoder.as_ref().map(|encoder| encoder.input) {
                Some(EncoderInputKind::Picture(picture)) => Some(picture.token),
                _ => None,
            };
            let more = short.iter().copied().filter(|token| Some(*token) != image).cycle().take(LONG);
            let long: Vec<u32> = short.iter().copied().chain(more.clone()).collect();
            let scored: Vec<u32> = more.take(5).collect();
            let mut firsts: Vec<(char, u32, Vec<f32>, Vec<Vec<f32>>)> = Vec::new();
            for (turn, name) in "sssslslllss".chars().enumerate() {
                let token = loaded.begin(if name == 's' { &short } else { &long });
                let logits = loaded.session.logits().unwrap();
                // Behind it, where the position counts as well.
                let mut rows = Vec::new();
                loaded.session.score(&scored, &mut |_, logits| rows.push(logits.to_vec())).unwrap();
                let seen = (name, token, logits, rows);
                match firsts.iter().find(|(first, ..)| *first == name) {
                    Some(first) => assert!(*first == seen, "{model} {precision} graph {cuda_graph}: call {turn}"),
                    None => firsts.push(seen),
                }
            }
            (firsts, loaded.session.outlier_columns().unwrap())
        };
        assert!(run(true) == run(false), "{model} {precision}: graphs and launches differ");
    }
}
