//! Every writer over every example document of `tests/golden/records`, and the schema of the record.
//!
//! `UPDATE_EXPECT=1 cargo test --test report` writes the expected files anew; review the difference.

use std::path::{Path, PathBuf};
use std::{env, fs};

use quantbench::record::metrics::{self, METRICS};
use quantbench::record::{
    Agreement, BreakEven, BreakEvenFinding, Document, Energy, OtherEngine, Protocol, Record, SCHEMA_VERSION,
};
use quantbench::report::compare::Order;
use quantbench::report::{self, Options, Terminal, WRITERS};
use serde_json::Value;

const RECORDS: &str = "tests/golden/records";

/// Holds `actual` against the file at `path`, or writes it there.
fn check(path: &Path, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::create_dir_all(path.parent().expect("a file has a folder")).expect("make the folder");
        return report::write_file(&path, actual).expect("write the expected file");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    let regenerate = "if the new text is right: UPDATE_EXPECT=1 cargo test --test report";
    assert!(expected == actual, "{} differs\n{}\n{regenerate}", path.display(), first_difference(&expected, actual));
}

fn first_difference(expected: &str, actual: &str) -> String {
    let (mut old, mut new) = (expected.lines(), actual.lines());
    for number in 1.. {
        match (old.next(), new.next()) {
            (None, None) => break,
            (a, b) if a == b => {}
            (a, b) => {
                return format!("line {number}\n  expected: {}\n  actual:   {}", a.unwrap_or("-"), b.unwrap_or("-"));
            }
        }
    }
    "line ends differ".into()
}

/// The example documents by name.
fn documents() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(RECORDS);
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).expect("the example records").map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).expect("read an example"))).collect()
}

fn parsed() -> Vec<(String, Document)> {
    documents().into_iter().map(|(name, text)| (name, serde_json::from_str(&text).expect("parse an example"))).collect()
}

/// The examples' samples are made by hand; what follows from them is computed. After changing samples, update twice: the
/// other expected files are made from these.
#[test]
fn examples_agree_with_their_samples() {
    for (name, mut document) in parsed() {
        for record in &mut document.records {
            record.metrics = metrics::summaries(record);
        }
        let text = serde_json::to_string_pretty(&document).expect("a document is JSON") + "\n";
        check(Path::new(&format!("{RECORDS}/{name}.json")), &text);
    }
}

#[test]
fn every_writer_writes_every_document_as_expected() {
    for (name, document) in parsed() {
        for writer in WRITERS {
            // What JSON holds is checked by the round trip below, and the page by tests/page.rs: a copy of every one would add nothing.
            if writer.name.starts_with("json") || writer.name == "html" {
                continue;
            }
            let extension = writer.extensions.first().copied().unwrap_or(writer.name);
            for (suffix, options) in [("", Options::default()), ("-wide", Options { wide: true, ..Options::default() })]
            {
                let text = (writer.write)(&document, &options).expect("write");
                assert!(text.ends_with('\n') || text.is_empty(), "{name} {}", writer.name);
                if suffix.is_empty() || writer.name == "table" {
                    let file = format!("{RECORDS}/expected/{name}{suffix}.{extension}");
                    check(Path::new(&file), &text);
                }
            }
        }
    }
}

/// What a terminal of 60, 80 and 140 columns shows.
#[test]
fn the_table_folds_to_the_terminal() {
    for (name, document) in parsed().iter().filter(|(name, _)| FOLDED.contains(&name.as_str())) {
        for columns in [60, 80, 140] {
            let terminal = Terminal { columns: Some(columns), colour: false };
            let options = Options { terminal, show_text: true, ..Options::default() };
            let text = (WRITERS[0].write)(document, &options).expect("write");
            check(Path::new(&format!("{RECORDS}/expected/terminal/{name}-{columns}.txt")), &text);
            let wide: Vec<&str> = text.lines().filter(|line| line.chars().count() > columns).collect();
            assert!(wide.is_empty(), "{name} at {columns}: {wide:?}");
        }
    }
}

