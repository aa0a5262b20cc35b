//! `quantbench import` on what the tools write: their shapes with round numbers, in `tests/golden/import/`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use quantbench::record::Document;
use quantbench::record::metrics::METRICS;
use serde_json::{Value, json};

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
    assert!(!table.contains(" on :") && !table.contains("1 new token"), "{table}");
    let (code, said) = run("report theirs.json -o r.html");
    assert_eq!(code, Some(0), "{said}");
    assert!(fs::read_to_string(folder.path().join("r.html")).expect("the page").contains("by optimum-benchmark"));
    let (code, said) = run("compare theirs.json theirs.json --fail-on decode_tps:-5%,weights_bytes");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("decode_tps, tokens/s"), "{said}");
}

#[test]
fn what_is_missing_or_foreign_is_said() {
    for (line, words) in [
        (
            "vllm.json",
            &["`--model-id ID`, `--precision NAME`, `--prompt-tokens N`, `--max-new-tokens N`, `--batch-size N`"][..],
        ),
        (
            "vllm.json --prompt-tokens 1 --max-new-tokens 2",
            &["give `--model-id ID`, `--precision NAME`, `--batch-size N`"],
        ),
        ("vllm.json --from llama-bench", &["not what llama-bench writes"]),
        ("absent.json", &["cannot import `absent.json`"]),
        ("../records/three_precisions.json", &["no known tool writes this", "`quantbench report`"]),
    ] {
        let output = import(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{line}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{line}: {said}");
    }
}

/// A row as llama-bench writes it, of a prompt test.
fn llama_row() -> Value {
    json!({
        "build_commit": "abc1234", "build_number": 6264, "cpu_info": "CPU, 8 cores", "gpu_info": "GPU", "backends": "CPU",
        "model_filename": "models/x.gguf", "model_type": "llama 1B Q4_0", "model_size": 800_000_000u64,
        "model_n_params": 1_200_000_000u64, "n_batch": 2048, "n_ubatch": 512, "n_threads": 8, "type_k": "f16", "type_v": "f16",
        "n_gpu_layers": 0, "split_mode": "layer", "main_gpu": 0, "tensor_split": "0.00", "n_prompt": 512, "n_gen": 0,
        "n_depth": 0, "test_time": "2026-01-02T03:04:05Z", "avg_ns": 1_000_000_000u64, "stddev_ns": 0, "avg_ts": 512.0,
        "stddev_ts": 0.0, "samples_ns": [1_000_000_000u64, 1_000_000_000u64, 1_000_000_000u64], "samples_ts": [512.0, 512.0, 512.0]
    })
}

fn with(mut row: Value, facts: Value) -> Value {
    row.as_object_mut().expect("a row").extend(facts.as_object().expect("facts").clone());
    row
}

/// Imports `bytes` as a file; gives the records and what stderr said.
fn imported(bytes: &[u8], options: &str) -> Result<(Vec<Value>, String), String> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rows");
    fs::write(&path, bytes).expect("write");
    let output = import(&format!("{} {options}", path.display()));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() != Some(0) {
        return Err(said);
    }
    let document: Document = serde_json::from_slice(&output.stdout).expect("a document");
    let records = document.records.iter().map(|record| serde_json::to_value(record).expect("JSON"));
    Ok((records.collect(), said))
}

