//! The binary from outside: exit code and both streams. `INSTA_UPDATE=always cargo test --test cli` rewrites the snapshots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A folder to run in, with the bad and good model folders that the commands name.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("no-config/readme.txt", "no model");
        write("not-json/config.json", "{");
        write("no-weights/config.json", &fs::read_to_string(golden("llama-tiny").join("config.json")).unwrap());
        write("empty.txt", "");
        write("folder.json/file.txt", "");
        copy(&golden("llama-tiny"), &folder.path().join("llama-tiny"));
        copy(&golden("llama-tiny"), &folder.path().join("unknown-type"));
        write("unknown-type/config.json", r#"{"model_type": "mamba"}"#);
        copy(&golden("llama-tiny"), &folder.path().join("truncated"));
        let weights = folder.path().join("truncated/model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
        Self { folder }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
        command.args(args).current_dir(self.folder.path()).env("COLUMNS", "100");
        command.env("HF_HOME", self.folder.path().join("hub")).env_remove("HF_TOKEN").env_remove("HF_ENDPOINT");
        // candle would write backtraces into its messages.
        command.env("RUST_BACKTRACE", "1").stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn has(&self, name: &str) -> bool {
        self.folder.path().join(name).exists()
    }
}

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(model)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn streams(output: &Output) -> String {
    format!(
        "exit code: {}\n----- stdout\n{}----- stderr\n{}",
        output.status.code().map_or("none".into(), |code| code.to_string()),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Name of the snapshot, and the command line.
const SNAPSHOTS: &[(&str, &[&str])] = &[
    ("help", &["--help"]),
    ("list_models", &["--list-models"]),
    ("unknown_precision", &["--precision", "fp16,imt8"]),
    ("unknown_option", &["--precison", "fp16"]),
    ("unknown_device", &["--device", "gpu"]),
    ("no_such_folder", &["--model-id", "./absent"]),
    ("no_such_shape", &["--model-id", "smollm2-135"]),
    ("folder_without_config", &["--model-id", "./no-config"]),
    ("config_not_json", &["--model-id", "./not-json"]),
    ("unknown_model_type", &["--model-id", "./unknown-type"]),
    ("folder_without_weights", &["--model-id", "./no-weights"]),
    ("truncated_weights", &["--model-id", "./truncated"]),
    ("empty_prompt", &["--prompt", ""]),
    ("empty_prompt_file", &["--prompt-file", "empty.txt"]),
    ("absent_prompt_file", &["--prompt-file", "absent.txt"]),
    ("no_new_tokens", &["--max-new-tokens", "0"]),
    ("beyond_context", &["--prompt-tokens", "9000"]),
    ("id_beyond_vocabulary", &["--prompt-ids", "1,99999999"]),
    ("text_without_tokenizer", &["--prompt", "The capital of France is"]),
    ("conflicting_prompts", &["--prompt", "a", "--prompt-tokens", "3"]),
    ("output_in_absent_folder", &["--output", "absent/r.json"]),
    ("output_is_a_folder", &["--output", "folder.json"]),
    ("output_without_format", &["--output", "r.xml"]),
    ("seed_with_repeats", &["--method", "seed", "--repeats", "3"]),
    ("seed_with_launches", &["--method", "seed", "--launches", "3"]),
    ("logits_in_absent_folder", &["--save-logits", "absent/logits.safetensors"]),
];

#[test]
fn exit_code_and_streams() {
    let place = Place::new();
    for (name, args) in SNAPSHOTS {
        insta::assert_snapshot!(*name, streams(&place.run(args)));
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_needs_the_feature() {
    insta::assert_snapshot!(streams(&Place::new().run(&["--device", "cuda:1"])));
}

#[test]
fn version_names_commit_features_and_target() {
    let output = Place::new().run(&["--version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.lines().count() == 1, "{text}");
    let start = format!("quantbench {} (commit ", env!("CARGO_PKG_VERSION"));
    assert!(text.starts_with(&start), "{text}");
    for word in ["features ", "target "] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn completions_and_man_page_know_the_options() {
    let place = Place::new();
    for args in [&["completions", "bash"][..], &["completions", "zsh"], &["completions", "fish"], &["man"]] {
        let output = place.run(args);
        // roff and zsh write `-` as `\-` or split words; the last word of an option is whole in all of them.
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{args:?}");
        for word in ["precision", "outlier", "list"] {
            assert!(text.contains(word), "{args:?} does not know `{word}`");
        }
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let place = Place::new();
    let mut child =
        place.command(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", streams(&output));
    assert!(output.stderr.is_empty(), "{}", streams(&output));
}

#[test]
fn a_failed_run_leaves_no_file() {
    let place = Place::new();
    let args = ["--model-id", "./truncated", "--output", "r.json", "--precision", "fp16"];
    assert_eq!(place.run(&args).status.code(), Some(2));
    assert!(!place.has("r.json"));
}

/// The keys that a record promises.
const RECORD_KEYS: &[&str] = &[
    "status",
    "reason",
    "engine/name",
    "engine/version",
    "engine/commit",
    "command",
    "timestamp",
    "model/id",
    "model/revision",
    "model/architecture",
    "model/parameters",
    "weights/source",
    "weights/dtype",
    "weights/seed",
    "weights/hash",
    "weights/fp16_overflow",
    "precision",
    "int8",
    "device/kind",
    "device/name",
    "workload/n_prompt",
    "workload/n_gen",
    "workload/n_depth",
    "workload/n_image",
    "workload/batch_size",
    "phases/resolve",
    "phases/load",
    "phases/quantize",
    "phases/warmup",
    "samples/prefill_ns",
    "samples/decode_step_ns",
    "samples/end_to_end_ns",
    "dtypes/weights",
    "dtypes/compute",
    "dtypes/kv_cache",
    "dtypes/logits",
    "ratio_to_fp16",
    "memory/start_bytes",
    "memory/end_bytes",
    "memory/peak_bytes",
    "memory/load_peak_bytes",
    "memory/weights_bytes",
    "memory/kv_cache_bytes",
    "memory/process_peak_rss_bytes",
    "bandwidth/weight_bytes_per_token",
    "bandwidth/kv_bytes_per_token",
    "bandwidth/read_gb_s",
    "bandwidth/achieved_gb_s",
    "bandwidth/mbu",
    "output/token_ids",
    "output/text",
    "environment/cpu",
    "environment/isa",
    "environment/threads",
    "environment/os",
    "environment/build_profile",
    "environment/features",
    "environment/gpu",
    "environment/driver",
    "environment/cuda",
    "warnings",
];

const METRICS: &[&str] = &[
    "latency_s",
    "latency_per_token_ms",
    "ttft_ms",
    "tpot_ms",
    "itl_ms",
    "decode_tps",
    "prefill_tps",
    "output_tps",
    "load_s",
];

#[test]
fn a_run_fills_the_record() {
    let place = Place::new();
    let args = "--model-id ./llama-tiny --prompt-ids 1,2,3 --max-new-tokens 4 --repeats 2 --warmup 0 --threads 1 \
                --output r.json";
    let output = place.run(&args.split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let table = String::from_utf8(output.stdout).unwrap();
    let text = fs::read_to_string(place.folder.path().join("r.json")).unwrap();
    assert!(!text.contains(&place.folder.path().display().to_string()), "a path of this machine in the record");
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["schema_version"], 1);

    let records = document["records"].as_array().unwrap();
    let precisions: Vec<_> = records.iter().map(|record| record["precision"].as_str().unwrap()).collect();
    assert_eq!(precisions, ["fp16", "int8", "nf4"]);
    for record in records {
        check_record(record);
        assert!(table.contains(record["precision"].as_str().unwrap()), "{table}");
    }
}

fn check_record(record: &Value) {
    for key in RECORD_KEYS {
        assert!(record.pointer(&format!("/{key}")).is_some(), "no `{key}` in {record}");
    }
    for metric in METRICS {
        for key in ["unit", "median", "min", "max", "mean", "stdev", "n", "ci95_low", "ci95_high"] {
            assert!(record["metrics"][metric].get(key).is_some(), "no `{metric}`.`{key}`");
        }
    }
    assert_eq!(record["status"], "ok", "{}", record["reason"]);
    assert_eq!(record["output"]["token_ids"].as_array().unwrap().len(), 4);
    assert_eq!(record["samples"]["end_to_end_ns"].as_array().unwrap().len(), 2);
    let by_format = record["memory"]["weights_by_format"].as_object().unwrap().values();
    let weights_bytes: u64 = by_format.map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(record["memory"]["weights_bytes"], weights_bytes);
    assert_eq!(record["samples"]["decode_step_ns"][1].as_array().unwrap().len(), 3);
}

#[test]
fn ways_to_measure_reach_the_record() {
    let place = Place::new();
    let run = |more: &str| {
        let args = "--model-id ./llama-tiny --precision fp16,nf4 --prompt-ids 1,2 --max-new-tokens 3 --threads 1 --output r.json";
        let output = place.run(&args.split_whitespace().chain(more.split_whitespace()).collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
        let text = fs::read_to_string(place.folder.path().join("r.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["records"][1].clone()
    };
    let launched = run("--launches 2 --repeats 2 --warmup 0 --sync-each-token --keep-series");
    assert_eq!(launched["samples"]["launches"], serde_json::json!([2, 2]));
    assert_eq!(launched["protocol"]["interval"], "between-launches");
    assert_eq!(launched["samples"]["synced_step_ns"].as_array().unwrap().len(), 4);
    assert_eq!(launched["series"].as_array().unwrap().len(), 4);
    assert!(launched["metrics"]["decode_synced_tps"]["median"].is_number());
    assert!(launched["self_check"]["error_share"].as_f64().unwrap() <= 1.0);
    assert!(
        launched["warnings"].as_array().unwrap().iter().any(|text| text.as_str().unwrap().starts_with("few_launches"))
    );

    let seed = run("--method seed");
    assert_eq!((&seed["protocol"]["method"], &seed["protocol"]["n_repeats"]), (&"seed".into(), &1.into()));
    assert_eq!((&seed["protocol"]["n_warmup"], &seed["samples"]["cold_ns"]), (&0.into(), &Value::Null));
    assert!(seed["series"].is_null() && seed["samples"]["launches"].is_null());
}

#[test]
fn stdout_takes_every_format() {
    let place = Place::new();
    for (format, start) in [("json", "{"), ("jsonl", "{"), ("csv", "status"), ("markdown", ""), ("table", "")] {
        let args = "--model-id ./llama-tiny --precision fp16 --prompt-ids 1 --max-new-tokens 2 --repeats 1 --warmup 0 \
                    --threads 1 --format";
        let output = place.run(&args.split_whitespace().chain([format]).collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("fp16") && text.starts_with(start), "{format}: {text}");
    }
}

#[test]
fn logits_are_saved_for_each_new_token() {
    let place = Place::new();
    let args = "--model-id ./llama-tiny --precision fp16 --prompt-ids 1,2 --max-new-tokens 3 --repeats 1 --warmup 0 \
                --threads 1 --save-logits logits.safetensors";
    let output = place.run(&args.split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let bytes = fs::read(place.folder.path().join("logits.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!((logits.dtype(), logits.shape()[0]), (safetensors::Dtype::F32, 3));
}

#[test]
fn a_weight_that_is_no_number_makes_every_precision_invalid() {
    let place = Place::new();
    copy(&golden("llama-tiny"), &place.folder.path().join("not-a-number"));
    let weights = place.folder.path().join("not-a-number/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let tensor = &header["model.layers.0.mlp.down_proj.weight"];
    assert_eq!(tensor["dtype"], "F16");
    let start = 8 + header_len + tensor["data_offsets"][0].as_u64().unwrap() as usize;
    // All bits set are a NaN of fp16.
    bytes[start..start + 2].fill(0xff);
    fs::write(&weights, bytes).unwrap();
    let args = "--model-id ./not-a-number --prompt-ids 1,2,3 --max-new-tokens 4 --repeats 2 --warmup 0 --threads 1 --allow-oom \
                --output r.json";
    let output = place.run(&args.split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(1), "{}", streams(&output));
    let found = statuses(&place);
    assert_eq!(found.iter().map(|(_, status, _)| status.as_str()).collect::<Vec<_>>(), ["invalid"; 3]);
    for (precision, _, reason) in found {
        assert_eq!(reason, "the logits are not finite after repeat 1", "{precision}");
    }
}

/// Precision, status and reason of every record of `r.json`.
fn statuses(place: &Place) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(place.folder.path().join("r.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let records = document["records"].as_array().unwrap().iter();
    records.map(|record| (text(&record["precision"]), text(&record["status"]), text(&record["reason"]))).collect()
}

/// A model of 203 MiB in fp16 and 58 MiB in nf4 under a limit of the address space: what does not fit is a row, whether it is
/// known before a worker starts or the worker is refused memory, and the rest is measured.
#[cfg(unix)]
#[test]
fn what_does_not_fit_is_a_row_and_the_rest_is_measured() {
    let place = Place::new();
    let config = fs::read_to_string(golden("llama-tiny").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in
        [("hidden_size", 1024), ("intermediate_size", 16384), ("num_hidden_layers", 2), ("num_attention_heads", 8)]
    {
        config[key] = value.into();
    }
    (config["head_dim"], config["num_key_value_heads"]) = (128.into(), 2.into());
    fs::create_dir(place.folder.path().join("wide")).unwrap();
    fs::write(place.folder.path().join("wide/config.json"), config.to_string()).unwrap();
    let args = "--model-id ./wide --weights random --precision fp16,nf4 --prompt-ids 1,2 --max-new-tokens 2 --repeats 1 \
                --warmup 0 --threads 1 --output r.json";
    for (limit_kib, allow, code, cause) in [
        (300_000, "", 1, "MiB free; an allocation of"),
        (300_000, "--allow-oom", 0, "MiB free; an allocation of"),
        (205_000, "--allow-oom", 0, "MiB free"),
    ] {
        let script = format!("ulimit -v {limit_kib} && exec \"$0\" {args} {allow}");
        let binary = env!("CARGO_BIN_EXE_quantbench");
        let output =
            Command::new("sh").args(["-c", &script, binary]).current_dir(place.folder.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", streams(&output));
        let found = statuses(&place);
        let reason = &found[0].2;
        assert_eq!((found[0].1.as_str(), found[1].1.as_str()), ("oom", "ok"), "{limit_kib}: {found:?}");
        assert!(reason.starts_with("out of memory: wanted 203.0 MiB, ") && reason.contains(cause), "{reason}");
    }
}