/// Examples with the longest lines: notes, warnings, reasons and several cases.
const FOLDED: &[&str] = &["three_precisions", "tainted", "fp16_oom", "two_cases", "two_runs", "quality_alone"];

/// What terminals of the same widths show of a comparison, and of the check of a history of the same runs.
#[test]
fn comparisons_fold_to_the_terminal() {
    let recorded = |name: &str| -> Document {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compare").join(name);
        report::read(&path).expect("a recording")
    };
    let (base, again, noisy) = (recorded("base.json"), recorded("again.json"), recorded("noisy.json"));
    let gates =
        || report::compare::gates("decode_tps:-5%,speedup_vs_fp16:-10%,peak_bytes:+3%,weights.hash").expect("gates");
    let rules = report::compare::Rules { gates: gates(), allow_different_machine: false, order: Order::Apart };
    let compared = report::compare::compare(&base, &noisy, &rules).expect("compare");
    let past = [base.records, again.records].concat();
    let check_rules = report::history::CheckRules { gates: gates(), n_last: 20 };
    let checked = report::history::check(&past, &noisy.records, &check_rules).expect("check");
    for columns in [60, 80, 140] {
        let terminal = Terminal { columns: Some(columns), colour: false };
        for (name, comparison) in [("compare", &compared), ("history", &checked)] {
            let text = (report::compare::FORMATS[0].write)(comparison, &terminal).expect("write");
            check(Path::new(&format!("{RECORDS}/expected/terminal/{name}-{columns}.txt")), &text);
            let wide: Vec<&str> = text.lines().filter(|line| line.chars().count() > columns).collect();
            assert!(wide.is_empty(), "{name} at {columns}: {wide:?}");
        }
    }
}

#[test]
fn colours_change_no_word() {
    for (name, document) in parsed() {
        let write = |colour| {
            let terminal = Terminal { columns: Some(100), colour };
            (WRITERS[0].write)(&document, &Options { terminal, ..Options::default() }).expect("write")
        };
        let coloured = write(true);
        assert!(coloured.contains("\x1b[1m"), "{name}");
        let mut plain = coloured.clone();
        for code in ["\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[33m"] {
            plain = plain.replace(code, "");
        }
        assert_eq!(plain, write(false), "{name}");
    }
}

#[test]
fn an_empty_document_is_no_error() {
    let document = Document { schema_version: SCHEMA_VERSION, records: vec![] };
    for writer in WRITERS {
        (writer.write)(&document, &Options::default()).expect("write");
    }
}

#[test]
fn json_round_trips() {
    for (name, text) in documents() {
        let document: Document = serde_json::from_str(&text).expect("parse");
        let written = (report::find("json").expect("a writer").write)(&document, &Options::default()).expect("write");
        let value = |text: &str| serde_json::from_str::<Value>(text).expect("parse");
        assert_eq!(value(&written), value(&text), "{name}");
        assert_eq!(serde_json::from_str::<Document>(&written).expect("parse"), document, "{name}");
    }
}

#[test]
fn jsonl_has_one_record_a_line() {
    for (name, document) in parsed() {
        let text = (report::find("jsonl").expect("a writer").write)(&document, &Options::default()).expect("write");
        let records: Vec<Record> = text.lines().map(|line| serde_json::from_str(line).expect("parse a line")).collect();
        assert_eq!(records, document.records, "{name}");
        for line in text.lines() {
            let value: Value = serde_json::from_str(line).expect("parse a line");
            assert_eq!(value["schema_version"], SCHEMA_VERSION, "{name}");
        }
    }
}

