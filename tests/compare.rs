//! `quantbench compare` over recorded runs: verdicts, refusals and exit codes.
//!
//! `tests/golden/compare/` holds both sides of one `--ab` run of the same build, `base` and `again`, and a disturbed run, `noisy`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use quantbench::record::{Document, Record, Status, metrics};
use quantbench::report;
use quantbench::report::compare::{Order, Rules, Verdict, compare, gates};
use serde_json::Value;

fn recorded(name: &str) -> Document {
    report::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compare").join(name)).expect("a recording")
}

/// What a change does to a recording.
type Change = fn(&mut Record);

/// All times of a record longer by `share`.
fn slow_down(record: &mut Record, share: f64) {
    let slower = |ns: &mut u64| *ns = (*ns as f64 / (1.0 - share)).round() as u64;
    let samples = &mut record.samples;
    samples.prefill_ns.iter_mut().for_each(slower);
    samples.end_to_end_ns.iter_mut().for_each(slower);
    samples.decode_step_ns.iter_mut().flatten().for_each(slower);
    record.metrics = metrics::summaries(record);
}

fn changed(name: &str, change: Change) -> Document {
    let mut document = recorded(name);
    document.records.iter_mut().for_each(change);
    document
}

fn rules(list: &str) -> Rules {
    Rules { gates: gates(list).expect("gates"), allow_different_machine: false, order: Order::Apart }
}

#[test]
fn verdicts() {
    let cases: &[(&str, Change, &str, Verdict)] = &[
        ("again", |_| {}, "decode_tps:-5%", Verdict::Ok),
        ("again", |r| slow_down(r, 0.10), "decode_tps:-5%", Verdict::Regressed),
        ("again", |r| slow_down(r, 0.05), "decode_tps:-5%", Verdict::CannotTell),
        ("noisy", |_| {}, "decode_tps:-5%", Verdict::CannotTell),
        // What slows all precisions alike leaves their ratios.
        ("again", |r| slow_down(r, 0.10), "speedup_vs_fp16:-10%", Verdict::Ok),
        (
            "again",
            |r| {
                if r.precision == "nf4" {
                    slow_down(r, 0.20)
                }
            },
            "speedup_vs_fp16:-10%",
            Verdict::Regressed,
        ),
        ("again", |_| {}, "peak_bytes:+3%,weights_bytes,weights.hash,token_ids", Verdict::Ok),
        (
            "again",
            |r| r.memory.peak_bytes = r.memory.peak_bytes.map(|b| b + b / 20),
            "peak_bytes:+3%",
            Verdict::Regressed,
        ),
        ("again", |r| r.memory.weights_bytes = Some(1), "weights_bytes", Verdict::Regressed),
        ("again", |r| r.weights.hash = "other".into(), "weights.hash", Verdict::Regressed),
        ("again", |r| r.output.token_ids[3] += 1, "token_ids", Verdict::Regressed),
        ("again", |r| r.status = Status::Oom, "weights_bytes", Verdict::Regressed),
        ("again", |r| r.samples.end_to_end_ns.truncate(5), "decode_tps:-5%", Verdict::CannotTell),
    ];
    let base = recorded("base.json");
    for (at, (name, change, list, verdict)) in cases.iter().enumerate() {
        let comparison = compare(&base, &changed(&format!("{name}.json"), *change), &rules(list)).expect("compare");
        let seen: Vec<_> = comparison
            .checks
            .iter()
            .map(|c| (&c.precision, c.metric, c.change, c.ci95_low, c.ci95_high, c.verdict))
            .collect();
        assert_eq!(comparison.verdict, *verdict, "case {at}, {name} at {list}: {seen:?}");
        assert!(comparison.empty_gates.is_empty(), "case {at}: {:?}", comparison.empty_gates);
    }
}

#[test]
fn a_gate_without_values_is_said() {
    let (base, mut new) = (recorded("base.json"), recorded("again.json"));
    for (change, list) in [
        ((|_| {}) as Change, "kl_mean:+0.1"),
        (|r| r.engine.commit = "another".into(), "token_ids"),
        (|r| r.memory.peak_bytes = None, "peak_bytes:+3%"),
        (
            |r| {
                if let Some(ratio) = &mut r.ratio_to_fp16 {
                    ratio.paired = false
                }
            },
            "speedup_vs_fp16:-5%",
        ),
    ] {
        new.records.iter_mut().for_each(change);
        let comparison = compare(&base, &new, &rules(list)).expect("compare");
        assert_eq!(comparison.empty_gates, [list]);
        assert!(comparison.checks.is_empty());
    }
}

