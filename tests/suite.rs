//! Suites from outside: files, plans, shards, merges, and cases that fail in every way while the others go on.

#[path = "suite/machines.rs"]
mod machines;
mod skips;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use quantbench::cli::suite_keys;
use quantbench::suite::{self, Planned, Shard};
use serde_json::Value;
use tempfile::TempDir;

/// A folder with small models to run in.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy(&golden("llama-tiny"), &folder.path().join("llama-tiny"));
        let place = Self { folder };
        files.iter().for_each(|(name, text)| place.write(name, text));
        place
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("HF_HOME", self.path("hub")).env_remove("HF_TOKEN").env_remove("HF_ENDPOINT");
        for variable in ["SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"] {
            command.env_remove(variable);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn golden(model: &str) -> PathBuf {
    root().join("tests/golden/models").join(model)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fails with both streams unless the exit code is this.
fn expect_code(output: &Output, code: i32) {
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "----- stdout\n{stdout}----- stderr\n{stderr}");
}

fn rows(jsonl: &str) -> Vec<Value> {
    jsonl.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// Index of the case, precision and status of every row.
fn summary(jsonl: &str) -> Vec<(u64, String, String)> {
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let row = |row: &Value| (row["suite"]["index"].as_u64().unwrap(), word(&row["precision"]), word(&row["status"]));
    rows(jsonl).iter().map(row).collect()
}

fn plan(place: &Place, name: &str) -> Vec<Planned> {
    suite::read(&place.path(name), &suite_keys()).unwrap_or_else(|error| panic!("{error}"))
}

/// Cases of which each is over at once.
const QUICK: &str = "device = \"cpu\"\nthreads = 1\nwarmup = 0\nrepeats = 1\nmax_new_tokens = 4\n\
                     [matrix]\nmodel_id = \"./llama-tiny\"\nprecision = [\"fp16\", \"nf4\"]\nprompt_tokens = [4, 5, 6]\n";

#[test]
fn every_config_plans_and_says_what_it_is_for() {
    for (name, n_cases) in [("smoke", 2), ("four-models", 4), ("context", 12), ("cpu", 5)] {
        let path = root().join(format!("configs/{name}.toml"));
        assert!(fs::read_to_string(&path).unwrap().starts_with("# "), "{name}");
        let output = Place::new(&[]).run(&["suite", path.to_str().unwrap(), "--dry-run"]);
        expect_code(&output, 0);
        let listed = text(&output.stdout);
        assert_eq!(listed.lines().count(), n_cases, "{name}: {listed}");
        for line in listed.lines() {
            assert!(line.contains("quantbench run ") && line.contains("--precision=fp16,int8,nf4"), "{line}");
        }
        let planned = suite::read(&path, &suite_keys()).unwrap();
        assert!(planned.iter().all(|case| case.limits.timeout_s.is_some()), "{name} may hang");
    }
    let n_configs = fs::read_dir(root().join("configs"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "toml"));
    assert_eq!(n_configs.count(), 4, "a config without an expectation");
}

#[test]
fn keys_are_the_options_of_a_run() {
    let keys = suite_keys();
    let has = |name: &str| keys.iter().any(|key| key.name == name);
    for name in [
        "model_id",
        "weights",
        "precision",
        "keep_fp16",
        "prompt_tokens",
        "depth",
        "quality",
        "device",
        "engine",
        "rel_ci",
    ] {
        assert!(has(name), "{name}");
    }
    for name in ["output", "format", "quiet", "list_models", "save_logits", "dry_run", "help"] {
        assert!(!has(name), "{name}");
    }
}

/// A suite file, and the words that its error and hint must hold.
const WRONG: &[(&str, &[&str])] = &[
    ("x = = 1", &["`s.toml` line 1"]),
    ("\n\nmodle_id = \"a\"", &["`s.toml` line 3: `modle_id` is unknown", "`model_id`"]),
    ("[matrix]\ndevice = [\"cpu\"]\ndepht = [1]", &["line 3: `depht` is unknown", "`depth`"]),
    ("[matrx]\ndevice = [\"cpu\"]", &["line 1: `matrx` is unknown", "`matrix`"]),
    ("timeout = 5", &["line 1: `timeout` is unknown", "`timeout_s`"]),
    ("[matrix]\ntimeout_s = [5]", &["line 2: `timeout_s` is unknown here"]),
    ("[[override]]\nwen = {}", &["line 2: `wen` is unknown", "`when`"]),
    ("[[override]]\nwhen = { modl_id = \"a\" }", &["line 2: `modl_id` is unknown", "`model_id`"]),
    ("[[override]]\nwhen = { precision = [\"fp16\"] }", &["line 2: `precision` cannot choose cases"]),
    ("depth = 1\n[[override]]\nwhen = { depth = 2 }", &["line 2: this `override` is for no case"]),
    ("[[override]]\nskip = true", &["has no case"]),
    ("override = 1", &["line 1: `override`: tables are needed"]),
    ("matrix = 1", &["line 1: `matrix`: a table is needed"]),
    ("extends = 1", &["line 1: `extends`: the name of a file"]),
    ("\ndepth = 1\n[matrix]\ndepth = [2]", &["line 2: `depth` stands in `[matrix]` as well"]),
    ("extends = \"s.toml\"", &["line 1: `extends`: this file extends itself"]),
    ("extends = \"absent.toml\"", &["absent.toml", "No such file"]),
    ("depth = true", &["line 1: `depth` is true or false; a text or a number is needed"]),
    ("offline = \"yes\"", &["line 1: `offline` is a text; true or false is needed"]),
    ("precision = []", &["line 1: `precision` is an empty list"]),
    ("depth = 0x10", &["not a decimal number"]),
    ("depth = [1, 2]", &["line 1: `depth` is a list"]),
    ("[matrix]\ndepth = []", &["line 2: `depth` is empty"]),
    ("[matrix]\ndepth = [1, 1]", &["the cases 1 and 2 are the same"]),
    ("timeout_s = 0", &["line 1: `timeout_s` is `0`"]),
    ("timeout_s = \"nan\"", &["line 1: `timeout_s` is `nan`"]),
    ("memory_limit = \"2 GB\"", &["line 1: `memory_limit` is `2 GB`", "`24 GiB`"]),
    ("\nmax_new_tokens = 0", &["line 2: `max_new_tokens`: `--max-new-tokens 0`: at least 1"]),
    ("\ndepth = -1", &["line 2: `depth`"]),
    ("device = \"gpu\"", &["line 1: `device`: unknown device `gpu`"]),
    ("[matrix]\nprecision = [\"fp16\", \"imt8\"]", &["line 2: `precision`: unknown precision `imt8`", "int8"]),
    ("prompt = \"a\"\nprompt_tokens = 3", &["line 1: `prompt`", "cannot be used with"]),
    ("prompt_file = \"absent.txt\"", &["line 1: `prompt_file`"]),
];

#[test]
fn what_is_wrong_is_named_with_its_line() {
    for (toml, words) in WRONG {
        let place = Place::new(&[("s.toml", toml)]);
        let output = place.run(&["suite", "s.toml", "--dry-run"]);
        expect_code(&output, 2);
        let stderr = text(&output.stderr);
        for word in *words {
            assert!(stderr.contains(word), "{toml}\nlacks `{word}`:\n{stderr}");
        }
    }
}

#[test]
fn a_matrix_is_multiplied_models_first() {
    let place = Place::new(&[(
        "s.toml",
        "[matrix]\ndepth = [0, 9]\nmodel_id = [\"phi-2\", \"smollm2-135m\"]\nprompt_tokens = [4]",
    )]);
    let planned = plan(&place, "s.toml");
    let commands: Vec<String> = planned.iter().map(|case| case.words.join(" ")).collect();
    let case = |model: &str, depth: usize| format!("--depth={depth} --model-id={model} --prompt-tokens=4");
    assert_eq!(commands, [case("phi-2", 0), case("phi-2", 9), case("smollm2-135m", 0), case("smollm2-135m", 9)]);
    assert_eq!(planned.iter().map(|case| case.index).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((planned[1].label.as_str(), planned[1].n_cases), ("phi-2 on auto, depth 9", 4));
}

#[test]
fn files_extend_and_override() {
    let base = "timeout_s = 60\nrepeats = 3\nprompt = \"hi\"\n[matrix]\nmodel_id = [\"phi-2\", \"smollm2-135m\"]\n\
                [[override]]\nwhen = { model_id = \"phi-2\" }\nrepeats = 1\ntimeout_s = 600\nmemory_limit = \"1 GiB\"\n";
    let own = "extends = \"base.toml\"\nquality = true\noffline = false\n[matrix]\ndepth = [0, 1]\n\
               [[override]]\nwhen = { model_id = \"smollm2-135m\", depth = [1, 2] }\nskip = true\n";
    let dropped = "extends = \"base.toml\"\n[matrix]\nmodel_id = \"llama-3.2-1b\"";
    let place = Place::new(&[
        ("base.toml", base),
        ("sub/own.toml", &own.replace("base", "../base")),
        ("dropped.toml", dropped),
    ]);
    let planned = plan(&place, "sub/own.toml");
    let seen: Vec<String> = planned.iter().map(|case| case.words.join(" ")).collect();
    let case = |model: &str, depth: usize, repeats: usize| {
        format!("--depth={depth} --model-id={model} --prompt=hi --quality --repeats={repeats}")
    };
    assert_eq!(seen, [case("phi-2", 0, 1), case("phi-2", 1, 1), case("smollm2-135m", 0, 3)]);
    assert_eq!((planned[0].suite.as_str(), planned[0].limits.timeout_s), ("own", Some(600.0)));
    assert_eq!((planned[0].limits.memory_limit_bytes, planned[2].limits.timeout_s), (Some(1 << 30), Some(60.0)));
    place.write("fixed.toml", "extends = \"base.toml\"\nmodel_id = \"phi-2\"");
    assert_eq!(plan(&place, "fixed.toml").len(), 1, "a setting replaces the axis of the base");
    // An override that came with the base may be for a model that is gone.
    assert_eq!(plan(&place, "dropped.toml").len(), 1);
}

#[test]
fn the_hash_is_of_the_content() {
    let hash = |toml: &str| plan(&Place::new(&[("s.toml", toml)]), "s.toml")[0].hash.clone();
    let first = hash("depth = 4\nmodel_id = \"phi-2\"\ntimeout_s = 5");
    assert_eq!(first, hash("# The order and the limits are not in it.\nmodel_id = \"phi-2\"\n[matrix]\ndepth = [4]"));
    assert_ne!(first, hash("depth = 5\nmodel_id = \"phi-2\""));
}

#[test]
fn four_shards_of_the_seed_suite_are_disjoint_and_complete() {
    let (place, seed) = (Place::new(&[]), root().join("configs/four-models.toml"));
    let seed = seed.to_str().unwrap();
    let listed = |command: &mut Command| {
        let output = command.output().unwrap();
        expect_code(&output, 0);
        text(&output.stdout)
    };
    let whole = listed(&mut place.command(&["suite", seed, "--dry-run"]));
    let mut parts = Vec::new();
    for index in 1..=4 {
        let typed = listed(&mut place.command(&["suite", seed, "--dry-run", "--shard", &format!("{index}/4")]));
        let slurm = [("SLURM_ARRAY_TASK_ID", index.to_string()), ("SLURM_ARRAY_TASK_COUNT", "4".to_owned())];
        assert_eq!(typed, listed(place.command(&["suite", seed, "--dry-run"]).envs(slurm)));
        let pod = [("JOB_COMPLETION_INDEX", (index - 1).to_string()), ("JOB_COMPLETIONS", "4".to_owned())];
        assert_eq!(typed, listed(place.command(&["suite", seed, "--dry-run"]).envs(pod)));
        parts.extend(typed.lines().map(str::to_owned).collect::<Vec<_>>());
    }
    parts.sort();
    assert_eq!(parts, whole.lines().collect::<Vec<_>>());
    assert_eq!(parts.iter().collect::<BTreeSet<_>>().len(), 4);
    let half = place.command(&["suite", seed, "--dry-run"]).env("SLURM_ARRAY_TASK_ID", "1").output().unwrap();
    expect_code(&half, 2);
    assert!(text(&half.stderr).contains("SLURM_ARRAY_TASK_COUNT"));
}

#[test]
fn a_killed_suite_goes_on_without_repeating_or_losing_a_row() {
    let place = Place::new(&[("s.toml", QUICK)]);
    let args = ["suite", "s.toml", "-o", "out.jsonl", "--resume"];
    let mut child = place.command(&args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let first = lines.find(|line| line.contains("/3 ")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(first.starts_with("1/3 llama-tiny on cpu, prompt_tokens 4: fp16 ok, nf4 ok; "), "{first}");

    let before = place.read("out.jsonl");
    let n_before = before.lines().count();
    assert!((2..6).contains(&n_before), "{n_before} rows were there");
    // What a kill in the middle of a write leaves: a row of the second case, and half of another.
    let row = before.lines().next().unwrap().replacen("\"index\":1", "\"index\":2", 1);
    let hash = plan(&place, "s.toml")[1].hash.clone();
    let row = row.replacen(&plan(&place, "s.toml")[0].hash, &hash, 1);
    let torn = format!("{}{row}\n{}", first_lines(&before, 2), &row[..row.len() / 2]);
    place.write("out.jsonl", torn);

    let output = place.run(&args);
    expect_code(&output, 0);
    let stderr = text(&output.stderr);
    assert!(stderr.contains("was cut") && stderr.contains("1 of 3 cases ended before"), "{stderr}");
    assert!(!stderr.contains("1/3 ") && stderr.contains("2/3 ") && stderr.contains("3/3 "), "{stderr}");
    let after = place.read("out.jsonl");
    assert!(after.starts_with(&first_lines(&before, 2)), "the rows of the first case were touched");
    let expected: Vec<_> =
        (1..=3).flat_map(|case| ["fp16", "nf4"].map(|name| (case, name.to_owned(), "ok".to_owned()))).collect();
    assert_eq!(summary(&after), expected);

    // Nothing is left to do, and nothing changes.
    expect_code(&place.run(&args), 0);
    assert_eq!(place.read("out.jsonl"), after);
    let refused = place.run(&["suite", "s.toml", "-o", "out.jsonl"]);
    expect_code(&refused, 2);
    assert!(text(&refused.stderr).contains("holds results already"));
    assert_eq!(place.read("out.jsonl"), after);

    merges(&place, &after);
}

fn first_lines(text: &str, n: usize) -> String {
    text.lines().take(n).map(|line| format!("{line}\n")).collect()
}

/// What merging says about the rows of a whole suite in every division.
fn merges(place: &Place, whole: &str) {
    let part = |index: usize| -> String {
        let shard = Shard { index, count: 2 };
        let own = |line: &&str| shard.has(rows(line)[0]["suite"]["index"].as_u64().unwrap() as usize);
        whole.lines().filter(own).map(|line| format!("{line}\n")).collect()
    };
    let (odd, even) = (part(1), part(2));
    let other_cpu = even.replace("\"isa\":\"", "\"isa\":\"other-");
    let failed = whole.replace("\"status\":\"ok\"", "\"status\":\"error\"");
    let torn = format!("{odd}{}", &even[..even.len() / 3]);
    for (name, text) in [("odd", &odd), ("even", &even), ("cpu", &other_cpu), ("failed", &failed), ("torn", &torn)] {
        place.write(&format!("{name}.jsonl"), text);
    }
    // Files, the rows, and the words on stderr.
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&["even.jsonl", "odd.jsonl"], whole, &[]),
        (&["out.jsonl", "out.jsonl"], whole, &["6 rows are left out"]),
        (&["failed.jsonl", "even.jsonl", "odd.jsonl"], whole, &["6 rows are left out"]),
        (&["odd.jsonl"], &odd, &["of 3 cases these are missing: 2"]),
        (&["torn.jsonl"], &odd, &["the last line of `torn.jsonl` was cut", "missing: 2"]),
    ];
    for (files, expected, words) in cases {
        let output = place.run(&[&["merge"], *files].concat());
        expect_code(&output, 0);
        let stderr = text(&output.stderr);
        assert!(text(&output.stdout) == **expected, "{files:?}: {:?}\n{stderr}", summary(&text(&output.stdout)));
        assert!(words.iter().all(|word| stderr.contains(word)), "{files:?}: {stderr}");
        assert_eq!(stderr.is_empty(), words.is_empty(), "{files:?}: {stderr}");
    }
    let output = place.run(&["merge", "odd.jsonl", "cpu.jsonl", "-o", "merged.jsonl"]);
    expect_code(&output, 0);
    let stderr = text(&output.stderr);
    assert!(stderr.contains("`environment.isa` differs on cpu: ") && stderr.contains("`cpu.jsonl`"), "{stderr}");
    assert_eq!(place.read("merged.jsonl").replace("other-", ""), whole);
    place.write("future.jsonl", odd.replacen("\"schema_version\":1", "\"schema_version\":99", 1));
    place.write("words.jsonl", "no row\n");
    for (file, word) in
        [("future.jsonl", "line 1: `schema_version` is 99"), ("words.jsonl", "line 1: "), ("absent", "cannot read")]
    {
        let output = place.run(&["merge", "even.jsonl", file, "-o", "never.jsonl"]);
        expect_code(&output, 2);
        assert!(text(&output.stderr).contains(word), "{}", text(&output.stderr));
        assert!(!place.path("never.jsonl").exists());
    }
}

#[test]
fn cases_that_fail_leave_the_others_running() {
    let toml = "device = \"cpu\"\nthreads = 1\nwarmup = 0\nrepeats = 2\nmax_new_tokens = 4\nprompt_tokens = 4\n\
                [matrix]\nmodel_id = [\"./broken\", \"owner/silent\", \"phi-2\", \"HERE/absent\", \"./llama-tiny\", \"./slow\"]\n\
                precision = [\"fp16\", \"nf4\"]\n\
                [[override]]\nwhen = { model_id = \"phi-2\" }\nmemory_limit = \"600 MiB\"\n\
                [[override]]\nwhen = { model_id = \"owner/silent\" }\ntimeout_s = 0.5\n\
                [[override]]\nwhen = { model_id = \"./slow\" }\ntimeout_s = 20\nrepeats = 500000000\n\
                prompt_tokens = 500\nmax_new_tokens = 500\n";
    let place = Place::new(&[("broken/config.json", "{")]);
    place.write("s.toml", toml.replace("HERE", place.folder.path().to_str().unwrap()));
    copy(&golden("llama-tiny"), &place.path("slow"));
    // A hub that takes connections and never answers: the case hangs before it has a worker.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let output = place.command(&["suite", "s.toml", "-o", "out.jsonl"]).env("HF_ENDPOINT", endpoint).output().unwrap();
    expect_code(&output, 1);
    let found = rows(&place.read("out.jsonl"));
    let expected = [
        ("broken", "error", "config.json"),
        ("owner/silent", "timeout", "longer than its limit of 0.5 s"),
        ("phi-2", "oom", "out of memory: wanted "),
        ("absent", "error", "absent"),
        ("llama-tiny", "ok", ""),
        ("slow", "timeout", "longer than its limit of 20 s"),
    ];
    assert_eq!(found.len(), 2 * expected.len());
    for (pair, (model, status, reason)) in found.chunks(2).zip(expected) {
        for (row, precision) in pair.iter().zip(["fp16", "nf4"]) {
            let said = row["reason"].as_str().unwrap_or_default();
            let seen = (row["model"]["id"].as_str(), row["precision"].as_str(), row["status"].as_str());
            assert_eq!(seen, (Some(model), Some(precision), Some(status)), "{said}");
            assert!(said.contains(reason), "{model}: {said}");
        }
    }
    let here = place.folder.path().to_str().unwrap();
    assert!(!place.read("out.jsonl").contains(here), "rows hold no path of this machine");
    let wanted = found[4]["memory"]["wanted_bytes"].as_u64().unwrap();
    assert!(wanted > 5 << 30, "phi-2 in fp16 wants {wanted} bytes");
    // What a slow case measured before its end is kept.
    assert!(!found[10]["samples"]["end_to_end_ns"].as_array().unwrap().is_empty());

    // Failed cases are over too, unless they are to be tried again; those that ended well stay.
    let before = place.read("out.jsonl");
    let output = place.run(&["suite", "s.toml", "-o", "out.jsonl", "--resume"]);
    expect_code(&output, 1);
    assert_eq!(place.read("out.jsonl"), before);
    let again = ["suite", "s.toml", "-o", "out.jsonl", "--resume", "--retry-failed", "--fail-fast", "--quiet"];
    let output = place.run(&again);
    expect_code(&output, 1);
    let tried: Vec<u64> = summary(&place.read("out.jsonl")).iter().map(|row| row.0).collect();
    assert_eq!(tried, [5, 5, 1, 1], "the first failure ends it");
}

/// Every row of a suite with two engines: those of a case that ran, of one that failed, and of one in which an engine has nothing to run.
#[test]
fn engines_are_rows_of_a_case() {
    let toml = "engine = [\"quantbench\", \"candle\"]\ndevice = \"cpu\"\nthreads = 1\nwarmup = 0\nrepeats = 2\nmax_new_tokens = 4\n\
                prompt_tokens = 4\nprecision = [\"fp16\", \"nf4\"]\n[matrix]\nmodel_id = [\"./llama-tiny\", \"./broken\"]\n";
    let place = Place::new(&[("s.toml", toml), ("broken/config.json", "{")]);
    let output = place.run(&["suite", "s.toml", "-o", "out.jsonl"]);
    expect_code(&output, 1);
    let said = text(&output.stderr);
    assert!(said.contains("fp16 ok, nf4 ok, fp16 by candle ok;"), "{said}");
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let row = |row: &Value| [&row["engine"]["name"], &row["precision"], &row["status"]].map(word).join(" ");
    let found = rows(&place.read("out.jsonl"));
    let of_case =
        |status: &str| ["quantbench fp16", "quantbench nf4", "candle fp16"].map(|row| format!("{row} {status}"));
    assert_eq!(found.iter().map(row).collect::<Vec<_>>(), [of_case("ok"), of_case("error")].concat());
    assert!(!found[2]["ratio_to_fp16"].is_null(), "candle's row is compared with ours");

    place.write("none.toml", "engine = \"candle\"\nprecision = \"nf4\"\nmodel_id = \"./llama-tiny\"\n");
    let output = place.run(&["suite", "none.toml"]);
    expect_code(&output, 1);
    let found = rows(&text(&output.stdout));
    assert_eq!(found.iter().map(row).collect::<Vec<_>>(), ["candle nf4 error"]);
    assert!(word(&found[0]["reason"]).contains("`--engine candle` has no `nf4`"), "{}", found[0]["reason"]);
}

/// Processes whose parent's parent is `id`: the workers of a suite's case.
fn workers_of(id: u32) -> Vec<String> {
    let parent = |id: &str| -> Option<String> {
        let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().to_owned())
    };
    let ids = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_grandchild = |child: &String| parent(child).and_then(|middle| parent(&middle)) == Some(id.to_string());
    ids.filter(|name| name.parse::<u32>().is_ok()).filter(is_grandchild).collect()
}

#[test]
fn a_worker_that_hangs_is_killed() {
    let toml = format!("timeout_s = 20\nmax_time = 600\n{}", QUICK.replace("[4, 5, 6]", "[4]"));
    let place = Place::new(&[("s.toml", &toml.replace("repeats = 1", "repeats = 500000000"))]);
    let mut child = place.command(&["suite", "s.toml", "--quiet"]).stdout(Stdio::piped()).spawn().unwrap();
    let workers = loop {
        let workers = workers_of(child.id());
        if !workers.is_empty() || child.try_wait().unwrap().is_some() {
            break workers;
        }
    };
    // A stopped process obeys nothing but a kill. On a machine so slow that the limit came first there is none to stop.
    let _ = Command::new("kill").arg("-STOP").args(&workers).status().unwrap();
    let output = child.wait_with_output().unwrap();
    expect_code(&output, 1);
    let statuses: Vec<String> = summary(&text(&output.stdout)).into_iter().map(|row| row.2).collect();
    assert_eq!(statuses, ["timeout", "timeout"]);
    for worker in workers {
        assert!(!Path::new(&format!("/proc/{worker}")).exists(), "worker {worker} is still there");
    }
}

/// Whoever kills a worker from outside has not run it out of memory, and the others go on.
#[test]
fn a_worker_that_somebody_kills_is_an_error() {
    let toml = format!("timeout_s = 120\nmax_time = 600\n{}", QUICK.replace("[4, 5, 6]", "[4]"));
    let toml = toml.replace("repeats = 1", "repeats = 500000000").replace("[\"fp16\", \"nf4\"]", "[\"nf4\"]");
    let place = Place::new(&[("s.toml", &toml)]);
    let mut child = place.command(&["suite", "s.toml", "--quiet"]).stdout(Stdio::piped()).spawn().unwrap();
    let workers = loop {
        let workers = workers_of(child.id());
        if !workers.is_empty() || child.try_wait().unwrap().is_some() {
            break workers;
        }
    };
    assert!(!workers.is_empty(), "no worker was seen");
    let _ = Command::new("kill").arg("-KILL").args(&workers).status().unwrap();
    let output = child.wait_with_output().unwrap();
    expect_code(&output, 1);
    let row = &rows(&text(&output.stdout))[0];
    let reason = row["reason"].as_str().unwrap();
    assert_eq!(row["status"], "error", "{reason}");
    assert!(reason.contains("the worker was killed by signal 9 (SIGKILL)"), "{reason}");
    assert!(row["memory"]["wanted_bytes"].is_null() && row["memory"]["needed_bytes"].is_null(), "{row}");
}

/// A file that takes nothing more: the rows that were measured are on stdout.
#[cfg(target_os = "linux")]
#[test]
fn rows_that_the_file_does_not_take_are_shown() {
    let place = Place::new(&[("s.toml", QUICK)]);
    std::os::unix::fs::symlink("/dev/full", place.path("out.jsonl")).unwrap();
    let output = place.run(&["suite", "s.toml", "-o", "out.jsonl", "--quiet"]);
    expect_code(&output, 2);
    let stderr = text(&output.stderr);
    assert!(stderr.contains("error: cannot write `out.jsonl`") && stderr.contains("hint: "), "{stderr}");
    let seen = summary(&text(&output.stdout));
    assert_eq!(seen, ["fp16", "nf4"].map(|name| (1, name.to_owned(), "ok".to_owned())));
}

#[test]
fn too_little_memory_is_told_whoever_runs_out() {
    for limit in ["500 KiB", "2 MiB"] {
        let toml = format!("memory_limit = \"{limit}\"\n{}", QUICK.replace("[4, 5, 6]", "[4]"));
        let place = Place::new(&[("s.toml", &toml)]);
        let output = place.run(&["suite", "s.toml", "--quiet"]);
        expect_code(&output, 1);
        for (_, precision, status) in summary(&text(&output.stdout)) {
            assert_eq!(status, "oom", "{precision} with {limit}: {}", text(&output.stdout));
        }
    }
}

#[test]
fn without_a_file_rows_go_to_stdout() {
    let place = Place::new(&[("s.toml", &QUICK.replace("[4, 5, 6]", "[4]"))]);
    let output = place.run(&["suite", "s.toml", "--quiet"]);
    expect_code(&output, 0);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(summary(&stdout).len(), 2);
    assert!(stderr.is_empty(), "{stderr}");
    let row = &rows(&stdout)[0];
    let command = "quantbench run --device=cpu --max-new-tokens=4 --model-id=PATH/TO/llama-tiny --precision=fp16,nf4 \
                   --prompt-tokens=4 --repeats=1 --threads=1 --warmup=0";
    assert_eq!(row["command"].as_str(), Some(command));
    assert_eq!(row["schema_version"].as_u64(), Some(1));
    assert_eq!((row["suite"]["name"].as_str(), row["suite"]["n_rows"].as_u64()), (Some("s"), Some(2)));
}

#[test]
fn two_writers_of_one_file_are_refused() {
    let place = Place::new(&[("s.toml", QUICK)]);
    let file = fs::File::create(place.path("out.jsonl")).unwrap();
    file.lock().unwrap();
    let output = place.run(&["suite", "s.toml", "-o", "out.jsonl"]);
    expect_code(&output, 2);
    assert!(text(&output.stderr).contains("another process writes"), "{}", text(&output.stderr));
}