#[test]
fn csv_rows_have_as_many_fields_as_the_header() {
    for (name, document) in parsed() {
        let text = (report::find("csv").expect("a writer").write)(&document, &Options::default()).expect("write");
        let rows = csv_rows(&text);
        assert_eq!(rows.len(), 1 + document.records.len(), "{name}");
        for row in &rows {
            assert_eq!(row.len(), rows[0].len(), "{name}");
        }
        for metric in METRICS {
            let column = rows[0].iter().position(|field| field == metric.key).expect("a column");
            for (row, record) in rows[1..].iter().zip(&document.records) {
                assert_eq!(row[column].parse().ok(), metric.value(record), "{name} {}", metric.key);
            }
        }
    }
}

/// A record of which everything is known, so that a column without a value has none ever.
fn full_record() -> Record {
    let (_, document) = parsed().into_iter().find(|(name, _)| name == "with_quality").expect("an example");
    let mut record = document.records[1].clone();
    let samples = &mut record.samples;
    samples.device_step_ns = samples.decode_step_ns.clone();
    samples.synced_step_ns = samples.decode_step_ns.clone();
    samples.energy_j = samples.end_to_end_ns.iter().map(|ns| *ns as f64 / 1e8).collect();
    samples.energy_window_s = samples.end_to_end_ns.iter().map(|ns| *ns as f64 / 1e9).collect();
    record.energy =
        Some(Energy { source: "nvml".into(), idle_watts: Some(1.0), refused: None, window: "repeats".into() });
    record.reason = Some("why".into());
    record.model.revision = Some("main".into());
    record.keep_fp16 = vec!["lm_head".into()];
    record.weights.seed = Some(1);
    record.card_bytes = Some(1 << 30);
    record.bandwidth.bound = Some("memory".into());
    (record.bandwidth.theoretical_gb_s, record.bandwidth.device_share) = (Some(50.0), Some(0.9));
    (record.bandwidth.memory_alone_share, record.bandwidth.arithmetic_alone_share) = (Some(0.9), Some(0.4));
    let memory = &mut record.memory;
    (memory.context_bytes, memory.device_process_bytes, memory.growth_bytes) = (Some(1), Some(2), Some(6));
    record.agreement = Some(Agreement { kl_mean: 0.1, top1_agreement: 0.9, ..Agreement::default() });
    record.other_engine = Some(OtherEngine { host_ms_per_token: Some(0.5), ..OtherEngine::default() });
    (memory.prefill_peak_bytes, memory.decode_peak_bytes, memory.load_peak_bytes) = (Some(3), Some(4), Some(5));
    let environment = &mut record.environment;
    (environment.gpu, environment.driver, environment.cuda) = (Some("GPU".into()), Some("1".into()), Some("2".into()));
    record.warnings = vec!["what: why".into()];
    let bandwidth = &mut record.bandwidth;
    (bandwidth.flops_per_step, bandwidth.achieved_gflop_s) = (Some(40), Some(2.0));
    (bandwidth.matmul_gflop_s, bandwidth.mfu) = (Some(8.0), Some(0.25));
    let (finding, batches) = (BreakEvenFinding::Within, vec![1, 16]);
    record.break_even = Some(BreakEven { finding, batches, low: Some(6.0), batch: Some(8.0), high: Some(12.0) });
    record.protocol = Protocol {
        n_repeats: 6,
        ended: "count".into(),
        order: "interleaved".into(),
        interval: "within-run".into(),
        method: "quantbench".into(),
        ..record.protocol
    };
    record.metrics = metrics::summaries(&record);
    record
}

#[test]
fn no_csv_column_is_always_empty() {
    let document = Document { schema_version: SCHEMA_VERSION, records: vec![full_record()] };
    let text = (report::find("csv").expect("a writer").write)(&document, &Options::default()).expect("write");
    let rows = csv_rows(&text);
    let empty: Vec<&String> =
        rows[0].iter().zip(&rows[1]).filter(|(_, cell)| cell.is_empty()).map(|(name, _)| name).collect();
    assert!(empty.is_empty(), "{empty:?}");
    for name in
        ["tainted", "n_repeats", "bound", "kl_mean_ci95_low", "perplexity_ratio_ci95_high", "card_bytes", "warnings"]
    {
        assert!(rows[0].iter().any(|column| column == name), "{name}");
    }
}

