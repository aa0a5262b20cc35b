//! Checkpoints that transformers and bitsandbytes saved quantized: loaded as they are, and made byte for byte.

use std::fs;
use std::path::{Path, PathBuf};

use quantbench::engine::{self, Device, EncoderInput, Engine, Session, Setup};
use quantbench::error;
use quantbench::events::Silent;
use quantbench::harness::{self, Case, DeviceChoice, MeasurementProtocol, PrecisionSelection, PromptChoice};
use quantbench::plan::Model;
use quantbench::quant::{self, FormatId, FormatOptions, nf4};
use quantbench::weights::policy::{Formats, Selection};
use quantbench::weights::{self, ModelRequest, WeightsChoice};
use safetensors::SafeTensors;
use serde_json::Value;

const MODELS: [&str; 3] = ["llama-tiny", "phi-odd", "t5-tiny"];
const PRECISIONS: [&str; 3] = ["int8", "nf4", "nf4-nodq"];
const N_GEN: usize = 16;

fn golden(kind: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(kind).join(name)
}

fn request(folder: &Path) -> ModelRequest {
    ModelRequest::of(folder.display().to_string())
}

fn load(folder: &Path, precision: &str) -> (Model, Box<dyn Session>) {
    load_with(folder, precision, &Selection::Usual)
}

fn load_with(folder: &Path, precision: &str, selection: &Selection) -> (Model, Box<dyn Session>) {
    let checkpoint = weights::open(&request(folder), &Silent).unwrap();
    let mut model = quantbench::models::build(&checkpoint.config).unwrap();
    harness::select(&mut model, &checkpoint, selection).unwrap();
    let source = checkpoint.source(&model.matrices, &model.vectors).unwrap();
    let setup = Setup {
        model: &model,
        source: source.as_ref(),
        formats: &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default()),
        device: Device::Cpu,
        threads: 2,
        sequences: 1,
        kv_format: Device::Cpu.kv_format(),
        capacity: 64,
        encoder_capacity: 16,
        cuda_graph: true,
    };
    let session = engine::load(&setup, &Silent).unwrap().session;
    (model, session)
}

/// Greedy ids, and the logits of the last step.
fn generate((model, session): &mut (Model, Box<dyn Session>)) -> (Vec<u32>, Vec<f32>) {
    let prompt = [5, 9, 100, 42, 7, 77, 12, 200];
    let start = model.decoder_start.map(|start| vec![start]);
    if start.is_some() {
        session.encode(EncoderInput::Tokens(&prompt)).unwrap();
    }
    let mut ids = vec![session.prefill(start.as_deref().unwrap_or(&prompt)).unwrap()];
    session.decode(N_GEN - 1, &mut |id| ids.push(id)).unwrap();
    (ids, session.logits().unwrap())
}

#[test]
fn a_saved_checkpoint_generates_what_the_model_does_when_it_is_quantized_at_load() {
    for model in MODELS {
        for precision in PRECISIONS {
            let mut saved = load(&golden("bnb", &format!("{model}-{precision}")), precision);
            let mut made = load(&golden("models", model), precision);
            assert_eq!(generate(&mut saved), generate(&mut made), "{model} {precision}");
            assert_eq!(saved.1.footprint().weights_bytes, made.1.footprint().weights_bytes, "{model} {precision}");
        }
    }
}

fn case(folder: &Path, precisions: &[&str], precision_selection: PrecisionSelection) -> Case {
    Case {
        model: request(folder),
        precisions: precisions.iter().filter_map(|name| FormatId::named(name)).collect(),
        precision_selection,
        engines: vec![Engine::Quantbench.into()],
        asked: Vec::new(),
        saved: None,
        engine_timeout_s: 60.0,
        format_options: FormatOptions::default(),
        device: DeviceChoice::Cpu,
        threads: 1,
        cuda_graph: true,
        sequences: 1,
        largest_batch: false,
        kv_format: None,
        prompt: PromptChoice::Default,
        chat: false,
        may_shorten: false,
        image: None,
        n_gen: 4,
        n_depth: 0,
        stop_at_eos: false,
        protocol: MeasurementProtocol::default(),
        stream: false,
        save_logits: None,
        keep_fp16: Vec::new(),
        quality: None,
        command: "quantbench".to_owned(),
    }
}

