//! Loops, schedulers and machines without network: what the documents tell to type, typed.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::skips::skip;
use super::{Place, QUICK, copy, expect_code, golden, root, rows, summary, text};

/// Options that make a run of a tiny model short.
const SHORT: &[&str] = &[
    "--device",
    "cpu",
    "--threads",
    "1",
    "--warmup",
    "0",
    "--repeats",
    "2",
    "--max-new-tokens",
    "4",
    "--prompt-tokens",
    "4",
];

/// Returns whether a program can be started; where not, the test is skipped.
#[track_caller]
fn has(program: &str, args: &[&str]) -> bool {
    let started = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let works = started.is_ok_and(|status| status.success());
    if !works {
        skip(format!("`{program} {}` does not work here", args.join(" ")));
    }
    works
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The shell block of docs/suites.md that holds `word`.
fn documented_block(word: &str) -> String {
    let page = fs::read_to_string(root().join("docs/suites.md")).unwrap();
    let mut blocks = page.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
    blocks.find(|block| block.contains(word)).unwrap_or_else(|| panic!("no block with `{word}`")).to_owned()
}

#[test]
fn the_documented_loop_works() {
    if !has("jq", &["--version"]) {
        return;
    }
    let place = Place::new(&[("broken/config.json", "{")]);
    copy(&golden("phi-tiny"), &place.path("phi-tiny"));
    let short = SHORT.join(" ");
    let binary = env!("CARGO_BIN_EXE_quantbench");
    executable(&place.path("quantbench"), &format!("#!/bin/sh\nexec '{binary}' \"$@\" {short}\n"));
    let block = documented_block("for model in");
    let models = block.lines().find(|line| line.starts_with("for model in ")).unwrap();
    let script = block.replace(models, "for model in ./llama-tiny ./broken ./phi-tiny; do");
    let path = format!("{}:{}", place.folder.path().display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-euc", &script]).current_dir(place.folder.path()).env("PATH", path);
    let output = shell.output().unwrap();
    expect_code(&output, 0);
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(stderr.contains("./broken: exit code 2"), "{stderr}");
    for row in ["llama-tiny\tfp16\tok\t", "phi-tiny\tnf4\tok\t"] {
        assert!(stdout.contains(row), "no `{row}` in\n{stdout}");
    }
    // Three one-liners: speed, the fastest, and memory.
    for line in ["llama-tiny: ", "\"phi-tiny\",\"int8\","] {
        assert!(stdout.lines().any(|seen| seen.starts_with(line)), "no `{line}` in\n{stdout}");
    }
}

#[test]
fn the_documented_suite_commands_exist() {
    let place = Place::new(&[]);
    copy(&root().join("configs"), &place.path("configs"));
    for line in documented_block("--resume ").lines() {
        let words: Vec<&str> = line.split('#').next().unwrap().split_whitespace().skip(1).collect();
        // Nothing is measured, and there is nothing to merge.
        let last = if words[0] == "suite" { "--dry-run" } else { "--help" };
        let words: Vec<&str> = words.into_iter().filter(|word| *word != "--dry-run").chain([last]).collect();
        expect_code(&place.run(&words), 0);
    }
}

/// Every path of a YAML file that is made of block mappings and block lists alone, with its value.
fn yaml_paths(text: &str) -> Vec<(String, String)> {
    let mut open: Vec<(usize, String)> = Vec::new();
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.trim().starts_with('#')) {
        let (mut indent, mut rest) = (line.len() - line.trim_start().len(), line.trim());
        open.retain(|(at, _)| *at < indent);
        while let Some(item) = rest.strip_prefix("- ") {
            open.push((indent, "-".to_owned()));
            (indent, rest) = (indent + 2, item);
        }
        let path = |last: &str| {
            let parts: Vec<&str> =
                open.iter().map(|(_, key)| key.as_str()).chain([last]).filter(|key| !key.is_empty()).collect();
            parts.join(".")
        };
        match rest
            .split_once(':')
            .filter(|(key, value)| !key.contains([' ', '"', '/']) && (value.is_empty() || value.starts_with(' ')))
        {
            Some((key, "")) => open.push((indent, key.to_owned())),
            Some((key, value)) => found.push((path(key), value.trim().trim_matches('"').to_owned())),
            None => found.push((path(""), rest.to_owned())),
        }
    }
    found
}

#[test]
fn the_indexed_job_has_what_a_shard_needs() {
    let text = fs::read_to_string(root().join("deploy/kubernetes-indexed-job.yaml")).unwrap();
    let paths = yaml_paths(&text);
    let all = |path: &str| -> Vec<&str> {
        paths.iter().filter(|(seen, _)| seen == path).map(|(_, value)| value.as_str()).collect()
    };
    for (path, expected) in [
        ("apiVersion", &["batch/v1"][..]),
        ("kind", &["Job"]),
        ("metadata.name", &["quantbench"]),
        ("spec.completionMode", &["Indexed"]),
        ("spec.template.spec.restartPolicy", &["Never"]),
        ("spec.template.spec.containers.-.name", &["quantbench"]),
        ("spec.template.spec.containers.-.env.-.name", &["JOB_COMPLETIONS", "HF_HOME"]),
        ("spec.podFailurePolicy.rules.-.onExitCodes.containerName", &["quantbench"]),
        ("spec.podFailurePolicy.rules.-.onExitCodes.values.-", &["2"]),
    ] {
        assert_eq!(all(path), expected, "{path} in {paths:#?}");
    }
    let completions = all("spec.completions");
    assert_eq!(all("spec.parallelism"), completions);
    assert_eq!(all("spec.template.spec.containers.-.env.-.value")[0], completions[0]);
    assert_eq!(all("spec.template.spec.containers.-.volumeMounts.-.name"), all("spec.template.spec.volumes.-.name"));

    // The command of the pod, in a shell: a case that failed is no reason to try again, another error is.
    let command = all("spec.template.spec.containers.-.command.-");
    assert_eq!(command[..2], ["/bin/sh", "-c"]);
    for (code, expected) in [(0, 0), (1, 0), (2, 1)] {
        let script = format!("quantbench() {{ printf '%s ' \"$@\"; return {code}; }}; {}", command[2]);
        let output = Command::new("sh")
            .args(["-c", &script])
            .env("JOB_COMPLETION_INDEX", "3")
            .env("JOB_COMPLETIONS", "4")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(expected), "exit code {code} of the suite");
        assert_eq!(super::text(&output.stdout), "suite /suite/suite.toml --resume -o /results/part-3-of-4.jsonl ");
    }
}

