//! What a precision costs in quality: sessions against each other, and the command from outside.
//!
//! `QUANTBENCH_SMOLLM2=FOLDER cargo test --release --test quality` also holds a real model against an independent
//! computation, tests/golden/quality/oracle.py.

mod skips;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::f16;
use quantbench::engine::{self, Device, Session, Setup};
use quantbench::events::Silent;
use quantbench::models;
use quantbench::plan::Model;
use quantbench::quality::cost::{self, TokenCost};
use quantbench::quality::pass::{self, WindowInput};
use quantbench::quality::summary::summarize;
use quantbench::quality::{CallPath, text};
use quantbench::quant::{FormatId, FormatOptions};
use quantbench::weights::policy::Formats;
use quantbench::weights::{self, ModelRequest, Source, SourceInfo};
use serde_json::Value;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn open(name: &str) -> (Model, Box<dyn Source>) {
    let request = ModelRequest::of(golden(&format!("models/{name}")).to_string_lossy().into_owned());
    let checkpoint = weights::open(&request, &Silent).unwrap();
    let model = models::build(&checkpoint.config).unwrap();
    let source = checkpoint.source(&model.matrices, &model.vectors).unwrap();
    (model, source)
}

fn session(model: &Model, source: &dyn Source, precision: &str) -> Box<dyn Session> {
    let formats = &Formats::new(FormatId::named(precision).expect("a format"), FormatOptions::default());
    let (device, threads, capacity, encoder_capacity) = (Device::Cpu, 2, 64, 64);
    let setup = Setup {
        model,
        source,
        formats,
        device,
        threads,
        capacity,
        encoder_capacity,
        cuda_graph: true,
        sequences: 1,
        kv_format: device.kv_format(),
    };
    engine::load(&setup, &Silent).unwrap().session
}

/// Ids all over the vocabulary.
fn ids(model: &Model) -> Vec<u32> {
    (0..48).map(|at| (at * 7919 + 11) % model.vocab as u32).collect()
}

fn rows(session: &mut dyn Session, tokens: &[u32], path: CallPath) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    let keep = &mut |_: usize, logits: &[f32]| {
        rows.push(logits.to_vec());
        Ok(())
    };
    pass::run(session, WindowInput { prefix: &[], tokens, first: 1, path }, keep).unwrap();
    rows
}

fn costs(reference: &[Vec<f32>], measured: &[Vec<f32>], tokens: &[u32]) -> Vec<TokenCost> {
    let pairs = reference.iter().zip(measured).zip(&tokens[1..]);
    pairs.map(|((reference, measured), &next)| cost::compare(reference, measured, next).unwrap()).collect()
}

/// Largest difference of a logit between two orders of summation, by tests/golden/README.md.
const ORDER_ERROR: f64 = 2e-4;
/// The same through NF4, whose block sums are scaled.
const NF4_ORDER_ERROR: f64 = 1e-3;
const ORDER_ERRORS: [(&str, f64); 3] = [("fp16", ORDER_ERROR), ("nf4", NF4_ORDER_ERROR), ("nf4-nodq", NF4_ORDER_ERROR)];

/// The largest divergence where no logit differs by more than `error`: it is ln E exp(d − E d) of differences d within ±error, which is
/// at most error² / 2 (Hoeffding's lemma). 2⁻⁵⁰ is what sums in fp64 round by.
fn most_kl(error: f64) -> f64 {
    error * error / 2.0 + 2f64.powi(-50)
}

/// A change of at most e in every logit changes a log probability by at most 2 e, and with it a mean of differences of log
/// probabilities, which is what the divergence and the mean log likelihood are.
#[test]
fn both_paths_give_the_same_quality() {
    for name in ["llama-tiny", "phi-odd"] {
        let (model, source) = open(name);
        let tokens = ids(&model);
        let reference = rows(session(&model, source.as_ref(), "fp32").as_mut(), &tokens, CallPath::Prefill);
        for (precision, error) in ORDER_ERRORS {
            let mut session = session(&model, source.as_ref(), precision);
            let of = |path| summarize(&costs(&reference, &rows(session.as_mut(), &tokens, path), &tokens)).unwrap();
            let [prefill, decode] = [CallPath::Prefill, CallPath::Decode].map(of);
            assert!((prefill.kl_mean - decode.kl_mean).abs() <= 2.0 * error, "{name} {precision}");
            assert!((prefill.nll_mean - decode.nll_mean).abs() <= 2.0 * error, "{name} {precision}");
        }
    }
}

