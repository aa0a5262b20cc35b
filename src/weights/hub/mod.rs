//! Model repositories: what is missing is downloaded into hf-hub's cache, every file from one commit.

mod config;
mod refusal;
mod survey;

pub use config::{HubConfig, Token};
pub use survey::{RemoteFile, Survey, survey};

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Repo, RepoType};

use self::refusal::{Answer, Refusal};
use super::builtin;
use super::safetensors::{self, INDEX, SINGLE};
use crate::error::BadInput;
use crate::events::{Event, Listener, Unit};

const DEFAULT_REVISION: &str = "main";

/// Files that a model may have beside config.json and its weights.
const OPTIONAL: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"];

/// A host that drops packets should not hold a command for the minutes that TCP takes to give up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Before the first further attempt; each later one waits that much longer.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Progress events are this far apart at least.
const PROGRESS_BYTES: u64 = 4 << 20;

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

/// Brings the files of `id` into the cache. Offline, or where the hub cannot be reached, a complete cache will do.
pub fn fetch(
    id: &str,
    revision: Option<&str>,
    need: Need,
    config: &HubConfig,
    events: &dyn Listener,
) -> Result<Fetched> {
    let revision = checked_revision(revision)?;
    let cached = Cached { config, id, revision, need };
    if config.offline {
        return cached.complete().map_err(|missing| offline_error(id, &missing));
    }
    let remote = Remote::new(config, id, revision, events)?;
    match remote.commit() {
        Ok(commit) => {
            let folder = remote.download(&commit, need)?;
            Ok(Fetched { folder, commit })
        }
        Err(refusal) => match (refusal, cached.complete()) {
            (Refusal::Unreachable { reason }, Ok(fetched)) => {
                let message = format!(
                    "the hub at `{}` cannot be reached ({reason}): the cached commit {} of `{id}` is used",
                    config.endpoint, fetched.commit
                );
                events.on(Event::Warning { name: "hub_unreachable".to_owned(), message });
                Ok(fetched)
            }
            (refusal, _) => Err(remote.explain(refusal, "config.json")),
        },
    }
}

fn checked_revision(revision: Option<&str>) -> Result<&str, BadInput> {
    let revision = revision.unwrap_or(DEFAULT_REVISION);
    match revision.is_empty() || revision.contains("..") || !revision.bytes().all(|byte| byte.is_ascii_graphic()) {
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

/// A repository as the cache has it.
struct Cached<'a> {
    config: &'a HubConfig,
    id: &'a str,
    revision: &'a str,
    need: Need,
}

impl Cached<'_> {
    /// The files, or the names of those that are missing.
    fn complete(&self) -> Result<Fetched, Vec<String>> {
        let mut wanted = vec!["config.json".to_owned()];
        let repo = Repo::with_revision(self.id.to_owned(), RepoType::Model, self.revision.to_owned());
        let root = self.config.cache().path().join(repo.folder_name());
        let commit = std::fs::read_to_string(root.join("refs").join(self.revision))
            .map_or_else(|_| self.revision.to_owned(), |commit| commit.trim().to_owned());
        let folder = root.join("snapshots").join(&commit);
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
}

/// A repository as the hub has it.
struct Remote<'a> {
    config: &'a HubConfig,
    id: &'a str,
    revision: &'a str,
    events: &'a dyn Listener,
    api: Api,
    agent: ureq::Agent,
}

impl<'a> Remote<'a> {
    fn new(config: &'a HubConfig, id: &'a str, revision: &'a str, events: &'a dyn Listener) -> Result<Self> {
        let api = ApiBuilder::from_cache(config.cache())
            .with_endpoint(config.endpoint.clone())
            .with_token(config.token.as_ref().map(|token| token.secret().to_owned()))
            // hf-hub's own retries can append a file to its first part; a fresh call looks at the part's length again.
            .with_retries(0)
            .with_progress(false)
            .build()
            .context("setting up hf-hub")?;
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .build()
            .into();
        Ok(Self { config, id, revision, events, api, agent })
    }

    /// The commit that the revision means now. All files are then taken from it, whatever is pushed meanwhile.
    fn commit(&self) -> Result<String, Refusal> {
        let answer = self.ask(self.revision, "config.json")?;
        let plain = |commit: &String| !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let commit = match answer.commit {
            Some(commit) => commit,
            // Behind relative redirects.
            None => {
                let url = self.repo(self.revision).url("config.json");
                self.api.metadata(&url).map_err(Refusal::of)?.commit_hash().to_owned()
            }
        };
        if !plain(&commit) {
            return Err(Refusal::Other { reason: "its X-Repo-Commit header holds no commit".to_owned() });
        }
        Ok(commit)
    }

    fn download(&self, commit: &str, need: Need) -> Result<PathBuf> {
        let config = self.file(commit, "config.json")?;
        let folder = config.parent().map(Path::to_owned).context("config.json lies in no folder")?;
        if need == Need::Everything {
            for name in OPTIONAL {
                self.optional(commit, name)?;
            }
            if !self.optional(commit, SINGLE)? {
                self.shards(commit, &folder)?;
            }
        }
        self.cache_repo(self.revision).create_ref(commit).context("writing the cache's reference")?;
        Ok(folder)
    }

    fn shards(&self, commit: &str, folder: &Path) -> Result<()> {
        if !self.optional(commit, INDEX)? {
            return Err(BadInput::new(format!("`{}` has neither `{SINGLE}` nor `{INDEX}`", self.id))
                .hint("weights must be safetensors; repositories with pytorch_model.bin alone cannot be read")
                .into());
        }
        for shard in safetensors::shards(&safetensors::read_index(&folder.join(INDEX))?) {
            self.file(commit, &shard)?;
        }
        Ok(())
    }

