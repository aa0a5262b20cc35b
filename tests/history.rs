//! `quantbench history` over scripted records: what is kept, what a check finds with few and with many runs, and its exit codes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use quantbench::record::{Document, Record, Status, metrics};
use quantbench::report;
use serde_json::Value;

fn recorded() -> Document {
    report::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compare/base.json")).expect("a recording")
}

/// The recording on a day, at a share of its speed.
fn run_of(day: usize, speed: f64) -> Document {
    let mut document = recorded();
    for record in &mut document.records {
        record.timestamp = format!("2026-03-{day:02}T12:00:00Z");
        record.engine.commit = format!("c0ffee{day:02}");
        let slower = |ns: &mut u64| *ns = (*ns as f64 / speed).round() as u64;
        record.samples.prefill_ns.iter_mut().for_each(slower);
        record.samples.end_to_end_ns.iter_mut().for_each(slower);
        record.samples.decode_step_ns.iter_mut().flatten().for_each(slower);
        record.metrics = metrics::summaries(record);
    }
    document
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, document: &Document) {
        fs::write(self.path(name), serde_json::to_string(document).expect("JSON")).expect("write");
    }

    /// Exit code, and stdout with stderr.
    fn run(&self, line: &str) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
        command.args(line.split_whitespace()).current_dir(self.0.path()).stdin(Stdio::null());
        let output = command.output().expect("start the program");
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (output.status.code(), said.concat())
    }

    /// Stdout of a command that ends with `code`.
    fn expect(&self, line: &str, code: i32) -> String {
        let (seen, said) = self.run(line);
        assert_eq!(seen, Some(code), "{line}\n{said}");
        said
    }

    /// Adds a run of each day from the first on, at these shares of the recorded speed.
    fn with_runs(self, speeds: &[f64]) -> Self {
        for (at, speed) in speeds.iter().enumerate() {
            self.write("result.json", &run_of(at + 1, *speed));
            self.expect("history add result.json", 0);
        }
        self
    }
}

/// Speeds of runs of one build: within 1.5 %, as runs on a quiet machine are.
const STEADY: &[f64] = &[1.0, 1.01, 0.995, 1.005, 0.99, 1.0, 1.008, 0.997];

#[test]
fn a_steady_history_is_ok_and_a_slow_run_regressed() {
    let place = Place::new().with_runs(STEADY);
    let said = place.expect("history check --fail-on decode_tps:-5%", 0);
    assert!(said.starts_with("ok: no regression in 2 checks"), "{said}");
    assert!(said.contains("base: the last 7 runs, to quantbench"), "{said}");
    // Ten percent slower lies far outside of what these runs spread over.
    place.write("slow.json", &run_of(9, 0.9));
    let said = place.expect("history check slow.json --fail-on decode_tps:-5%", 3);
    assert!(said.starts_with("regressed: 2 of 2 checks") && said.contains("the last 8 runs"), "{said}");
    // The result was not added by that.
    assert!(place.expect("history list", 0).contains("  8 "), "{}", place.expect("history list", 0));
    place.expect("history add slow.json", 0);
    place.expect("history check --fail-on decode_tps:-5%", 3);
    place.expect("history check --fail-on decode_tps:-20%", 0);
    // Faster is no regression.
    place.write("fast.json", &run_of(10, 1.3));
    place.expect("history check fast.json --fail-on decode_tps:-5%", 0);
}

#[test]
fn few_runs_prove_little() {
    let place = Place::new();
    place.write("result.json", &run_of(1, 1.0));
    place.expect("history add result.json", 0);
    let said = place.expect("history check", 0);
    assert!(said.contains("no earlier run"), "{said}");
    place.expect("history check --strict", 3);
    // One and two earlier runs carry no interval, however slow the newest is.
    for (day, earlier) in [(2, "1 earlier run carries no interval"), (3, "2 earlier runs carry no interval")] {
        place.write("result.json", &run_of(day, 0.5));
        let said = place.expect("history check result.json --fail-on decode_tps:-5%", 0);
        assert!(said.starts_with("can't tell") && said.contains(earlier), "{said}");
        place.write("result.json", &run_of(day, 1.0 - 0.01 * day as f64));
        place.expect("history add result.json", 0);
    }
    // Three carry one that is wide: their spread of 1.5 % gives ± 7 %.
    place.write("slow.json", &run_of(4, 0.93));
    assert!(place.expect("history check slow.json --fail-on decode_tps:-5%", 0).starts_with("can't tell"));
    place.expect("history check slow.json --fail-on decode_tps:-5% --strict", 3);
    place.write("slow.json", &run_of(4, 0.6));
    place.expect("history check slow.json --fail-on decode_tps:-5%", 3);
}

