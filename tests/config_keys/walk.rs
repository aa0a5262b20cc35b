//! Every key of every config that is here, and what is told of the others.

use std::fs;
use std::path::Path;
use std::process::Command;

use quantbench::models::{self, Fate, Files, Walked};
use quantbench::weights::{builtin_models, json};
use serde_json::{Value, json};

use crate::{Folder, set};

/// Objects whose keys are walked by themselves.
const SECTIONS: &[&str] =
    &["text_config", "vision_config", "rope_scaling", "rope_parameters", "full_attention", "sliding_attention"];

fn n_keys(config: &Value) -> usize {
    let keys = config.as_object().into_iter().flatten();
    keys.map(|(key, value)| 1 + if SECTIONS.contains(&key.as_str()) { n_keys(value) } else { 0 }).sum()
}

fn count(keys: &[Walked], is: impl Fn(&Fate) -> bool) -> usize {
    keys.iter().filter(|walked| is(&walked.fate)).count()
}

/// Prints how many are computed, harmless and off; none is unknown, and none is left out.
#[test]
fn every_key_of_the_golden_and_built_in_configs_is_in_a_list() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &Path| fs::read(path).ok().map(|bytes| json::parse(&bytes).unwrap());
    let mut configs: Vec<(String, Value, Option<Value>)> = Vec::new();
    for folder in ["tests/golden/models", "tests/golden/bnb", "tests/golden/architectures/models"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let config = read(&path.join("config.json")).unwrap();
            configs.push((
                path.file_name().unwrap().to_string_lossy().into_owned(),
                config,
                read(&path.join("generation_config.json")),
            ));
        }
    }
    configs.extend(builtin_models().iter().map(|shape| (shape.name.to_owned(), shape.config(), None)));
    configs.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(configs.len(), 9 + 9 + 18 + 18);
    let mut total = [0; 3];
    for (name, config, generation) in &configs {
        let built = models::read(&Files { config, generation: generation.as_ref() }).unwrap();
        assert_eq!(built.notes, [], "{name}");
        let is_config = |walked: &&Walked| walked.file == "config.json";
        assert_eq!(built.keys.iter().filter(is_config).count(), n_keys(config), "{name}: {:?}", built.keys);
        assert_eq!(built.keys.len(), n_keys(config) + generation.as_ref().map_or(0, n_keys), "{name}");
        let counts = [Fate::Computed, Fate::Harmless, Fate::Off].map(|fate| count(&built.keys, |is| *is == fate));
        assert_eq!(counts.iter().sum::<usize>(), built.keys.len(), "{name}: {:?}", built.keys);
        println!("{name}: {} computed, {} harmless, {} refused unless off, and off", counts[0], counts[1], counts[2]);
        total = std::array::from_fn(|i| total[i] + counts[i]);
    }
    println!("all: {} computed, {} harmless, {} off", total[0], total[1], total[2]);
    assert!(total[0] > 300 && total[1] > 100, "{total:?}");
}

/// One warning of a file names all of its keys.
#[test]
fn a_key_in_no_list_is_told_with_its_value() {
    let folder = Folder::changed("paligemma-tiny", |config| {
        config["text_config"]["rope_scaling"] = json!({"type": "linear", "factor": 2.0, "alpha": 3});
        config["vision_config"]["window"] = json!([1, 2]);
        config.insert("foo".into(), "x".repeat(100).into());
        config.insert("bar".into(), true.into());
        config.insert("baz".into(), json!(null));
    })
    .edit("generation_config.json", set(json!({"qux": 0.5, "temperature": 0.1})));
    let (_, warnings) = folder.build().unwrap();
    let [(name, config), (also, generation)] = &warnings[..] else { panic!("{warnings:?}") };
    assert_eq!((name.as_str(), also.as_str()), ("unknown_config_key", "unknown_config_key"));
    for key in ["`text_config.rope_scaling.alpha` 3", "`vision_config.window` [1,2]", "`foo` \"xxx", "`bar` true"] {
        assert!(config.starts_with("config.json has keys") && config.contains(key), "{config}");
    }
    assert!(!config.contains("baz") && config.len() < 300, "{config}");
    assert!(generation.contains("generation_config.json") && generation.contains("`qux` 0.5"), "{generation}");

    let mut request = folder.request();
    request.strict_config = true;
    let error = quantbench::harness::build(&folder.open(), &request, &quantbench::events::Silent).unwrap_err();
    assert!(error.to_string().starts_with("`--strict-config`: config.json has keys"), "{error}");
}

