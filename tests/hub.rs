//! The hub as it answers: a loopback server with commits, etags, ranges, redirects, refusals and broken connections.

#[path = "hub/certificates.rs"]
mod certificates;
#[path = "hub/command.rs"]
mod command;
#[path = "hub/outages.rs"]
mod outages;
#[path = "hub/server.rs"]
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quantbench::error;
use quantbench::events::{Event, Listener, Silent, Unit};
use quantbench::weights::hub::{HubConfig, Patience, Token};
use quantbench::weights::spec::{MatrixSpec, Role};
use quantbench::weights::{self, Checkpoint, ModelRequest, SourceKind, WeightsChoice};

use self::server::{Behaviour, Hub, Refuse, refused_endpoint};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SECRET: &str = "hf_secret";
const ID: &str = "owner/model";

/// A file of one fp16 matrix `[n, 1]`.
fn safetensors(name: &str, n: usize) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F16","shape":[{n},1],"data_offsets":[0,{}]}}}}"#, 2 * n);
    let data = (0..n).flat_map(|i| half::f16::from_f32(i as f32).to_le_bytes());
    (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).chain(data).collect()
}

fn files() -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("config.json", br#"{"model_type": "llama"}"#.to_vec()),
        ("generation_config.json", br#"{"eos_token_id": 2}"#.to_vec()),
        ("model.safetensors", safetensors("a.weight", 1000)),
    ])
}

/// The pauses that were asked for; none of them is taken.
#[derive(Clone, Default)]
struct Pauses(Arc<Mutex<Vec<Duration>>>);

