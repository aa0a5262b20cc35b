//! Batches from the command line.

use std::process::Command;

use serde_json::Value;

fn json(words: &[&str]) -> Value {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny");
    let output = Command::new(env!("CARGO_BIN_EXE_quantbench"))
        .args(["-m", model, "--device", "cpu", "--threads", "2", "--quiet", "--format", "json"])
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Bytes that the worker of a dry run's only row holds.
fn bytes(dry_run: &Value) -> u64 {
    let row = &dry_run["rows"][0];
    ["weights_bytes", "kv_cache_bytes", "scratch_bytes"].map(|key| row[key].as_u64().unwrap()).iter().sum()
}

/// What fits is said exactly: one sequence more would not.
#[test]
fn the_largest_batch_fits_a_card_and_one_more_does_not() {
    let words = ["--dry-run", "-p", "100", "-n", "20", "--card", "0.25", "-b"];
    let found = json(&[&words[..], &["max"]].concat());
    let cases = found.as_array().unwrap();
    let precisions: Vec<&str> = cases.iter().map(|case| case["rows"][0]["precision"].as_str().unwrap()).collect();
    assert_eq!(precisions, ["fp16", "int8", "nf4"]);
    let batches: Vec<u64> = cases.iter().map(|case| case["workload"]["batch_size"].as_u64().unwrap()).collect();
    assert!(batches[0] > 100 && batches[2] >= batches[0], "{batches:?}");
    for (case, precision) in cases.iter().zip(precisions) {
        assert_eq!((case["rows"].as_array().unwrap().len(), case["rows"][0]["fits_card"].as_bool()), (1, Some(true)));
        let more = (case["workload"]["batch_size"].as_u64().unwrap() + 1).to_string();
        let beyond = json(&[&words[..], &[more.as_str(), "--precision", precision]].concat());
        assert_eq!(beyond["rows"][0]["fits_card"].as_bool(), Some(false), "{precision}");
        assert!(bytes(case) <= 1 << 28 && bytes(&beyond) > 1 << 28);
    }
}

#[test]
fn a_list_of_batches_makes_a_case_of_each() {
    let words = ["-b", "1,3", "-p", "5", "-n", "4", "-r", "1", "--warmup", "0", "--precision", "fp16,nf4"];
    let document = json(&words);
    let records = document["records"].as_array().unwrap();
    let of = |record: &Value| {
        let n_sequences = 1 + record["output"]["further_token_ids"].as_array().map_or(0, Vec::len);
        (record["precision"].as_str().unwrap().to_owned(), record["workload"]["batch_size"].as_u64(), n_sequences)
    };
    let seen: Vec<_> = records.iter().map(of).collect();
    let expected = [("fp16", 1, 1), ("nf4", 1, 1), ("fp16", 3, 3), ("nf4", 3, 3)];
    assert_eq!(seen, expected.map(|(precision, batch, n)| (precision.to_owned(), Some(batch), n)));
    for (one, three) in records[..2].iter().zip(&records[2..]) {
        assert_eq!((one["status"].as_str(), three["status"].as_str()), (Some("ok"), Some("ok")));
        // The first sequence is the one that runs alone.
        assert_eq!(one["output"]["token_ids"], three["output"]["token_ids"]);
        let bytes = |record: &Value| record["memory"]["kv_cache_bytes"].as_u64().unwrap();
        assert_eq!(bytes(three), 3 * bytes(one));
        let tps = |key: &str| three["metrics"][key]["median"].as_f64().unwrap();
        assert!((tps("decode_tps") - 3.0 * tps("decode_tps_per_sequence")).abs() < 1e-9 * tps("decode_tps"));
    }
}

/// candle-transformers' models run one sequence here: a row says so, and the others are measured.
#[test]
fn an_engine_that_runs_one_sequence_refuses_more_by_name() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/models/llama-tiny");
    let words =
        ["-b", "2", "-p", "5", "-n", "4", "-r", "1", "--warmup", "0", "--precision", "fp16", "--format", "json"];
    let output = Command::new(env!("CARGO_BIN_EXE_quantbench"))
        .args(["-m", model, "--device", "cpu", "--threads", "2", "--quiet", "--engine", "quantbench,candle"])
        .args(words)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let records = document["records"].as_array().unwrap();
    assert_eq!((records[0]["status"].as_str(), records[1]["status"].as_str()), (Some("ok"), Some("error")));
    assert_eq!(records[1]["reason"].as_str(), Some("candle's engine cannot run a batch of 2 sequences; it runs 1"));
}
