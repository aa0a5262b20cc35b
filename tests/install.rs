//! What people install and automate with: the steps of action.yml, the tarball of scripts/release.sh, the stages of the Dockerfile.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_quantbench");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The shell script of the step called `name` in action.yml.
fn step(name: &str) -> String {
    let text = fs::read_to_string(root().join("action.yml")).unwrap();
    let step = text.split("    - name: ").find(|step| step.starts_with(&format!("{name}\n"))).expect("a step");
    let (_, script) = step.split_once("      run: |\n").expect("a script");
    script.lines().map(|line| line.strip_prefix("        ").unwrap_or(line).to_owned() + "\n").collect()
}

/// A folder as a runner gives one, with a tiny model.
struct Runner(TempDir);

impl Runner {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny");
        fs::create_dir(&model).unwrap();
        for file in fs::read_dir(root().join("tests/golden/models/llama-tiny")).unwrap().flatten() {
            fs::copy(file.path(), model.join(file.file_name())).unwrap();
        }
        Self(folder)
    }

    /// Runs a step with its variables; what it wrote to the runner's files is appended there.
    fn step(&self, name: &str, variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new("bash");
        command.args(["--noprofile", "--norc", "-e", "-o", "pipefail", "-c", &step(name)]);
        command.env("GITHUB_OUTPUT", self.0.path().join("outputs"));
        command.env("GITHUB_STEP_SUMMARY", self.0.path().join("summary.md"));
        command.envs(variables.iter().copied()).current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
    }

    /// The last value of an output.
    fn output(&self, name: &str) -> Option<String> {
        let text = self.read("outputs");
        text.lines().rev().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    }
}

fn expect(output: &Output, code: i32) {
    let streams = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert_eq!(output.status.code(), Some(code), "{}\n{}", streams[0], streams[1]);
}

#[test]
fn the_action_measures_and_fails_on_a_regression() {
    let runner = Runner::new();
    expect(&runner.step("build", &[("BINARY", BINARY), ("SOURCE", "nowhere")]), 0);
    assert_eq!(runner.output("binary").as_deref(), Some(BINARY));
    let args = "-m ./tiny --precision fp16,nf4 --repeats 6 --warmup 0 -n 2 --threads 1 --device cpu";
    let measure = [("BINARY", BINARY), ("ARGS", args), ("OUTPUT", "r.json"), ("REPORT", "r.html")];
    expect(&runner.step("measure", &[&measure[..], &[("BASE", "")]].concat()), 0);
    assert_eq!(runner.output("result").as_deref(), Some("r.json"));
    assert!(runner.read("r.html").contains("<html") && runner.read("summary.md").contains("nf4"));

    let gates = "weights_bytes,peak_bytes:+50%";
    let compare = |baseline: &str| {
        let variables =
            [("BINARY", BINARY), ("BASELINE", baseline), ("OUTPUT", "r.json"), ("FAIL_ON", gates), ("STRICT", "true")];
        runner.step("compare", &variables)
    };
    expect(&compare(""), 0);
    assert_eq!(runner.output("verdict").as_deref(), Some("not-compared"));
    expect(&compare("r.json"), 0);
    assert_eq!(runner.output("verdict").as_deref(), Some("ok"));

    let mut base: Value = serde_json::from_str(&runner.read("r.json")).unwrap();
    base["records"][1]["memory"]["weights_bytes"] = 1.into();
    fs::write(runner.0.path().join("base.json"), base.to_string()).unwrap();
    expect(&compare("base.json"), 3);
    assert_eq!(runner.output("verdict").as_deref(), Some("regressed"));
    // Markdown escapes the underscore.
    assert!(runner.read("summary.md").replace('\\', "").contains("weights_bytes"), "{}", runner.read("summary.md"));
    // A baseline that cannot be read is an error of its own, not a verdict.
    expect(&compare("absent.json"), 2);
}

#[test]
fn the_action_measures_another_build_on_the_same_machine() {
    let runner = Runner::new();
    let args = "-m ./tiny --precision nf4 --repeats 2 --warmup 0 -n 2 --threads 1 --device cpu";
    let measure = [("BINARY", BINARY), ("ARGS", args), ("OUTPUT", "r.json"), ("REPORT", ""), ("BASE", BINARY)];
    expect(&runner.step("measure", &measure), 0);
    let records = |name: &str| serde_json::from_str::<Value>(&runner.read(name)).unwrap()["records"].clone();
    assert_eq!(records("base-quantbench.json")[0]["precision"], records("r.json")[0]["precision"]);
}

/// Unpacked into a prefix, everything is where a system looks for it.
#[test]
fn the_tarball_is_a_prefix() {
    let folder = tempfile::tempdir().unwrap();
    let script = "source <(sed '/^main \"/d' release.sh); tarball \"$1\" quantbench-0-test \"$2\"";
    let mut command = Command::new("bash");
    command.args(["-euc", script, "bash", BINARY]).arg(folder.path()).current_dir(root().join("scripts"));
    expect(&command.output().unwrap(), 0);
    let prefix = folder.path().join("prefix");
    fs::create_dir(&prefix).unwrap();
    let mut tar = Command::new("tar");
    tar.arg("xzf")
        .arg(folder.path().join("quantbench-0-test.tar.gz"))
        .args(["--strip-components=1", "-C"])
        .arg(&prefix);
    expect(&tar.output().unwrap(), 0);
    let version = Command::new(prefix.join("bin/quantbench")).arg("--version").env_clear().output().unwrap();
    expect(&version, 0);
    for file in [
        "share/man/man1/quantbench.1",
        "share/man/man1/quantbench-compare.1",
        "share/bash-completion/completions/quantbench",
        "share/zsh/site-functions/_quantbench",
        "share/fish/vendor_completions.d/quantbench.fish",
        "share/doc/quantbench/LICENSE-MIT",
    ] {
        assert!(prefix.join(file).metadata().is_ok_and(|file| file.len() > 0), "no `{file}`");
    }
}

#[test]
fn the_stages_of_the_dockerfile_are_there() {
    let text = fs::read_to_string(root().join("Dockerfile")).unwrap();
    let stages: Vec<&str> =
        text.lines().filter_map(|line| Some(line.strip_prefix("FROM ")?.split_once(" AS ")?.1)).collect();
    assert_eq!(stages, ["build", "build-cuda", "cuda", "cpu"]);
    for line in text.lines().filter(|line| line.starts_with("COPY --from=")) {
        let from = line["COPY --from=".len()..].split(' ').next().unwrap();
        assert!(stages.contains(&from), "{line}");
    }
    let rust = text.lines().find_map(|line| line.strip_prefix("ARG RUST=")).unwrap();
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains(&format!("rust-version = \"{rust}\"")), "Dockerfile builds with Rust {rust}");
}
