//! Outputs against each other: every number of every format by `scripts/outputs`, several files in one report, files that come back.

mod skips;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_quantbench");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Exit code, stdout and stderr.
fn run(folder: &Path, program: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output =
        Command::new(program).args(arguments).current_dir(folder).stdin(Stdio::null()).output().expect("start");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Stdout of a command that succeeds.
fn quantbench(folder: &Path, line: &str) -> String {
    let (code, stdout, stderr) = run(folder, PROGRAM, &line.split_whitespace().collect::<Vec<_>>());
    assert_eq!(code, Some(0), "{line}: {stderr}");
    stdout
}

fn example(name: &str) -> Value {
    let path = root().join(format!("tests/golden/records/{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).expect("an example")).expect("JSON")
}

fn write(folder: &TempDir, name: &str, value: &Value) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, value.to_string()).expect("write");
    path
}

fn read(folder: &TempDir, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.path().join(name)).expect("a file")).expect("JSON")
}

/// Runs the script on a file; skipped without Python.
#[track_caller]
fn compare_outputs(file: &Path) {
    if Command::new("python3").arg("--version").output().is_err() {
        return skips::skip("no python3 in PATH");
    }
    let script = root().join("scripts/outputs");
    let words = [script.to_str().expect("UTF-8"), file.to_str().expect("UTF-8"), PROGRAM];
    let (code, stdout, stderr) = run(root(), "python3", &words);
    assert_eq!(code, Some(0), "{}\n{stdout}{stderr}", file.display());
    // It compared something in every format.
    assert_eq!(stdout.lines().filter(|line| line.contains(" compared, 0 wrong")).count(), 11, "{stdout}");
    assert!(!stdout.contains(": 0 compared"), "{stdout}");
}

#[test]
fn no_two_outputs_of_an_example_disagree() {
    let folder = root().join("tests/golden/records");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).expect("examples").map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    assert!(files.len() > 10);
    files.iter().for_each(|file| compare_outputs(file));
}

#[test]
fn no_two_outputs_of_a_run_disagree() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = root().join("tests/golden/models/llama-tiny");
    let line = format!(
        "--model-id {} --quality --quality-tokens 40 --prompt-ids 1,2,3,4,5 --max-new-tokens 6 --repeats 7 --warmup 1 --threads 1 \
         --card 1 --quiet -o run.json",
        model.display()
    );
    quantbench(folder.path(), &line);
    compare_outputs(&folder.path().join("run.json"));
    // The card is in the record, for whoever reads it later.
    assert_eq!(read(&folder, "run.json")["records"][0]["card_bytes"], 1u64 << 30);
    assert!(quantbench(folder.path(), "report run.json").contains("fp16, int8 and nf4 fit in 1.00 GiB"));
    assert!(
        quantbench(folder.path(), "report run.json --card 0.001").contains("fp16, int8 and nf4 do not fit in 0.00 GiB")
    );
}

#[test]
fn a_wrong_number_is_found() {
    if Command::new("python3").arg("--version").output().is_err() {
        return skips::skip("no python3 in PATH");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = write(&folder, "r.json", &example("with_quality"));
    // A program whose outputs are those of another document: one number is off in each format.
    let mut other = example("with_quality");
    other["records"][1]["metrics"]["tpot_ms"]["median"] = 31.0.into();
    other["records"][1]["metrics"]["latency_s"]["median"] = 0.26.into();
    other["records"][1]["metrics"]["decode_tps"]["median"] = 33.0.into();
    other["records"][1]["samples"]["prefill_ns"][0] = 123_750_001u64.into();
    let other = write(&folder, "other.json", &other);
    let fake = folder.path().join("fake");
    fs::write(&fake, format!("#!/bin/sh\nshift 2\nexec {PROGRAM} report {} \"$@\"\n", other.display())).expect("write");
    let _ = Command::new("chmod").arg("+x").arg(&fake).status().expect("chmod");
    let script = root().join("scripts/outputs");
    let words = [script.to_str().unwrap(), path.to_str().unwrap(), fake.to_str().unwrap()];
    let (code, stdout, _) = run(root(), "python3", &words);
    assert_eq!(code, Some(1), "{stdout}");
    assert_eq!(stdout.lines().filter(|line| line.ends_with(" compared, 0 wrong")).count(), 0, "{stdout}");
}

#[test]
fn several_files_stand_in_one_report_each_under_its_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut later = example("no_difference");
    for record in later["records"].as_array_mut().expect("records") {
        record["timestamp"] = "2026-01-02T00:00:00Z".into();
    }
    write(&folder, "base.json", &example("three_precisions"));
    write(&folder, "new.json", &later);
    let table = quantbench(folder.path(), "report base.json new.json");
    for line in [
        "base.json, 2026-01-01T00:00:00Z: nf4 decodes fastest: 2.00x fp16 [1.98, 2.02]",
        "new.json, 2026-01-02T00:00:00Z: int8: no difference within 5 %",
        "change is that of the median against base.json, 2026-01-01T00:00:00Z, of the same precision",
    ] {
        assert!(table.contains(line), "{line}\n{table}");
    }
    let rows: Vec<&str> = table.lines().filter(|line| line.contains("  new.json, 2026-01-02T00:00:00Z  ")).collect();
    assert_eq!(rows.len(), 3, "{table}");
    // nf4 went from 40 to 10 tokens/s; where the base stands, there is no change to show.
    assert!(rows[2].starts_with("nf4") && rows[2].contains("-75.0 % ["), "{table}");
    assert!(
        table.lines().filter(|line| line.contains("  base.json, 2026")).all(|line| line.ends_with("  -")),
        "{table}"
    );
    assert!(!table.contains("nf4 and nf4"), "{table}");
    // The same file twice, and JSON lines of a merge.
    let twice = quantbench(folder.path(), "report base.json base.json");
    assert!(twice.contains("#1 base.json, 2026-01-01T00:00:00Z: ") && twice.contains("#2 base.json"), "{twice}");
}