#[test]
fn what_transformers_does_not_read_is_told_where_it_says_something_else() {
    for (model, change, told) in [
        ("llama-odd", json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` 0.5"),
        ("llama-odd", json!({"rope_scaling": {"factor": 8.0}}), "`rope_scaling.factor` 8.0"),
        (
            "llama-odd",
            json!({"rope_scaling": {"type": "dynamic", "factor": 8.0, "alpha": 2.0}}),
            "`rope_scaling.alpha` 2.0",
        ),
        ("paligemma-odd", json!({"hidden_activation": "gelu"}), "`hidden_activation` \"gelu\""),
    ] {
        let folder = Folder::changed(model, |config| {
            let at = if model.starts_with("pali") { config["text_config"].as_object_mut().unwrap() } else { config };
            set(change)(at);
        });
        let (_, warnings) = folder.build().unwrap();
        assert!(warnings.len() == 1 && warnings[0].1.contains(told), "{warnings:?}");
    }
}

/// transformers' generate looks in generation_config.json for the tokens that end a text, and in config.json where there is none.
#[test]
fn the_last_tokens_are_those_of_generation_config() {
    let eos = |config: Value, generation: Option<Value>| {
        let folder = Folder::changed("llama-odd", set(json!({ "eos_token_id": config })));
        let folder = match generation {
            Some(generation) => folder.write("generation_config.json", &generation.to_string()),
            None => folder.without("generation_config.json"),
        };
        let (model, warnings) = folder.build().unwrap();
        (model.eos, warnings.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
    };
    let none: Vec<String> = Vec::new();
    assert_eq!(eos(json!(507), Some(json!({"eos_token_id": [507, 78]}))), (vec![507, 78], none.clone()));
    assert_eq!(eos(json!([1, 2]), Some(json!({"eos_token_id": 78}))), (vec![78], none.clone()));
    assert_eq!(eos(json!(null), Some(json!({"eos_token_id": 78}))), (vec![78], none.clone()));
    assert_eq!(eos(json!([1, 2]), None), (vec![1, 2], none.clone()));
    assert_eq!(eos(json!(-1), None), (vec![], none.clone()));
    assert_eq!(eos(json!(null), None), (vec![], none.clone()));
    assert_eq!(eos(json!(507), Some(json!({"eos_token_id": -1}))), (vec![], none.clone()));
    // As transformers: the file is there, so nothing else is asked.
    assert_eq!(
        eos(json!(507), Some(json!({"bos_token_id": 1}))),
        (vec![], vec!["generation_setting_not_read".to_owned()])
    );
    assert_eq!(
        eos(json!(507), Some(json!({"eos_token_id": "78"}))),
        (vec![507], vec!["generation_setting_not_read".to_owned()])
    );

    let t5 =
        Folder::of("t5-tiny").write("generation_config.json", r#"{"decoder_start_token_id": 3, "eos_token_id": 1}"#);
    assert_eq!(t5.build().unwrap().0.decoder_start, Some(3));
    let paligemma = Folder::of("paligemma-tiny").write("generation_config.json", r#"{"eos_token_id": [1, 9]}"#);
    assert_eq!(paligemma.build().unwrap().0.eos, [1, 9]);
}

#[test]
fn settings_of_generate_that_greedy_decoding_does_not_apply_are_told() {
    let told = |file: &str, keys: Value| {
        let folder = Folder::of("llama-odd");
        let folder = if file == "config.json" { folder.without("generation_config.json") } else { folder };
        folder.edit(file, set(keys)).build().unwrap().1
    };
    for file in ["generation_config.json", "config.json"] {
        let off = json!({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "suppress_tokens": null, "bad_words_ids": [],
            "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 4096, "max_new_tokens": 7});
        assert_eq!(told(file, off), vec![]);
        for (key, value) in [
            ("repetition_penalty", json!(1.1)),
            ("no_repeat_ngram_size", json!(3)),
            ("suppress_tokens", json!([5])),
            ("forced_eos_token_id", json!(1)),
            ("num_beams", json!(4)),
            ("min_new_tokens", json!(8)),
        ] {
            let warnings = told(file, json!({ key: value }));
            let [(name, message)] = &warnings[..] else { panic!("{key}: {warnings:?}") };
            assert_eq!(name, "generation_setting_not_applied");
            assert!(message.starts_with(file) && message.contains(&format!("`{key}` {value}")), "{message}");
        }
    }
    // Where both files are there, transformers reads one.
    let both = Folder::of("llama-odd").edit("config.json", set(json!({"repetition_penalty": 1.5})));
    assert_eq!(both.build().unwrap().1, vec![]);
}

/// The binary on a folder: what the parent warns of stands in the record.
fn run(folder: &Folder, more: &[&str]) -> (Option<i32>, Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    command.args([
        "--model-id",
        folder.0.path().to_str().unwrap(),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--precision",
        "fp16",
    ]);
    command.args(["--warmup", "0", "--repeats", "1", "--format", "json"]).args(more);
    let output = command.output().unwrap();
    let record =
        serde_json::from_slice::<Value>(&output.stdout).map_or(json!(null), |document| document["records"][0].clone());
    (output.status.code(), record, String::from_utf8_lossy(&output.stderr).into_owned())
}

const PROMPT: [&str; 4] = ["--prompt-ids", "1,2,3,40,50,60,70,80", "--max-new-tokens", "6"];

#[test]
fn a_record_stops_at_the_tokens_of_generation_config_and_holds_the_warnings() {
    let python = r#"{"eos_token_id": [507, 78], "temperature": NaN, "top_p": Infinity, "foo": -Infinity}"#;
    let folder = Folder::changed("llama-odd", set(json!({"zoo": 5}))).write("generation_config.json", python);
    let (code, record, stderr) = run(&folder, &[&PROMPT[..], &["--stop-at-eos"]].concat());
    assert_eq!((code, &record["output"]["token_ids"]), (Some(0), &json!([142, 78])), "{stderr}");
    let warnings = record["warnings"].to_string();
    for told in
        ["unknown_config_key: config.json", "`zoo` 5", "unknown_config_key: generation_config.json", "-Infinity"]
    {
        assert!(warnings.contains(told), "{told}: {warnings}");
    }
    let (code, _, stderr) = run(&folder, &[&PROMPT[..], &["--strict-config"]].concat());
    assert!(code == Some(2) && stderr.contains("--strict-config") && stderr.contains("hint: "), "{stderr}");
}

/// No run needs the file.
#[test]
fn a_generation_config_that_is_no_json_is_a_warning() {
    let folder = Folder::of("llama-odd").write("generation_config.json", "{\"eos_token_id\": 78,");
    let (code, record, stderr) = run(&folder, &[&PROMPT[..], &["--stop-at-eos"]].concat());
    assert_eq!((code, record["output"]["token_ids"].as_array().map(Vec::len)), (Some(0), Some(6)), "{stderr}");
    assert!(record["warnings"].to_string().contains("generation_config.json` is not JSON"), "{record}");
}

#[test]
fn t5_takes_a_prompt_beyond_its_training() {
    let (code, record, stderr) = run(&Folder::of("t5-tiny"), &["--prompt-tokens", "600", "--max-new-tokens", "2"]);
    assert_eq!((code, &record["workload"]["n_prompt"]), (Some(0), &json!(600)), "{stderr}");
    let (code, _, stderr) = run(&Folder::of("t5-tiny"), &["--prompt-tokens", "99999999999"]);
    assert!(code == Some(2) && stderr.contains("hint: "), "{stderr}");
}
