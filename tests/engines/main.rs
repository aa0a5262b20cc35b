//! Engines as processes that speak the protocol: what each does to its own row and to the others', and the example of the docs.
#![cfg(unix)]

mod scripted;
#[path = "../skips/mod.rs"]
mod skips;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Not a test: the scripted engine, which `quantbench` starts as this program.
#[test]
#[ignore = "started by the other tests as an engine"]
fn scripted_engine() {
    if let Ok(script) = std::env::var(scripted::VARIABLE) {
        scripted::serve(&script);
    }
}

/// `name=command` of a scripted engine.
fn scripted(script: &str) -> String {
    let own = std::env::current_exe().unwrap();
    let words = "--exact scripted_engine --ignored --nocapture";
    format!("{script}=env {}={script} '{}' {words}", scripted::VARIABLE, own.display())
}

struct Ran {
    code: Option<i32>,
    records: Vec<Value>,
    stdout: String,
    stderr: String,
}

fn tiny() -> PathBuf {
    root().join("tests/golden/models/llama-tiny")
}

fn run(engines: &[String], args: &str) -> Ran {
    run_model(&tiny(), engines, args)
}

fn run_model(model: &Path, engines: &[String], args: &str) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("r.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.arg("-m").arg(model);
    command.args("--device cpu --threads 1 --warmup 1 --repeats 3 -p 8 --quiet".split(' ')).args(args.split(' '));
    engines.iter().for_each(|engine| {
        command.arg("--engine").arg(engine);
    });
    let output = command.arg("-o").arg(&out).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = std::fs::read_to_string(&out).unwrap_or_else(|_| panic!("{stderr}"));
    let document: Value = serde_json::from_str(&text).unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    Ran { code: output.status.code(), records: document["records"].as_array().unwrap().clone(), stdout, stderr }
}

fn record<'a>(records: &'a [Value], engine: &str) -> &'a Value {
    records.iter().find(|record| record["engine"]["name"] == engine).unwrap_or_else(|| panic!("no row of {engine}"))
}

/// Each of them spoils its own row, says why, and the others are measured.
#[test]
fn an_engine_that_misbehaves_is_a_row_with_its_reason() {
    let scripts = ["logs", "spins", "hangs", "dies", "short", "nan", "lies", "garbage", "newer", "full"];
    let engines: Vec<String> = ["quantbench".to_owned()].into_iter().chain(scripts.map(scripted)).collect();
    let ran = run(&engines, "--precision fp16 -n 64 --engine-timeout 3");
    assert_eq!((ran.code, ran.records.len()), (Some(1), 11), "{}", ran.stderr);
    let expected = [
        ("quantbench", "ok", ""),
        ("logs", "ok", ""),
        ("spins", "ok", ""),
        ("hangs", "timeout", "timeout: the engine did not answer `run` within 3 s"),
        ("dies", "error", "the engine ended with exit status: 3: no more tokens"),
        ("short", "invalid", "repeat 1 generated 63 tokens, not 64"),
        ("nan", "invalid", "the logits are not finite"),
        ("lies", "invalid", "the engine's clock is not CLOCK_MONOTONIC: its start lies before the request by 3"),
        ("garbage", "error", "the engine wrote `tokens: 1 2 3` to its socket, which is no message of the protocol"),
        ("newer", "error", "the engine speaks version 3 of the engine protocol, and this build reads versions up to 2"),
        ("full", "oom", "out of memory: CUDA out of memory"),
    ];
    for (engine, status, reason) in expected {
        let row = record(&ran.records, engine);
        let said = row["reason"].as_str().unwrap_or_default();
        assert_eq!(row["status"], status, "{engine}: {said}");
        assert!(said.starts_with(reason) && (reason.is_empty() == said.is_empty()), "{engine}: {said}");
    }
    for engine in ["quantbench", "logs"] {
        assert_eq!(record(&ran.records, engine)["samples"]["prefill_ns"].as_array().unwrap().len(), 3, "{engine}");
    }
    // Whoever waits is stopped, so that its threads do not disturb the others.
    let warnings = ran.records.iter().flat_map(|record| record["warnings"].as_array().unwrap());
    assert!(!warnings.clone().any(|text| text.as_str().unwrap().starts_with("waiting_engine")), "{:?}", ran.records);
    let logs = record(&ran.records, "logs");
    assert_eq!((logs["engine"]["version"].as_str(), logs["precision"].as_str()), (Some("7.0"), Some("fp16")));
    // A sleep of 1 ms is never shorter: 64 tokens take 64 ms and more.
    let end_to_end = logs["samples"]["end_to_end_ns"].as_array().unwrap().iter().filter_map(Value::as_u64);
    assert!(end_to_end.clone().all(|ns| ns >= 64_000_000), "{logs}");
    assert!(logs["other_engine"]["ratio_at_width"]["median"].as_f64().is_some_and(|ratio| ratio > 0.0), "{logs}");
    let left = Command::new("ps").args(["-eo", "args"]).output();
    let left = left.map(|ps| String::from_utf8_lossy(&ps.stdout).contains("sleep 86399")).unwrap_or(false);
    assert!(!left, "a process of a dead engine's group is left");
}

