//! Models with an encoder through the whole program: what a run shows them, what its record says, what is refused.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn run(model: &str, args: &[&str]) -> Output {
    run_folder(&golden("models").join(model), args)
}

fn run_folder(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.arg("--model-id").arg(folder).args(["--device", "cpu", "--threads", "1"]);
    command.args(["--warmup", "0", "--repeats", "1", "--precision", "fp16", "--format", "json"]).args(args);
    command.stdin(Stdio::null()).output().unwrap()
}

fn record(model: &str, args: &[&str]) -> Value {
    let output = run(model, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    document["records"][0].clone()
}

fn golden_ids(model: &str, prompt: usize) -> Value {
    let text = std::fs::read_to_string(golden("expected").join(model).join("golden.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["prompts"][prompt]["generated_ids"].clone()
}

#[test]
fn a_picture_and_the_default_prompt_give_the_ids_of_the_reference() {
    let image = golden("models/paligemma-odd/image.png");
    let seen = record("paligemma-odd", &["--image", image.to_str().unwrap(), "--max-new-tokens", "16"]);
    assert_eq!(seen["output"]["token_ids"], golden_ids("paligemma-odd", 0));
    let workload = &seen["workload"];
    assert_eq!((workload["n_image"].as_u64(), workload["n_prompt"].as_u64()), (Some(16), Some(3)));
    assert_eq!(workload["image"], "file");
    let phase = |name: &str| seen["phases"][name].as_f64().unwrap_or_else(|| panic!("no phase {name}"));
    let whole_s = seen["samples"]["end_to_end_ns"][0].as_f64().unwrap() / 1e9;
    let parts_s = phase("image_encode") + phase("prefill") + phase("decode");
    // Sums of fp64 seconds.
    assert!(phase("image_encode") > 0.0 && (parts_s - whole_s).abs() < 1e-9, "{parts_s} of {whole_s}");
    assert!(seen["metrics"]["ttft_ms"]["median"].as_f64().unwrap() >= 1e3 * phase("image_encode"));
}

#[test]
fn without_an_image_the_record_says_that_one_was_generated() {
    let seen = record("paligemma-odd", &["--max-new-tokens", "2"]);
    assert_eq!(seen["workload"]["image"], "generated");
    let text = record("t5-tiny", &["--max-new-tokens", "2", "--prompt-tokens", "5"]);
    assert_eq!((&text["workload"]["image"], text["workload"]["n_gen"].as_u64()), (&Value::Null, Some(2)));
    assert!(text["phases"]["encoder"].as_f64().unwrap() > 0.0);
    assert!(record("llama-tiny", &["--max-new-tokens", "2"])["phases"]["encoder"].is_null());
}

#[test]
fn pictures_that_cannot_be_shown_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let (broken, absent) = (place.path().join("broken.png"), place.path().join("absent.png"));
    let whole = golden("models/paligemma-odd/image.png");
    let bytes = std::fs::read(&whole).unwrap();
    std::fs::write(&broken, &bytes[..bytes.len() / 2]).unwrap();
    for (model, image, more, expected) in [
        ("paligemma-odd", &broken, &[][..], "cannot read image"),
        ("paligemma-odd", &absent, &[], "cannot read image"),
        ("llama-tiny", &whole, &[], "`llama` models read text only"),
        ("paligemma-odd", &whole, &["--prompt", "<image> caption"], "image tokens"),
        ("paligemma-odd", &whole, &["--prompt-tokens", "100000"], "the model's context holds"),
    ] {
        for how in [&[][..], &["--dry-run"]] {
            let output = run(model, &[&["--image", image.to_str().unwrap()], more, how].concat());
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{errors}");
            assert!(errors.contains(expected) && errors.contains("hint:"), "{errors}");
        }
    }
}

/// The odd model with these files beside its weights in place of preprocessor_config.json.
fn with_settings(files: &[(&str, &Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden("models/paligemma-odd")).unwrap().flatten() {
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    std::fs::remove_file(folder.path().join("preprocessor_config.json")).unwrap();
    for (name, value) in files {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

/// The logits of a run on the odd model's picture, and the warnings of its record about settings.
fn look(folder: &Path) -> (Vec<u8>, Vec<String>) {
    let (image, logits) = (golden("models/paligemma-odd/image_100x60.png"), folder.join("logits.safetensors"));
    let args = ["--image", image.to_str().unwrap(), "--prompt-ids", "2,5,6", "--max-new-tokens", "1", "--save-logits"];
    let output = run_folder(folder, &[&args[..], &[logits.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let warnings = document["records"][0]["warnings"].as_array().unwrap().iter().filter_map(Value::as_str);
    let told = warnings.filter(|warning| warning.contains("processor_setting")).map(str::to_owned).collect();
    (std::fs::read(logits).unwrap(), told)
}

#[test]
fn the_image_processors_settings_count_in_either_file() {
    let text = std::fs::read_to_string(golden("models/paligemma-odd/preprocessor_config.json")).unwrap();
    let usual: Value = serde_json::from_str(&text).unwrap();
    let mut other = usual.clone();
    other["image_mean"] = serde_json::json!([0.2, 0.4, 0.6]);
    other["image_std"] = serde_json::json!([0.9, 0.8, 0.7]);
    let nested =
        |settings: &Value| serde_json::json!({"image_processor": settings, "processor_class": "PaliGemmaProcessor"});
    let older = serde_json::json!({"processor_class": "PaliGemmaProcessor", "image_seq_length": 16});
    let expected = look(with_settings(&[("preprocessor_config.json", &other)]).path());
    assert!(expected.1.is_empty(), "{:?}", expected.1);
    for files in [
        &[("processor_config.json", &nested(&other))][..],
        // As transformers: the nested settings count where both are there.
        &[("processor_config.json", &nested(&other)), ("preprocessor_config.json", &usual)],
        &[("processor_config.json", &older), ("preprocessor_config.json", &other)],
        &[("processor_config.json", &nested(&Value::Null)), ("preprocessor_config.json", &other)],
    ] {
        assert!(look(with_settings(files).path()) == expected, "{files:?}");
    }

    let (defaults, told) = look(with_settings(&[]).path());
    assert!(defaults != expected.0 && told.len() == 1 && told[0].starts_with("no_processor_settings: "), "{told:?}");
    other["do_sharpen"] = true.into();
    other["do_thumbnail"] = false.into();
    let (same, told) = look(with_settings(&[("processor_config.json", &nested(&other))]).path());
    let expected_warning =
        "unapplied_processor_setting: `do_sharpen` of processor_config.json is `true`, which is not applied";
    assert!(same == expected.0 && told == [expected_warning], "{told:?}");
}
