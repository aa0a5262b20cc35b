//! Models with an encoder through the whole program: what a run shows them, what its record says, what is refused.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn run(model: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.arg("--model-id").arg(golden("models").join(model)).args(["--device", "cpu", "--threads", "1"]);
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
        ("llama-tiny", &whole, &[], "`llama` models read text alone"),
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