#[test]
fn another_precision_than_the_saved_one_is_refused_with_both_names() {
    let folder = golden("bnb", "llama-tiny-nf4");
    for precisions in [&["int8"][..], &["nf4-nodq"], &["nf4", "fp16"]] {
        let error = harness::run(&case(&folder, precisions, PrecisionSelection::ByName), &Silent).unwrap_err();
        let other = precisions.iter().find(|name| **name != "nf4").unwrap();
        assert!(error.to_string().contains(&format!("`--precision {other}`")), "{error}");
        assert!(error.to_string().contains("saved in `nf4`"), "{error}");
        assert!(error.is::<error::BadInput>());
        assert!(error::hint(&error).is_some());
    }
}

/// A golden folder whose config.json and weights a test changes.
fn changed(name: &str, config: impl Fn(String) -> String, weights: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let (from, to) = (golden("bnb", name), tempfile::tempdir().unwrap());
    fs::write(to.path().join("config.json"), config(fs::read_to_string(from.join("config.json")).unwrap())).unwrap();
    let file = "model.safetensors";
    fs::write(to.path().join(file), weights(fs::read(from.join(file)).unwrap())).unwrap();
    to
}

/// `from`, each time it occurs, as `to`, which is as long.
fn replaced(mut bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> =
        bytes.windows(from.len()).enumerate().filter(|(_, w)| *w == from.as_bytes()).map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "no `{from}`");
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    bytes
}

#[test]
fn what_is_not_as_bitsandbytes_saves_it_is_refused_with_where_and_why() {
    let same = |bytes: Vec<u8>| bytes;
    let text = |config: String| config;
    for (folder, expected) in [
        (changed("llama-tiny-nf4", |c| c.replace("\"nf4\"", "\"fp4\""), same), "says `bnb-fp4-dq`"),
        (changed("llama-tiny-nf4", |c| c.replace("bitsandbytes", "gptq"), same), "bits absent"),
        (changed("llama-tiny-nf4", |c| c.replace("quantization_config", "other"), same), "which cannot be cast"),
        (changed("llama-tiny-int8", text, |b| replaced(b, "q_proj.SCB", "q_proj.SCA")), "it is absent"),
        (
            changed("llama-tiny-nf4", text, |b| replaced(b, "k_proj.weight.absmax", "k_proj.weight.absmin")),
            "it is absent",
        ),
        (
            changed("llama-tiny-nf4", |c| c.replace("\"intermediate_size\": 256", "\"intermediate_size\": 512"), same),
            "must be U8 of",
        ),
        (
            changed("llama-tiny-nf4", text, |b| replaced(b, "\"blocksize\": 64", "\"blocksize\": 32")),
            "weight.absmax` must be",
        ),
        (
            changed("llama-tiny-nf4", text, |b| replaced(b, "\"shape\": [128, 256]", "\"shape\": [256, 128]")),
            "[256, 128]",
        ),
    ] {
        let error = try_load(folder.path()).expect_err(expected);
        assert!(format!("{error:#}").contains(expected), "{error:#}");
    }
}

fn try_load(folder: &Path) -> anyhow::Result<()> {
    let checkpoint = weights::open(&request(folder), &Silent)?;
    let model = quantbench::models::build(&checkpoint.config)?;
    let source = checkpoint.source(&model.matrices, &model.vectors)?;
    model.matrices.iter().filter_map(|spec| source.parts(spec)).try_for_each(|parts| parts.map(drop))
}

fn export_to(model: &Path, precision: &str, output: &Path) -> anyhow::Result<weights::export::Exported> {
    let checkpoint = weights::open(&request(model), &Silent)?;
    let plan = quantbench::models::build(&checkpoint.config)?;
    weights::export::export(
        &checkpoint,
        (&plan.matrices, &plan.vectors),
        FormatId::named(precision).expect("a format"),
        output,
        &Silent,
    )
}

