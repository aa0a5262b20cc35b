//! An engine that behaves as its script says. It is this test program itself, started with one ignored test.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use quantbench::harness::clock::{Clock, Monotonic};
use quantbench::protocol::{
    EngineReply, EngineRequest, Failure, Finished, HeldModel, HeldPart, Hello, Load, LoadReply, Logits, Message,
    RowsReply, RunReport, RunRequest, SOCKET_VARIABLE, Score, VERSION, capability,
};
use quantbench::quality::rows::RowWriter;

/// The variable with the name of the script.
pub const VARIABLE: &str = "SCRIPTED_ENGINE";

pub const VOCABULARY: usize = 8;

/// What `predicts` gives the next token of a text; 0 to all others.
pub const SURE: f32 = 5.0;

/// Time that `predicts` says its host takes between two steps.
pub const HOST_NS: u64 = 250_000;

/// Answers as `script` says until the parent is gone.
pub fn serve(script: &str) {
    let path = std::env::var_os(SOCKET_VARIABLE).expect("the parent names a socket");
    let mut stream = UnixStream::connect(path).unwrap();
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let protocol = if script == "newer" { VERSION + 1 } else { VERSION };
    let knows = if script == "predicts" { &[capability::SCORE, capability::DEPTH][..] } else { &[capability::LOGITS] };
    let capabilities = knows.iter().chain(&["a word of tomorrow"]).map(|&word| word.to_owned()).collect();
    let hello = Hello { protocol, engine: script.to_owned(), version: "7.0".to_owned(), capabilities };
    send(&mut stream, EngineReply::Hello(hello));
    if script == "spins" {
        // As a pool of threads does that waits for work.
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    let (mut n_runs, mut vocabulary) = (0, VOCABULARY);
    for line in lines.map_while(Result::ok) {
        println!("{{\"run\":{{}}}} a log line of {script} on standard output");
        eprintln!("a log line of {script} on standard error");
        let reply = match serde_json::from_str::<EngineRequest>(&line).unwrap() {
            EngineRequest::Load(_) if script == "full" => {
                let (message, wanted_bytes, free_bytes) = ("CUDA out of memory".to_owned(), 7, 0);
                let failed = Failure::OutOfMemory { message, wanted_bytes, free_bytes };
                write(&mut stream, &Message::<EngineReply, u64>::Failed(failed));
                continue;
            }
            EngineRequest::Load(load) => {
                assert!(load.directory.is_dir());
                vocabulary = self::vocabulary(&load);
                EngineReply::Load(Box::new(if script == "predicts" { held() } else { LoadReply::default() }))
            }
            EngineRequest::Run(run) => {
                n_runs += 1;
                EngineReply::Run(self::run(script, n_runs, &run))
            }
            EngineRequest::Logits(logits) => {
                write_logits(script, &logits);
                EngineReply::Logits(RowsReply::default())
            }
            EngineRequest::Score(score) if script == "predicts" => {
                write_score(&score, vocabulary);
                EngineReply::Score(RowsReply::default())
            }
            EngineRequest::Finish(_) => EngineReply::Finish(Finished::default()),
            other => panic!("{other:?} was not offered"),
        };
        if script == "garbage" && n_runs == 2 {
            stream.write_all(b"tokens: 1 2 3\n").unwrap();
        }
        send(&mut stream, reply);
    }
}

fn send(stream: &mut UnixStream, reply: EngineReply) {
    write(stream, &Message::<EngineReply, u64>::Reply(reply));
}

fn write(stream: &mut UnixStream, message: &Message<EngineReply, u64>) {
    let line = serde_json::to_string(message).unwrap() + "\n";
    stream.write_all(line.as_bytes()).unwrap();
}

/// A millisecond a token.
fn run(script: &str, n_runs: usize, run: &RunRequest) -> RunReport {
    let clock = Monotonic::start();
    let start_ns = clock.now_ns();
    let n_gen = if script == "short" { run.n_gen - 1 } else { run.n_gen };
    let step = |_| {
        std::thread::sleep(Duration::from_millis(1));
        clock.now_ns()
    };
    let token_ns: Vec<u64> = (0..n_gen).map(step).collect();
    match (script, n_runs) {
        ("hangs", 2) => std::thread::sleep(Duration::from_secs(600)),
        ("dies", 2) => {
            // A process of the group outlives its leader.
            std::process::Command::new("sleep").arg("86399").spawn().unwrap();
            eprintln!("no more tokens");
            std::process::exit(3);
        }
        _ => {}
    }
    let ids = (0..n_gen as u32).map(|at| at % VOCABULARY as u32).collect();
    let report = RunReport { start_ns, token_ns, ids, ..RunReport::default() };
    match script {
        // Twice as fast as it was.
        "lies" => RunReport {
            token_ns: report.token_ns.iter().map(|ns| ns - 3_600_000_000_000).collect(),
            start_ns: start_ns - 3_600_000_000_000,
            ..report
        },
        "predicts" => {
            RunReport { host_step_ns: vec![HOST_NS; n_gen.saturating_sub(1)], finite_logits: Some(true), ..report }
        }
        _ => report,
    }
}

/// Rows of the model's embedding: of a folder, or, for a GGUF file, of the tiny model that it was made of.
fn vocabulary(load: &Load) -> usize {
    let model = Path::new(&load.model);
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tiny");
    let folder = if model.is_file() { &tiny } else { model };
    let config = std::fs::read_to_string(folder.join("config.json")).expect("a folder or a file");
    serde_json::from_str::<serde_json::Value>(&config).unwrap()["vocab_size"].as_u64().unwrap() as usize
}

fn held() -> LoadReply {
    let part = |format: &str, bytes| Some(HeldPart { format: format.to_owned(), bytes });
    let held = HeldModel { head: part("q6_k", 9), kv_cache: part("f16", 64), ..HeldModel::default() };
    LoadReply { held, ..LoadReply::default() }
}

/// Each token of the text with [`SURE`].
fn write_score(score: &Score, vocabulary: usize) {
    let scored = &score.tokens[score.first..];
    let mut rows = RowWriter::create(&score.file, scored.len(), vocabulary).unwrap();
    for &token in scored {
        let mut row = vec![0.0; vocabulary];
        row[token as usize] = SURE;
        rows.write(&row).unwrap();
    }
    rows.finish().unwrap();
}

fn write_logits(script: &str, logits: &Logits) {
    let mut rows = RowWriter::create(&logits.file, logits.run.n_gen, VOCABULARY).unwrap();
    for _ in 0..logits.run.n_gen {
        let mut row = [0.5; VOCABULARY];
        row[3] = if script == "nan" { f32::NAN } else { 1.0 };
        rows.write(&row).unwrap();
    }
    rows.finish().unwrap();
}