#[test]
fn the_reference_costs_nothing_and_fp16_hardly_anything() {
    let (model, source) = open("llama-odd");
    let tokens = ids(&model);
    let of = |precision| rows(session(&model, source.as_ref(), precision).as_mut(), &tokens, CallPath::Prefill);
    let reference = of("fp32");
    let itself = summarize(&costs(&reference, &of("fp32"), &tokens)).unwrap();
    assert_eq!((itself.kl_mean, itself.kl_p99, itself.top1_agreement, itself.logit_error_max), (0.0, 0.0, 1.0, 0.0));
    // The checkpoint is in fp16: both hold the same values, and only sums differ.
    let fp16 = summarize(&costs(&reference, &of("fp16"), &tokens)).unwrap();
    assert!(fp16.logit_error_max <= ORDER_ERROR && fp16.kl_mean <= most_kl(ORDER_ERROR), "{fp16:?}");
    // What sums explain is far below the cost of other values.
    let nf4 = summarize(&costs(&reference, &of("nf4"), &tokens)).unwrap();
    assert!(nf4.logit_error_max > NF4_ORDER_ERROR && nf4.kl_mean > most_kl(NF4_ORDER_ERROR), "{nf4:?}");
    for cost in [fp16, nf4] {
        assert!(cost.kl_mean <= most_kl(cost.logit_error_max), "{cost:?}");
    }
}

/// Every matrix with its rows in another order.
struct Shuffled(Box<dyn Source>);