    /// A file that may be absent: says whether it is there.
    fn optional(&self, commit: &str, name: &str) -> Result<bool> {
        if self.cached(commit, name).is_none() {
            match self.ask(commit, name) {
                Ok(_) => {}
                Err(Refusal::NoSuchFile) => return Ok(false),
                Err(refusal) => return Err(self.explain(refusal, name)),
            }
        }
        self.file(commit, name)?;
        Ok(true)
    }

    /// A file from the cache or the hub.
    fn file(&self, commit: &str, name: &str) -> Result<PathBuf> {
        if let Some(path) = self.cached(commit, name) {
            return Ok(path);
        }
        let mut attempt = 0;
        loop {
            match self.download_file(commit, name) {
                Ok(path) => return Ok(path),
                Err(Refusal::Interrupted { .. } | Refusal::Unreachable { .. }) if attempt < self.config.retries => {
                    attempt += 1;
                    std::thread::sleep(RETRY_PAUSE * attempt as u32);
                }
                Err(Refusal::Denied { status }) => {
                    let refusal = self.ask(commit, name).err().unwrap_or(Refusal::Denied { status });
                    return Err(self.explain(refusal, name));
                }
                Err(refusal) => return Err(self.explain(refusal, name)),
            }
        }
    }

    /// One attempt, from where an earlier one stopped.
    fn download_file(&self, commit: &str, name: &str) -> Result<PathBuf, Refusal> {
        let repo = self.repo(commit);
        let total = Cell::new(0);
        let download = || repo.download_with_progress(name, Bar::new(name, &total, self.events));
        let result = match download() {
            // A part that is already whole, or longer than the file, cannot be resumed.
            Err(error) if self.forget_part(commit, name, &error) => download(),
            other => other,
        };
        let path = result.map_err(Refusal::of)?;
        let bytes = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if bytes != total.get() {
            // hf-hub keeps what it was sent: a server that ignores ranges appends the whole file to its first part.
            for file in [path.canonicalize().unwrap_or_default(), path] {
                let _ = std::fs::remove_file(file);
            }
            return Err(Refusal::Interrupted { reason: format!("{bytes} bytes came of {}", total.get()) });
        }
        Ok(path)
    }

    fn forget_part(&self, commit: &str, name: &str, error: &ApiError) -> bool {
        let unsatisfiable = match error {
            ApiError::InvalidResume => true,
            ApiError::RequestError(error) => matches!(**error, ureq::Error::StatusCode(416)),
            _ => false,
        };
        let metadata = unsatisfiable.then(|| self.api.metadata(&self.repo(commit).url(name)));
        match metadata {
            Some(Ok(metadata)) => {
                let part = self.cache_repo(commit).blob_path(metadata.etag()).with_extension("part");
                std::fs::remove_file(part).is_ok()
            }
            _ => false,
        }
    }

    fn cached(&self, commit: &str, name: &str) -> Option<PathBuf> {
        let path = self.cache_repo(commit).pointer_path(commit).join(name);
        path.is_file().then_some(path)
    }

    fn repo(&self, revision: &str) -> hf_hub::api::sync::ApiRepo {
        self.api.repo(Repo::with_revision(self.id.to_owned(), RepoType::Model, revision.to_owned()))
    }

    fn cache_repo(&self, revision: &str) -> hf_hub::CacheRepo {
        self.config.cache().repo(Repo::with_revision(self.id.to_owned(), RepoType::Model, revision.to_owned()))
    }

    /// Asks for the first byte of a file. hf-hub's own errors hide the header that tells refusals apart.
    fn ask(&self, revision: &str, name: &str) -> Result<Answer, Refusal> {
        let url = self.repo(revision).url(name);
        let authorization = self.config.token.as_ref().map(|token| format!("Bearer {}", token.secret()));
        let signed = |request: ureq::RequestBuilder<ureq::typestate::WithoutBody>| match &authorization {
            Some(value) => request.header("Authorization", value),
            None => request,
        };
        let answer = Answer::of(signed(self.agent.get(&url)).header("Range", "bytes=0-0").call())?;
        let unexplained = answer.status >= 400 && answer.error_code.is_none();
        let answer = match unexplained {
            true => Answer::of(signed(self.agent.head(&url)).call())?,
            false => answer,
        };
        answer.accept(self.config.token.is_some())
    }

    fn explain(&self, refusal: Refusal, file: &str) -> anyhow::Error {
        refusal.explain(self.id, self.revision, file, &self.config.endpoint)
    }
}

/// hf-hub's progress as events.
struct Bar<'a> {
    label: String,
    /// Of the file, for the caller.
    total: &'a Cell<u64>,
    events: &'a dyn Listener,
    begun: bool,
    done: u64,
    told: u64,
}

impl<'a> Bar<'a> {
    fn new(name: &str, total: &'a Cell<u64>, events: &'a dyn Listener) -> Self {
        Self { label: format!("download {name}"), total, events, begun: false, done: 0, told: 0 }
    }
}

impl Progress for Bar<'_> {
    /// Called again for every attempt.
    fn init(&mut self, size: usize, _filename: &str) {
        self.total.set(size as u64);
        if !self.begun {
            self.events.on(Event::Begin { label: self.label.clone(), total: size as u64, unit: Unit::Bytes });
        }
        (self.begun, self.done, self.told) = (true, 0, 0);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        if self.done - self.told >= PROGRESS_BYTES {
            self.told = self.done;
            self.events.on(Event::Progress { done: self.done });
        }
    }

    fn finish(&mut self) {
        self.events.on(Event::Progress { done: self.done });
    }
}

impl Drop for Bar<'_> {
    /// Also where a download fails.
    fn drop(&mut self) {
        if self.begun {
            self.events.on(Event::End);
        }
    }
}