#[test]
fn rows_are_read_from_what_was_saved_around_them() {
    let row = with(llama_row(), json!({"backends": "Vulkan", "n_gpu_layers": 99}));
    let list = serde_json::to_string_pretty(&[row.clone(), row.clone()]).expect("JSON");
    let (line, mark) = (row.to_string() + "\n", "\u{feff}");
    let wide: Vec<u8> = format!("{mark}{list}\r\n").encode_utf16().flat_map(u16::to_le_bytes).collect();
    let noise = "ggml_vulkan: Found 1 Vulkan devices:\nggml_vulkan: 0 = GPU | uma: 0 | fp16: 0\n";
    let stopped = format!("{},\n", &list[..list.find("},").expect("a first row") + 1]);
    let torn = &list[..list.len() - 40];
    for (text, n, note) in [
        (list.clone().into_bytes(), 2, ""),
        (format!("{mark}{line}").into_bytes(), 1, ""),
        (wide, 2, ""),
        (format!("{noise}{list}\n").into_bytes(), 2, "passed over: 1 to 2"),
        (format!("{noise}{list}\n\nbuild: abc1234 (6264)\n").into_bytes(), 2, "passed over: 1 to 2"),
        (format!("{line}{noise}{line}").into_bytes(), 2, "passed over: 2 to 3"),
        (stopped.into_bytes(), 1, "the list of rows has no end"),
        (torn.as_bytes().to_vec(), 1, "has no end and is left out"),
        (format!("{line}{}", &line[..200]).into_bytes(), 1, "line 2 has no end"),
    ] {
        let shown = String::from_utf8_lossy(&text).into_owned();
        let (records, said) = imported(&text, "").unwrap_or_else(|said| panic!("{shown}: {said}"));
        assert_eq!(records.len(), n, "{shown}");
        assert_eq!(records[0]["device"], json!({"kind": "vulkan", "name": "GPU"}), "{shown}");
        assert!(said.contains(note) && said.is_empty() == note.is_empty(), "{shown}: {said}");
        // Whoever reads the record later must know that rows are lost.
        let warned = records.iter().any(|record| record["warnings"].to_string().contains("incomplete_file"));
        assert_eq!(warned, note.contains("no end"), "{shown}");
    }
    let torn = format!("[\n{},\nggml: noise\n}}]", line.trim_end().trim_end_matches('}'));
    let said = imported(torn.as_bytes(), "").unwrap_err();
    assert!(said.contains("line 3, in the middle of a row, is no JSON: take it out"), "{said}");
    let said = imported(b"INSERT INTO test (build_commit) VALUES ('a');\n", "").unwrap_err();
    assert!(said.contains("it is SQL: write the rows with `llama-bench -o jsonl` instead"), "{said}");
}

#[test]
fn tables_of_llama_bench_are_read_as_means() {
    let row = llama_row();
    let keys: Vec<&String> = row.as_object().expect("a row").keys().filter(|key| !key.starts_with("samples")).collect();
    let cell = |key: &&String| format!("\"{}\"", row[key.as_str()].to_string().trim_matches('"'));
    let join = |cells: Vec<String>| cells.join(",") + "\n";
    let csv = join(keys.iter().map(|key| key.to_string()).collect()) + &join(keys.iter().map(cell).collect());
    let (records, _) = imported(csv.as_bytes(), "").expect("CSV");
    assert_eq!(records.len(), 1);
    for (pointer, expected) in [
        ("/precision", json!("Q4_0")),
        ("/model/id", json!("x.gguf")),
        ("/engine/commit", json!("abc1234")),
        ("/environment/cpu", json!("CPU, 8 cores")),
        ("/memory/weights_bytes", json!(800_000_000u64)),
        ("/workload/batch_size", json!(1)),
        ("/metrics/prefill_tps/median", json!(512.0)),
        ("/metrics/prefill_tps/ci95_low", json!(null)),
        ("/protocol/n_repeats", json!(0)),
    ] {
        assert_eq!(records[0].pointer(pointer), Some(&expected), "{pointer}");
    }
    assert!(records[0]["warnings"].to_string().contains("only_mean"), "{}", records[0]["warnings"]);

    let table = "| model | size | params | backend | ngl | test | t/s |\n| --- | ---: | ---: | --- | --: | ---: | ---: |\n\
        | llama 1B Q4_0 | 702.14 MiB | 1.24 B | CUDA,RPC | 99 | pp512 | 2368.80 ± 93.24 |\n\
        | llama 1B Q4_0 | 702.14 MiB | 1.24 B | CUDA,RPC | 99 | tg128 @ d512 | 131.42 ± 0.14 |\n\
        | llama 1B Q4_0 | 702.14 MiB | 1.24 B | BLAS | 0 | pp512+tg128 | 320.00 ± 1.00 |\n\nbuild: 8cf427ff (5163)\n";
    let (records, said) = imported(format!("ggml_cuda_init: found 1\n{table}").as_bytes(), "").expect("Markdown");
    assert!(said.contains("passed over: 1\n"), "{said}");
    for (at, pointer, expected) in [
        (0, "/engine/version", json!("b5163")),
        (0, "/engine/commit", json!("8cf427ff")),
        (0, "/model/id", json!("llama 1B Q4_0")),
        (0, "/precision", json!("Q4_0")),
        (0, "/device/kind", json!("cuda")),
        (0, "/metrics/prefill_tps/median", json!(2368.8)),
        // The table rounds it.
        (0, "/memory/weights_bytes", json!(null)),
        (1, "/workload/n_depth", json!(512)),
        (1, "/metrics/decode_tps/median", json!(131.42)),
        (2, "/device/kind", json!("cpu")),
        // 640 tokens at 320 tokens/s are 2 s, in which 128 are generated.
        (2, "/metrics/output_tps/median", json!(64.0)),
        (2, "/metrics/latency_s/median", json!(2.0)),
    ] {
        assert_eq!(records[at].pointer(pointer), Some(&expected), "row {at} {pointer}");
    }
    let unknown = table.replace("pp512 ", "gg512 ");
    assert!(imported(unknown.as_bytes(), "").unwrap_err().contains("`gg512` is no test"));
}

