//! Sections and tensors that are not whole, or say what cannot be: each a clear error, no panic, and no memory for what is not there.

use quantbench::error::{BadInput, hint};
use quantbench::events::Silent;
use quantbench::harness;
use quantbench::rng::SplitMix64;
use quantbench::weights::{self, ModelRequest};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::golden::{Golden, Tensors, of_bitsandbytes, root, scheme};
use crate::tensors::{Entry, entries};

/// Fails unless `error` is the user's to mend, with what to do, and holds these words.
#[track_caller]
fn assert_clear(what: &str, error: &anyhow::Error, words: &[&str]) {
    let found = error.chain().any(|cause| cause.is::<BadInput>());
    let said = format!("{error:#}\nhint: {}", hint(error).unwrap_or_default());
    assert!(found && hint(error).is_some(), "{what}: {said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{what}: `{word}` is not in `{said}`"));
}

fn group(weights: Value) -> Value {
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}})
}

#[test]
fn settings_that_are_not_computed_are_refused_by_key_and_value() {
    let gptq = |key: &str, value: Value| {
        let mut section = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        section[key] = value;
        section
    };
    let awq = |key: &str, value: Value| {
        let mut section = json!({"quant_method": "awq", "bits": 4, "group_size": 128});
        section[key] = value;
        section
    };
    let with = |key: &str, value: Value| {
        let mut section = group(json!({"num_bits": 4, "type": "int", "strategy": "channel"}));
        section[key] = value;
        section
    };
    let huge = json!(1u64 << 63);
    for (section, words) in [
        (gptq("bits", json!(3)), ["bits", "`3`"]),
        (gptq("bits", json!(5)), ["bits", "`5`"]),
        (gptq("bits", json!(0)), ["bits", "`0`"]),
        (gptq("bits", json!("4")), ["bits", "integers"]),
        (gptq("bits", json!(null)), ["bits", "null"]),
        (gptq("group_size", json!(0)), ["group_size", "`0`"]),
        (gptq("group_size", json!(-2)), ["group_size", "`-2`"]),
        (gptq("group_size", json!(1.5)), ["group_size", "`1.5`"]),
        (gptq("group_size", huge.clone()), ["group_size", "9223372036854775808"]),
        (gptq("checkpoint_format", json!("marlin")), ["checkpoint_format", "`marlin`"]),
        (gptq("is_marlin_format", json!(true)), ["is_marlin_format", "`true`"]),
        (gptq("desc_act", json!("yes")), ["desc_act", "`yes`"]),
        (gptq("pack_dtype", json!("int64")), ["pack_dtype", "`int64`"]),
        (awq("bits", json!(8)), ["bits", "`8`"]),
        (awq("version", json!("gemv_fast")), ["version", "`gemv_fast`"]),
        (awq("group_size", json!(0)), ["group_size", "`0`"]),
        (awq("format", json!("gemv")), ["format", "`gemv`"]),
        (awq("backend", json!("llm-awq")), ["backend", "`llm-awq`"]),
        (awq("modules_to_not_convert", json!(["("])), ["modules_to_not_convert", "`(`"]),
        (awq("modules_to_not_convert", json!([1])), ["modules_to_not_convert", "[1]"]),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), ["weight_block_size", "[0,128]"]),
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), ["weight_block_size", "[128]"]),
        (json!({"quant_method": "fp8", "weight_block_size": "x"}), ["weight_block_size", "`x`"]),
        (json!({"quant_method": "fp8", "weight_block_size": [1e30, 1]}), ["weight_block_size", "1e+30"]),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), ["fmt", "`e5m2`"]),
        (json!({"quant_method": "compressed-tensors"}), ["config_groups", "absent"]),
        (with("config_groups", json!({})), ["config_groups", "{}"]),
        (with("config_groups", json!([1])), ["config_groups", "[1]"]),
        (with("config_groups", json!({"g": {"targets": ["Linear"]}})), ["config_groups.g.weights", "absent"]),
        (with("format", json!("marlin-24")), ["format", "`marlin-24`"]),
        (with("quantization_status", json!("initialized")), ["quantization_status", "`initialized`"]),
        (with("ignore", json!(5)), ["ignore", "`5`"]),
        (with("ignore", json!(["re:*"])), ["ignore", "`*`"]),
        (with("sparsity_config", json!({"format": "sparse-24-bitmask"})), ["sparsity_config.format", "sparse"]),
        (with("transform_config", json!({"config_groups": {"u": {}}})), ["transform_config", "rotations"]),
        (group(json!({"num_bits": 3, "type": "int", "strategy": "channel"})), ["weights.num_bits", "`3`"]),
        (group(json!({"num_bits": 4, "type": "int", "strategy": "group"})), ["weights.group_size", "absent"]),
        (
            group(json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 0})),
            ["weights.group_size", "`0`"],
        ),
        (group(json!({"num_bits": 4, "type": "int", "strategy": "sideways"})), ["weights.strategy", "`sideways`"]),
        (group(json!({"num_bits": 8, "type": "float", "strategy": "block"})), ["weights.block_structure", "absent"]),
        (
            group(json!({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 64})),
            ["weights.group_size", "`64`"],
        ),
        (group(json!({"num_bits": 8, "type": "complex"})), ["weights.type", "`complex`"]),
        (json!({"quant_method": "modelopt"}), ["quant_algo", "absent"]),
        (json!({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}), ["quant_algo", "`W4A8_AWQ`"]),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}), ["group_size", "`32`"]),
        (
            json!({"quant_method": "modelopt", "quant_algo": "FP8", "pre_quant_scale": true}),
            ["pre_quant_scale", "`true`"],
        ),
        (json!({"quant_method": "mxfp4", "modules_to_not_convert": {}}), ["modules_to_not_convert", "{}"]),
    ] {
        let error = scheme(&section).err().unwrap_or_else(|| panic!("{section}"));
        assert_clear(&section.to_string(), &error, &words);
    }
}