/// A width is each engine's own format; a name is one engine's alone, and one line says what the other has.
#[test]
fn precisions_are_asked_for_by_width_or_by_name() {
    let names = |ran: &Ran| -> Vec<String> {
        let name = |record: &Value| {
            format!("{} {}", record["engine"]["name"].as_str().unwrap(), record["precision"].as_str().unwrap())
        };
        ran.records.iter().map(name).collect()
    };
    let engines = ["quantbench".to_owned(), scripted("logs"), "llama.cpp".to_owned()];
    let python = "--python /nowhere/python";
    let ran = run(&engines, &format!("--precision 16bit,4bit -n 4 {python}"));
    let expected = ["quantbench fp16", "quantbench nf4", "logs fp16", "logs nf4", "llama.cpp f16", "llama.cpp q4_0"];
    assert_eq!(names(&ran), expected, "{}", ran.stderr);
    let without = record(&ran.records, "llama.cpp");
    let reason = without["reason"].as_str().unwrap();
    assert!(
        without["status"] == "error" && reason.starts_with("starting the engine `python`: No such file"),
        "{reason}"
    );
    let ran = run(&engines[..2], "--precision fp16 -n 4");
    assert_eq!(names(&ran), ["quantbench fp16", "logs fp16"]);
    let engines = ["quantbench".to_owned(), "llama.cpp".to_owned()];
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.arg("-m").arg(root().join("tests/golden/models/llama-tiny"));
    command.args(["--precision", "nf4", "-n", "2", "-r", "1", "--device", "cpu"]);
    let said = command.args(engines.iter().flat_map(|engine| ["--engine", engine])).output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("`nf4` is not offered by llama.cpp; nearest: q4_0"), "{said}");
}

