//! Whole models of golden folders: ids and logits of the dequantized weights, on the reference and every instruction set of the CPU engine.

use std::path::{Path, PathBuf};

use quantbench::engine::{self, Device, Session, Setup};
use quantbench::events::Silent;
use quantbench::harness;
use quantbench::kernels::isa::Isa;
use quantbench::plan::Model;
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, Checkpoint, ModelRequest};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::golden::root;

/// fp32 differs from fp64 by at most 3e-5 in these models, eager attention from SDPA by 3e-5; 1e-6 of noise moves them by up to 2.4e-4.
const LOGIT_TOLERANCE: f32 = 5e-4;

/// What the rows of golden folders are called.
const NAMES: &[(&str, &str)] = &[
    ("tiny-awq", "awq-int4-g128"),
    ("tiny-fp8", "fp8"),
    ("tiny-fp8-block", "fp8"),
    ("tiny-gptq", "gptq-int4-g128"),
    ("tiny-gptq-act", "gptq-int4-g128"),
    ("tiny-w4a16", "w4a16-g128"),
];

/// Folders and their names.
fn folders() -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(root().join("models")).expect("folders of models");
    let paths = entries.map(|entry| entry.expect("a file").path()).filter(|path| path.join("config.json").is_file());
    let named = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (path, name)
    };
    let mut found: Vec<_> = paths.map(named).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn open(path: &Path) -> (Checkpoint, Model) {
    let request = ModelRequest::of(path.display().to_string());
    let checkpoint = weights::open(&request, &Silent).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
    let model = harness::build(&checkpoint, &request, &Silent).expect("a model");
    (checkpoint, model)
}

fn precision(checkpoint: &Checkpoint) -> FormatId {
    checkpoint.quantized.as_ref().expect("a quantized checkpoint").precision
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Executor {
    Reference,
    Cpu(Isa),
}

fn executors() -> impl Iterator<Item = Executor> {
    std::iter::once(Executor::Reference).chain(Isa::available().into_iter().map(Executor::Cpu))
}

fn load((checkpoint, model): (&Checkpoint, &Model), executor: Executor) -> Box<dyn Session> {
    let source = checkpoint.source(&model.matrices, &model.vectors).expect("its weights");
    let setup = Setup {
        model,
        source: source.as_ref(),
        formats: &Formats::new(precision(checkpoint), FormatOptions::default()),
        device: Device::Cpu,
        threads: 2,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: 64,
        encoder_capacity: 0,
        cuda_graph: false,
    };
    let loaded = match executor {
        Executor::Reference => engine::reference::load(&setup, &Silent),
        Executor::Cpu(isa) => engine::cpu::load(&setup, isa, &Silent),
    };
    let session = loaded.expect("a session").session;
    // What is known before a model is loaded is what it takes; vectors count 2 bytes a value.
    let stored = quantbench::engine::needs::stored_bytes(model, setup.formats);
    assert_eq!(session.footprint().weights_bytes, stored, "{executor:?}");
    session
}

/// Logits of each step when `tokens` follow the prompt.
fn forced(session: &mut dyn Session, prompt: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
    session.rewind(0);
    session.prefill(prompt).expect("a prompt");
    let mut logits = vec![session.logits().expect("logits")];
    for &token in &tokens[..tokens.len() - 1] {
        session.prefill(&[token]).expect("a step");
        logits.push(session.logits().expect("logits"));
    }
    logits
}

fn u32s(tensors: &SafeTensors, name: &str) -> Vec<u32> {
    let tensor = tensors.tensor(name).expect(name);
    let size = tensor.dtype().bitsize() / 8;
    tensor.data().chunks_exact(size).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()
}

fn f32s(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).expect(name).data().to_vec();
    data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The greedy ids of a run that nobody told.
fn greedy(session: &mut dyn Session, prompt: &[u32], n_gen: usize) -> Vec<u32> {
    session.rewind(0);
    let mut own = vec![session.prefill(prompt).expect("a prompt")];
    session.decode(n_gen - 1, &mut |id| own.push(id)).expect("steps");
    own
}

#[test]
fn ids_and_logits_are_those_of_the_dequantized_model() {
    for (path, name) in folders() {
        let golden = root().join("golden").join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&golden).unwrap_or_else(|error| panic!("{}: {error}", golden.display()));
        let tensors = SafeTensors::deserialize(&bytes).expect("golden tensors");
        let (checkpoint, model) = open(&path);
        if let Some((_, expected)) = NAMES.iter().find(|(known, _)| *known == name) {
            assert_eq!(precision(&checkpoint).name, *expected, "{name}");
        }
        for executor in executors() {
            let mut session = load((&checkpoint, &model), executor);
            for prompt in 0..3 {
                let what = format!("{name} {executor:?} prompt {prompt}");
                let ids = u32s(&tensors, &format!("p{prompt}.input_ids"));
                let generated = u32s(&tensors, &format!("p{prompt}.generated_ids"));
                let expected = f32s(&tensors, &format!("p{prompt}.step_logits"));
                let seen = forced(session.as_mut(), &ids, &generated);
                for (step, (seen, expected)) in seen.iter().zip(expected.chunks_exact(model.vocab)).enumerate() {
                    let worst = seen.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst <= LOGIT_TOLERANCE, "{what} step {step}: logits differ by {worst}");
                }
                // The reference's own margins are above twice the tolerance (`min_top1_margin`).
                assert_eq!(greedy(session.as_mut(), &ids, generated.len()), generated, "{what}");
            }
        }
    }
}

pub fn architectures() -> PathBuf {
    match std::env::var_os("QUANTBENCH_ARCHITECTURES") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/architectures"),
    }
}

/// bf16 holds every value of its MXFP4, so that the model is `gpt_oss`.
#[test]
fn a_gpt_oss_in_mxfp4_gives_the_ids_of_its_bf16_weights() {
    let facts = std::fs::read(architectures().join("golden/gpt_oss/golden.json")).expect("facts");
    let facts: Value = serde_json::from_slice(&facts).expect("JSON");
    let bytes = std::fs::read(architectures().join("golden/gpt_oss/golden.safetensors")).expect("golden tensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("golden tensors");
    let (checkpoint, model) = open(&architectures().join("models/gpt_oss-mxfp4"));
    assert_eq!(precision(&checkpoint).name, "mxfp4");
    for executor in executors() {
        let mut session = load((&checkpoint, &model), executor);
        for (i, prompt) in facts["prompts"].as_array().expect("prompts").iter().enumerate() {
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(prompt[key].clone()).expect("ids") };
            let (input, generated) = (ids("input_ids"), ids("generated_ids"));
            let expected = f32s(&tensors, &format!("p{i}.step_logits"));
            let seen = forced(session.as_mut(), &input, &generated).concat();
            let worst = seen.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= LOGIT_TOLERANCE, "{executor:?} prompt {i}: logits differ by {worst}");
            assert_eq!(greedy(session.as_mut(), &input, generated.len()), generated, "{executor:?} prompt {i}");
        }
    }
}