fn all_entries() -> Vec<Entry> {
    let mut all = Vec::new();
    for file in ["int4", "float"] {
        all.extend(entries(&Golden::open(file), file));
    }
    all
}

#[track_caller]
fn refused(entry: &Entry, what: &str, tensors: &Tensors) -> String {
    let what = format!("{} {what}", entry.name);
    let error = tensors.read(entry.scheme.as_ref(), entry.shape).err().unwrap_or_else(|| panic!("{what} is read"));
    assert_clear(&what, &error, &[]);
    format!("{error:#}")
}

/// Tensors that a module may have and whose values nobody reads.
const UNREAD: &[&str] = &["input_scale", "input_scale_ub"];

#[test]
fn tensors_of_other_shapes_and_types_are_named() {
    for entry in all_entries() {
        for at in 0..entry.tensors.0.len() {
            let (name, dtype, shape, bytes) = entry.tensors.0[at].clone();
            if UNREAD.contains(&name.as_str()) {
                continue;
            }
            let with = |dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| {
                let mut changed = entry.tensors.clone();
                changed.0[at] = (name.clone(), dtype, shape, bytes);
                changed
            };
            let optional = ["weight_shape", "g_idx"].contains(&name.as_str());
            if !optional {
                refused(&entry, &format!("without {name}"), &entry.tensors.clone().without(&name));
            }
            let other = if dtype == Dtype::I16 { Dtype::U16 } else { Dtype::I16 };
            let said = refused(&entry, &format!("{name} in {other}"), &with(other, shape.clone(), bytes.clone()));
            assert!(said.contains(&name) || said.contains("quant_state"), "{said}");
            // A dimension more or less, a row less, and a dimension of nothing.
            if !shape.is_empty() && shape != [1] {
                refused(
                    &entry,
                    &format!("{name} in 3 dimensions"),
                    &with(dtype, [shape.clone(), vec![1, 1]].concat(), bytes.clone()),
                );
                let mut short = shape.clone();
                short[0] -= 1;
                let len = bytes.len() / shape[0] * short[0];
                refused(&entry, &format!("a shorter {name}"), &with(dtype, short, bytes[..len].to_vec()));
            }
            refused(&entry, &format!("an empty {name}"), &with(dtype, vec![0, usize::MAX], Vec::new()));
            refused(&entry, &format!("a huge {name}"), &with(dtype, vec![usize::MAX, usize::MAX], Vec::new()));
            // A shape that is right, and bytes that are not there.
            let cut = with(dtype, shape.clone(), bytes[..bytes.len() / 2].to_vec());
            assert!(cut.read(entry.scheme.as_ref(), entry.shape).is_err(), "{} {name} cut", entry.name);
        }
    }
}

