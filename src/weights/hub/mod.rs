//! Model repositories: what is missing is downloaded into the cache that huggingface_hub uses, every file from one commit.

mod cache;
mod client;
mod config;
mod download;
mod network;
mod refusal;
mod survey;
mod url;

pub use config::{HubConfig, Patience, Timeouts, Token};
pub use network::Network;
pub use survey::{RemoteFile, Survey, survey};

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use self::cache::Cache;
use self::client::{Client, Metadata};
use self::refusal::Refusal;
use super::builtin;
use super::safetensors::{self, INDEX, SINGLE};
use crate::error::BadInput;
use crate::events::{Event, Listener, Unit};

const DEFAULT_REVISION: &str = "main";

/// Files that a model may have beside config.json and its weights. Those that are there are read: what one of them says may change
/// what is computed.
const OPTIONAL: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
];

/// `owner/name` in the characters that the hub allows.
pub fn is_repository_id(id: &str) -> bool {
    let part = |part: &str| {
        let plain = part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        plain && !part.is_empty() && part.len() <= 96 && !part.starts_with(['-', '.']) && !part.contains("..")
    };
    id.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// What a caller wants of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// config.json alone.
    Config,
    /// Also the weights, and tokenizer and settings where there are any.
    Everything,
}

/// A repository's files at one commit.
pub struct Fetched {
    pub folder: PathBuf,
    pub commit: String,
}

/// Brings the files of `id` into the cache. Offline, or where the hub does not answer or is busy, a complete cache will do.
pub fn fetch(
    id: &str,
    revision: Option<&str>,
    need: Need,
    config: &HubConfig,
    events: &dyn Listener,
) -> Result<Fetched> {
    let remote = Remote::new(config, id, checked_revision(revision)?, events);
    let cached = Cached::of(&remote, need);
    if config.offline {
        return cached.complete().map_err(|missing| offline_error(id, &missing));
    }
    if let Some(fetched) = cached.pinned() {
        return Ok(fetched);
    }
    let fetch = || {
        let commit = remote.commit(cached.complete().is_err())?;
        let folder = remote.download_all(&commit, need)?;
        Ok(Fetched { folder, commit })
    };
    fetch().or_else(|failure| cached.instead_of(failure))
}

fn checked_revision(revision: Option<&str>) -> Result<&str, BadInput> {
    let revision = revision.unwrap_or(DEFAULT_REVISION);
    let is_bad = revision.is_empty()
        || revision.contains("..")
        || revision.starts_with('/')
        || !revision.bytes().all(|byte| byte.is_ascii_graphic());
    match is_bad {
        true => Err(BadInput::new(format!("`{revision}` is no branch, tag or commit"))),
        false => Ok(revision),
    }
}

/// The etags of cached files, by which the cache names their content; `None` where it holds plain files.
pub fn etags(files: &[PathBuf]) -> Option<String> {
    let etag = |path: &PathBuf| {
        let blob = std::fs::read_link(path).ok()?;
        Some(blob.file_name()?.to_string_lossy().into_owned())
    };
    files.iter().map(etag).collect::<Option<Vec<_>>>().map(|etags| etags.join(","))
}

fn offline_error(id: &str, missing: &[String]) -> anyhow::Error {
    BadInput::new(format!("offline, and the cache lacks {} of `{id}`", missing.join(", ")))
        .hint(format!("run once without `--offline`, {}", random_hint(id)))
        .into()
}

/// How to go on without the hub: ends with a command.
fn random_hint(id: &str) -> String {
    match builtin::by_hub_id(id) {
        Some(shape) => {
            format!(
                "or measure the same shape with random weights: quantbench --model-id {} --weights random",
                shape.hub_id
            )
        }
        None => "or put the model's config.json into a folder and measure its shape with random weights: \
                 quantbench --model-id ./FOLDER --weights random"
            .to_owned(),
    }
}

