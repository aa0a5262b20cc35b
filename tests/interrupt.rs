//! Ctrl-C: what was measured is kept, in table and file, and the exit code says that the run was ended.
#![cfg(unix)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Sends SIGINT, as a terminal does to every process of a group.
fn interrupt(pid: u32) {
    assert!(Command::new("kill").args(["-INT", &pid.to_string()]).status().unwrap().success());
}

fn workers(parent: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn start(folder: &Path, args: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.args(args.split_whitespace()).current_dir(folder).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A run that would repeat ten thousand times ends soon, with what it has.
#[test]
fn a_run_keeps_what_it_measured() {
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tiny");
    std::os::unix::fs::symlink(model, folder.path().join("tiny")).unwrap();
    let args = "-m tiny --precision fp16,nf4 -p 8 -n 32 --repeats 100000 --warmup 0 --threads 1 --device cpu -o r.json";
    let mut child = start(folder.path(), args);
    let pid = child.id();
    // Once both workers are there, repeats are not far.
    let began = Instant::now();
    while workers(pid).len() < 2 {
        assert!(child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(300), "it did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(2));
    let workers = workers(pid);
    // The workers get it too, and go on until their parent ends them.
    workers.iter().copied().for_each(interrupt);
    interrupt(pid);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("stopping behind this run") {
        assert!(stderr.read_line(&mut said).unwrap() > 0, "{said}");
    }
    let mut table = String::new();
    child.stdout.take().unwrap().read_to_string(&mut table).unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    let text = std::fs::read_to_string(folder.path().join("r.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let records = document["records"].as_array().unwrap();
    assert_eq!(records.len(), 2);
    for record in records {
        let n = record["samples"]["end_to_end_ns"].as_array().unwrap().len();
        match record["status"].as_str().unwrap() {
            "ok" => assert!(n > 0 && record["protocol"]["ended"] == "interrupted", "{record}"),
            _ => {
                assert!(record["reason"].as_str().unwrap().contains("interrupted before its first repeat"), "{record}")
            }
        }
    }
    assert!(said.contains("interrupted"), "{said}");
    assert!(table.contains("nf4"), "{table}");
    assert!(workers.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "a worker is left");
}