#[test]
fn scales_that_are_no_finite_numbers_are_refused() {
    let mut changed = 0;
    for entry in all_entries() {
        for name in
            ["scales", "weight_scale", "weight_scale_inv", "weight.absmax", "weight_global_scale", "weight_scale_2"]
        {
            let Some(at) = entry.tensors.0.iter().position(|tensor| tensor.0 == name) else { continue };
            let nan: &[u8] = match entry.tensors.0[at].1 {
                Dtype::F32 => &[0, 0, 0xc0, 0x7f],
                Dtype::F16 => &[0, 0x7e],
                Dtype::BF16 => &[0xc0, 0x7f],
                Dtype::F8_E4M3 => &[0x7f],
                Dtype::U8 => &[255],
                other => panic!("{other}"),
            };
            let mut tensors = entry.tensors.clone();
            let bytes = &mut tensors.0[at].3;
            let last = bytes.len() - nan.len();
            bytes[last..].copy_from_slice(nan);
            refused(&entry, &format!("{name} with NaN"), &tensors);
            if ["weight_global_scale", "weight_scale_2"].contains(&name) {
                tensors.0[at].3.fill(0);
                refused(&entry, &format!("{name} of 0"), &tensors);
            }
            changed += 1;
        }
    }
    assert!(changed >= 30, "{changed} tensors of scales");
}

#[test]
fn groups_that_are_not_there_are_refused() {
    for entry in all_entries().into_iter().filter(|entry| entry.tensors.0.iter().any(|tensor| tensor.0 == "g_idx")) {
        for group in [4096i32, -1, i32::MIN, i32::MAX] {
            let mut tensors = entry.tensors.clone();
            tensors.tensor("g_idx").3[8..12].copy_from_slice(&group.to_le_bytes());
            let said = refused(&entry, "g_idx out of range", &tensors);
            assert!(said.contains("input 2") && said.contains(&group.to_string()), "{said}");
        }
    }
}

#[test]
fn texts_and_shapes_that_lie_are_refused() {
    let golden = Golden::open("float");
    let (tensors, scheme) = of_bitsandbytes(&golden, "bnb.fp4-b64", (16, 512));
    let state = "weight.quant_state.bitsandbytes__fp4";
    for text in [
        "",
        "{",
        "[]",
        r#"{"quant_type": "fp4", "blocksize": 0, "shape": [16, 512]}"#,
        r#"{"quant_type": "fp4", "blocksize": -64, "shape": [16, 512]}"#,
        r#"{"quant_type": "fp4", "blocksize": 18446744073709551615, "shape": [16, 512]}"#,
        r#"{"quant_type": "fp4", "blocksize": 64, "shape": [18446744073709551615, 512]}"#,
        r#"{"quant_type": "fp4", "blocksize": 64, "shape": []}"#,
        r#"{"quant_type": "int3", "blocksize": 64, "shape": [16, 512]}"#,
        r#"{"quant_type": "fp4", "blocksize": 64, "shape": [16, 512], "nested_blocksize": 256, "nested_offset": 0.5}"#,
        r#"{"quant_type": "fp4", "blocksize": 64, "shape": [16, 512], "nested_blocksize": 0, "nested_offset": 0.5}"#,
    ] {
        let mut lying = tensors.clone();
        *lying.tensor(state) = (state.to_owned(), Dtype::U8, vec![text.len()], text.as_bytes().to_vec());
        let error = lying.read(scheme.as_ref(), (16, 512)).err().unwrap_or_else(|| panic!("`{text}` is read"));
        assert_clear(text, &error, &[]);
    }
    let packed = all_entries().into_iter().find(|entry| entry.name == "ct.w4a16-g128").expect("an entry");
    for shape in [[16i64, 511], [-16, 512], [0, 0], [i64::MAX, i64::MAX]] {
        let mut lying = packed.tensors.clone();
        lying.tensor("weight_shape").3 = shape.iter().flat_map(|length| length.to_le_bytes()).collect();
        assert!(refused(&packed, "weight_shape", &lying).contains(&format!("{shape:?}")));
    }
}

