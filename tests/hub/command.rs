//! The hub through the whole program: what a run's record says of an outage, and which variables count.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::COMMIT;
use super::server::{Behaviour, Hub, refused_endpoint};

/// The files of a golden model, as a hub holds them.
fn golden_files() -> std::collections::BTreeMap<&'static str, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tiny");
    let names =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    names.into_iter().map(|name| (name, std::fs::read(folder.join(name)).unwrap())).collect()
}

/// A short run of `owner/model` with these variables and no others of the hub's.
fn run(variables: &[(&str, &str)], args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantbench"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().to_uppercase();
        if text.starts_with("HF_")
            || text.starts_with("HUGGING")
            || text.ends_with("_PROXY")
            || text.starts_with("XDG_")
        {
            command.env_remove(name);
        }
    }
    command.envs(variables.iter().copied()).stdin(Stdio::null());
    command.args(["--model-id", "owner/model", "--device", "cpu", "--threads", "1", "--precision", "fp16"]);
    command.args(["--max-new-tokens", "2", "--warmup", "0", "--repeats", "1", "--format", "json"]).args(args);
    command.output().unwrap()
}

fn document(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn an_outage_stands_in_the_record_and_a_dry_run_shows_it_at_once() {
    let hub = Hub::serve(Behaviour { files: golden_files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let home = home.path().to_str().unwrap();
    let at = |endpoint: &str, args: &[&str]| run(&[("HF_HOME", home), ("HF_ENDPOINT", endpoint)], args);
    let plain = document(&at(&hub.endpoint, &[]));
    let warnings = |document: &Value| {
        let warnings = document["records"][0]["warnings"].as_array().unwrap().iter();
        let about_hub = warnings.filter_map(Value::as_str).filter(|warning| warning.starts_with("hub_"));
        about_hub.map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(warnings(&plain).is_empty());

    let nobody = refused_endpoint();
    let seen = warnings(&document(&at(&nobody, &[])));
    let [warning] = &seen[..] else { panic!("{seen:?}") };
    assert!(warning.starts_with("hub_unreachable: ") && warning.contains(COMMIT), "{warning}");
    assert!(!warning.contains("127.0.0.1"), "a record holds no host: {warning}");
    // No record keeps it there.
    let dry = at(&nobody, &["--dry-run"]);
    let errors = String::from_utf8_lossy(&dry.stderr);
    assert!(dry.status.success() && errors.contains("warning: hub_unreachable: "), "{errors}");

    hub.answer_all("429", "Retry-After: 1\r\n", "slow down");
    let seen = warnings(&document(&at(&hub.endpoint, &[])));
    assert!(seen.len() == 1 && seen[0].starts_with("hub_busy: ") && seen[0].contains("429"), "{seen:?}");
}

#[test]
fn the_cache_may_lie_elsewhere_than_the_token() {
    let hub = Hub::serve(Behaviour { files: golden_files(), ..Default::default() });
    let place = tempfile::tempdir().unwrap();
    let (home, cache) = (place.path().join("home"), place.path().join("models"));
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("token"), "hf_secret\n").unwrap();
    let variables = [
        ("HF_HOME", home.to_str().unwrap()),
        ("HF_HUB_CACHE", cache.to_str().unwrap()),
        ("HF_ENDPOINT", hub.endpoint.as_str()),
    ];
    document(&run(&variables, &[]));
    assert!(hub.log_with_tokens().iter().all(|(_, token)| *token));
    assert!(cache.join("models--owner--model/refs/main").is_file() && !home.join("hub").exists());
    document(&run(&variables, &["--offline"]));
    assert!(hub.log().is_empty());
}
