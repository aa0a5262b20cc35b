//! An engine that behaves as its script says. It is this test program itself, started with one ignored test.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use quantbench::harness::clock::{Clock, Monotonic};
use quantbench::protocol::{
    EngineReply, EngineRequest, Failure, Finished, Hello, Logits, Message, RowsReply, RunReport, RunRequest,
    SOCKET_VARIABLE, VERSION, capability,
};
use quantbench::quality::rows::RowWriter;

/// The variable with the name of the script.
pub const VARIABLE: &str = "SCRIPTED_ENGINE";

pub const VOCABULARY: usize = 8;

/// Answers as `script` says until the parent is gone.
pub fn serve(script: &str) {
    let path = std::env::var_os(SOCKET_VARIABLE).expect("the parent names a socket");
    let mut stream = UnixStream::connect(path).unwrap();
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let protocol = if script == "newer" { VERSION + 1 } else { VERSION };
    let hello = Hello {
        protocol,
        engine: script.to_owned(),
        version: "7.0".to_owned(),
        capabilities: vec![capability::LOGITS.to_owned(), "a word of tomorrow".to_owned()],
    };
    send(&mut stream, EngineReply::Hello(hello));
    if script == "spins" {
        // As a pool of threads does that waits for work.
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    let mut n_runs = 0;
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
                let precision = load.precision;
                assert!(load.directory.is_dir() && std::path::Path::new(&load.model).is_dir(), "{precision}");
                EngineReply::Load(Box::default())
            }
            EngineRequest::Run(run) => {
                n_runs += 1;
                EngineReply::Run(self::run(script, n_runs, &run))
            }
            EngineRequest::Logits(logits) => {
                write_logits(script, &logits);
                EngineReply::Logits(RowsReply::default())
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
        _ => report,
    }
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
