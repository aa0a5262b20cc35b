//! Where weights come from: folders that are whole, folders that are not, and made-up weights.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use quantbench::error;
use quantbench::events::Silent;
use quantbench::weights::spec::{MatrixSpec, Role, VectorKind, VectorSpec};
use quantbench::weights::{
    self, Checkpoint, ModelRequest, Source, SourceKind, WeightsChoice, random::Random, tokenizer,
};
use safetensors::Dtype;
use serde_json::{Value, json};

fn request(model_id: &str, weights: WeightsChoice) -> ModelRequest {
    ModelRequest {
        model_id: model_id.to_owned(),
        revision: None,
        offline: true,
        weights,
        seed: 3,
        outlier_channels: 6,
        strict_config: false,
    }
}

fn open(folder: &Path) -> anyhow::Result<Checkpoint> {
    weights::open(&request(&folder.display().to_string(), WeightsChoice::Auto), &Silent)
}

fn matrix(name: &str, n: usize, k: usize) -> MatrixSpec {
    MatrixSpec { name: name.to_owned(), n, k, role: Role::Projection, others: Vec::new(), held: None }
}

fn vector(name: &str, len: usize, kind: VectorKind) -> VectorSpec {
    VectorSpec { name: name.to_owned(), len, kind, others: Vec::new() }
}

fn values(source: &dyn Source, name: &str, n: usize, k: usize) -> (Vec<f16>, usize) {
    let mut out = vec![f16::ZERO; n * k];
    let overflow = source.read_rows(name, 0..n, &mut out).unwrap();
    (out, overflow)
}

