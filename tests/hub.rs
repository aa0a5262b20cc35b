//! The hub as it answers: a loopback server with commits, etags, ranges, redirects, refusals and broken connections.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use quantbench::error;
use quantbench::events::{Event, Listener, Silent, Unit};
use quantbench::weights::hub::{HubConfig, Token};
use quantbench::weights::spec::{MatrixSpec, Role};
use quantbench::weights::{self, Checkpoint, Request, SourceKind, WeightsChoice};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SECRET: &str = "hf_secret";
const ID: &str = "owner/model";

/// What the server holds and how it behaves.
#[derive(Default)]
struct Behaviour {
    files: BTreeMap<&'static str, Vec<u8>>,
    /// Answer to every request without the token [`SECRET`]; a 403 to those with it too.
    refuse: Option<Refuse>,
    /// The next transfer of this many bytes or more breaks off after that many; 0 is never.
    break_after: AtomicUsize,
    /// Sends files whole, whatever range is asked for.
    ignores_ranges: bool,
}

struct Refuse {
    status: u16,
    code: &'static str,
    message: &'static str,
    /// Tells HEAD alone the code.
    only_head: bool,
}

struct Hub {
    endpoint: String,
    behaviour: Arc<Behaviour>,
    /// Method, path and range of each request.
    log: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn serve(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let hub = Self { endpoint, behaviour: Arc::new(behaviour), log: Arc::default() };
        let (endpoint, behaviour, log) = (hub.endpoint.clone(), hub.behaviour.clone(), hub.log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client may hang up at any time.
                let _ = answer(stream, &endpoint, &behaviour, &log);
            }
        });
        hub
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

fn answer(mut stream: TcpStream, endpoint: &str, hub: &Behaviour, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut headers = BTreeMap::new();
    while let Some(line) = lines.next().transpose()?.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or_default();
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let range = headers.get("range").cloned().unwrap_or_default();
    log.lock().unwrap().push(format!("{method} {path} {range}"));

    let (prefix, name) = path.rsplit_once('/').unwrap_or_default();
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        let head =
            format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        let whole = hub.break_after.load(Ordering::SeqCst);
        match method {
            "HEAD" => Ok(()),
            _ if whole > 0 && body.len() >= whole => {
                hub.break_after.store(0, Ordering::SeqCst);
                stream.write_all(&body[..whole])
            }
            _ => stream.write_all(body),
        }
    };
    let at_hub = !prefix.starts_with("/blobs");
    let welcome = headers.get("authorization").is_some_and(|value| value == &format!("Bearer {SECRET}"));
    if let Some(refuse) = hub.refuse.as_ref().filter(|refuse| at_hub && (!welcome || refuse.status == 403)) {
        let told = !refuse.code.is_empty() && (method == "HEAD" || !refuse.only_head);
        let code = if told { format!("X-Error-Code: {}\r\n", refuse.code) } else { String::new() };
        let explained = format!("{code}X-Error-Message: {}\r\n", refuse.message);
        return reply(&refuse.status.to_string(), &explained, b"");
    }
    if at_hub && !prefix.ends_with("/main") && !prefix.ends_with(COMMIT) {
        return reply("404", "X-Error-Code: RevisionNotFound\r\n", b"");
    }
    let Some(file) = hub.files.get(name) else {
        return reply("404", "X-Error-Code: EntryNotFound\r\n", b"");
    };
    let facts = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"etag-{}\"\r\n", name.replace('.', "-"));
    let large = name.ends_with(".safetensors");
    match (at_hub, large, prefix.starts_with("/relative")) {
        // Large files lie elsewhere, and small ones behind a relative redirect.
        (true, true, _) => reply("302", &format!("{facts}Location: {endpoint}/blobs/{name}\r\n"), b""),
        (true, false, false) => reply("307", &format!("{facts}Location: /relative{path}\r\n"), b""),
        _ => {
            let (from, to) = range.trim_start_matches("bytes=").split_once('-').unwrap_or(("0", ""));
            let from: usize = from.parse().unwrap_or(0);
            if hub.ignores_ranges && to.is_empty() {
                return reply("200", &facts, file);
            }
            let to = to.parse().map_or(file.len(), |to: usize| (to + 1).min(file.len()));
            if from >= to {
                return reply("416", "", b"");
            }
            let content = format!("Content-Range: bytes {from}-{}/{}\r\n{facts}", to - 1, file.len());
            reply("206", &content, &file[from..to])
        }
    }
}

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

fn config(endpoint: &str, home: &Path, token: Option<&str>) -> HubConfig {
    HubConfig {
        endpoint: endpoint.to_owned(),
        home: home.to_owned(),
        token: token.map(|token| Token::new(token, "a test").unwrap()),
        offline: false,
        retries: 0,
    }
}

fn request(id: &str, weights: WeightsChoice) -> Request {
    Request {
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
    MatrixSpec { name: name.to_owned(), n, k: 1, role: Role::Projection }
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
    assert!(hub.log().iter().all(|line| !line.contains("/blobs/") || line.ends_with("bytes=0-0")), "weights were sent");

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
fn a_file_of_the_wrong_length_does_not_stay_in_the_cache() {
    let hub = Hub::serve(Behaviour { files: files(), ignores_ranges: true, ..Default::default() });
    let home = tempfile::tempdir().unwrap();
    let blobs = home.path().join("hub/models--owner--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("etag-model-safetensors.part"), [0; 10]).unwrap();
    let config = config(&hub.endpoint, home.path(), None);
    let error = open(&config, &Silent).err().expect("ten bytes too many");
    assert!(error.to_string().contains("bytes came of"), "{error}");
    let opened = open(&config, &Silent).unwrap();
    opened.source(&[matrix("a.weight", 1000)], &[]).unwrap();
}

#[test]
fn a_part_that_is_already_whole_does_not_block() {
    let hub = Hub::serve(Behaviour { files: files(), ..Default::default() });
    for length in [0, 400] {
        let home = tempfile::tempdir().unwrap();
        let blobs = home.path().join("hub/models--owner--model/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let whole = [hub.behaviour.files["model.safetensors"].as_slice(), &vec![0; length]].concat();
        fs::write(blobs.join("etag-model-safetensors.part"), whole).unwrap();
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
    let at = |revision: &str| Request { revision: Some(revision.to_owned()), ..request(ID, WeightsChoice::Auto) };
    let error = weights::open_with(&at("v9"), &config, &Silent).err().unwrap();
    assert!(error.to_string().contains("`v9`"), "{error}");
    weights::open_with(&at(COMMIT), &config, &Silent).unwrap();
    assert!(weights::open_with(&at("../../x"), &config, &Silent).is_err());
    // A commit that another tool cached has a snapshot and no reference.
    fs::remove_dir_all(home.path().join("hub/models--owner--model/refs")).unwrap();
    let offline = HubConfig { offline: true, ..config };
    weights::open_with(&at(COMMIT), &offline, &Silent).unwrap();
}

/// Nobody listens there any more.
fn refused_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}