/// An engine that predicts given texts is compared over every step of quantbench's text, and its quality is measured as ours is.
#[test]
fn engines_are_compared_over_one_text_and_have_their_quality() {
    let engines = ["quantbench".to_owned(), scripted("predicts"), scripted("logs")];
    let ran = run(&engines, "--precision fp16,nf4 -n 8 -d 4 --quality --quality-tokens 33");
    let row = |engine: &str, precision: &str| {
        let is = |record: &&Value| record["engine"]["name"] == engine && record["precision"] == precision;
        ran.records.iter().find(is).unwrap_or_else(|| panic!("no {precision} of {engine}: {}", ran.stderr))
    };
    let config = std::fs::read_to_string(tiny().join("config.json")).unwrap();
    let vocabulary = serde_json::from_str::<Value>(&config).unwrap()["vocab_size"].as_f64().unwrap();
    for precision in ["fp16", "nf4"] {
        let predicts = row("predicts", precision);
        let agreement = &predicts["agreement"];
        // It goes its own way soon, and all steps count: it is sure of the token that our fp16 chose.
        assert_eq!((&agreement["reference"], &agreement["steps"]), (&"fp16".into(), &8.into()), "{predicts}");
        assert!(agreement["parts_at"].as_u64().is_some_and(|at| at < 8), "{agreement}");
        assert_eq!(agreement["top1_agreement"], 1.0);
        assert!(agreement["kl_mean"].as_f64().is_some_and(|kl| kl > 0.0), "{agreement}");
        // ln(1 + (n - 1) · e⁻⁵) is its negative log likelihood of each token.
        let quality = &predicts["quality"];
        let expected = 1.0 + (vocabulary - 1.0) * (-f64::from(scripted::SURE)).exp();
        let perplexity = quality["perplexity"].as_f64().unwrap_or(f64::NAN);
        assert!((perplexity / expected - 1.0).abs() < 1e-6, "{perplexity} {expected}");
        assert_eq!((&quality["n_tokens"], &quality["path"]), (&32.into(), &"prefill".into()));
        let of_fp16 = row("quantbench", "fp16")["quality"]["perplexity"].as_f64().unwrap();
        let ratio = quality["perplexity_ratio"].as_f64().unwrap();
        assert!((ratio * of_fp16 / perplexity - 1.0).abs() < 1e-9, "{ratio}");
        // One that cannot is measured without, and runs behind no depth.
        let logs = row("logs", precision);
        let reason = logs["reason"].as_str().unwrap_or_default();
        assert!(reason.starts_with("this engine cannot run behind a depth"), "{reason}");
    }
    let narrow = &row("quantbench", "nf4")["agreement"];
    assert_eq!((&narrow["reference"], &narrow["steps"]), (&"fp16".into(), &8.into()), "{narrow}");
    assert!(row("quantbench", "fp16")["agreement"].is_null());

    let other = &row("predicts", "fp16")["other_engine"];
    let otherwise = ["head in q6_k, quantbench's in fp16", "kv cache in f16, quantbench's in fp32"];
    assert_eq!(other["held_otherwise"], serde_json::json!(otherwise));
    assert_eq!(other["host_ms_per_token"], scripted::HOST_NS as f64 / 1e6);
    for line in [&format!("fp16 by predicts, nf4 by predicts: {}", otherwise[0]), "growth"] {
        assert!(ran.stdout.contains(line), "{}", ran.stdout);
    }
    let memory = &row("predicts", "fp16")["memory"];
    let bytes = |key: &str| memory[key].as_u64().unwrap_or_else(|| panic!("{key}: {memory}"));
    assert_eq!(bytes("growth_bytes"), bytes("peak_bytes") - bytes("before_load_bytes"));
}

#[test]
fn an_engine_that_cannot_predict_a_text_says_so_and_keeps_its_speed() {
    let ran = run(&["quantbench".to_owned(), scripted("logs")], "--precision fp16 -n 4 --quality --quality-tokens 16");
    let logs = record(&ran.records, "logs");
    assert_eq!((&logs["status"], &logs["quality"]), (&"ok".into(), &Value::Null), "{logs}");
    let expected = "no_quality: no quality was measured: this engine predicts no given text (it does not say `score`)";
    assert!(logs["warnings"].as_array().unwrap().contains(&expected.into()), "{logs}");
    assert!(record(&ran.records, "quantbench")["quality"]["kl_mean"].is_number(), "{}", ran.stderr);
}