#[test]
fn unequal_work_and_other_machines_are_refused() {
    let cases: &[(Change, bool, &str)] = &[
        (|r| r.workload.n_gen += 1, true, "unequal work at smollm2-135m fp16"),
        (|r| r.workload.n_prompt += 1, true, "prompt tokens"),
        (|r| r.workload.n_depth += 512, true, "depth `0` and `512`"),
        (|r| r.weights.source = "local".into(), true, "weights `random` and `local`"),
        (|r| r.model.id = "other".into(), true, "nothing to compare"),
        (|r| r.keep_fp16.push("lm_head".into()), true, "nothing to compare"),
        (|r| r.environment.isa = "avx2".into(), false, "instruction set"),
        (|r| r.device.name = "Another CPU".into(), false, "device"),
        (|r| r.environment.threads = 64, false, "threads"),
        (|r| r.engine.name = "llama.cpp".into(), false, "engine"),
        (|r| r.environment.build_profile = "debug".into(), false, "build profile"),
    ];
    let base = recorded("base.json");
    for (change, always, word) in cases {
        let new = changed("again.json", *change);
        let error = compare(&base, &new, &rules("decode_tps:-5%")).expect_err(word).to_string();
        assert!(error.contains(word), "{word}: {error}");
        let allowed = Rules { allow_different_machine: true, ..rules("decode_tps:-5%") };
        assert_eq!(compare(&base, &new, &allowed).is_err(), *always, "{word}");
    }
}

#[test]
fn repeats_in_turn_are_paired() {
    let base = recorded("noisy.json");
    let slower = changed("noisy.json", |r| slow_down(r, 0.10));
    let interleaved = Rules { order: Order::Interleaved, ..rules("decode_tps:-5%") };
    assert_eq!(compare(&base, &slower, &rules("decode_tps:-5%")).expect("compare").verdict, Verdict::CannotTell);
    assert_eq!(compare(&base, &slower, &interleaved).expect("compare").verdict, Verdict::Regressed);
}

#[test]
fn a_missing_precision_is_said() {
    let (base, mut new) = (recorded("base.json"), recorded("again.json"));
    new.records.retain(|record| record.precision == "fp16");
    let comparison = compare(&base, &new, &rules("decode_tps:-5%")).expect("compare");
    assert!(comparison.not_compared.iter().any(|what| what.contains("only the base has smollm2-135m nf4")));
    assert_eq!(comparison.checks.len(), 1);
}

#[test]
fn engines_of_one_file_are_told_apart() {
    let with_other = |name: &str, share: f64| {
        let mut document = recorded(name);
        let mut other = document.records.clone();
        for record in &mut other {
            record.engine.name = "candle".into();
            slow_down(record, share);
        }
        document.records.extend(other);
        document
    };
    // Only the other engine became slower.
    let rules = rules("decode_tps:-20%");
    let comparison = compare(&with_other("base.json", 0.5), &with_other("base.json", 0.8), &rules).expect("compare");
    let verdicts: Vec<_> = comparison.checks.iter().map(|check| check.verdict).collect();
    assert_eq!(verdicts, [Verdict::Ok, Verdict::Ok, Verdict::Regressed, Verdict::Regressed]);
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a folder"));
        let documents: &[(&str, Document)] = &[
            ("base", recorded("base.json")),
            ("again", recorded("again.json")),
            ("slow", changed("again.json", |r| slow_down(r, 0.10))),
            ("slower", changed("again.json", |r| slow_down(r, 0.05))),
            ("longer", changed("again.json", |r| r.workload.n_gen += 1)),
            ("elsewhere", changed("again.json", |r| r.device.name = "Another CPU".into())),
        ];
        for (name, document) in documents {
            let text = serde_json::to_string(document).expect("a document is JSON");
            fs::write(place.path(&format!("{name}.json")), text).expect("write");
        }
        fs::write(place.path("text.json"), "no records").expect("write");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
        command.args(line.split_whitespace()).current_dir(self.0.path()).stdin(Stdio::null());
        command.output().expect("start the program")
    }
}

