//! What a run would download, without downloading it.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{
    About, Cached, Failure, Fetched, HubConfig, INDEX, Need, OPTIONAL, Remote, SINGLE, checked_revision, offline_error,
};
use crate::events::Listener;

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RemoteFile {
    pub name: String,
    /// `None` where the hub does not report it.
    pub bytes: Option<u64>,
    pub is_cached: bool,
}

/// A repository at one commit, with its config.json in the cache.
pub struct Survey {
    pub fetched: Fetched,
    /// All that a run needs.
    pub files: Vec<RemoteFile>,
}

/// Looks what [`super::fetch`] would bring. What says that is fetched: config.json, and the index of shards where there is one.
pub fn survey(
    id: &str,
    revision: Option<&str>,
    need: Need,
    config: &HubConfig,
    events: &dyn Listener,
) -> Result<Survey> {
    let remote = Remote::new(config, id, checked_revision(revision)?, events);
    let cached = Cached::of(&remote, need);
    if config.offline {
        return cached.complete().map(from_cache).map_err(|missing| offline_error(id, &missing));
    }
    if let Some(fetched) = cached.pinned() {
        return Ok(from_cache(fetched));
    }
    let survey = || remote.survey(remote.commit(cached.complete().is_err())?, need);
    survey().or_else(|failure| cached.instead_of(failure).map(from_cache))
}

fn bytes_of(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|metadata| metadata.len())
}

/// A cache that has everything.
fn from_cache(fetched: Fetched) -> Survey {
    let entries = std::fs::read_dir(&fetched.folder).into_iter().flatten().flatten();
    let mut files: Vec<RemoteFile> = entries
        .map(|entry| RemoteFile {
            name: entry.file_name().to_string_lossy().into_owned(),
            bytes: bytes_of(&entry.path()),
            is_cached: true,
        })
        .collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Survey { fetched, files }
}

impl Remote<'_> {
    fn survey(&self, commit: String, need: Need) -> Result<Survey, Failure> {
        let config = self.file(&commit, "config.json").about("config.json")?;
        let folder = self.cache.snapshot(&commit);
        let mut files = vec![local("config.json", &config)];
        if need == Need::Everything {
            for name in OPTIONAL {
                files.extend(self.survey_file(&commit, name)?);
            }
            match self.survey_file(&commit, SINGLE)? {
                Some(single) => files.push(single),
                None => files.extend(self.survey_shards(&commit)?),
            }
        }
        Ok(Survey { fetched: Fetched { folder, commit }, files })
    }

    fn survey_shards(&self, commit: &str) -> Result<Vec<RemoteFile>, Failure> {
        let shards = self.shards(commit)?;
        let mut files = vec![local(INDEX, &self.cache.snapshot(commit).join(INDEX))];
        for shard in shards {
            files.extend(self.survey_file(commit, &shard)?);
        }
        Ok(files)
    }

    /// `None` where the repository has no such file.
    fn survey_file(&self, commit: &str, name: &str) -> Result<Option<RemoteFile>, Failure> {
        if let Some(path) = self.cache.file(commit, name) {
            return Ok(Some(local(name, &path)));
        }
        let metadata = self.look(commit, name)?;
        Ok(metadata.map(|metadata| RemoteFile { name: name.to_owned(), bytes: metadata.bytes, is_cached: false }))
    }
}

fn local(name: &str, path: &Path) -> RemoteFile {
    RemoteFile { name: name.to_owned(), bytes: bytes_of(path), is_cached: true }
}