#[test]
fn the_device_is_found_in_any_order_of_backends() {
    for (backends, layers, kind) in [
        ("BLAS,MTL", 99, "mtl"),
        ("BLAS, MTL", 99, "mtl"),
        ("MTL,BLAS", 99, "mtl"),
        ("RPC,CUDA", 99, "cuda"),
        ("BLAS,MTL", 0, "cpu"),
        ("BLAS", 99, "cpu"),
    ] {
        let row = with(llama_row(), json!({"backends": backends, "n_gpu_layers": layers}));
        let (records, _) = imported(row.to_string().as_bytes(), "").expect("a row");
        assert_eq!(records[0]["device"]["kind"], kind, "{backends} {layers}");
    }
}

/// optimum-benchmark's report of a batch: prefill 0.1 s and decode 0.4 s for all sequences.
fn optimum(batch: u64, n_gen: u64) -> Value {
    json!({
        "config": {
            "backend": {"name": "pytorch", "model": "owner/name", "device": "cpu", "torch_dtype": "float16",
                        "quantization_scheme": null, "quantization_config": {}},
            "scenario": {"input_shapes": {"batch_size": batch, "sequence_length": 64},
                         "generate_kwargs": {"max_new_tokens": n_gen, "min_new_tokens": n_gen}},
            "environment": {"cpu": "CPU"}
        },
        "report": {
            "prefill": {"latency": {"unit": "s", "values": [0.1, 0.1]}}, "decode": {"latency": {"values": [0.4, 0.4]}},
            "per_token": {"latency": {"values": vec![0.1; 2 * (n_gen as usize - 1)]}}
        }
    })
}

#[test]
fn figures_of_a_batch_count_all_of_its_sequences() {
    // A time per token is that of one sequence: it does not shrink with the batch.
    for (batch, output, prefill, decode) in [(1, 10.0, 640.0, 10.0), (4, 40.0, 2560.0, 40.0)] {
        let (records, _) = imported(optimum(batch, 5).to_string().as_bytes(), "").expect("a report");
        let median = |key: &str| records[0]["metrics"][key]["median"].as_f64().expect(key);
        for (key, expected) in [
            ("output_tps", output),
            ("prefill_tps", prefill),
            ("decode_tps", decode),
            ("tpot_ms", 100.0),
            ("itl_ms", 100.0),
            ("ttft_ms", 100.0),
            ("latency_s", 0.5),
            ("latency_per_token_ms", 100.0),
        ] {
            // Nanoseconds are whole, so a quotient of tenths is off by some roundings of 2⁻⁵³.
            assert!((median(key) - expected).abs() <= 1e-12 * expected, "{key} of {batch}: {}", median(key));
        }
        assert_eq!(records[0]["workload"]["batch_size"], batch);
    }
    let vllm = json!({"avg_latency": 0.5, "latencies": [0.5, 0.5], "percentiles": {}});
    let options = "--model-id a/b --precision fp16 --prompt-tokens 64 --max-new-tokens 5 --batch-size 4";
    let (records, _) = imported(vllm.to_string().as_bytes(), options).expect("a report");
    assert_eq!(records[0]["metrics"]["output_tps"]["median"], 40.0);
}

#[test]
fn reports_that_are_no_generation_or_in_another_unit_are_refused() {
    let without = with(optimum(1, 5), json!({"report": {"forward": {"latency": {"values": [0.1]}}}}));
    assert!(imported(without.to_string().as_bytes(), "").unwrap_err().contains("times no prefill"));
    let mut other = optimum(1, 5);
    other["report"]["prefill"]["latency"]["unit"] = "ms".into();
    assert!(imported(other.to_string().as_bytes(), "").unwrap_err().contains("its prefill is in `ms`"));
    let mut beams = optimum(1, 5);
    beams["config"]["scenario"]["generate_kwargs"]["num_beams"] = 4.into();
    let (records, _) = imported(beams.to_string().as_bytes(), "").expect("a report");
    assert!(records[0]["warnings"].to_string().contains("beam_search"), "{}", records[0]["warnings"]);
}

#[test]
fn every_metric_is_there() {
    let record = &records("optimum-benchmark.json")[0];
    for metric in METRICS.iter().filter(|metric| metric.values.is_some()) {
        assert!(record["metrics"][metric.key].is_object(), "{}", metric.key);
    }
}