#[test]
fn layers_that_are_kept_in_fp16_are_saved_plain_and_named_for_transformers() {
    let (place, model) = (tempfile::tempdir().unwrap(), golden("models", "llama-tiny"));
    let output = place.path().join("exported");
    let checkpoint = weights::open(&request(&model), &Silent).unwrap();
    let mut plan = quantbench::models::build(&checkpoint.config).unwrap();
    let kept = Selection::Without(vec!["down_proj".to_owned()]);
    harness::select(&mut plan, &checkpoint, &kept).unwrap();
    weights::export::export(&checkpoint, (&plan.matrices, &plan.vectors), nf4::ID, &output, &Silent).unwrap();

    let config: Value = serde_json::from_slice(&fs::read(output.join("config.json")).unwrap()).unwrap();
    let names = [0, 1, 2].map(|layer| format!("model.layers.{layer}.mlp.down_proj"));
    let expected = names.iter().map(String::as_str).chain(["lm_head"]).collect::<Vec<_>>();
    assert_eq!(config["quantization_config"]["llm_int8_skip_modules"], serde_json::json!(expected));
    let bytes = fs::read(output.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for name in &names {
        assert_eq!(tensors.tensor(&format!("{name}.weight")).unwrap().dtype(), safetensors::Dtype::F16);
    }
    assert!(tensors.names().iter().all(|name| !name.contains("down_proj.weight.")));

    let (mut exported, mut made) = (load(&output, "nf4"), load_with(&model, "nf4", &kept));
    assert_eq!(generate(&mut exported), generate(&mut made));
    assert_eq!(exported.1.footprint().weights_bytes, made.1.footprint().weights_bytes);
}

/// The whole file, header and order of the tensors included.
#[test]
fn an_exported_checkpoint_is_the_one_that_bitsandbytes_saves() {
    for model in MODELS {
        for precision in PRECISIONS {
            let (place, golden) = (tempfile::tempdir().unwrap(), golden("bnb", &format!("{model}-{precision}")));
            let output = place.path().join("exported");
            let exported = export_to(&self::golden("models", model), precision, &output).unwrap();
            let [ours, theirs] = [&output, &golden].map(|folder| fs::read(folder.join("model.safetensors")).unwrap());
            same_tensors(&format!("{model} {precision}"), &ours, &theirs);
            assert!(ours == theirs, "{model} {precision}: the tensors are the same, their order or header is not");
            assert_eq!((exported.bytes, exported.fp16_overflow), (ours.len() as u64, 0));
            let [ours, theirs] = [&output, &golden]
                .map(|folder| serde_json::from_slice::<Value>(&fs::read(folder.join("config.json")).unwrap()).unwrap());
            assert_eq!(ours["quantization_config"].to_string(), theirs["quantization_config"].to_string());
            assert_eq!(ours["dtype"], theirs["dtype"]);
            assert_eq!(ours["model_type"], theirs["model_type"]);
            for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
                assert!(output.join(name).is_file(), "{model}: no {name}");
            }
            let left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
            assert_eq!(left, ["exported"]);
            let mut saved = load(&output, precision);
            assert_eq!(generate(&mut saved), generate(&mut load(&golden, precision)), "{model} {precision}");
        }
    }
}

fn same_tensors(what: &str, ours: &[u8], theirs: &[u8]) {
    let [ours, theirs] = [ours, theirs].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let names = |tensors: &SafeTensors| {
        let mut names: Vec<String> = tensors.names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(&ours), names(&theirs), "{what}");
    for (name, theirs) in theirs.tensors() {
        let ours = ours.tensor(&name).unwrap();
        assert_eq!((ours.dtype(), ours.shape()), (theirs.dtype(), theirs.shape()), "{what}: {name}");
        assert!(ours.data() == theirs.data(), "{what}: {name} differs");
    }
}

#[test]
fn an_export_that_cannot_be_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let (model, new) = (golden("models", "llama-tiny"), place.path().join("new"));
    let full = place.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("file"), "kept").unwrap();
    for (model, precision, output, expected) in [
        (&model, "fp32", &new, "bitsandbytes saves no `fp32`"),
        (&golden("bnb", "llama-tiny-nf4"), "nf4", &new, "saved in `nf4` already"),
        (&PathBuf::from("smollm2-135m"), "nf4", &new, "a shape without weights"),
        (&model, "nf4", &full, "not empty"),
        (&model, "nf4", &full.join("file"), "no folder"),
        (&model, "nf4", &place.path().join("absent/new"), "there is no folder"),
    ] {
        let error = export_to(model, precision, output).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.is::<error::BadInput>());
        assert!(error::hint(&error).is_some());
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(full.join("file")).unwrap(), "kept");
}

