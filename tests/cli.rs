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
    ("brief_help", &["-h"]),
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
    ("endless_prompt_file", &["--prompt-file", "/dev/zero"]),
    ("too_many_threads", &["--threads", "99999"]),
    ("no_new_tokens", &["--max-new-tokens", "0"]),
    ("beyond_context", &["-m", "smollm2-135m", "--prompt-tokens", "9000"]),
    ("id_beyond_vocabulary", &["-m", "smollm2-135m", "--prompt-ids", "1,99999999"]),
    ("text_without_tokenizer", &["-m", "smollm2-135m", "--prompt", "The capital of France is"]),
    ("stream_without_tokenizer", &["-m", "smollm2-135m", "--stream", "--prompt-ids", "1,2"]),
    ("stream_of_random_ids", &["-m", "./llama-tiny", "--stream", "-p", "8"]),
    ("stream_without_warm_up", &["-m", "./llama-tiny", "--stream", "--method", "single-cold-run"]),
    ("stream_beside_another_build", &["-m", "./llama-tiny", "--stream", "--ab", "other"]),
    ("conflicting_prompts", &["--prompt", "a", "--prompt-tokens", "3"]),
    ("output_in_absent_folder", &["--output", "absent/r.json"]),
    ("output_is_a_folder", &["--output", "folder.json"]),
    ("output_without_format", &["--output", "r.xml"]),
    ("candle_quantized", &["--engine", "candle", "--precision", "4bit"]),
    ("candle_without_fp16", &["--engine", "quantbench,candle", "--precision", "int8,nf4"]),
    ("unknown_engine", &["--engine", "cnadle"]),
    ("dry_run_as_csv", &["--dry-run", "--format", "csv"]),
    ("cold_run_with_repeats", &["--method", "seed", "--repeats", "3"]),
    ("cold_run_with_launches", &["--method", "single-cold-run", "--launches", "3"]),
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
fn a_stdout_that_takes_nothing_is_named() {
    let place = Place::new();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let child = place.command(&["completions", "bash"]).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(streams(&output).contains("error: writing the result to stdout"), "{}", streams(&output));
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

/// The texts on stderr are those of the records, whatever stdout is for.
#[test]
fn a_text_is_shown_while_it_is_written() {
    let place = Place::new();
    let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    fs::write(place.folder.path().join("llama-tiny/chat_template.jinja"), template).unwrap();
    for (more, n_texts) in [
        (&["--prompt", "The capital"][..], 2),
        (&["--prompt", "The capital", "--chat", "--launches", "2"], 2),
        (&["-n", "8", "-n", "16", "--stop-at-eos", "--engine", "quantbench,candle"], 6),
    ] {
        let mut args: Vec<&str> =
            "-m ./llama-tiny --precision fp16,nf4 --warmup 1 --repeats 1 --threads 1 --device cpu \
                                   --format jsonl --quiet --stream"
                .split_whitespace()
                .collect();
        args.extend(more);
        if !more.contains(&"-n") {
            args.extend(["-n", "24"]);
        }
        let output = place.run(&args);
        assert_eq!(output.status.code(), Some(0), "{more:?}: {}", streams(&output));
        let records: Vec<Value> =
            String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(records.len(), n_texts, "{more:?}");
        let shown = |record: &Value| {
            let engine = record["engine"]["name"].as_str().filter(|name| *name != "quantbench");
            let label =
                engine.map(|name| format!("{name}-")).unwrap_or_default() + record["precision"].as_str().unwrap();
            let text: String = record["output"]["text"].as_str().unwrap().chars().filter(|c| !c.is_control()).collect();
            format!("{label}\n{text}\n\n")
        };
        assert_eq!(String::from_utf8_lossy(&output.stderr), records.iter().map(shown).collect::<String>(), "{more:?}");
    }
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
    assert_eq!((&seed["protocol"]["method"], &seed["protocol"]["n_repeats"]), (&"single-cold-run".into(), &1.into()));
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
fn candle_rows_stand_beside_our_own_with_the_same_ids() {
    let place = Place::new();
    let args = "--model-id ./llama-tiny --engine quantbench,candle --precision fp16,nf4 --prompt-ids 1,2,3 \
                --max-new-tokens 4 --repeats 6 --warmup 0 --threads 1 --output r.json --save-logits logits.safetensors";
    let output = place.run(&args.split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("fp16 by candle") && table.contains("candle's fp16 decodes"), "{table}");
    let document: Value = serde_json::from_slice(&fs::read(place.folder.path().join("r.json")).unwrap()).unwrap();
    let seen = |at: usize| {
        let record = &document["records"][at];
        (record["engine"]["name"].as_str().unwrap(), record["precision"].as_str().unwrap())
    };
    assert_eq!([seen(0), seen(1), seen(2)], [("quantbench", "fp16"), ("quantbench", "nf4"), ("candle", "fp16")]);
    let [own, _, candle] = [0, 1, 2].map(|at| &document["records"][at]);
    assert_eq!(own["output"], candle["output"]);
    assert_eq!(own["memory"]["weights_bytes"], candle["memory"]["weights_bytes"]);
    assert!(own["ratio_to_fp16"].is_null() && candle["ratio_to_fp16"]["paired"] == true, "{}", candle["ratio_to_fp16"]);
    assert_eq!((&candle["dtypes"]["compute"], &candle["status"]), (&"fp16".into(), &"ok".into()));
    for file in ["logits.fp16", "logits.nf4", "logits.candle-fp16"] {
        assert!(place.has(&format!("{file}.safetensors")), "no `{file}`");
    }
}

/// `VERSION` is what records show, and nothing but Cargo.lock knows it.
#[test]
fn the_version_of_candle_is_the_locked_one() {
    let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let entry = format!("name = \"candle-transformers\"\nversion = \"{}\"\n", quantbench::engine::candle::VERSION);
    assert!(lock.contains(&entry), "Cargo.lock has another candle-transformers than `{}`", entry.trim());
}

#[test]
fn doctor_has_a_page_for_every_machine() {
    let place = Place::new();
    let output = place.run(&["doctor"]);
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let page = String::from_utf8(output.stdout).unwrap();
    for title in ["build", "cpu", "memory", "gpu", "permissions", "what to do"] {
        assert!(page.lines().any(|line| line == title), "no block `{title}` in\n{page}");
    }
    let output = place.run(&["doctor", "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(seen["cpu"]["threads"].as_u64() >= Some(1) && seen["memory"]["read_gb_s"].as_f64() > Some(0.0), "{seen}");
    assert!(seen["findings"].as_array().unwrap().iter().all(|f| f["what"].is_string() && f["advice"].is_string()));
}

#[test]
fn a_dry_run_says_what_would_run_and_whether_it_fits() {
    let place = Place::new();
    let args = ["--model-id", "./llama-tiny", "--prompt-ids", "1,2,3", "--threads", "1", "--dry-run"];
    let output = place.run(&args);
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["would run llama-tiny (llama", "3 prompt + 64 new tokens", "no download", "nf4 ", "GiB of memory"] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
    let output = place.run(&[&args[..], &["--format", "json"]].concat());
    let dry: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = dry["rows"].as_array().unwrap();
    assert_eq!((rows.len(), dry["weights"].as_str(), dry["download_bytes"].as_u64()), (3, Some("local"), Some(0)));
    // 3 layers of keys and values, 2 heads of 32 elements, fp32, for 3 + 64 positions.
    assert!(rows.iter().all(|row| row["kv_cache_bytes"] == 3 * 2 * 2 * 32 * 4 * 67 && row["fits"] == true), "{dry}");
    // What a run would refuse is refused here.
    assert_eq!(place.run(&["--model-id", "./absent", "--dry-run"]).status.code(), Some(2));
}

#[test]
fn a_model_that_fits_no_machine_is_told_by_a_dry_run() {
    let place = Place::new();
    let config = fs::read_to_string(golden("llama-tiny").join("config.json")).unwrap();
    fs::create_dir(place.folder.path().join("huge")).unwrap();
    // 2^22 × 2^22 embeddings of 2 bytes.
    let mut huge: Value = serde_json::from_str(&config).unwrap();
    huge["vocab_size"] = (1 << 22).into();
    huge["hidden_size"] = (1 << 22).into();
    fs::write(place.folder.path().join("huge/config.json"), huge.to_string()).unwrap();
    let args = ["--model-id", "./huge", "--weights", "random", "--prompt-ids", "1", "--dry-run", "--format", "json"];
    let output = place.run(&args);
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    let dry: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        dry["rows"].as_array().unwrap().iter().all(|row| row["fits"] == false) && dry["order"] == "in_turn",
        "{dry}"
    );
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

/// What people type where a value begins with a dash or was copied from Python.
#[test]
fn words_are_taken_as_they_are_meant() {
    let place = Place::new();
    let rest =
        "--precision fp16 --max-new-tokens 2 --warmup 0 --repeats 1 --threads 1 --model-id llama-tiny --format json";
    let run = |option: &str, value: &str| {
        let output = place.run(&[vec![option, value], rest.split(' ').collect()].concat());
        assert_eq!(output.status.code(), Some(0), "{option} {value}: {}", streams(&output));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        document["records"][0].clone()
    };
    let record = run("--prompt", "- hello");
    assert_eq!(
        record["workload"]["n_prompt"], 6,
        "five tokens behind the one of the beginning, as transformers has it"
    );
    assert!(record["command"].as_str().unwrap().contains("--prompt '- hello'"), "{}", record["command"]);
    let ids = run("--prompt-ids", "1,2,3")["output"]["token_ids"].clone();
    for text in ["1, 2, 3", "[1, 2, 3]", "tensor([[1, 2, 3]])", "1 2 3,"] {
        let record = run("--prompt-ids", text);
        assert_eq!((&record["workload"]["n_prompt"], &record["output"]["token_ids"]), (&3.into(), &ids), "{text}");
    }
    for (args, code) in [(&["--prompt", "--precision", "fp16"][..], 2), (&["--prompt-ids", "1,x"], 2)] {
        assert_eq!(place.run(args).status.code(), Some(code), "{args:?}");
    }
    let output = place.run(&["export", "--model-id", "llama-tiny", "--precision", "all", "--output", "new"]);
    let said = streams(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("one precision is written at a time") && !said.contains(", all\n"), "{said}");
}

#[test]
fn threads_beyond_the_cpus_are_in_table_and_record() {
    let place = Place::new();
    let n = std::thread::available_parallelism().unwrap().get() + 1;
    let args = format!(
        "--model-id llama-tiny --precision nf4 --threads {n} --max-new-tokens 2 --warmup 0 --repeats 1 --output r.json"
    );
    let output = place.run(&args.split(' ').collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(0), "{}", streams(&output));
    assert!(streams(&output).contains("too_many_threads: "), "{}", streams(&output));
    let document: Value = serde_json::from_slice(&fs::read(place.folder.path().join("r.json")).unwrap()).unwrap();
    let record = &document["records"][0];
    assert!(record["tainted"] == true && record["warnings"].to_string().contains("too_many_threads: "), "{record}");
}

/// What was measured is shown wherever it can be, and the exit code says that not all of it is where it was asked for.
#[cfg(target_os = "linux")]
#[test]
fn a_result_that_one_place_does_not_take_is_in_the_other() {
    let place = Place::new();
    for name in ["full.json", "full.safetensors"] {
        std::os::unix::fs::symlink("/dev/full", place.folder.path().join(name)).unwrap();
    }
    let args = "--model-id llama-tiny --precision fp16 --max-new-tokens 2 --warmup 0 --repeats 1 --threads 1";
    let words = |rest: &str| format!("{args} {rest}").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let run = |rest: &str, stdout: Stdio| {
        let temporary = place.folder.path().join("kept");
        fs::create_dir_all(&temporary).unwrap();
        let words = words(rest);
        let mut command = place.command(&words.iter().map(String::as_str).collect::<Vec<_>>());
        command
            .env("TMPDIR", temporary)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap()
    };
    let output = run("--output full.json", Stdio::piped());
    let said = streams(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("llama-tiny") && said.contains("\nfp16 "), "the table is shown: {said}");
    assert!(said.contains("error: cannot write `full.json`: No space left"), "{said}");
    // The file itself is kept where there is room, and named.
    let kept = said.split("it was written to `").nth(1).and_then(|rest| rest.split('`').next()).expect("a hint");
    let document: Value = serde_json::from_slice(&fs::read(kept).unwrap()).unwrap();
    assert_eq!(document["records"][0]["status"], "ok");

    let output = run("--output full.json --format json", Stdio::piped());
    assert_eq!(output.status.code(), Some(2), "{}", streams(&output));
    serde_json::from_slice::<Value>(&output.stdout).unwrap();

    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = run("--output r.json", full.into());
    let said = streams(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(place.has("r.json") && said.contains("\nfp16 ") && said.contains("writing the result to stdout"), "{said}");

    let output = run("--save-logits full.safetensors --output r.json", Stdio::piped());
    let said = streams(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("\nfp16 ") && said.contains("error: the logits could not be written to"), "{said}");
    assert_eq!(statuses(&place)[0].1, "ok", "what was measured is sound");
}

/// Precision, status and reason of every record of `r.json`.
fn statuses(place: &Place) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(place.folder.path().join("r.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let records = document["records"].as_array().unwrap().iter();
    records.map(|record| (text(&record["precision"]), text(&record["status"]), text(&record["reason"]))).collect()
}

/// A model of 395 MiB in fp16 and about a quarter of that in nf4 under a limit of the address space: what does not fit is a row, whether it is
/// known before a worker starts or the worker is refused memory, and the rest is measured.
#[cfg(unix)]
#[test]
fn what_does_not_fit_is_a_row_and_the_rest_is_measured() {
    let place = Place::new();
    let config = fs::read_to_string(golden("llama-tiny").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in
        [("hidden_size", 1024), ("intermediate_size", 32768), ("num_hidden_layers", 2), ("num_attention_heads", 8)]
    {
        config[key] = value.into();
    }
    (config["head_dim"], config["num_key_value_heads"]) = (128.into(), 2.into());
    fs::create_dir(place.folder.path().join("wide")).unwrap();
    fs::write(place.folder.path().join("wide/config.json"), config.to_string()).unwrap();
    let args = "--model-id ./wide --weights random --precision fp16,nf4 --prompt-ids 1,2 --max-new-tokens 2 --repeats 1 \
                --warmup 0 --threads 1 --output r.json";
    let refused = ["out of memory: an allocation of ", "395.8 MiB are needed in all, "];
    for (limit_kib, allow, code, said) in [
        (480_000, "", 1, refused),
        (480_000, "--allow-oom", 0, refused),
        (400_000, "--allow-oom", 0, ["out of memory: wanted 395.8 MiB, ", " MiB free"]),
    ] {
        let script = format!("ulimit -v {limit_kib} && exec \"$0\" {args} {allow}");
        let binary = env!("CARGO_BIN_EXE_quantbench");
        let output =
            Command::new("sh").args(["-c", &script, binary]).current_dir(place.folder.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", streams(&output));
        let found = statuses(&place);
        let reason = &found[0].2;
        assert_eq!((found[0].1.as_str(), found[1].1.as_str()), ("oom", "ok"), "{limit_kib}: {found:?}");
        assert!(reason.starts_with(said[0]) && reason.contains(said[1]), "{reason}");
    }
}