/// Why files of a repository could not be fetched.
enum Failure {
    Refused { refusal: Refusal, file: String },
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// Names the file that a refusal is about.
trait About<T> {
    fn about(self, file: &str) -> Result<T, Failure>;
}

impl<T> About<T> for Result<T, Refusal> {
    fn about(self, file: &str) -> Result<T, Failure> {
        self.map_err(|refusal| Failure::Refused { refusal, file: file.to_owned() })
    }
}

/// A repository as the cache has it.
struct Cached<'a> {
    remote: &'a Remote<'a>,
    need: Need,
}

impl<'a> Cached<'a> {
    fn of(remote: &'a Remote<'a>, need: Need) -> Self {
        Self { remote, need }
    }

    /// The files, or the names of those that are missing.
    fn complete(&self) -> Result<Fetched, Vec<String>> {
        let mut wanted = vec!["config.json".to_owned()];
        let commit = self.remote.cache.commit_of(self.remote.revision);
        let folder = self.remote.cache.snapshot(&commit);
        if self.need == Need::Everything {
            let shards = safetensors::read_index(&folder.join(INDEX)).map(|map| safetensors::shards(&map));
            match shards {
                Ok(shards) if !folder.join(SINGLE).is_file() => wanted.extend(shards),
                _ => wanted.push(SINGLE.to_owned()),
            }
        }
        wanted.retain(|file| !folder.join(file).is_file());
        match wanted.is_empty() {
            true => Ok(Fetched { folder, commit }),
            false => Err(wanted),
        }
    }

    /// The files of a revision that is a commit, and so never changes, where it is known of all of them what they are.
    fn pinned(&self) -> Option<Fetched> {
        let (revision, cache) = (self.remote.revision, &self.remote.cache);
        let is_commit = revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_known = |name: &&str| cache.file(revision, name).is_some() || cache.is_absent(revision, name);
        let fetched = self.complete().ok().filter(|fetched| is_commit && fetched.commit == revision)?;
        (self.need == Need::Config || OPTIONAL.iter().all(is_known)).then_some(fetched)
    }

    /// The cached commit where the hub is out of reach and the cache is whole, with a warning; else the error.
    fn instead_of(&self, failure: Failure) -> Result<Fetched> {
        let Remote { id, revision, config, events, .. } = *self.remote;
        let (refusal, file) = match failure {
            Failure::Refused { refusal, file } => (refusal, file),
            Failure::Other(error) => return Err(error),
        };
        match (refusal.outage(), self.complete()) {
            (Some((name, outage)), Ok(fetched)) => {
                let message = format!("{outage}: the cached commit {} of `{id}` is used", fetched.commit);
                events.on(Event::Warning { name: name.to_owned(), message });
                Ok(fetched)
            }
            _ => Err(refusal.explain(id, revision, &file, &config.endpoint)),
        }
    }
}

/// A repository as the hub has it.
struct Remote<'a> {
    config: &'a HubConfig,
    id: &'a str,
    revision: &'a str,
    events: &'a dyn Listener,
    client: Client<'a>,
    cache: Cache,
}

impl<'a> Remote<'a> {
    fn new(config: &'a HubConfig, id: &'a str, revision: &'a str, events: &'a dyn Listener) -> Self {
        Self { config, id, revision, events, client: Client::new(config), cache: Cache::new(&config.cache, id) }
    }

    /// The commit that the revision means now. All files are then taken from it, whatever is pushed meanwhile. One that cannot be
    /// had at once is asked for again where nothing stands in for it.
    fn commit(&self, is_needed: bool) -> Result<String, Failure> {
        let address = self.address(self.revision, "config.json");
        let mut retries = Retries::new(&self.config.patience);
        loop {
            match self.client.metadata(&address) {
                Ok(metadata) => return Ok(metadata.commit),
                // Where nobody is there at all, an answer a moment later would be a surprise.
                Err(refusal) if !is_needed || refusal.is_nobody() => return Err(refusal).about("config.json"),
                Err(refusal) => retries.pause(refusal, self.events).about("config.json")?,
            }
        }
    }