/// Other engines load what was exported: the values are those that every precision begins with.
#[test]
fn an_fp16_folder_has_the_weights_that_were_measured() {
    for model in MODELS {
        let (place, model) = (tempfile::tempdir().unwrap(), golden("models", model));
        let output = place.path().join("exported");
        export_to(&model, "fp16", &output).unwrap();
        assert_eq!(generate(&mut load(&output, "fp16")), generate(&mut load(&model, "fp16")));
        let config: Value = serde_json::from_slice(&fs::read(output.join("config.json")).unwrap()).unwrap();
        assert!(config["dtype"] == "float16" && config.get("quantization_config").is_none(), "{config}");
    }
    // Random weights of a shape, which no folder holds.
    let place = tempfile::tempdir().unwrap();
    let random = ModelRequest { weights: WeightsChoice::Random, seed: 3, ..request(&golden("models", "llama-tiny")) };
    let checkpoint = weights::open(&random, &Silent).unwrap();
    let plan = quantbench::models::build(&checkpoint.config).unwrap();
    let output = place.path().join("random");
    let tensors = (plan.matrices.as_slice(), plan.vectors.as_slice());
    weights::export::export(&checkpoint, tensors, quant::BASELINE, &output, &Silent).unwrap();
    let (source, bytes) =
        (checkpoint.source(tensors.0, tensors.1).unwrap(), fs::read(output.join("model.safetensors")));
    let (bytes, name) = (bytes.unwrap(), &plan.matrices[1].name);
    let mut values = vec![half::f16::ZERO; plan.matrices[1].n * plan.matrices[1].k];
    source.read_rows(name, 0..plan.matrices[1].n, &mut values).unwrap();
    let saved = SafeTensors::deserialize(&bytes).unwrap();
    assert!(saved.tensor(name).unwrap().data() == values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
}

/// Name, dims, type and offset of each tensor of a GGUF file, and where its values begin.
fn gguf(bytes: &[u8]) -> (Vec<(String, Vec<u64>, u32, u64)>, usize) {
    let mut at = 8;
    let mut take = |n: usize| {
        at += n;
        bytes[at - n..at].to_vec()
    };
    let long = |bytes: Vec<u8>| u64::from_le_bytes(bytes.try_into().unwrap());
    let short = |bytes: Vec<u8>| u32::from_le_bytes(bytes.try_into().unwrap());
    let (n_tensors, n_keys) = (long(take(8)), long(take(8)));
    for _ in 0..n_keys {
        let length = long(take(8)) as usize;
        take(length);
        match short(take(4)) {
            8 => {
                let length = long(take(8)) as usize;
                take(length);
            }
            _ => drop(take(4)),
        }
    }
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        let length = long(take(8)) as usize;
        let name = String::from_utf8(take(length)).unwrap();
        let n_dims = short(take(4));
        let dims = (0..n_dims).map(|_| long(take(8))).collect();
        tensors.push((name, dims, short(take(4)), long(take(8))));
    }
    (tensors, at.next_multiple_of(32))
}

/// The values of llama.cpp's tensors are the checkpoint's; of keys and queries the two halves of a head lie by turns.
#[test]
fn a_gguf_file_has_the_weights_that_were_measured() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("model.gguf");
    let checkpoint = weights::open(&request(&golden("models", "llama-tiny")), &Silent).unwrap();
    let plan = quantbench::models::build(&checkpoint.config).unwrap();
    let tensors = (plan.matrices.as_slice(), plan.vectors.as_slice());
    let (size, _) = weights::gguf::export(&checkpoint, tensors, quant::BASELINE, &output, &Silent).unwrap();
    let bytes = fs::read(&output).unwrap();
    assert!(bytes.starts_with(b"GGUF\x03\0\0\0") && size == bytes.len() as u64);
    let (saved, begin) = gguf(&bytes);
    let source = checkpoint.source(tensors.0, tensors.1).unwrap();
    let row = |own: &str, at: usize, k: usize| {
        let mut values = vec![half::f16::ZERO; k];
        source.read_rows(own, at..at + 1, &mut values).unwrap();
        values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()
    };
    let head_dim = checkpoint.config["head_dim"].as_u64().map_or_else(
        || {
            (checkpoint.config["hidden_size"].as_u64().unwrap()
                / checkpoint.config["num_attention_heads"].as_u64().unwrap()) as usize
        },
        |dim| dim as usize,
    );
    // Row 1 of a head is the first of its second half.
    for (theirs, own, from, to) in [
        ("token_embd.weight", "model.embed_tokens.weight", 7, 7),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 3, 3),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", head_dim / 2, 1),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", head_dim / 2, head_dim / 2),
    ] {
        let (_, dims, kind, offset) = saved.iter().find(|(name, ..)| name == theirs).unwrap();
        let (k, spec) = (dims[0] as usize, plan.matrices.iter().find(|spec| spec.name == own).unwrap());
        assert_eq!((dims.as_slice(), *kind), (&[spec.k as u64, spec.n as u64][..], 1), "{theirs}");
        let at = begin + *offset as usize + to * k * 2;
        assert!(bytes[at..at + 2 * k] == row(own, from, k), "{theirs}");
    }
    let refused = |model: &str| {
        let checkpoint = weights::open(&request(&golden("models", model)), &Silent).unwrap();
        let plan = quantbench::models::build(&checkpoint.config).unwrap();
        let new = place.path().join("other.gguf");
        weights::gguf::export(&checkpoint, (&plan.matrices, &plan.vectors), quant::BASELINE, &new, &Silent)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refused("t5-tiny"), "no GGUF is written for `t5`");
    assert!(!place.path().join("other.gguf").exists());
}
