//! Tiny models of every family against transformers' own runs: fp16, LLM.int8 and NF4, on every executor of this machine.
//!
//! tests/golden/architectures holds what the default run needs. Where `QUANTBENCH_ARCHITECTURES` names a folder of the same layout,
//! every model of it is run instead.

mod bitsandbytes;
mod contrasts;
#[path = "../coverage/mod.rs"]
mod coverage;
#[cfg(feature = "cuda")]
mod cuda;
mod lengths;
mod packed;
#[path = "../range/mod.rs"]
mod planted;
mod range;
mod routing;
#[cfg(feature = "cuda")]
#[path = "../skips/mod.rs"]
mod skips;
mod windows;

use std::path::{Path, PathBuf};

use candle_core::DType;
use coverage::in_turn;
use quantbench::engine::{self, Device, Session, Setup};
use quantbench::events::Silent;
use quantbench::kernels::isa::Isa;
use quantbench::plan::Model;
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::weights::policy::{Formats, Selection};
use quantbench::weights::{self, ModelRequest, Source};
use safetensors::SafeTensors;
use serde_json::Value;

const N_GEN: usize = 16;

/// fp32 against fp32: a relative change of 1e-6 in the embeddings moves logits by up to 1.9e-4 (the folder's README).
const FP32_LOGIT_TOLERANCE: f32 = 5e-4;

/// NF4: 1e-6 of noise moves logits by up to 2.4e-4.
const NF4_LOGIT_TOLERANCE: f32 = 2e-3;

/// LLM.int8 where no activation lies near a rounding boundary.
const INT8_LOGIT_TOLERANCE: f32 = 1e-3;

/// transformers 5 leaves experts and router as they are.
const EXPERTS_KEPT: [&str; 2] = ["experts", "router"];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Executor {
    Reference,
    Cpu(Isa),
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Cuda,
    /// candle-transformers' own models, in fp32.
    Candle,
}

fn executors() -> Vec<Executor> {
    std::iter::once(Executor::Reference).chain(Isa::available().into_iter().map(Executor::Cpu)).collect()
}

/// The folder with `models/` and `golden/`.
fn root() -> PathBuf {
    match std::env::var_os("QUANTBENCH_ARCHITECTURES") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/architectures"),
    }
}