/// Fields as a reader of RFC 4180 sees them.
fn csv_rows(text: &str) -> Vec<Vec<String>> {
    let (mut rows, mut row, mut field, mut quoted) = (vec![], vec![], String::new(), false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => row.push(std::mem::take(&mut field)),
            '\n' if !quoted => {
                row.push(std::mem::take(&mut field));
                rows.push(std::mem::take(&mut row));
            }
            c => field.push(c),
        }
    }
    assert!(!quoted && field.is_empty() && row.is_empty(), "the text ends in the middle of a row");
    rows
}

#[test]
fn no_output_holds_control_characters_or_private_words() {
    for (name, document) in parsed() {
        for writer in WRITERS {
            let text =
                (writer.write)(&document, &Options { wide: true, card_bytes: Some(1 << 30), ..Options::default() })
                    .expect("write");
            assert_eq!(report::private_words(&text, &[]), Vec::<String>::new(), "{name} {}", writer.name);
            let readable = matches!(writer.name, "table" | "markdown");
            assert!(!readable || text.chars().all(|c| c == '\n' || !c.is_control()), "{name} {}", writer.name);
        }
    }
}

#[test]
fn writers_have_unique_names_and_extensions() {
    let mut words: Vec<_> = WRITERS.iter().flat_map(|writer| writer.extensions).collect();
    let n = words.len();
    words.sort();
    words.dedup();
    assert_eq!(words.len(), n);
    for writer in WRITERS {
        assert_eq!(report::find(writer.name).expect("a writer").name, writer.name);
        for extension in writer.extensions {
            let path = format!("some/file.{}", extension.to_uppercase());
            assert_eq!(report::by_extension(Path::new(&path)).expect("a writer").name, writer.name);
        }
    }
}

#[test]
fn an_unknown_extension_names_the_known_ones() {
    for (path, seen) in [("r.xml", "extension `.xml`"), ("r", "no extension"), (".json", "no extension")] {
        let error = report::by_extension(Path::new(path)).err().expect("an error");
        let known = ".txt .json .jsonl .ndjson .csv .md .markdown .html .htm";
        assert_eq!(error.to_string(), format!("no output format for `{path}`: {seen}, known are {known}"));
        assert!(error.is::<quantbench::error::BadInput>());
    }
}

#[test]
fn files_are_written_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("r.json");
    report::check_writable(&path).expect("writable");
    assert_eq!(fs::read_dir(&folder).expect("read").count(), 0, "checking leaves nothing");
    for text in ["first, longer", "second"] {
        report::write_file(&path, text).expect("write");
        report::check_writable(&path).expect("still writable");
        assert_eq!(fs::read_to_string(&path).expect("read"), text);
        assert_eq!(fs::read_dir(&folder).expect("read").count(), 1, "no temporary file stays");
    }
}