#[test]
fn merge_reads_and_writes_documents_and_lines() {
    let folder = tempfile::tempdir().expect("a folder");
    write(&folder, "a.json", &example("three_precisions"));
    write(&folder, "b.json", &example("with_quality"));
    quantbench(folder.path(), "report b.json -o b.jsonl");
    let said = quantbench(folder.path(), "merge a.json b.jsonl -o all.jsonl");
    assert!(said.contains("6 rows of 2 files"), "{said}");
    quantbench(folder.path(), "merge a.json b.json -o all.json");
    let all = read(&folder, "all.json");
    assert_eq!((all["schema_version"].clone(), all["records"].as_array().map(Vec::len)), (json!(1), Some(6)));
    let records = |text: String| serde_json::from_str::<Value>(&text).expect("JSON")["records"].clone();
    let lines = records(quantbench(folder.path(), "report all.jsonl --format json"));
    assert_eq!(records(quantbench(folder.path(), "report all.json --format json")), lines);
    assert_eq!(lines[0], example("three_precisions")["records"][0]);
    let (code, _, error) = run(folder.path(), PROGRAM, &["merge", "absent.json"]);
    assert_eq!((code, error.contains("cannot read `absent.json`")), (Some(2), true), "{error}");
    let mut newer = example("three_precisions");
    newer["schema_version"] = 2.into();
    write(&folder, "newer.json", &newer);
    let (code, _, error) = run(folder.path(), PROGRAM, &["merge", "newer.json"]);
    assert!(code == Some(2) && error.contains("`newer.json` record 1: `schema_version` is 2"), "{error}");
}

#[test]
fn our_rows_come_back_from_llama_bench() {
    let folder = tempfile::tempdir().expect("a folder");
    let document = example("three_precisions");
    write(&folder, "r.json", &document);
    fs::write(folder.path().join("r.jsonl"), quantbench(folder.path(), "report r.json --format llama-bench"))
        .expect("write");
    quantbench(folder.path(), "import r.jsonl -o back.json");
    let back = read(&folder, "back.json");
    let rows = back["records"].as_array().expect("records");
    assert_eq!(rows.len(), 6);
    for (record, pair) in document["records"].as_array().unwrap().iter().zip(rows.chunks(2)) {
        for key in ["precision", "engine", "model", "device", "timestamp"] {
            let expected = if key == "model" {
                &json!({"id": "example-1b", "revision": null, "architecture": "llama", "parameters": 1_000_000_000u64})
            } else {
                &record[key]
            };
            assert_eq!((&pair[0][key], &pair[1][key]), (expected, expected), "{key}");
        }
        for (row, key) in [(&pair[0], "prefill_tps"), (&pair[1], "decode_tps")] {
            assert_eq!(row["metrics"][key]["median"], record["metrics"][key]["median"], "{key}");
            assert_eq!(row["metrics"][key]["ci95_low"], record["metrics"][key]["ci95_low"], "{key}");
        }
    }
    let table = quantbench(folder.path(), "report back.json");
    assert!(table.contains("the prompt is processed at: fp16 80.0 tokens/s [79.2, 80.8]"), "{table}");
    assert!(table.contains("nf4 decodes fastest: 40.0 tokens/s [39.6, 40.4]"), "{table}");
    assert!(table.lines().any(|line| line.starts_with("precision") && line.ends_with("  prefill")), "{table}");
}

#[test]
fn a_dry_run_holds_its_rows_against_the_card() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = quantbench(folder.path(), "--model-id smollm2-135m --device cpu --card 0.2 --dry-run");
    let row = |name: &str| text.lines().find(|line| line.starts_with(name)).expect(name).to_owned();
    assert!(text.contains("fits a card") && text.contains("0.20 GiB"), "{text}");
    assert!(row("fp16").ends_with("  no") && row("nf4").ends_with("  yes"), "{text}");
    let plain = quantbench(folder.path(), "--model-id smollm2-135m --device cpu --dry-run --format json");
    let planned: Value = serde_json::from_str(&plain).expect("JSON");
    assert_eq!((&planned["card_bytes"], &planned["rows"][0]["fits_card"]), (&Value::Null, &Value::Null));
}

#[test]
fn the_next_steps_are_for_people_alone() {
    // Stdout is no terminal here: a program reads it, or nobody does.
    let folder = tempfile::tempdir().expect("a folder");
    let model = root().join("tests/golden/models/llama-tiny");
    let line = format!(
        "--model-id {} --prompt-ids 1,2 --max-new-tokens 2 --repeats 1 --warmup 0 --threads 1",
        model.display()
    );
    let table = quantbench(folder.path(), &line);
    assert!(table.contains("precision") && !table.contains("limit, not measured"), "{table}");
}