    fn download_all(&self, commit: &str, need: Need) -> Result<PathBuf, Failure> {
        self.file(commit, "config.json").about("config.json")?;
        if need == Need::Everything {
            for name in OPTIONAL {
                self.optional(commit, name)?;
            }
            if !self.optional(commit, SINGLE)? {
                for shard in self.shards(commit)? {
                    self.file(commit, &shard).about(&shard)?;
                }
            }
        }
        let noted = self.cache.set_commit(self.revision, commit);
        noted.map_err(|error| Refusal::of_cache(self.cache.path(), error)).about("refs")?;
        Ok(self.cache.snapshot(commit))
    }

    /// The names of the weights' files, by their index.
    fn shards(&self, commit: &str) -> Result<Vec<String>, Failure> {
        if !self.optional(commit, INDEX)? {
            let error = BadInput::new(format!("`{}` has neither `{SINGLE}` nor `{INDEX}`", self.id))
                .hint("weights must be safetensors; repositories with pytorch_model.bin alone cannot be read");
            return Err(Failure::Other(error.into()));
        }
        Ok(safetensors::shards(&safetensors::read_index(&self.cache.snapshot(commit).join(INDEX))?))
    }

    /// A file that may be absent: says whether it is there.
    fn optional(&self, commit: &str, name: &str) -> Result<bool, Failure> {
        if self.cache.file(commit, name).is_some() {
            return Ok(true);
        }
        let Some(metadata) = self.look(commit, name)? else { return Ok(false) };
        self.file_of(&metadata, commit, name).about(name)?;
        Ok(true)
    }

    /// Asks about a file that may be absent; what is known to be absent is not asked for again.
    fn look(&self, commit: &str, name: &str) -> Result<Option<Metadata>, Failure> {
        if self.cache.is_absent(commit, name) {
            return Ok(None);
        }
        match self.metadata(commit, name) {
            Ok(metadata) => Ok(Some(metadata)),
            Err(Refusal::NoSuchFile { is_certain }) => {
                if is_certain {
                    self.cache.note_absent(commit, name);
                }
                Ok(None)
            }
            Err(refusal) => Err(refusal).about(name),
        }
    }

    /// Asks about a file, again and again where that may help.
    fn metadata(&self, commit: &str, name: &str) -> Result<Metadata, Refusal> {
        let address = self.address(commit, name);
        let mut retries = Retries::new(&self.config.patience);
        loop {
            match self.client.metadata(&address) {
                Ok(metadata) => return Ok(metadata),
                Err(refusal) => retries.pause(refusal, self.events)?,
            }
        }
    }

    fn address(&self, revision: &str, name: &str) -> String {
        let (revision, name) = (url::escape_part(revision), url::escape_path(name));
        format!("{}/{}/resolve/{revision}/{name}", self.config.endpoint, self.id)
    }
}

/// Attempts that failed one after the other.
struct Retries<'a> {
    patience: &'a Patience,
    n_failed: usize,
    pause: Duration,
}

impl<'a> Retries<'a> {
    fn new(patience: &'a Patience) -> Self {
        Self { patience, n_failed: 0, pause: patience.pause }
    }

    /// Waits as long as the hub asks for, or longer each time. Fails with the refusal where another attempt would not help, or
    /// patience ends.
    fn pause(&mut self, refusal: Refusal, events: &dyn Listener) -> Result<(), Refusal> {
        let asked = match &refusal {
            Refusal::Busy { pause, .. } => *pause,
            _ => None,
        };
        let is_over =
            self.n_failed >= self.patience.retries || asked.is_some_and(|asked| asked > self.patience.longest_asked);
        if is_over || !refusal.may_pass() {
            return Err(refusal);
        }
        self.n_failed += 1;
        let pause = asked.unwrap_or(self.pause);
        self.pause = (self.pause * 2).min(self.patience.longest_pause);
        let label = format!("{}; trying again in {} s", refusal.brief(), pause.as_secs_f64().ceil());
        events.on(Event::Begin { label, total: self.patience.retries as u64, unit: Unit::Runs });
        events.on(Event::Progress { done: self.n_failed as u64 });
        (self.patience.sleep)(pause);
        events.on(Event::End);
        Ok(())
    }
}