/// A golden folder with another config.json and other weights.
fn opened(folder: &str, config: Option<&Value>, weights: Option<&[u8]>) -> anyhow::Result<()> {
    let from = root().join("models").join(folder);
    let place = tempfile::tempdir()?;
    let copy = |name: &str| std::fs::copy(from.join(name), place.path().join(name)).map(drop);
    match config {
        Some(config) => std::fs::write(place.path().join("config.json"), config.to_string())?,
        None => copy("config.json")?,
    }
    match weights {
        Some(bytes) => std::fs::write(place.path().join("model.safetensors"), bytes)?,
        None => copy("model.safetensors")?,
    }
    let request = ModelRequest::of(place.path().display().to_string());
    let checkpoint = weights::open(&request, &Silent)?;
    let model = harness::build(&checkpoint, &request, &Silent)?;
    let source = checkpoint.source(&model.matrices, &model.vectors)?;
    for spec in &model.matrices {
        if let Some(stored) = source.stored(spec) {
            assert_eq!(stored?.shape(), (spec.n, spec.k));
        }
    }
    Ok(())
}

const FOLDERS: [&str; 6] = ["tiny-awq", "tiny-fp8", "tiny-fp8-block", "tiny-gptq", "tiny-gptq-act", "tiny-w4a16"];

#[test]
fn files_that_are_cut_are_errors() {
    for folder in FOLDERS {
        let bytes = std::fs::read(root().join("models").join(folder).join("model.safetensors")).expect("weights");
        assert!(opened(folder, None, Some(&bytes)).is_ok(), "{folder}");
        for keep in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
            assert!(opened(folder, None, Some(&bytes[..keep])).is_err(), "{folder} of {keep} bytes");
        }
    }
}

/// Every key of every section, at values of every kind: read or refused, never a panic.
#[test]
fn any_value_of_any_key_is_read_or_refused() {
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(3),
        json!(8),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("x"),
        json!("re:("),
        json!([]),
        json!([0, 0]),
        json!([u64::MAX, 1]),
        json!(["Linear"]),
        json!({}),
        json!({"a": {"b": 1}}),
    ];
    let mut errors = 0;
    for folder in FOLDERS {
        let text = std::fs::read(root().join("models").join(folder).join("config.json")).expect("a config");
        let config: Value = serde_json::from_slice(&text).expect("JSON");
        for path in paths(&config["quantization_config"], "/quantization_config") {
            for value in &values {
                let mut changed = config.clone();
                *changed.pointer_mut(&path).expect("a key") = value.clone();
                if let Err(error) = opened(folder, Some(&changed), None) {
                    assert!(!format!("{error:#}").is_empty());
                    errors += 1;
                }
            }
        }
    }
    assert!(errors > 200, "{errors} refusals");
}

/// Pointers to every value inside.
fn paths(value: &Value, at: &str) -> Vec<String> {
    let inner = value.as_object().into_iter().flatten();
    let inner = inner.flat_map(|(key, value)| paths(value, &format!("{at}/{key}")));
    std::iter::once(at.to_owned()).chain(inner).collect()
}

/// Bytes of headers and data at random: read or refused, never a panic.
#[test]
fn any_bytes_are_read_or_refused() {
    let mut rng = SplitMix64::new(26);
    for folder in FOLDERS {
        let bytes = std::fs::read(root().join("models").join(folder).join("model.safetensors")).expect("weights");
        let header = 8 + u64::from_le_bytes(std::array::from_fn(|i| bytes[i])) as usize;
        for round in 0..40 {
            let mut changed = bytes.clone();
            for _ in 0..=round % 4 {
                let within = if round % 2 == 0 { header } else { changed.len() };
                let at = rng.below(within);
                changed[at] = if round % 3 == 0 { b'0' + (rng.below(10) as u8) } else { rng.below(256) as u8 };
            }
            let _ = opened(folder, None, Some(&changed));
        }
    }
}