impl Source for Shuffled {
    fn info(&self) -> &SourceInfo {
        self.0.info()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> anyhow::Result<usize> {
        let n = rows.len();
        let overflow = self.0.read_rows(name, rows, out)?;
        let k = out.len() / n;
        for row in 0..n / 2 {
            let (above, below) = out.split_at_mut((n - 1 - row) * k);
            above[row * k..][..k].swap_with_slice(&mut below[..k]);
        }
        Ok(overflow)
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.0.stored_bytes(name)
    }
}

#[test]
fn other_weights_are_another_model() {
    let (model, source) = open("llama-tiny");
    let tokens = ids(&model);
    let reference = rows(session(&model, source.as_ref(), "fp32").as_mut(), &tokens, CallPath::Prefill);
    let shuffled = rows(session(&model, &Shuffled(source), "fp16").as_mut(), &tokens, CallPath::Prefill);
    let found = summarize(&costs(&reference, &shuffled, &tokens)).unwrap();
    // The logits of these models deviate by s = 2.5 (tests/golden/README.md). Unrelated ones diverge by s² = 6.3 nats on average, and expect
    // the same token by chance alone, once in the vocabulary.
    assert!(found.kl_mean > 1.0 && found.top1_agreement < 0.2, "{found:?}");
}

/// Weights that fp16 cannot hold: a reference that was cast would not see what the cast costs.
struct Finer(Box<dyn Source>);

impl Source for Finer {
    fn info(&self) -> &SourceInfo {
        self.0.info()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> anyhow::Result<usize> {
        self.0.read_rows(name, rows, out)
    }

    /// Above what fp16 rounds to by less than half a step.
    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> anyhow::Result<()> {
        self.0.read_rows_f32(name, rows, out)?;
        out.iter_mut().for_each(|value| *value *= 1.0 + 2f32.powi(-13));
        Ok(())
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.0.stored_bytes(name)
    }
}

#[test]
fn the_reference_holds_the_checkpoints_own_values() {
    let (model, source) = open("phi-tiny");
    let source = Finer(source);
    let tokens = ids(&model);
    let of = |precision| rows(session(&model, &source, precision).as_mut(), &tokens, CallPath::Prefill);
    let found = summarize(&costs(&of("fp32"), &of("fp16"), &tokens)).unwrap();
    // The head alone makes a logit of 2.5, their deviation, 3e-4 smaller: more than sums explain.
    assert!(found.kl_mean > 0.0 && found.logit_error_max > ORDER_ERROR, "{found:?}");
}

fn quantbench(model: &Path, args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.args(args.split_whitespace()).arg("--model-id").arg(model).arg("--quiet");
    command.output().unwrap()
}

fn records(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let document: Value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    document["records"].as_array().unwrap().clone()
}

#[test]
fn every_kind_of_model_has_its_quality() {
    for (name, n_tokens) in [("llama-tiny", 23), ("phi-tiny", 23), ("t5-tiny", 24), ("paligemma-odd", 24)] {
        let args = "quality --quality-tokens 24 --threads 2 --format json";
        for record in records(&quantbench(&golden(&format!("models/{name}")), args)) {
            let (precision, quality) = (&record["precision"], &record["quality"]);
            assert_eq!(record["status"], "ok", "{name} {precision}: {}", record["reason"]);
            // Without an encoder nothing stands before the first token.
            assert_eq!(quality["n_tokens"], n_tokens, "{name}");
            let path = if precision == "int8" { "decode" } else { "prefill" };
            assert_eq!(quality["path"], path, "{name}");
            let (kl, ratio) = (quality["kl_mean"].as_f64().unwrap(), quality["perplexity_ratio"].as_f64().unwrap());
            match precision.as_str() {
                Some("fp16") => assert!(kl <= most_kl(ORDER_ERROR) && ratio == 1.0, "{name}: {quality}"),
                _ => assert!(kl > most_kl(NF4_ORDER_ERROR) && ratio != 1.0, "{name}: {quality}"),
            }
        }
    }
}

#[test]
fn a_long_text_goes_in_windows() {
    let folder = tempfile::tempdir().unwrap();
    let book = folder.path().join("book.txt");
    std::fs::write(&book, text::SAMPLE.repeat(4)).unwrap();
    let args = format!(
        "quality --precision fp16 --threads 2 --format json --quality-tokens 1300 --quality-text {}",
        book.display()
    );
    let record = &records(&quantbench(&golden("models/llama-tiny"), &args))[0];
    let quality = &record["quality"];
    assert_eq!((&quality["n_tokens"], &quality["n_windows"]), (&Value::from(1299), &Value::from(2)), "{quality}");
    assert_eq!(quality["text"], "book.txt");
    assert!(quality["kl_mean"].as_f64().unwrap() < 1e-4, "{quality}");
}

#[test]
fn a_run_has_speed_and_quality_in_one_record() {
    let args = "--quality --quality-tokens 16 --quality-path decode --max-new-tokens 2 --repeats 1 --warmup 0 --threads 1 \
                --precision nf4 --format json";
    let record = &records(&quantbench(&golden("models/llama-tiny"), args))[0];
    assert!(record["metrics"]["decode_tps"]["median"].as_f64().unwrap() > 0.0);
    assert_eq!((&record["quality"]["path"], &record["quality"]["n_tokens"]), (&"decode".into(), &15.into()));
    assert!(record["quality"]["perplexity_ratio"].is_null(), "fp16 was not run");
}

/// What a part costs alone is what the model costs when all else is kept, whichever option says so.
#[test]
fn parts_are_measured_alone_and_kept() {
    let model = golden("models/llama-tiny");
    let args = |rest: &str| format!("quality --quality-tokens 24 --threads 2 --format json {rest}");
    let of = |rest: &str| records(&quantbench(&model, &args(rest)));
    let by_module = of("--precision int8,nf4 --by-module");
    let kept = of("--precision int8,nf4 --keep-fp16 mlp");
    for (record, kept) in by_module.iter().zip(&kept) {
        let modules = record["quality"]["modules"].as_array().unwrap();
        let names: Vec<_> = modules.iter().map(|module| module["module"].as_str().unwrap()).collect();
        let layers = ["model.layers.0", "model.layers.1", "model.layers.2"];
        assert_eq!(names, [["attention", "mlp", "embeddings"], layers].concat());
        for module in modules {
            assert!(
                module["kl_mean"].as_f64().unwrap() > 0.0 && module["saved_bytes"].as_u64().unwrap() > 0,
                "{module}"
            );
            assert_eq!(module["outlier_share"].is_null(), record["precision"] == "nf4", "{module}");
        }
        assert_eq!(modules[0]["kl_mean"], kept["quality"]["kl_mean"], "{names:?}");
        assert_eq!(kept["keep_fp16"], Value::from(vec!["mlp"]));
    }
    let nothing = of("--precision nf4 --keep-fp16 *");
    assert!(nothing[0]["quality"]["kl_mean"].as_f64().unwrap() < 1e-4, "all is fp16");
    let unknown = quantbench(&model, "quality --keep-fp16 down_pro");
    let error = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(error.contains("`--keep-fp16 down_pro` matches no linear layer"), "{error}");
}

#[test]
fn random_weights_have_no_quality() {
    let model = golden("models/llama-tiny");
    let output = quantbench(&model, "quality --weights random");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2));
    assert!(error.contains("no quality can be measured: it needs trained weights, and these are random"), "{error}");
    // At once and not below a run; the same before it.
    for args in ["--quality", "--quality --dry-run", "--quality-tokens 9"] {
        let output =
            quantbench(&model, &format!("--weights random {args} --precision fp16 --max-new-tokens 2 --threads 1"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(2), true), "{args}: {error}");
        assert!(
            error.contains("no quality can be measured: it needs trained weights, and these are random"),
            "{args}: {error}"
        );
    }
    let planned = quantbench(&model, "--quality --quality-tokens 9 --dry-run");
    let text = String::from_utf8_lossy(&planned.stdout).into_owned();
    assert!(text.contains("then the quality of each precision over at most 9 tokens of `sample`"), "{text}");
}

