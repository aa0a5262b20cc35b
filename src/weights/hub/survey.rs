//! What a run would download, without downloading it.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{
    Cached, Fetched, HubConfig, INDEX, Need, OPTIONAL, Refusal, Remote, SINGLE, checked_revision, offline_error,
};
use crate::error::BadInput;
use crate::events::Listener;
use crate::weights::safetensors;

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RemoteFile {
    pub name: String,
    /// `None` where the hub does not tell.
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
    let revision = checked_revision(revision)?;
    let cached = Cached { config, id, revision, need };
    if config.offline {
        return cached.complete().map(from_cache).map_err(|missing| offline_error(id, &missing));
    }
    let remote = Remote::new(config, id, revision, events)?;
    match remote.commit() {
        Ok(commit) => remote.survey(commit, need),
        Err(refusal) => match (refusal, cached.complete()) {
            (Refusal::Unreachable { .. }, Ok(fetched)) => Ok(from_cache(fetched)),
            (refusal, _) => Err(remote.explain(refusal, "config.json")),
        },
    }
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
    fn survey(&self, commit: String, need: Need) -> Result<Survey> {
        let config = self.file(&commit, "config.json")?;
        let folder = config.parent().map(Path::to_owned).unwrap_or_default();
        let mut files = vec![local("config.json", &config)];
        if need == Need::Everything {
            for name in OPTIONAL {
                files.extend(self.look(&commit, name)?);
            }
            match self.look(&commit, SINGLE)? {
                Some(single) => files.push(single),
                None => files.extend(self.look_for_shards(&commit, &folder)?),
            }
        }
        Ok(Survey { fetched: Fetched { folder, commit }, files })
    }

    fn look_for_shards(&self, commit: &str, folder: &Path) -> Result<Vec<RemoteFile>> {
        if !self.optional(commit, INDEX)? {
            return Err(BadInput::new(format!("`{}` has neither `{SINGLE}` nor `{INDEX}`", self.id)).into());
        }
        let index = folder.join(INDEX);
        let mut files = vec![local(INDEX, &index)];
        for shard in safetensors::shards(&safetensors::read_index(&index)?) {
            files.extend(self.look(commit, &shard)?);
        }
        Ok(files)
    }

    /// `None` where the repository has no such file.
    fn look(&self, commit: &str, name: &str) -> Result<Option<RemoteFile>> {
        if let Some(path) = self.cached(commit, name) {
            return Ok(Some(local(name, &path)));
        }
        match self.ask(commit, name) {
            Ok(_) => {
                let metadata = self.api.metadata(&self.repo(commit).url(name));
                let bytes = metadata.ok().map(|metadata| metadata.size() as u64);
                Ok(Some(RemoteFile { name: name.to_owned(), bytes, is_cached: false }))
            }
            Err(Refusal::NoSuchFile) => Ok(None),
            Err(refusal) => Err(self.explain(refusal, name)),
        }
    }
}

fn local(name: &str, path: &Path) -> RemoteFile {
    RemoteFile { name: name.to_owned(), bytes: bytes_of(path), is_cached: true }
}