#[test]
fn unwritable_paths_say_which_and_why() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "kept").expect("write");
    let cases = [
        (folder.path().to_owned(), "it is a folder"),
        (folder.path().join("none/r.json"), "there is no folder `"),
        (file.join("r.json"), "is no folder"),
        (PathBuf::new(), "this names no file"),
        (PathBuf::from(".."), "this names no file"),
    ];
    for (path, why) in cases {
        for error in [report::check_writable(&path), report::write_file(&path, "text")].map(Result::unwrap_err) {
            let message = error.to_string();
            assert!(message.starts_with(&format!("cannot write `{}`: ", path.display())), "{message}");
            assert!(message.contains(why), "{message}");
            assert!(quantbench::error::hint(&error).is_some(), "{message}");
        }
    }
    assert_eq!(fs::read_to_string(&file).expect("read"), "kept");
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_modes_kept() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = tempfile::tempdir().expect("a folder");
    let (file, link) = (folder.path().join("real.json"), folder.path().join("link.json"));
    fs::write(&file, "old").expect("write");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("set the mode");
    symlink(&file, &link).expect("link");
    report::write_file(&link, "new").expect("write");
    assert!(fs::symlink_metadata(&link).expect("stat").is_symlink());
    assert_eq!(fs::read_to_string(&file).expect("read"), "new");
    assert_eq!(fs::metadata(&file).expect("stat").permissions().mode() & 0o777, 0o640);
    report::check_writable(Path::new("/dev/null")).expect("a device is writable");
    report::write_file(Path::new("/dev/null"), "gone").expect("a device is written in place");
}

#[test]
fn every_writer_tells_engines_of_one_run_apart() {
    let (_, mut document) = parsed().into_iter().find(|(name, _)| name == "three_precisions").expect("an example");
    let mut other = document.records[0].clone();
    other.engine.name = "candle".into();
    document.records.push(other);
    for writer in WRITERS {
        let text = (writer.write)(&document, &Options::default()).expect("write");
        assert!(text.contains("candle"), "{}:\n{text}", writer.name);
    }
}

#[test]
fn schema_matches_the_types() {
    let schema = schemars::schema_for!(Document);
    let text = serde_json::to_string_pretty(&schema).expect("a schema is JSON") + "\n";
    check(Path::new("docs/record.schema.json"), &text);
}

/// What every record must have, by dotted path.
const KEYS: &[&str] = &[
    "status",
    "reason",
    "engine: name version commit",
    "command",
    "timestamp",
    "model: id revision architecture parameters",
    "weights: source dtype seed hash fp16_overflow",
    "precision",
    "int8: threshold outlier_columns_mean",
    "device: kind name",
    "workload: n_prompt n_gen n_depth n_image batch_size",
    "phases",
    "samples: prefill_ns decode_step_ns end_to_end_ns",
    "metrics",
    "dtypes: weights compute kv_cache logits",
    "ratio_to_fp16: median ci95_low ci95_high paired by_bytes",
    "memory: start_bytes end_bytes peak_bytes load_peak_bytes weights_bytes kv_cache_bytes process_peak_rss_bytes",
    "bandwidth: weight_bytes_per_token kv_bytes_per_token read_gb_s achieved_gb_s mbu",
    "output: token_ids text",
    "environment: cpu isa threads os build_profile features gpu driver cuda",
    "warnings",
];

#[test]
fn the_schema_has_every_promised_key() {
    let schema = serde_json::to_value(schemars::schema_for!(Document)).expect("a schema is JSON");
    let record = &schema["$defs"]["Record"];
    for line in KEYS {
        let (key, fields) = line.split_once(':').unwrap_or((line, ""));
        let value = &record["properties"][key];
        assert!(value.is_object(), "`{key}` is not in the schema");
        let definition = resolve(&schema, value);
        for field in fields.split_whitespace() {
            assert!(definition["properties"][field].is_object(), "`{key}.{field}` is not in the schema");
        }
    }
    let summary = &schema["$defs"]["Summary"]["properties"];
    for field in ["unit", "median", "min", "max", "mean", "stdev", "n", "ci95_low", "ci95_high"] {
        assert!(summary[field].is_object(), "`metrics.*.{field}` is not in the schema");
    }
}

/// The definition behind a reference, also where `null` is allowed beside it.
fn resolve<'a>(schema: &'a Value, value: &'a Value) -> &'a Value {
    let any_of = value["anyOf"].as_array().into_iter().flatten();
    let reference = std::iter::once(value).chain(any_of).find_map(|value| value["$ref"].as_str());
    reference.and_then(|reference| schema.pointer(reference.trim_start_matches('#'))).unwrap_or(value)
}