/// A GGUF file is given as it is to engines that take it; one that takes folders alone is refused by name.
#[test]
fn a_gguf_file_is_run_as_it_is_or_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    let mut export = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    export.args(["export", "--precision", "fp16", "--format", "gguf", "--quiet", "-m"]).arg(tiny());
    assert!(export.arg("-o").arg(&file).output().unwrap().status.success());
    let engines = ["quantbench".to_owned(), scripted("predicts"), "transformers".to_owned()];
    let ran = run_model(&file, &engines, "--precision fp16 -n 4");
    assert_eq!((ran.code, ran.records.len()), (Some(0), 2), "{}", ran.stderr);
    assert_eq!(record(&ran.records, "predicts")["agreement"]["steps"], 4, "{}", ran.stderr);

    let alone = Command::new(env!("CARGO_BIN_EXE_quantbench"))
        .arg("-m")
        .arg(&file)
        .args(["--device", "cpu", "-p", "4", "--engine", "transformers"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert_eq!(alone.status.code(), Some(2), "{said}");
    assert!(said.contains("transformers loads no GGUF file such as"), "{said}");
}

/// Packages that are missing or too old are a row that names them and what to do.
#[test]
fn packages_that_are_missing_or_too_old_are_named_in_the_row() {
    use std::os::unix::fs::PermissionsExt;

    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return skips::skip("no python3");
    }
    let folder = tempfile::tempdir().unwrap();
    // Without the packages of the machine, and with what the file's folder pretends to have.
    let python = folder.path().join("python");
    let path = folder.path().display();
    std::fs::write(&python, format!("#!/bin/sh\nPYTHONPATH='{path}' exec python3 -S \"$@\"\n")).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let reason = |engine: &str| {
        let ran = run(&[engine.to_owned()], &format!("--precision 16bit -n 2 --python {}", python.display()));
        let record = record(&ran.records, engine);
        assert_eq!(record["status"], "error", "{record}");
        record["reason"].as_str().unwrap().to_owned()
    };
    let missing = reason("llama.cpp");
    assert!(missing.starts_with("the package `llama-cpp-python` is missing"), "{missing}");
    for (package, version) in [("torch", "2.15.0"), ("transformers", "4.9.1")] {
        let info = folder.path().join(format!("{package}-{version}.dist-info"));
        std::fs::create_dir(&info).unwrap();
        let text = format!("Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n");
        std::fs::write(info.join("METADATA"), text).unwrap();
    }
    let old = reason("transformers");
    assert!(old.starts_with("the package `transformers` is 4.9.1, and 4.56 or newer is needed"), "{old}");
}

#[test]
fn an_unknown_engine_is_refused_with_those_there_are() {
    let output = Command::new(env!("CARGO_BIN_EXE_quantbench")).args(["--engine", "lama.cpp"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("no engine has this name") && said.contains("did you mean `llama.cpp`"), "{said}");
}

/// The page's own program, with nothing but the standard library.
#[test]
fn the_example_of_the_docs_is_measured() {
    let example = root().join("docs/engines/minimal.py");
    let text = std::fs::read_to_string(&example).unwrap();
    assert!(text.lines().count() <= 50, "{} lines", text.lines().count());
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return skips::skip("no python3");
    }
    let ran =
        run(&["quantbench".to_owned(), format!("minimal=python3 '{}'", example.display())], "--precision fp16 -n 8");
    let minimal = record(&ran.records, "minimal");
    assert_eq!((ran.code, &minimal["status"]), (Some(0), &Value::from("ok")), "{minimal}");
    assert_eq!(minimal["output"]["token_ids"].as_array().unwrap().len(), 8);
    let page = std::fs::read_to_string(root().join("docs/engine-protocol.md")).unwrap();
    assert!(
        page.contains(text.trim_end()),
        "docs/engine-protocol.md shows another program than docs/engines/minimal.py"
    );
}

/// The schema of the wire types, which `UPDATE_EXPECT=1` writes anew.
#[test]
fn the_schema_is_that_of_the_types() {
    let engine = schemars::schema_for!(quantbench::protocol::Message<quantbench::protocol::EngineReply, Value>);
    let parent = schemars::schema_for!(quantbench::protocol::EngineRequest);
    let schema = serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The engine protocol: a line of the parent, or a line of an engine",
        "version": quantbench::protocol::VERSION,
        "$defs": { "from_parent": parent, "from_engine": engine },
    });
    let (path, text) = (root().join("docs/engine-protocol.schema.json"), format!("{schema:#}\n"));
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), text, "run with UPDATE_EXPECT=1");
}