#[test]
fn numbers_that_decide_by_themselves_need_one_earlier_run() {
    let place = Place::new().with_runs(&[1.0]);
    let mut larger = run_of(2, 1.0);
    larger
        .records
        .iter_mut()
        .for_each(|record| record.memory.peak_bytes = record.memory.peak_bytes.map(|b| b + b / 10));
    place.write("larger.json", &larger);
    let said = place.expect("history check larger.json --fail-on peak_bytes:+3%", 3);
    assert!(said.starts_with("regressed"), "{said}");
    place.write("same.json", &run_of(2, 1.0));
    place.expect("history check same.json --fail-on peak_bytes:+3%,weights_bytes,weights.hash", 0);
    let mut failed = run_of(2, 1.0);
    (failed.records[0].status, failed.records[0].reason) = (Status::Oom, Some("no room".into()));
    place.write("failed.json", &failed);
    assert!(place.expect("history check failed.json", 3).contains("it gives no result any more (oom: no room)"));
    let (code, said) = place.run("history check same.json --fail-on kl_mean:+0.01");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("compared nothing: kl_mean:+0.01"), "{said}");
}

#[test]
fn only_undisturbed_runs_of_the_same_work_on_the_same_machine_count() {
    let place = Place::new().with_runs(STEADY);
    let changes: &[(fn(&mut Record), &str)] = &[
        (|r| r.device.name = "Another CPU".into(), "8 ran on another machine"),
        (|r| r.environment.threads = 63, "8 ran on another machine"),
        (|r| r.environment.build_profile = "debug".into(), "8 ran on another machine"),
        (|r| r.workload.n_gen += 1, "no earlier run"),
    ];
    for (change, word) in changes {
        let mut other = run_of(9, 0.5);
        other.records.iter_mut().for_each(change);
        place.write("other.json", &other);
        let said = place.expect("history check other.json", 0);
        assert!(said.contains(word) && said.contains("nothing was compared"), "{word}: {said}");
    }
    // A disturbed run and a failed one in between change nothing of the verdict; that they are left out is said.
    let mut disturbed = run_of(9, 0.2);
    disturbed.records.iter_mut().for_each(|record| record.tainted = true);
    place.write("disturbed.json", &disturbed);
    let mut failed = run_of(10, 1.0);
    failed.records.iter_mut().for_each(|record| record.status = Status::Error);
    place.write("failed.json", &failed);
    place.expect("history add disturbed.json failed.json", 0);
    place.write("slow.json", &run_of(11, 0.9));
    let said = place.expect("history check slow.json --fail-on decode_tps:-5%", 3);
    assert!(said.contains("1 noisy left out, 1 failed left out") && said.contains("the last 8 runs"), "{said}");
    // No more than asked for, and those are the last.
    let said = place.expect("history check slow.json --fail-on decode_tps:-5% --last 4", 3);
    assert!(said.contains("the last 4 runs, to quantbench") && said.contains("2026-03-08"), "{said}");
}

#[test]
fn a_history_is_listed_and_reported() {
    let place = Place::new().with_runs(STEADY);
    let listed = place.expect("history list", 0);
    let row = listed.lines().find(|line| line.starts_with("nf4")).expect("a row");
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[1..6], ["8", "0", "0", "2026-03-01", "2026-03-08"], "{listed}");
    let all: Value = serde_json::from_str(&place.expect("history list --format json", 0)).expect("JSON");
    assert_eq!((all[0]["n_runs"].as_u64(), all[0]["commit"].as_str()), (Some(8), Some("c0ffee08")));
    // The files are records like any other; a folder of them is a report with a trend.
    place.expect("report quantbench-history -o trend.html", 0);
    let page = fs::read_to_string(place.path("trend.html")).expect("the page");
    assert!(page.contains("<h3>Decode speed over the runs, tokens/s</h3>") && page.contains("8 runs in order of time"));
    let names: Vec<String> = fs::read_dir(place.path("quantbench-history"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.contains(&".gitattributes".to_owned()), "{names:?}");
}

#[test]
fn outputs_and_refusals() {
    let place = Place::new().with_runs(STEADY);
    let said = place.expect("history check --format json -o check.md", 0);
    let comparison: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((comparison["verdict"].as_str(), comparison["base"]["n_runs"].as_u64()), (Some("ok"), Some(7)));
    let check = &comparison["checks"][0];
    for key in ["base", "new", "change", "ci95_low", "ci95_high", "limit"] {
        assert!(check[key].is_f64(), "{key} in {check}");
    }
    assert!(fs::read_to_string(place.path("check.md")).expect("the file").starts_with("### ✅ ok"));
    assert!(
        place
            .expect("history add result.json", 0)
            .contains("0 records added to `quantbench-history`, 2 were there already")
    );
    fs::create_dir(place.path("empty")).expect("a folder");
    for (line, word) in [
        ("history check --dir absent", "cannot read records from `absent`"),
        ("history list --dir empty", "the folder holds no .json or .jsonl file"),
        ("history add absent.json", "cannot read records from `absent.json`"),
        ("history check --fail-on decode_tps", "never twice the same"),
        ("history check --last 0", "a whole number from 1 on"),
        ("history", "add"),
    ] {
        let (code, said) = place.run(line);
        assert_eq!(code, Some(2), "{line}\n{said}");
        assert!(said.contains(word), "{line}: no `{word}` in\n{said}");
    }
}