/// Processes of this test, ended in the reverse order.
#[derive(Default)]
struct Daemons(Vec<Child>);

impl Drop for Daemons {
    fn drop(&mut self) {
        for daemon in self.0.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

impl Daemons {
    fn start(&mut self, place: &Place, program: &str, args: &[&str]) -> bool {
        let log = fs::File::create(place.path(&format!("{program}.log"))).unwrap();
        let errors = log.try_clone().unwrap();
        let path = format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(program);
        command.args(args).current_dir(place.folder.path()).env("PATH", path).stdout(log).stderr(errors);
        let child = command.spawn();
        child.map(|child| self.0.push(child)).is_ok()
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A cluster of this machine alone, all of whose files lie in the place. `None` where it cannot be started.
fn slurm(place: &Place) -> Option<Daemons> {
    // Its own version is a question that sbatch answers in a cluster alone.
    let found = |program: &&str| has("sh", &["-c", &format!("PATH=$PATH:/usr/sbin command -v {program}")]);
    if !["sbatch", "slurmctld", "slurmd", "munged"].iter().all(found) {
        return None;
    }
    let folder = place.folder.path().display().to_string();
    let hostname = text(&Command::new("hostname").arg("-s").output().ok()?.stdout).trim().to_owned();
    // munged wants its socket to be reachable and its key to be the owner's alone.
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    place.write("munge.key", (0..=255u8).cycle().map(|byte| byte.wrapping_mul(167)).take(1024).collect::<Vec<_>>());
    fs::set_permissions(place.path("munge.key"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir_all(place.path("state")).unwrap();
    fs::create_dir_all(place.path("spool")).unwrap();
    let user = text(&Command::new("id").arg("-un").output().ok()?.stdout);
    place.write("slurm.conf", format!(
        "ClusterName=test\nSlurmctldHost={hostname}(127.0.0.1)\nSlurmUser={user}SlurmdUser={user}AuthType=auth/munge\n\
         AuthInfo=socket={folder}/munge.sock\nStateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\n\
         SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\nSlurmctldPort={}\nSlurmdPort={}\n\
         ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n\
         SelectTypeParameters=CR_Core\nSwitchType=switch/none\nMpiDefault=none\nReturnToService=2\nMailProg=/bin/true\n\
         JobAcctGatherType=jobacct_gather/none\nNodeName={hostname} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN\n\
         PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n",
        free_port(), free_port(),
    ));
    let mut daemons = Daemons::default();
    let file = |name: &str| format!("{folder}/{name}");
    let munged = [
        "--foreground",
        "--force",
        &format!("--socket={}", file("munge.sock")),
        &format!("--key-file={}", file("munge.key")),
        &format!("--pid-file={}", file("munged.pid")),
        &format!("--log-file={}", file("munged.own.log")),
        &format!("--seed-file={}", file("munged.seed")),
    ];
    let conf = file("slurm.conf");
    let started = daemons.start(place, "munged", &munged)
        && daemons.start(place, "slurmctld", &["-D", "-f", &conf])
        && daemons.start(place, "slurmd", &["-D", "-f", &conf]);
    started.then_some(daemons)
}

/// The script with another number of parts, as a user changes it.
fn script_for(place: &Place, parts: usize) -> String {
    let text = fs::read_to_string(root().join("deploy/slurm-array.sh")).unwrap();
    let changed = text
        .replace("--array=1-4\n", &format!("--array=1-{parts}\n"))
        .replace("parts=4\n", &format!("parts={parts}\n"));
    assert!(text.contains("--array=1-4\n") && text.contains("parts=4\n"), "the parts stand in another form");
    place.write("array.sh", changed);
    fs::set_permissions(place.path("array.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    "./array.sh".to_owned()
}

/// Indices of the cases whose rows a part holds.
fn cases_of(place: &Place, part: &str) -> Vec<u64> {
    rows(&place.read(part)).iter().map(|row| row["suite"]["index"].as_u64().unwrap()).collect()
}

/// Three parts of three cases: whichever tasks an array runs, and however often, each writes its own part.
#[test]
fn a_partial_array_repeats_its_own_part_alone() {
    let place = Place::new(&[("s.toml", QUICK)]);
    let script = script_for(&place, 3);
    fs::create_dir(place.path("results")).unwrap();
    // What Slurm sets for `--array=LIST`.
    let array = |ids: &[usize], options: &[&str]| {
        for id in ids {
            let mut task = Command::new(place.path(&script));
            task.args(["s.toml", "results"]).args(options).current_dir(place.folder.path());
            task.env("QUANTBENCH", env!("CARGO_BIN_EXE_quantbench")).env("SLURM_ARRAY_TASK_ID", id.to_string());
            task.env("SLURM_ARRAY_TASK_COUNT", ids.len().to_string());
            task.env("SLURM_ARRAY_TASK_MIN", ids[0].to_string());
            task.env("SLURM_ARRAY_TASK_MAX", ids[ids.len() - 1].to_string());
            expect_code(&task.output().unwrap(), 0);
        }
    };
    let part = |id: usize| format!("results/part-{id}-of-3.jsonl");
    array(&[3], &[]);
    assert_eq!(cases_of(&place, &part(3)), [3, 3]);
    let before = place.read(&part(3));
    array(&[1, 3], &["--retry-failed"]);
    assert_eq!(place.read(&part(3)), before, "what ended does not run again");
    assert_eq!(cases_of(&place, &part(1)), [1, 1]);
    array(&[1, 2, 3], &[]);
    let merged = place.run(&["merge", &part(1), &part(2), &part(3)]);
    expect_code(&merged, 0);
    assert_eq!(summary(&text(&merged.stdout)).iter().map(|row| row.0).collect::<Vec<_>>(), [1, 1, 2, 2, 3, 3]);
}

#[test]
fn a_slurm_array_runs_a_suite_in_parts() {
    let place = Place::new(&[("s.toml", QUICK)]);
    let Some(_daemons) = slurm(&place) else { return };
    fs::create_dir(place.path("results")).unwrap();
    let script = script_for(&place, 2);
    let submit = |options: &[&str]| {
        let mut submit = Command::new("timeout");
        submit.args(["120", "sbatch", "--wait"]).args(options).args([&script, "s.toml", "results"]);
        submit.current_dir(place.folder.path()).env("SLURM_CONF", place.path("slurm.conf"));
        submit.env("QUANTBENCH", env!("CARGO_BIN_EXE_quantbench")).output().unwrap()
    };
    // One task alone first: its part is what it is in the whole array.
    let output = submit(&["--array=2"]);
    if !text(&output.stdout).contains("Submitted batch job") {
        skip(format!("Slurm does not take jobs here: {}", text(&output.stderr)));
        return;
    }
    expect_code(&output, 0);
    let parts = ["results/part-1-of-2.jsonl", "results/part-2-of-2.jsonl"];
    assert_eq!(cases_of(&place, parts[1]), [2, 2]);
    let before = place.read(parts[1]);
    expect_code(&submit(&[]), 0);
    assert_eq!(cases_of(&place, parts[0]), [1, 1, 3, 3]);
    assert_eq!(place.read(parts[1]), before, "what ended does not run again");
    let merged = place.run(&["merge", parts[1], parts[0]]);
    expect_code(&merged, 0);
    let seen = summary(&text(&merged.stdout));
    assert_eq!(seen.iter().map(|row| row.0).collect::<Vec<_>>(), [1, 1, 2, 2, 3, 3]);
    assert!(seen.iter().all(|row| row.2 == "ok") && merged.stderr.is_empty(), "{seen:?}");
}

#[test]
fn a_machine_without_network_runs_what_was_copied() {
    if !has("unshare", &["-rn", "true"]) {
        return;
    }
    // As docs/offline.md says: the binary, a model folder, a cache, a suite.
    let place = Place::new(&[("s.toml", &QUICK.replace("./llama-tiny", "owner/tiny").replace("[4, 5, 6]", "[4]"))]);
    fs::copy(env!("CARGO_BIN_EXE_quantbench"), place.path("quantbench")).unwrap();
    let cached = "hub/hub/models--owner--tiny";
    let commit = "0123456789abcdef0123456789abcdef01234567";
    copy(&golden("llama-tiny"), &place.path(&format!("{cached}/snapshots/{commit}")));
    place.write(&format!("{cached}/refs/main"), commit);

    let alone = |args: &[&str]| {
        let script = "test \"$(wc -l < /proc/net/route)\" -le 1 && exec ./quantbench \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["-rn", "sh", "-c", script, "sh"]).args(args).current_dir(place.folder.path());
        command.env("HF_HOME", place.path("hub")).env("HF_HUB_OFFLINE", "1").output().unwrap()
    };
    let run = |model: &str| alone(&[&["run", "--precision", "nf4", "--model-id", model], SHORT].concat());
    expect_code(&run("./llama-tiny"), 0);
    expect_code(&run("owner/tiny"), 0);
    let missing = run("owner/absent");
    expect_code(&missing, 2);
    assert!(text(&missing.stderr).contains("hint: "), "{}", text(&missing.stderr));
    expect_code(&alone(&["suite", "s.toml", "-o", "out.jsonl"]), 0);
    assert_eq!(summary(&place.read("out.jsonl")).len(), 2);
}