/// Engines in Python as they are, where an interpreter has their packages: the same weights give the same ids.
#[test]
fn real_engines_agree_at_16_bit() {
    let Some(python) = std::env::var_os("QUANTBENCH_PYTHON").filter(|path| !path.is_empty()).map(PathBuf::from) else {
        return skips::skip("QUANTBENCH_PYTHON names no Python with transformers and llama-cpp-python");
    };
    let engines = ["quantbench", "transformers", "llama.cpp"].map(str::to_owned);
    let python = format!("--python {}", python.display());
    let args = format!("--precision 16bit,8bit,4bit -n 8 -d 5 --quality --quality-tokens 32 {python}");
    let ran = run(&engines, &args);
    assert_eq!(ran.records.len(), 9, "{}", ran.stderr);
    let divergence = |engine: &str, precision: &str| {
        let is = |record: &&Value| record["engine"]["name"] == engine && record["precision"] == precision;
        ran.records.iter().find(is).and_then(|record| record["quality"]["kl_mean"].as_f64()).unwrap_or(f64::NAN)
    };
    for (at, record) in ran.records.iter().enumerate() {
        assert_eq!(record["status"], "ok", "{record}");
        assert_eq!((at == 0, &record["quality"]["n_tokens"]), (record["agreement"].is_null(), &31.into()), "{record}");
        assert!(at == 0 || record["agreement"]["steps"] == 8, "every step counts: {record}");
    }
    // bitsandbytes' codes are ours. Its products on CPUs round otherwise (calls of one row and of many differ by 0.2 in a logit of
    // SmolLM2's), so that divergences are held as those of golden data are (tests/golden/README.md): within a factor of 2.
    for precision in ["nf4", "int8"] {
        let ratio = divergence("transformers", precision) / divergence("quantbench", precision);
        assert!((0.5..2.0).contains(&ratio), "{precision}: {ratio}");
    }
    for engine in ["transformers", "llama.cpp"] {
        let agreement = &record(&ran.records, engine)["agreement"];
        let number = |key: &str| agreement[key].as_f64().unwrap_or(f64::NAN);
        let parts = agreement["parts_at"].is_null() || number("margin") < number("margin_bound");
        assert!(parts && number("logit_error_first") < number("margin_bound"), "{engine}: {agreement}");
    }
    // A file that llama.cpp's rules quantize, made by our export and its quantizer: both engines run the same bytes.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    let mut export = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    export.args(["export", "--precision", "fp16", "--format", "gguf", "--quiet", "-m"]).arg(tiny());
    assert!(export.arg("-o").arg(&file).output().unwrap().status.success());
    let quantized = folder.path().join("tiny-q8_0.gguf");
    let code = "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); \
                p.ftype = l.LLAMA_FTYPE_MOSTLY_Q8_0; \
                sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))";
    let python_path = python.trim_start_matches("--python ");
    let made = Command::new(python_path).args(["-c", code]).args([&file, &quantized]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let ran = run_model(&quantized, &engines, &format!("-n 8 {python}"));
    assert_eq!(ran.records.len(), 2, "transformers is refused: {}", ran.stderr);
    let theirs = record(&ran.records, "llama.cpp");
    assert_eq!((&theirs["status"], &theirs["precision"]), (&"ok".into(), &"q8_0".into()), "{theirs}");
    assert_eq!((&theirs["agreement"]["reference"], &theirs["agreement"]["steps"]), (&"q8_0".into(), &8.into()));
    // Norms are fp16 with us and fp32 there.
    let formats = |record: &Value| record["memory"]["weights_by_format"]["q8_0"].clone();
    assert_eq!(formats(theirs), formats(record(&ran.records, "quantbench")), "{theirs}");
}