impl Pauses {
    fn taken(&self) -> Vec<Duration> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// The usual patience without its pauses.
fn impatient(pauses: &Pauses) -> Patience {
    let pauses = pauses.clone();
    let sleep = move |pause| {
        pauses.0.lock().unwrap().push(pause);
        std::thread::yield_now();
    };
    Patience { sleep: Arc::new(sleep), ..Patience::default() }
}

fn config(endpoint: &str, home: &Path, token: Option<&str>) -> HubConfig {
    let patience = Patience { retries: 0, ..impatient(&Pauses::default()) };
    let token = token.map(|token| Token::new(token, "a test").unwrap());
    HubConfig { token, patience, ..HubConfig::new(endpoint, home.join("hub")) }
}

fn request(id: &str, weights: WeightsChoice) -> ModelRequest {
    ModelRequest {
        model_id: id.to_owned(),
        revision: None,
        offline: false,
        weights,
        seed: 0,
        outlier_channels: 0,
        strict_config: false,
    }
}

fn open(config: &HubConfig, events: &dyn Listener) -> anyhow::Result<Checkpoint> {
    weights::open_with(&request(ID, WeightsChoice::Auto), config, events)
}

fn matrix(name: &str, n: usize) -> MatrixSpec {
    MatrixSpec { name: name.to_owned(), n, k: 1, role: Role::Projection, others: Vec::new(), held: None }
}

#[derive(Default)]
struct Heard(Mutex<Vec<Event>>);

impl Listener for Heard {
    fn on(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

#[test]
fn a_repository_is_downloaded_once_with_progress_and_then_works_offline() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let mut config = config(&hub.endpoint, home.path(), None);
    let heard = Heard::default();
    let opened = open(&config, &heard).unwrap();
    assert_eq!((opened.id.as_str(), opened.revision.as_deref()), (ID, Some(COMMIT)));
    assert!(opened.generation_config.is_some() && opened.tokenizer.is_none());
    let source = opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
    assert_eq!((source.info().source, source.info().hash.as_str()), (SourceKind::Hub, "etag-model-safetensors"));

    let total = hub.behaviour.files["model.safetensors"].len() as u64;
    let heard = heard.0.into_inner().unwrap();
    let begin = Event::Begin { label: "download model.safetensors".to_owned(), total, unit: Unit::Bytes };
    let at = heard.iter().position(|event| *event == begin).expect("the weights' progress");
    assert_eq!(heard[at + 1..], [Event::Progress { done: total }, Event::End]);

    hub.log();
    open(&config, &Silent).unwrap();
    assert!(hub.log().iter().all(|line| !line.contains("safetensors")), "cached weights are asked for again");
    config.offline = true;
    let opened = open(&config, &Silent).unwrap();
    assert_eq!(opened.revision.as_deref(), Some(COMMIT));
    assert!(hub.log().is_empty(), "offline asks nothing");

    // Gone from the net, but whole in the cache: told, not hidden.
    let config = HubConfig { endpoint: refused_endpoint(), offline: false, ..config };
    let heard = Heard::default();
    open(&config, &heard).unwrap();
    assert!(
        matches!(&heard.0.into_inner().unwrap()[..], [Event::Warning { name, message }] if name == "hub_unreachable" && message.contains(COMMIT))
    );
}

#[test]
fn shards_come_by_index_and_random_weights_fetch_config_json_alone() {
    let index = br#"{"weight_map":{"a.weight":"one.safetensors","b.weight":"two.safetensors"}}"#;
    let mut files = files();
    files.remove("model.safetensors");
    files.insert("model.safetensors.index.json", index.to_vec());
    files.insert("one.safetensors", safetensors("a.weight", 3));
    files.insert("two.safetensors", safetensors("b.weight", 5));
    let hub = Hub::serve(Behaviour { files, ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);

    let random = weights::open_with(&request(ID, WeightsChoice::Random), &config, &Silent).unwrap();
    assert_eq!(random.source(&[matrix("a.weight", 3)], &[]).unwrap().info().source, SourceKind::Random);
    assert!(hub.log().iter().all(|line| line.contains("config.json") && !line.contains("generation")));

    let opened = open(&config, &Silent).unwrap();
    let source = opened.source(&[matrix("a.weight", 3), matrix("b.weight", 5)], &[]).unwrap();
    assert_eq!(source.info().hash, "etag-one-safetensors,etag-two-safetensors");
}

#[test]
fn a_survey_downloads_nothing_but_what_says_what_is_needed() {
    let mut behaviour = Behaviour { files: files(), ..Default::default() };
    behaviour.files.insert("tokenizer.json", br#"{"not": "read"}"#.to_vec());
    let bytes = |behaviour: &Behaviour, name: &str| behaviour.files[name].len() as u64;
    let weights_bytes = bytes(&behaviour, "model.safetensors");
    let tokenizer_bytes = bytes(&behaviour, "tokenizer.json");
    let hub = Hub::serve(behaviour);
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    let survey = || weights::survey_with(&request(ID, WeightsChoice::Auto), &config, &Silent).unwrap();
    let surveyed = survey();
    assert_eq!(surveyed.checkpoint.revision.as_deref(), Some(COMMIT));
    let missing = |surveyed: &weights::Surveyed| {
        let files = surveyed.files.iter().filter(|file| !file.is_cached);
        files.map(|file| (file.name.clone(), file.bytes)).collect::<Vec<_>>()
    };
    let name = |name: &str, bytes: u64| (name.to_owned(), Some(bytes));
    let generation_bytes = hub.behaviour.files["generation_config.json"].len() as u64;
    let all = [
        name("tokenizer.json", tokenizer_bytes),
        name("generation_config.json", generation_bytes),
        name("model.safetensors", weights_bytes),
    ];
    assert_eq!(missing(&surveyed), all);
    assert!(hub.log().iter().all(|line| !line.contains("/blobs/") || line.starts_with("HEAD")), "weights were sent");

    let random = weights::survey_with(&request(ID, WeightsChoice::Random), &config, &Silent).unwrap();
    assert_eq!((missing(&random), random.files.len()), (vec![], 1));
}

#[test]
fn a_survey_of_shards_and_of_a_full_cache() {
    let index = br#"{"weight_map":{"a.weight":"one.safetensors","b.weight":"two.safetensors"}}"#;
    let mut files = files();
    files.remove("model.safetensors");
    files.insert("model.safetensors.index.json", index.to_vec());
    files.insert("one.safetensors", safetensors("a.weight", 3));
    files.insert("two.safetensors", safetensors("b.weight", 5));
    let hub = Hub::serve(Behaviour { files, ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let mut config = config(&hub.endpoint, home.path(), None);
    let missing = |config: &HubConfig| {
        let surveyed = weights::survey_with(&request(ID, WeightsChoice::Auto), config, &Silent).unwrap();
        surveyed.files.into_iter().filter(|file| !file.is_cached).map(|file| file.name).collect::<Vec<_>>()
    };
    assert_eq!(missing(&config), ["generation_config.json", "one.safetensors", "two.safetensors"]);
    open(&config, &Silent).unwrap();
    assert!(missing(&config).is_empty());
    config.offline = true;
    assert!(missing(&config).is_empty());
    let config = HubConfig { endpoint: refused_endpoint(), offline: false, ..config };
    assert!(missing(&config).is_empty(), "a cache that is whole needs no hub");
}

#[test]
fn a_broken_download_is_resumed() {
    let hub = Hub::serve(Behaviour { files: files(), break_after: AtomicUsize::new(1500), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    let heard = Heard::default();
    let error = open(&config, &heard).err().expect("a broken download");
    let hint = error::hint(&error).unwrap();
    assert!(hint.contains("goes on where it stopped"), "{error}: {hint}");
    assert_eq!(heard.0.into_inner().unwrap().last(), Some(&Event::End));

    hub.log();
    let opened = open(&config, &Silent).unwrap();
    assert!(hub.log().iter().any(|line| line == "GET /blobs/model.safetensors bytes=1500-"));
    let source = opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
    let mut last = [half::f16::ZERO];
    source.read_rows("a.weight", 999..1000, &mut last).unwrap();
    assert_eq!(last[0].to_f32(), 999.0);
}

#[test]
fn a_server_that_ignores_ranges_sends_the_file_anew() {
    let hub = Hub::serve(Behaviour { files: files(), ignores_ranges: true, ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let blobs = home.path().join("hub/models--owner--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("etag-model-safetensors.incomplete"), [0; 10]).unwrap();
    let opened = open(&config(&hub.endpoint, home.path(), None), &Silent).unwrap();
    opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
    assert_eq!(fs::read(blobs.join("etag-model-safetensors")).unwrap(), hub.behaviour.files["model.safetensors"]);
}

#[test]
fn a_part_that_is_already_whole_does_not_block() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    for length in [0, 400] {
        let home = tempfile::tempdir().unwrap();
        let blobs = home.path().join("hub/models--owner--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let whole = [hub.behaviour.files["model.safetensors"].as_slice(), &vec![0; length]].concat();
        fs::write(blobs.join("etag-model-safetensors.incomplete"), whole).unwrap();
        let opened = open(&config(&hub.endpoint, home.path(), None), &Silent).unwrap();
        opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
    }
}

#[test]
fn refusals_are_told_apart_and_never_show_the_token() {
    let refuse = |status, code, message| Refuse { status, code, message, only_head: false };
    let gated = |status| Refuse { status, code: "GatedRepo", message: "", only_head: true };
    let cases: Vec<(Refuse, Option<&str>, &[&str])> = vec![
        (gated(401), None, &["no access token", "accept", "/owner/model", "HF_TOKEN"]),
        (gated(403), Some(SECRET), &["licence", "has not been accepted", "/owner/model"]),
        (refuse(401, "", ""), None, &["needs an access token"]),
        (
            refuse(401, "", "Invalid credentials in Authorization header"),
            Some("hf_wrong"),
            &["does not know the access token"],
        ),
        (refuse(401, "", ""), Some("hf_wrong"), &["does not know the access token"]),
        (refuse(401, "RepoNotFound", ""), None, &["no repository", "private"]),
        (refuse(404, "RepoNotFound", ""), Some("hf_other"), &["no repository", "may see"]),
        (refuse(404, "EntryNotFound", ""), None, &["no file `config.json`"]),
        (refuse(403, "", ""), Some(SECRET), &["may not read"]),
        (refuse(500, "", ""), None, &["answered 500"]),
    ];
    for (refuse, token, wanted) in cases {
        let case = format!("{} {} with {token:?}", refuse.status, refuse.code);
        let hub = Hub::serve(Behaviour { files: files(), refuse: Some(refuse), ..Default::default() });
        let home = tempfile::tempdir().unwrap();
        let error = open(&config(&hub.endpoint, home.path(), token), &Silent).err().expect(&case);
        let shown = format!("{error:#} {error:?} {}", error::hint(&error).expect(&case));
        for part in wanted {
            assert!(shown.contains(part), "{case}: `{part}` is not in `{shown}`");
        }
        assert!(shown.ends_with("--weights random"), "{case}: {shown}");
        assert!(!shown.contains("hf_"), "{case}: {shown}");
    }
}

#[test]
fn the_token_opens_what_is_closed() {
    let refuse = Refuse { status: 401, code: "GatedRepo", message: "", only_head: false };
    let hub = Hub::serve(Behaviour { files: files(), refuse: Some(refuse), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    open(&config(&hub.endpoint, home.path(), Some(SECRET)), &Silent).unwrap();
    assert!(Token::new("hf_a\nb", "`HF_TOKEN`").err().is_some_and(|error| !error.to_string().contains("hf_a")));
}

#[test]
fn without_the_hub_the_hint_ends_with_the_same_shape_at_random() {
    let home = tempfile::tempdir().unwrap();
    let offline = HubConfig { offline: true, ..config(&refused_endpoint(), home.path(), None) };
    let unreachable = config(&refused_endpoint(), home.path(), None);
    for (config, wanted) in [(&offline, "config.json, model.safetensors"), (&unreachable, "cannot be reached")] {
        let error =
            weights::open_with(&request("microsoft/phi-2", WeightsChoice::Auto), config, &Silent).err().unwrap();
        assert!(error.to_string().contains(wanted), "{error}");
        let hint = error::hint(&error).unwrap();
        assert!(hint.ends_with("quantbench --model-id microsoft/phi-2 --weights random"), "{hint}");
        weights::open_with(&request("microsoft/phi-2", WeightsChoice::Random), config, &Silent).unwrap();
    }
}

#[test]
fn a_missing_revision_is_named() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    let at = |revision: &str| ModelRequest { revision: Some(revision.to_owned()), ..request(ID, WeightsChoice::Auto) };
    let error = weights::open_with(&at("v9"), &config, &Silent).err().unwrap();
    assert!(error.to_string().contains("`v9`"), "{error}");
    weights::open_with(&at(COMMIT), &config, &Silent).unwrap();
    assert!(weights::open_with(&at("../../x"), &config, &Silent).is_err());
    // A commit has a snapshot and no reference.
    assert!(!home.path().join("hub/models--owner--model/refs").exists());
    let offline = HubConfig { offline: true, ..config };
    weights::open_with(&at(COMMIT), &offline, &Silent).unwrap();
}