/// Every model that has a reference run.
fn models() -> Vec<String> {
    let folders = std::fs::read_dir(root().join("golden")).unwrap();
    let mut names: Vec<String> =
        folders.map(|folder| folder.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

fn checkpoint(model: &str) -> weights::Checkpoint {
    let folder = root().join("models").join(model);
    weights::open(&ModelRequest::of(folder.display().to_string()), &Silent).unwrap()
}

/// The plan of a folder's config.json.
fn plan(model: &str) -> Model {
    quantbench::models::build(&checkpoint(model).config).unwrap()
}

/// Loads `plan` with the weights of `model`.
fn load(model: &str, plan: &Model, precision: &str, executor: Executor) -> anyhow::Result<Box<dyn Session>> {
    let checkpoint = checkpoint(model);
    let source = checkpoint.source(&plan.matrices, &plan.vectors)?;
    load_from(source.as_ref(), &checkpoint.config, plan, precision, executor)
}

/// Loads `plan` with the weights of `source`.
fn load_from(
    source: &dyn Source,
    config: &Value,
    plan: &Model,
    precision: &str,
    executor: Executor,
) -> anyhow::Result<Box<dyn Session>> {
    let device = if executor == Executor::Cuda { Device::Cuda(0) } else { Device::Cpu };
    let setup = Setup {
        model: plan,
        source,
        formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
        device,
        threads: 2,
        sequences: 1,
        kv_format: device.kv_format(),
        capacity: 64,
        encoder_capacity: 0,
        cuda_graph: true,
    };
    let loaded = match executor {
        Executor::Reference => engine::reference::load(&setup, &Silent)?,
        Executor::Cpu(isa) => engine::cpu::load(&setup, isa, &Silent)?,
        Executor::Cuda => engine::load(&setup, &Silent)?,
        Executor::Candle => engine::candle::load(&setup, config, DType::F32, &Silent)?,
    };
    Ok(loaded.session)
}

/// Logits of each step when `tokens` follow the prompt, and the token that each step chose.
fn forced(session: &mut dyn Session, prompt: &[u32], tokens: &[u32]) -> (Vec<u32>, Vec<Vec<f32>>) {
    session.rewind(0);
    let mut chosen = vec![session.prefill(prompt).unwrap()];
    let mut logits = vec![session.logits().unwrap()];
    for &token in &tokens[..tokens.len() - 1] {
        chosen.push(session.prefill(&[token]).unwrap());
        logits.push(session.logits().unwrap());
    }
    (chosen, logits)
}

/// Greedy generation: the ids and the logits of each step.
fn generate(session: &mut dyn Session, prompt: &[u32]) -> (Vec<u32>, Vec<Vec<f32>>) {
    session.rewind(0);
    let mut ids = vec![session.prefill(prompt).unwrap()];
    let mut logits = vec![session.logits().unwrap()];
    while ids.len() < N_GEN {
        session.decode(1, &mut |id| ids.push(id)).unwrap();
        logits.push(session.logits().unwrap());
    }
    (ids, logits)
}

/// The facts and tensors of one golden file.
struct Golden {
    facts: Value,
    bytes: Vec<u8>,
}

impl Golden {
    fn open(model: &str, file: &str) -> Self {
        Self::open_in(&root(), model, file)
    }

    fn open_in(root: &Path, model: &str, file: &str) -> Self {
        let folder = root.join("golden").join(model);
        let facts = std::fs::read_to_string(folder.join(format!("{file}.json"))).unwrap();
        let bytes = std::fs::read(folder.join(format!("{file}.safetensors"))).unwrap();
        Self { facts: serde_json::from_str(&facts).unwrap(), bytes }
    }

    /// Rows of logits.
    fn steps(&self, name: &str) -> Vec<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let values: Vec<f32> =
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        values.chunks_exact(tensor.shape()[1]).map(<[f32]>::to_vec).collect()
    }

    /// Each prompt of the reference run, with its continuation.
    fn prompts(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let prompts = self.facts["prompts"].as_array().unwrap();
        prompts.iter().map(|prompt| (ids(&prompt["input_ids"]), ids(&prompt["generated_ids"]))).collect()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differs = |(a, b): (&f32, &f32)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(differs).fold(0.0, f32::max)
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().zip(b).map(|(a, b)| largest_difference(a, b)).fold(0.0, f32::max)
}

#[test]
fn fp16_logits_and_ids_equal_the_reference() {
    for (turn, model) in models().into_iter().enumerate() {
        let (golden, plan) = (Golden::open(&model, "golden"), plan(&model));
        for executor in in_turn(&executors(), turn) {
            let mut session = load(&model, &plan, "fp16", executor).unwrap();
            for (i, (prompt, expected_ids)) in golden.prompts().iter().enumerate() {
                let (ids, logits) = generate(session.as_mut(), prompt);
                let difference = worst(&logits, &golden.steps(&format!("p{i}.step_logits")));
                assert!(difference <= FP32_LOGIT_TOLERANCE, "{model} {executor:?} prompt {i}: {difference}");
                assert_eq!(&ids, expected_ids, "{model} {executor:?} prompt {i}");
            }
        }
    }
}

/// candle's own models, given the same tensors; those that it computes otherwise are refused with the reason.
#[test]
fn candle_logits_and_ids_equal_the_reference_or_it_refuses() {
    let mut ran = Vec::new();
    for model in models() {
        let (golden, plan) = (Golden::open(&model, "golden"), plan(&model));
        let mut session = match load(&model, &plan, "fp16", Executor::Candle) {
            Ok(session) => session,
            Err(error) => {
                let error = error.to_string();
                assert!(
                    error.starts_with("`--engine candle` cannot run this model: candle-transformers' `"),
                    "{error}"
                );
                println!("{model}: {error}");
                continue;
            }
        };
        for (i, (prompt, expected_ids)) in golden.prompts().iter().enumerate() {
            let (ids, logits) = generate(session.as_mut(), prompt);
            let difference = worst(&logits, &golden.steps(&format!("p{i}.step_logits")));
            assert!(difference <= FP32_LOGIT_TOLERANCE, "{model} candle prompt {i}: {difference}");
            assert_eq!(&ids, expected_ids, "{model} candle prompt {i}");
        }
        ran.push(model);
    }
    for model in ["qwen2-odd", "qwen3-odd", "olmo2-odd", "mixtral-odd"] {
        assert!(ran.iter().any(|ran| ran == model), "{model} was refused");
    }
}

/// The selections that the references of a model were made with, and their names there.
fn nf4_variants(model: &str, golden: &Golden) -> Vec<(Selection, &'static str)> {
    let kept = Selection::Without(EXPERTS_KEPT.map(str::to_owned).to_vec());
    let has_experts = plan(model).experts().is_some();
    match (has_experts, golden.facts["variants"].get("nf4_experts_f32").is_some()) {
        (false, _) => vec![(Selection::Usual, "nf4_f32")],
        (true, false) => vec![(kept, "nf4_f32")],
        (true, true) => vec![(kept, "nf4_f32"), (Selection::Usual, "nf4_experts_f32")],
    }
}

#[test]
fn nf4_logits_and_ids_equal_the_reference() {
    for (turn, model) in models().into_iter().enumerate() {
        let (reference, golden) = (Golden::open(&model, "golden"), Golden::open(&model, "quant_golden"));
        for (selection, variant) in nf4_variants(&model, &golden) {
            let mut plan = plan(&model);
            selection.apply(&mut plan.matrices).unwrap();
            let misread = bitsandbytes::misreads(&plan);
            for executor in in_turn(&executors(), turn + 1) {
                let mut session = match misread {
                    true => bitsandbytes::load_misread(&model, &plan, executor),
                    false => load(&model, &plan, "nf4", executor).unwrap(),
                };
                for (i, (prompt, _)) in reference.prompts().iter().enumerate() {
                    let case = format!("{model} {variant} {executor:?} prompt {i}");
                    let expected = golden.steps(&format!("{variant}.p{i}.step_logits"));
                    let facts = &golden.facts["variants"][variant]["prompts"][i];
                    let (chosen, logits) = forced(session.as_mut(), prompt, &ids(&facts["generated_ids"]));
                    let difference = worst(&logits[..expected.len()], &expected);
                    assert!(difference <= NF4_LOGIT_TOLERANCE, "{case}: logits differ by {difference}");
                    // A choice closer than both sides' error may fall either way; quantized runs were not filtered.
                    if facts["min_top1_margin"].as_f64().unwrap() > 2.0 * NF4_LOGIT_TOLERANCE as f64 {
                        assert_eq!(chosen, ids(&facts["generated_ids"]), "{case}");
                    }
                }
            }
        }
    }
}

#[test]
fn int8_logits_equal_the_reference_where_they_are_stable_and_its_cost_elsewhere() {
    for (turn, model) in models().into_iter().enumerate() {
        let (reference, golden) = (Golden::open(&model, "golden"), Golden::open(&model, "quant_golden"));
        let mut plan = plan(&model);
        if plan.experts().is_some() {
            Selection::Without(EXPERTS_KEPT.map(str::to_owned).to_vec()).apply(&mut plan.matrices).unwrap();
        }
        for executor in in_turn(&executors(), turn + 2) {
            let mut session = load(&model, &plan, "int8", executor).unwrap();
            for (i, (prompt, continuation)) in reference.prompts().iter().enumerate() {
                let case = format!("{model} int8 {executor:?} prompt {i}");
                let facts = &golden.facts["variants"]["int8_f32"]["prompts"][i];
                let (_, logits) = forced(session.as_mut(), prompt, continuation);
                if facts["input_noise_1e-6"]["first_step_stable"].as_bool().unwrap() {
                    let expected = golden.steps(&format!("int8_f32.p{i}.step_logits"));
                    let difference = largest_difference(&logits[0], &expected[0]);
                    assert!(difference <= INT8_LOGIT_TOLERANCE, "{case}: first logits differ by {difference}");
                }
                let fp32 = reference.steps(&format!("p{i}.step_logits"));
                let kl: f64 = fp32.iter().zip(&logits).map(|(p, q)| kl_divergence(p, q)).sum();
                let (mean, known) = (kl / N_GEN as f64, facts["forced_mean_kl"].as_f64().unwrap());
                // The known one is of one pass over prompt and continuation, which rotates by its own length: where frequencies depend
                // on that, it counts the other rotation as well, and is no lower bound.
                let by_length = plan.ropes.iter().any(|rope| rope.by_length.is_some());
                let is_near = mean <= 2.0 * known && (by_length || mean >= known / 2.0);
                assert!(is_near, "{case}: mean KL {mean}, reference {known}");
            }
        }
    }
}

/// `Σ p · ln(p / q)` over softmaxes of the logits, in nats.
fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |x: &[f32]| {
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let sum: f64 = x.iter().map(|&x| (x as f64 - largest).exp()).sum();
        x.iter().map(|&x| x as f64 - largest - sum.ln()).collect::<Vec<f64>>()
    };
    log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum()
}