#[test]
fn exit_codes() {
    let place = Place::new();
    for (line, code, word) in [
        ("compare base.json again.json", 0, "ok: no regression in 4 checks"),
        ("compare base.json slow.json", 3, "regressed: 1 of 4 checks"),
        ("compare base.json slower.json", 0, "can't tell: 2 of 4 checks"),
        ("compare base.json slower.json --strict", 3, "can't tell: 2 of 4 checks"),
        ("compare base.json slow.json --fail-on decode_tps:-20%", 0, "ok: no regression"),
        ("compare base.json slow.json --format markdown", 3, "| nf4 | decode\\_tps, tokens/s |"),
        ("compare base.json longer.json", 2, "unequal work"),
        ("compare base.json elsewhere.json", 2, "--allow-different-machine"),
        ("compare base.json elsewhere.json --allow-different-machine", 0, "different machines: device"),
        ("compare base.json again.json --fail-on kl_mean:+3%", 2, "compared nothing: kl_mean:+3%"),
        (
            "compare base.json slow.json --fail-on kl_mean:+3%,decode_tps:-5%",
            3,
            "the gate `kl_mean:+3%` compared nothing",
        ),
        ("compare base.json again.json --fail-on decode_tps", 2, "never twice the same"),
        ("compare base.json text.json", 2, "cannot read records from `text.json`"),
        ("compare base.json absent.json", 2, "cannot read records from `absent.json`"),
        ("compare base.json again.json -o absent/c.md", 2, "there is no folder `absent`"),
        ("--fail-on decode_tps:-5%", 2, "`--fail-on` needs `--baseline` or `--ab`"),
        ("--baseline absent.json", 2, "cannot read records from `absent.json`"),
        ("--ab absent", 2, "`--ab absent`"),
    ] {
        let output = place.run(line);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{line}\n{said}");
        assert!(said.contains(word), "{line}: no `{word}` in\n{said}");
    }
}

#[test]
fn json_says_all() {
    let place = Place::new();
    let output = place.run("compare base.json slow.json --format json -o c.md");
    let comparison: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(comparison["verdict"], "regressed");
    let check = &comparison["checks"][0];
    for key in ["base", "new", "change", "ci95_low", "ci95_high", "limit"] {
        assert!(check[key].is_f64(), "{key} in {check}");
    }
    assert!(fs::read_to_string(place.path("c.md")).expect("the file").starts_with("### ❌ regressed: 1 of 4"));
}

/// A tiny model, so that a run takes no time. Whatever its speed, gates on equal work hold; one on speed cannot be told on a busy machine.
const TINY: &str =
    "--precision fp16,nf4 --prompt-ids 1,2,3 --max-new-tokens 4 --repeats 8 --warmup 0 --threads 1 --model-id";

fn tiny() -> String {
    format!("{TINY} {}/tests/golden/models/llama-tiny", env!("CARGO_MANIFEST_DIR"))
}

const GATES: &str = "decode_tps:-99.9%,weights_bytes,weights.hash,token_ids";

/// Whether a comparison by [`GATES`] holds a row on speed and ones of equal work that are ok, at each of both precisions.
fn assert_equal_work(said: &str) {
    for precision in ["fp16", "nf4"] {
        let row = |metric: &str| {
            let start = format!("{precision:<9}  {metric}");
            said.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("no `{start}` in\n{said}"))
        };
        assert!(row("decode_tps, tokens/s").contains("-99.9 %"), "{said}");
        for metric in ["weights_bytes", "weights.hash", "token_ids"] {
            assert!(row(metric).ends_with("  ok"), "{metric} in\n{said}");
        }
    }
}

#[test]
fn a_run_compares_itself_with_a_baseline() {
    let place = Place::new();
    assert_eq!(place.run(&format!("{} --output tiny.json", tiny())).status.code(), Some(0));
    let output = place.run(&format!("{} --baseline tiny.json --fail-on {GATES} --format json", tiny()));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    serde_json::from_str::<Document>(&stdout).expect("stdout is the run alone");
    assert_equal_work(&stderr);

    let output = place.run(&format!(
        "{} --baseline tiny.json --fail-on weights_bytes --max-new-tokens 5",
        tiny().replace(" --max-new-tokens 4", "")
    ));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("unequal work"));
}

#[test]
fn two_builds_run_in_turn() {
    let place = Place::new();
    let line = format!("{} --ab {} --fail-on {GATES} --output both.json", tiny(), env!("CARGO_BIN_EXE_quantbench"));
    let output = place.run(&line);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_equal_work(&said);
    assert_eq!(report::read(&place.path("both.json")).expect("both sides").records.len(), 4);

    let output = place.run(&format!("{} --ab /bin/true", tiny()));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("it is no quantbench"));
}
