//! `quantbench import` on what the tools write: their shapes with round numbers, in `tests/golden/import/`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use quantbench::record::Document;
use quantbench::record::metrics::METRICS;
use serde_json::Value;

fn import(line: &str) -> Output {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import");
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.arg("import").args(line.split_whitespace()).current_dir(folder).stdin(Stdio::null());
    command.output().expect("start the program")
}

fn records(line: &str) -> Vec<Value> {
    let output = import(line);
    assert_eq!(output.status.code(), Some(0), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    serde_json::from_value::<Document>(document.clone()).expect("a document of records");
    document["records"].as_array().expect("records").clone()
}

const VLLM: &str =
    "vllm.json --model-id example/example-8b --precision bf16 --prompt-tokens 32 --max-new-tokens 128 --batch-size 8";

/// Command line, which record, JSON pointer, value.
const FACTS: &[(&str, usize, &str, &str)] = &[
    ("llama-bench.jsonl", 0, "/engine/name", "\"llama.cpp\""),
    ("llama-bench.jsonl", 0, "/engine/version", "\"b5163\""),
    ("llama-bench.jsonl", 0, "/model/id", "\"example-1B-Q4_K_M.gguf\""),
    ("llama-bench.jsonl", 0, "/precision", "\"Q4_K_M\""),
    ("llama-bench.jsonl", 0, "/device/kind", "\"cuda\""),
    ("llama-bench.jsonl", 0, "/metrics/prefill_tps/median", "8000.0"),
    ("llama-bench.jsonl", 0, "/metrics/decode_tps/median", "null"),
    ("llama-bench.jsonl", 0, "/metrics/ttft_ms/median", "null"),
    ("llama-bench.jsonl", 0, "/weights/hash", "null"),
    ("llama-bench.jsonl", 0, "/memory/peak_bytes", "null"),
    ("llama-bench.jsonl", 0, "/bandwidth/mbu", "null"),
    ("llama-bench.jsonl", 1, "/workload/n_depth", "512"),
    ("llama-bench.jsonl", 1, "/metrics/decode_tps/median", "200.0"),
    ("llama-bench.jsonl", 1, "/metrics/decode_tps/ci95_low", "200.0"),
    ("llama-bench.jsonl", 1, "/metrics/tpot_ms/median", "5.0"),
    ("llama-bench.jsonl", 1, "/metrics/itl_ms/median", "null"),
    ("llama-bench.jsonl", 2, "/device/kind", "\"cpu\""),
    ("llama-bench.jsonl", 2, "/precision", "\"fp16\""),
    ("llama-bench.jsonl", 2, "/model/parameters", "null"),
    ("llama-bench.jsonl", 2, "/metrics/latency_s/median", "10.0"),
    ("llama-bench.jsonl", 2, "/metrics/output_tps/median", "12.8"),
    (VLLM, 0, "/engine/name", "\"vllm\""),
    (VLLM, 0, "/engine/version", "null"),
    (VLLM, 0, "/workload/batch_size", "8"),
    (VLLM, 0, "/metrics/latency_s/median", "2.0"),
    (VLLM, 0, "/metrics/output_tps/median", "512.0"),
    (VLLM, 0, "/metrics/decode_tps/median", "null"),
    (VLLM, 0, "/device/name", "null"),
    (VLLM, 0, "/environment/threads", "null"),
    ("optimum-benchmark.json", 0, "/engine/name", "\"optimum-benchmark\""),
    ("optimum-benchmark.json", 0, "/precision", "\"nf4\""),
    ("optimum-benchmark.json", 0, "/workload/n_prompt", "64"),
    ("optimum-benchmark.json", 0, "/metrics/ttft_ms/median", "50.0"),
    ("optimum-benchmark.json", 0, "/metrics/decode_tps/median", "10.0"),
    ("optimum-benchmark.json", 0, "/metrics/itl_ms/median", "100.0"),
    ("optimum-benchmark.json", 0, "/metrics/load_s/median", "3.5"),
    ("optimum-benchmark.json", 0, "/memory/peak_bytes", "5860000000"),
    ("optimum-benchmark.json", 0, "/memory/weights_bytes", "null"),
    ("optimum-benchmark.json", 0, "/device/name", "\"Example GPU\""),
    ("optimum-benchmark.json --precision mine", 0, "/precision", "\"mine\""),
];

#[test]
fn what_a_file_says_is_kept_and_what_it_lacks_is_null() {
    for (line, at, pointer, expected) in FACTS {
        let records = records(line);
        let seen = records[*at].pointer(pointer).unwrap_or(&Value::Null);
        let expected: Value = serde_json::from_str(expected).expect("a JSON value");
        match (seen.as_f64(), expected.as_f64()) {
            // Sums and quotients of round numbers: a few roundings of 2⁻⁵³ each, and 10⁻¹² is thousands of them.
            (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-12 * b.abs(), "{line} {pointer}: {a}, not {b}"),
            _ => assert_eq!(*seen, expected, "{line} {pointer}"),
        }
    }
}

#[test]
fn rows_stand_in_reports_and_comparisons() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("theirs.json");
    let line = format!("llama-bench.jsonl optimum-benchmark.json --output {}", path.display());
    assert_eq!(import(&line).status.code(), Some(0));
    let run = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
        let output = command.args(line.split_whitespace()).current_dir(folder.path()).stdin(Stdio::null()).output();
        let output = output.expect("start the program");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code(), said)
    };
    let (code, table) = run("report theirs.json");
    assert_eq!(code, Some(0), "{table}");
    assert!(table.contains("by llama.cpp on Example GPU") && table.contains("nf4"), "{table}");
    // A row that names no device has none in its title, and one without new tokens no speed that a token could have.
    assert!(table.contains("its machine") && !table.contains(" on :") && !table.contains("1 new token"), "{table}");
    let (code, said) = run("report theirs.json -o r.html");
    assert_eq!(code, Some(0), "{said}");
    assert!(fs::read_to_string(folder.path().join("r.html")).expect("the page").contains("by optimum-benchmark"));
    let (code, said) = run("compare theirs.json theirs.json --fail-on decode_tps:-5%,weights_bytes");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("decode_tps, tokens/s"), "{said}");
}

#[test]
fn what_is_missing_or_foreign_is_said() {
    for (line, word) in [
        ("vllm.json", "--prompt-tokens N"),
        ("vllm.json --prompt-tokens 1 --max-new-tokens 2", "--model-id ID"),
        ("vllm.json --from llama-bench", "not what llama-bench writes"),
        ("absent.json", "cannot import `absent.json`"),
        ("../records/three_precisions.json", "no known tool writes this"),
    ] {
        let output = import(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{line}: {said}");
        assert!(said.contains(word), "{line}: {said}");
    }
}

#[test]
fn every_metric_is_there() {
    let record = &records("optimum-benchmark.json")[0];
    for metric in METRICS.iter().filter(|metric| metric.values.is_some()) {
        assert!(record["metrics"][metric.key].is_object(), "{}", metric.key);
    }
}
