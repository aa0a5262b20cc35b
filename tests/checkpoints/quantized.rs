//! A record is called by what its weights are held in, and not by what config.json says.

use quantbench::events::Silent;
use quantbench::quant::int8;
use quantbench::weights;
use serde_json::{Value, json};

use crate::folder::{Folder, quantbench};

/// The section that a quantized golden checkpoint has.
fn section(name: &str) -> Value {
    Folder::of_kind("bnb", name).config["quantization_config"].clone()
}

#[test]
fn plain_weights_are_plain_whatever_the_section_says() {
    let plain = Folder::of("llama-tiny").run("fp16");
    for section in [section("llama-tiny-nf4"), section("llama-tiny-int8"), json!({"quant_method": "gptq", "bits": 4})] {
        let folder = Folder::of("llama-tiny").set("quantization_config", section).write();
        let checkpoint = weights::open(&folder.request(), &Silent).unwrap();
        assert!(checkpoint.quantized.is_none());
        let run = folder.run("fp16");
        assert_eq!(run.warns(&["quantization_config_ignored"]).logits, plain.logits);
        for precision in ["int8", "nf4"] {
            assert_eq!(folder.run(precision).logits, Folder::of("llama-tiny").run(precision).logits, "{precision}");
        }
    }
    // The same of MLX' own key.
    let folder = Folder::of("llama-tiny").set("quantization", json!({"group_size": 64, "bits": 4})).write();
    assert_eq!(folder.run("fp16").warns(&["quantization_config_ignored"]).logits, plain.logits);
}

#[test]
fn what_is_exported_of_plain_weights_says_what_it_holds() {
    let place = tempfile::tempdir().unwrap();
    let output = place.path().join("exported");
    let folder = Folder::of("llama-tiny").set("quantization_config", section("llama-tiny-nf4")).write();
    let checkpoint = weights::open(&folder.request(), &Silent).unwrap();
    let model = quantbench::models::build(&checkpoint.config).unwrap();
    weights::export::export(&checkpoint, (&model.matrices, &model.vectors), int8::ID, &output, &Silent).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["load_in_8bit"], json!(true));
}

#[test]
fn no_record_is_called_by_a_format_that_holds_none_of_its_weights() {
    let folder = Folder::of("llama-tiny").set("quantization_config", section("llama-tiny-nf4")).write();
    let run = ["--max-new-tokens", "2", "--warmup", "0", "--repeats", "1", "--format", "json"];
    let output = quantbench(&folder, &run);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut precisions = Vec::new();
    for record in document["records"].as_array().unwrap() {
        let precision = record["precision"].as_str().unwrap();
        assert!(record["memory"]["weights_by_format"][precision].as_u64().unwrap() > 100_000, "{record}");
        let warnings = record["warnings"].as_array().unwrap();
        let told =
            |warning: &&Value| warning.as_str().unwrap().starts_with("quantization_config_ignored: `bitsandbytes`");
        assert_eq!(warnings.iter().filter(told).count(), 1, "{warnings:?}");
        precisions.push(precision.to_owned());
    }
    assert_eq!(precisions, ["fp16", "int8", "nf4"]);
}

#[test]
fn nf4_is_called_as_it_is_held() {
    for (name, says, held) in
        [("llama-tiny-nf4", "llama-tiny-nf4-nodq", "nf4"), ("llama-tiny-nf4-nodq", "llama-tiny-nf4", "nf4-nodq")]
    {
        let folder = Folder::of_kind("bnb", name).set("quantization_config", section(says)).write();
        let checkpoint = weights::open(&folder.request(), &Silent).unwrap();
        assert_eq!(checkpoint.quantized.unwrap().precision.name, held);
        let (run, plain) = (folder.run(held), Folder::of_kind("bnb", name).run(held));
        assert_eq!(run.warns(&["quantization_config_disagrees"]).logits, plain.logits);
    }
}

#[test]
fn a_contradiction_is_an_error_that_names_it() {
    for (name, says, words) in [
        ("llama-tiny-nf4", "llama-tiny-int8", ["says `int8`", "holds weights in `nf4`"]),
        ("llama-tiny-int8", "llama-tiny-nf4", ["says `nf4`", "holds weights in `int8`"]),
        ("llama-tiny-int8", "llama-tiny-nf4-nodq", ["says `nf4-nodq`", "holds weights in `int8`"]),
    ] {
        Folder::of_kind("bnb", name).set("quantization_config", section(says)).write().refused(&words);
    }
    let fp4 = |name: &str| name.replace("bitsandbytes__nf4", "bitsandbytes__fp4");
    Folder::of_kind("bnb", "llama-tiny-nf4").renamed(fp4).write().refused(&["says `nf4`", "`fp4`"]);
}

/// Plain weights in place of the quantized ones of some layers.
fn half_way(replaced: &str) -> Folder {
    let (mut folder, plain) = (Folder::of_kind("bnb", "llama-tiny-nf4"), Folder::of("llama-tiny"));
    folder.tensors.retain(|name, _| !name.contains(replaced));
    let kept = plain.tensors.into_iter().filter(|(name, _)| name.contains(replaced));
    folder.tensors.extend(kept);
    folder
}

#[test]
fn a_half_quantized_checkpoint_is_told_unless_config_json_says_so() {
    let folder = half_way("down_proj").write();
    let run = folder.run("nf4");
    let message = run.warns(&["partly_quantized"]).message("partly_quantized");
    assert!(message.contains("3 of 21 linear layers") && message.contains("down_proj"), "{message}");
    let mut said = half_way("down_proj");
    said.config["quantization_config"]["llm_int8_skip_modules"] = json!(["down_proj", "lm_head"]);
    said.write().run("nf4").warns(&[]);

    // Of the layers that the model has, none is quantized.
    let one_more = |name: &str| name.replace("model.layers.0.", "model.layers.9.");
    let mut folder = half_way("model.layers.");
    let quantized = Folder::of_kind("bnb", "llama-tiny-nf4").renamed(one_more).tensors;
    folder.tensors.extend(quantized.into_iter().filter(|(name, _)| name.contains("layers.9.")));
    folder.write().refused(&["says `nf4`", "none of the 21 linear layers"]);
}

#[test]
fn other_methods_are_refused_by_name_with_what_to_do() {
    for (section, word) in [
        (json!({"quant_method": "hqq", "bits": 4}), "`hqq` (integers of HQQ)"),
        (json!({"quant_method": "aqlm"}), "`aqlm`"),
        (json!({"quant_method": "gptq", "bits": 3}), "bits `3`"),
        (json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), "version `gemv`"),
        (json!({"group_size": 64, "bits": 4}), "`mlx`"),
        (json!({"quant_method": "of tomorrow"}), "`of tomorrow`"),
    ] {
        let name = |name: &str| name.replace("proj.weight", "proj.qweight");
        let folder = Folder::of("llama-tiny").set("quantization_config", section).renamed(name).write();
        folder.refused(&[word, "16-bit model"]);
        let output = quantbench(&folder, &["--dry-run"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains(word), "{word}");
    }
}