/// What the oracle's figures allow: nf4 1 % or 1e-4 (another order of sums); int8, which one part in a million of the input
/// moves, 15 % of the divergence, 0.5 % of the log likelihood and 2.5 points of agreement.
fn check_against_oracle(quality: &Value, oracle: &Value, int8: bool, what: &str) {
    let of = |value: &Value, key: &str| value[key].as_f64().unwrap();
    for (key, relative, absolute) in [
        ("nll_mean", if int8 { 0.005 } else { 0.01 }, 1e-4),
        ("kl_mean", if int8 { 0.15 } else { 0.01 }, 1e-4),
        ("top1_agreement", 0.0, if int8 { 0.025 } else { 0.01 }),
    ] {
        let (found, expected) = (of(quality, key), of(oracle, key));
        let allowed = f64::max(relative * expected, absolute);
        assert!((found - expected).abs() <= allowed, "{what} {key}: {found}, not {expected} ± {allowed}");
    }
}

#[test]
fn a_real_model_costs_what_an_independent_computation_says() {
    let Some(folder) = std::env::var_os("QUANTBENCH_SMOLLM2").map(PathBuf::from) else {
        skips::skip("QUANTBENCH_SMOLLM2 names no folder with SmolLM2-135M-Instruct");
        return;
    };
    let json = |path| -> Value { serde_json::from_str(&std::fs::read_to_string(golden(path)).unwrap()).unwrap() };
    let (oracle, paragraph) = (json("quality/smollm2.json"), json("smollm2.json"));
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("paragraph.txt");
    std::fs::write(&file, paragraph["paragraph"]["text"].as_str().unwrap()).unwrap();
    let run = |args: &str| {
        let args = format!("quality --format json --quality-text {} {args}", file.display());
        records(&quantbench(&folder, &args))
    };
    let usual = run("--precision fp16,int8,nf4,nf4-nodq");
    for (at, key) in ["fp16", "int8.decode", "nf4", "nf4-nodq"].into_iter().enumerate() {
        check_against_oracle(&usual[at]["quality"], &oracle["precisions"][key], at == 1, key);
    }
    let nll = |at: usize| usual[at]["quality"]["nll_mean"].as_f64().unwrap();
    assert!((nll(0) - paragraph["paragraph"]["mean_nll"].as_f64().unwrap()).abs() < 0.002);
    let kl = |at: usize| usual[at]["quality"]["kl_mean"].as_f64().unwrap();
    assert!(kl(0) < 1e-4);
    assert!(kl(3) <= kl(2) + usual[2]["quality"]["kl_mean_half_width"].as_f64().unwrap());
    let prefill = run("--precision int8 --quality-path prefill");
    check_against_oracle(&prefill[0]["quality"], &oracle["precisions"]["int8.prefill"], true, "int8.prefill");
}