/// A safetensors file of tensors that lie one after another.
fn safetensors(tensors: &[(&str, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert((*name).to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    with_header(&Value::Object(header).to_string(), &data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

const CONFIG: &str = r#"{"model_type": "llama"}"#;
const INDEX: &str = "model.safetensors.index.json";

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

#[test]
fn a_bad_folder_is_refused_with_what_where_and_why() {
    let weight = || ("a.weight", "F16", vec![2, 3], vec![0; 12]);
    let whole = safetensors(&[weight()]);
    let one = |file: Vec<u8>| vec![("config.json", CONFIG.into()), ("model.safetensors", file)];
    let header = |text: &str, data: &[u8]| one(with_header(text, data));
    let sharded =
        |index: &str| vec![("config.json", CONFIG.into()), (INDEX, index.into()), ("one.safetensors", whole.clone())];
    type Files = Vec<(&'static str, Vec<u8>)>;
    let cases: Vec<(&str, Files, &[&str])> = vec![
        ("no config", vec![("model.safetensors", whole.clone())], &["config.json"]),
        ("config is no JSON", vec![("config.json", b"{".to_vec())], &["config.json", "not JSON", "line 1"]),
        ("config is no object", vec![("config.json", b"[1]".to_vec())], &["config.json", "object"]),
        ("no weights", vec![("config.json", CONFIG.into())], &["model.safetensors", INDEX]),
        (
            "pickled weights",
            vec![("config.json", CONFIG.into()), ("pytorch_model.bin", vec![])],
            &["only PyTorch pickles: `pytorch_model.bin`"],
        ),
        ("empty file", one(vec![]), &["model.safetensors", "0 bytes"]),
        ("truncated", one(whole[..whole.len() - 1].to_vec()), &["truncated"]),
        ("trailing bytes", one([whole.clone(), vec![0]].concat()), &["end before the file"]),
        (
            "header beyond the file",
            one([&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
            &["claims 18446744073709551615"],
        ),
        ("header cut", one([&100u64.to_le_bytes()[..], b"{}"].concat()), &["claims 100 bytes, at most 2"]),
        ("header is no JSON", header("{]", &[]), &["header cannot be read"]),
        ("header is no UTF-8", one([&1u64.to_le_bytes()[..], &[0xff]].concat()), &["header cannot be read"]),
        (
            "offsets overlap",
            header(
                r#"{"a.weight":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F16","shape":[1],"data_offsets":[10,12]}}"#,
                &[0; 12],
            ),
            &["header cannot be read", "offset"],
        ),
        (
            "offsets and shape disagree",
            header(r#"{"a.weight":{"dtype":"F16","shape":[2,4],"data_offsets":[0,12]}}"#, &[0; 12]),
            &["header cannot be read"],
        ),
        (
            "shape overflows",
            header(r#"{"a.weight":{"dtype":"F16","shape":[18446744073709551615,9],"data_offsets":[0,2]}}"#, &[0; 2]),
            &["header cannot be read"],
        ),
        (
            "unknown dtype",
            header(r#"{"a.weight":{"dtype":"Q9","shape":[2],"data_offsets":[0,2]}}"#, &[0; 2]),
            &["header cannot be read", "Q9"],
        ),
        (
            "integer dtype",
            one(safetensors(&[("a.weight", "I64", vec![2, 3], vec![0; 48])])),
            &["a.weight", "I64", "F16, BF16 and F32"],
        ),
        (
            "wrong shape",
            one(safetensors(&[("a.weight", "F16", vec![3, 2], vec![0; 12])])),
            &["a.weight", "[3, 2]", "[2, 3]"],
        ),
        (
            "no values in a huge shape",
            one(safetensors(&[("a.weight", "F16", vec![0, 1 << 60, 1 << 60], vec![])])),
            &["a.weight", "[2, 3]"],
        ),
        (
            "missing tensor",
            one(safetensors(&[("a.weigth", "F16", vec![2, 3], vec![0; 12])])),
            &["`llama` needs tensor `a.weight`", "1 tensors read", "`a.weigth`"],
        ),
        (
            "missing shard",
            sharded(r#"{"weight_map":{"a.weight":"one.safetensors","b":"two.safetensors"}}"#),
            &["two.safetensors", "1 of 2 files"],
        ),
        ("index outside", sharded(r#"{"weight_map":{"a.weight":"../one.safetensors"}}"#), &["../one.safetensors"]),
        ("index is no JSON", sharded("weights"), &[INDEX, "not an index"]),
        ("index without a map", sharded("{}"), &["weight_map"]),
        ("index names no file", sharded(r#"{"weight_map":{"a.weight":3}}"#), &["a.weight", "not a string"]),
        (
            "bad tokenizer",
            vec![
                ("config.json", CONFIG.into()),
                ("model.safetensors", whole.clone()),
                ("tokenizer.json", b"{\"version\": 1".to_vec()),
            ],
            &["tokenizer.json"],
        ),
    ];
    for (case, files, wanted) in cases {
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        let folder = folder(&files);
        let opened = open(folder.path()).and_then(|opened| opened.source(&[matrix("a.weight", 2, 3)], &[]));
        let error = opened.err().unwrap_or_else(|| panic!("{case}: was accepted"));
        let message = format!("{error:#}");
        for part in wanted {
            assert!(message.contains(part), "{case}: `{part}` is not in `{message}`");
        }
        assert!(error.downcast_ref::<error::BadInput>().is_some(), "{case}: {message}");
        let parent = folder.path().parent().unwrap().display().to_string();
        assert!(parent == "/" || !message.contains(&parent), "{case}: `{message}` holds a path");
    }
}

#[test]
fn an_id_that_is_nothing_is_refused_with_the_nearest_name() {
    let cases: &[(&str, &[&str])] = &[
        ("phi2", &["`phi2`", "`phi-2`"]),
        ("SmolLM2-135M", &["`smollm2-135m`"]),
        ("./no-such-folder", &["no such folder", "./no-such-folder"]),
        ("/no/such/folder", &["no such folder"]),
        ("a/b/c", &["no such folder"]),
        ("", &["``"]),
        ("owner/na me", &["owner/name"]),
        ("../x", &["no such folder"]),
        ("owner/..", &["owner/name"]),
    ];
    for (id, wanted) in cases {
        let error = weights::open(&request(id, WeightsChoice::Auto), &Silent).err().expect(id);
        for part in *wanted {
            assert!(error.to_string().contains(part), "`{id}`: {error}");
        }
    }
}

#[test]
fn built_in_names_mean_random_weights_and_hub_ids_only_on_request() {
    for shape in weights::builtin_models() {
        for (id, weights) in [(shape.name, WeightsChoice::Auto), (shape.hub_id, WeightsChoice::Random)] {
            let opened = weights::open(&request(id, weights), &Silent).unwrap();
            assert_eq!((opened.id.as_str(), opened.config), (id, shape.config()));
            assert!(opened.tokenizer.is_none());
        }
    }
}

#[test]
fn random_weights_take_the_shape_of_a_folder_without_weights() {
    let folder = folder(&[("config.json", CONFIG.as_bytes())]);
    let opened = weights::open(&request(&folder.path().display().to_string(), WeightsChoice::Random), &Silent).unwrap();
    let source = opened.source(&[matrix("a.weight", 2, 3)], &[]).unwrap();
    let info = source.info();
    assert_eq!((info.source, info.seed, info.hash.as_str()), (SourceKind::Random, Some(3), "seed:3, recipe:2"));
    assert_eq!(opened.id, folder.path().file_name().unwrap().to_string_lossy());
}

#[test]
fn shards_are_read_by_index_and_casts_round_to_nearest_even() {
    // fp16: 1 + 2⁻¹⁰ is the neighbour of 1, 65504 the largest value, 2⁻²⁴ the smallest; halfway goes to the even one.
    let cases: &[(f32, f32)] = &[
        (1.0, 1.0),
        (-1.5, -1.5),
        (1.0 + 2f32.powi(-11), 1.0),
        (1.0 + 3.0 * 2f32.powi(-11), 1.0 + 2f32.powi(-9)),
        (65504.0, 65504.0),
        (65519.0, 65504.0),
        (65520.0, f32::INFINITY),
        (-1e30, f32::NEG_INFINITY),
        (f32::INFINITY, f32::INFINITY),
        (2f32.powi(-24), 2f32.powi(-24)),
        (2f32.powi(-25), 0.0),
        (-3.0 * 2f32.powi(-25), -2f32.powi(-23)),
        (1e-30, 0.0),
    ];
    let f32s: Vec<u8> = cases.iter().flat_map(|(x, _)| x.to_le_bytes()).collect();
    let bf16s: Vec<u8> = cases.iter().flat_map(|(x, _)| bf16::from_f32(*x).to_le_bytes()).collect();
    let f16s: Vec<u8> = cases.iter().flat_map(|(x, _)| f16::from_f32(*x).to_le_bytes()).collect();
    let n = cases.len();
    let index = r#"{"weight_map":{"wide":"a.safetensors","brain":"b.safetensors","half":"b.safetensors"}}"#;
    let folder = folder(&[
        ("config.json", CONFIG.as_bytes()),
        (INDEX, index.as_bytes()),
        ("a.safetensors", &safetensors(&[("wide", "F32", vec![n, 1], f32s), ("half", "F16", vec![1], vec![0; 2])])),
        ("b.safetensors", &safetensors(&[("brain", "BF16", vec![n, 1], bf16s), ("half", "F16", vec![n], f16s)])),
    ]);
    let opened = open(folder.path()).unwrap();
    let specs = [matrix("wide", n, 1), matrix("brain", n, 1)];
    let source = opened.source(&specs, &[vector("half", n, VectorKind::Bias)]).unwrap();
    assert_eq!(source.names(), ["brain", "half", "wide"]);

    let (wide, overflow) = values(source.as_ref(), "wide", n, 1);
    assert_eq!(overflow, 2);
    assert_eq!(wide.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), cases.iter().map(|(_, y)| *y).collect::<Vec<_>>());
    let (brain, overflow) = values(source.as_ref(), "brain", n, 1);
    let expected: Vec<f16> = cases.iter().map(|(x, _)| f16::from_f32(bf16::from_f32(*x).to_f32())).collect();
    // bf16 has no 65504 or 65519: both become 65536, beyond fp16.
    assert_eq!((brain, overflow), (expected, 4));
    let (half, overflow) = values(source.as_ref(), "half", n, 1);
    assert_eq!((half, overflow), (wide, 0));
}

#[test]
fn rows_may_be_read_in_any_chunks() {
    let (n, k) = (37, 20_011);
    let bytes: Vec<u8> = (0..n * k).flat_map(|i| bf16::from_f32((i % 977) as f32 - 488.0).to_le_bytes()).collect();
    let file = safetensors(&[("pad", "F16", vec![3], vec![0; 6]), ("m", "BF16", vec![n, k], bytes.clone())]);
    let folder = folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors", &file)]);
    let opened = open(folder.path()).unwrap();
    let specs = [matrix("m", n, k)];
    let vectors = [vector("v", k, VectorKind::NormWeight)];
    let real = opened.source(&specs, &[]).unwrap();
    let random: Box<dyn Source> = Box::new(Random::new(1, 6, &specs, &vectors));
    for source in [&real, &random] {
        let (whole, _) = values(source.as_ref(), "m", n, k);
        for step in [1, 5, 36] {
            let mut parts = vec![f16::ZERO; n * k];
            for start in (0..n).step_by(step).collect::<Vec<_>>().into_iter().rev() {
                let end = n.min(start + step);
                source.read_rows("m", start..end, &mut parts[start * k..end * k]).unwrap();
            }
            assert!(whole == parts, "{step} rows at a time");
        }
        let mut out = vec![f16::ZERO; k];
        assert!(source.read_rows("m", n..n + 1, &mut out).is_err());
        assert!(source.read_rows("m", 0..2, &mut out).is_err());
        assert!(source.read_rows("none", 0..1, &mut out).is_err());
    }

    // As they are saved, for a device that casts.
    assert_eq!((real.raw_dtype("m"), real.raw_dtype("none"), random.raw_dtype("m")), (Some(Dtype::BF16), None, None));
    let mut raw = vec![0; 2 * 3 * k];
    real.read_raw("m", 5..8, &mut raw).unwrap();
    assert!(raw == bytes[2 * 5 * k..2 * 8 * k]);
    assert!(real.read_raw("m", 35..38, &mut raw).is_err());
    assert!(real.read_raw("m", 5..7, &mut raw).is_err());
    assert!(random.read_raw("m", 5..8, &mut raw).is_err());
}

#[test]
fn random_weights_are_the_same_everywhere_scaled_and_hold_the_outliers_asked_for() {
    let (n, k) = (300, 257);
    let kinds = [VectorKind::NormWeight, VectorKind::NormOffset, VectorKind::Bias];
    let specs = [matrix("m", n, k + 1), matrix("other", n, k + 1), matrix("behind", n, k)];
    let vectors: Vec<_> = kinds.iter().map(|kind| vector(&format!("{kind:?}"), k, *kind)).collect();
    let make = |seed| Random::new(seed, 6, &specs, &vectors);
    let source = make(7);
    let (m, _) = values(&source, "m", n, k + 1);

    // Fixed by arithmetic that every machine does alike; a change here changes every published random-weight result.
    let first: Vec<u16> = m[..4].iter().map(|x| x.to_bits()).collect();
    assert_eq!(first, FIRST_BITS);
    assert!(m != values(&make(8), "m", n, k + 1).0, "another seed");
    assert!(m != values(&source, "other", n, k + 1).0, "another tensor");

    // 77,400 independent draws: their variance is off by √(2 / 77400) = 0.5 % at one sigma, their mean by 0.36 % of it.
    let wide: Vec<f64> = m.iter().map(|x| x.to_f64()).collect();
    let mean = wide.iter().sum::<f64>() / wide.len() as f64;
    let variance = wide.iter().map(|x| x * x).sum::<f64>() / wide.len() as f64;
    assert!((variance * (k + 1) as f64 - 1.0).abs() < 0.025, "{variance}");
    assert!((mean * ((k + 1) as f64).sqrt()).abs() < 0.018, "{mean}");

    let mut channels = Vec::new();
    for (kind, centre) in [("NormWeight", 0.0), ("NormOffset", 1.0)] {
        let (weights, _) = values(&source, kind, k, 1);
        let weights: Vec<f32> = weights.iter().map(|x| x.to_f32() + centre).collect();
        let large: Vec<usize> = (0..k).filter(|&c| weights[c] > 6.0).collect();
        assert_eq!(large.len(), 6, "{kind}");
        // 0.02 · 6, the largest draw of a sum of eight uniforms being below 5 sigma.
        assert!((0..k).filter(|c| !large.contains(c)).all(|c| (weights[c] - 1.0).abs() < 0.12), "{kind}");
        channels.push(large);
    }
    assert_eq!(channels[0], channels[1], "the same channels in every norm");
    // A matrix behind the norm: half the size, and each outlier channel's values a 20th of that. 300 draws: 4 % at one sigma.
    let (behind, _) = values(&source, "behind", n, k);
    for channel in 0..k {
        let square: f64 = behind.iter().skip(channel).step_by(k).map(|x| x.to_f64() * x.to_f64()).sum();
        let size = (square / n as f64 * k as f64).sqrt();
        let expected = if channels[0].contains(&channel) { 0.5 / 20.0 } else { 0.5 };
        assert!((size / expected - 1.0).abs() < 0.2, "{channel}: {size}, not {expected}");
    }
    assert!(values(&source, "Bias", k, 1).0.iter().all(|x| x.to_f32().abs() < 0.12));
}

const FIRST_BITS: [u16; 4] = [10869, 44725, 8972, 11338];

#[test]
fn the_hash_follows_the_content_of_a_folder() {
    let hash = |value: u8| {
        let file = safetensors(&[("a.weight", "F16", vec![2, 3], vec![value; 12])]);
        let folder = folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors", &file)]);
        let source = open(folder.path()).unwrap().source(&[matrix("a.weight", 2, 3)], &[]).unwrap();
        (source.info().hash.clone(), source.info().dtype.clone())
    };
    assert_eq!(hash(1), hash(1));
    assert_ne!(hash(1), hash(2));
    assert!(hash(1).0.starts_with("xxh3:") && hash(1).1 == "f16");
}

#[test]
fn a_golden_folder_opens_with_its_tokenizer() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tiny");
    let opened = open(&path).unwrap();
    assert_eq!((opened.id.as_str(), opened.config["model_type"].as_str()), ("llama-tiny", Some("llama")));
    assert!(opened.generation_config.is_some());
    let tokenizer = opened.tokenizer.as_ref().unwrap();
    let ids = tokenizer::encode(tokenizer, "the cat").unwrap();
    assert!(!ids.is_empty());
    tokenizer::decode(tokenizer, &ids).unwrap();
    let source = opened.source(&[matrix("model.embed_tokens.weight", 512, 128)], &[]).unwrap();
    assert_eq!(source.info().source, SourceKind::Local);
    assert_eq!(source.stored_bytes("model.embed_tokens.weight"), 2 * 512 * 128);
}

#[test]
fn a_revision_belongs_to_the_hub() {
    for id in ["phi-2", env!("CARGO_MANIFEST_DIR")] {
        let request = ModelRequest { revision: Some("v1".to_owned()), ..request(id, WeightsChoice::Random) };
        let error = weights::open(&request, &Silent).err().expect(id);
        assert!(error.to_string().contains("--revision v1"), "{error}");
    }
}

/// Sets each integer of a config in turn, those of nested ones too, and hands it to `see`.
fn with_each_integer(config: &Value, path: &str, value: u64, see: &mut dyn FnMut(&str, &Value)) {
    let at = config.pointer(path).unwrap();
    if let Some(keys) = at.as_object() {
        for key in keys.keys() {
            with_each_integer(config, &format!("{path}/{key}"), value, see);
        }
    } else if at.is_u64() {
        let mut changed = config.clone();
        *changed.pointer_mut(path).unwrap() = value.into();
        see(path, &changed);
    }
}

#[test]
fn sizes_beyond_any_model_are_named_and_nothing_overflows() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    let mut refused = Vec::new();
    for model in fs::read_dir(folder).unwrap() {
        let config = fs::read_to_string(model.unwrap().path().join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        for value in [0, 1, 1 << 22, 1_000_000_000_000, 1 << 63] {
            with_each_integer(&config, "", value, &mut |path, changed| match quantbench::models::build(changed) {
                Ok(model) => assert!(model.parameters() < 1 << 62, "{path}: {value}"),
                Err(error) => {
                    let error = error.to_string();
                    refused.push(format!("{path} {value}: {}", error::without_backtrace(&error)));
                }
            });
        }
    }
    for expected in [
        "/hidden_size 1000000000000: config.json says `hidden_size` 1000000000000; it must be 1 to 4194304",
        "/text_config/head_dim 4194304: config.json says `num_attention_heads × head_dim` 16777216; it must be 1 to 4194304",
        "/num_decoder_layers 4194304: config.json says `num_decoder_layers` 4194304; it must be at most 4096",
    ] {
        assert!(refused.iter().any(|said| said == expected), "no `{expected}` in {refused:#?}");
    }
}
