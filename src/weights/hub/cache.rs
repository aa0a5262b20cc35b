//! The cache's layout, which huggingface_hub shares: `models--OWNER--NAME/{blobs,snapshots,refs,.no_exist}` and `.locks`.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// A repository's folder in the cache.
pub struct Cache {
    repository: PathBuf,
    locks: PathBuf,
}

/// Whether a file may be written alone.
pub enum Lock {
    Held(#[allow(dead_code, reason = "dropping it releases the lock")] File),
    /// Another process holds it.
    Busy,
    /// The file system has none: everybody is let in.
    Missing,
}

impl Cache {
    /// Of the repository `id` below the folder of all repositories.
    pub fn new(root: &Path, id: &str) -> Self {
        let name = hf_hub::Repo::model(id.to_owned()).folder_name();
        Self { repository: root.join(&name), locks: root.join(".locks").join(name) }
    }

    /// Its folder, for messages.
    pub fn path(&self) -> &Path {
        &self.repository
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.repository.join("snapshots").join(commit)
    }

    /// A file of a commit, where it is here.
    pub fn file(&self, commit: &str, name: &str) -> Option<PathBuf> {
        Some(self.snapshot(commit).join(name)).filter(|path| path.is_file())
    }

    /// Whether a commit is known to have no such file.
    pub fn is_absent(&self, commit: &str, name: &str) -> bool {
        self.absence(commit, name).is_file()
    }

    /// Notes that a commit has no such file; a cache that cannot be written is left as it is.
    pub fn note_absent(&self, commit: &str, name: &str) {
        let path = self.absence(commit, name);
        let _ = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| File::create(&path).map(drop));
    }

    fn absence(&self, commit: &str, name: &str) -> PathBuf {
        self.repository.join(".no_exist").join(commit).join(name)
    }

    /// The commit that a branch or tag meant last; a revision without a note may be a commit itself.
    pub fn commit_of(&self, revision: &str) -> String {
        fs::read_to_string(self.repository.join("refs").join(revision))
            .map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned())
    }

    /// Notes what a branch or tag means; a cache that may not be written keeps its note.
    pub fn set_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        let path = self.repository.join("refs").join(revision);
        let known = fs::read_to_string(&path).is_ok_and(|known| known == commit);
        if known || revision == commit {
            return Ok(());
        }
        let written = write_whole(&path, commit);
        let is_read_only =
            |error: &io::Error| matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem);
        written.or_else(|error| if is_read_only(&error) { Ok(()) } else { Err(error) })
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.repository.join("blobs").join(etag)
    }

    /// What came so far of a blob.
    pub fn part(&self, etag: &str) -> PathBuf {
        self.repository.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// A part that no other process knows, for file systems without locks.
    pub fn own_part(&self, etag: &str) -> io::Result<tempfile::NamedTempFile> {
        let folder = self.repository.join("blobs");
        fs::create_dir_all(&folder)?;
        let prefix = format!("{etag}.");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".incomplete").permissions(Permissions::from_mode(0o666)).tempfile_in(folder)
    }

    /// Tries to be the only one that writes a blob, by the lock that huggingface_hub takes.
    pub fn try_lock(&self, etag: &str) -> io::Result<Lock> {
        fs::create_dir_all(&self.locks)?;
        let path = self.locks.join(format!("{etag}.lock"));
        let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(0o664).open(&path);
        let file = open()?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Lock::Busy),
            Err(TryLockError::Error(_)) => return Ok(Lock::Missing),
        }
        // Another process may have removed the file between opening and locking; then somebody else holds the new one.
        let is_current = fs::metadata(&path).is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() == now.ino()));
        if !is_current {
            return Ok(Lock::Busy);
        }
        // Some network file systems grant every lock at once.
        match open()?.try_lock() {
            Ok(()) => Ok(Lock::Missing),
            Err(_) => Ok(Lock::Held(file)),
        }
    }

    /// Shows a blob as a file of a commit: a relative link, or the file itself where there are no links.
    pub fn link(&self, etag: &str, commit: &str, name: &str) -> io::Result<PathBuf> {
        let path = self.snapshot(commit).join(name);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder)?;
        let up = "../".repeat(2 + Path::new(name).components().count() - 1);
        let target = format!("{up}blobs/{etag}");
        // Made beside its place and moved there: nobody sees a file without its link.
        match tempfile::Builder::new().make_in(folder, |path| symlink(&target, path)) {
            Ok(link) => link.into_temp_path().persist(&path).map_err(|error| error.error)?,
            Err(error) if error.kind() == ErrorKind::StorageFull => return Err(error),
            Err(_) => fs::rename(self.blob(etag), &path)?,
        }
        Ok(path)
    }
}

fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lock_has_one_holder() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::new(root.path(), "owner/model");
        let lock = root.path().join(".locks/models--owner--model/etag.lock");
        // One that was left behind.
        fs::create_dir_all(lock.parent().unwrap()).unwrap();
        File::create(&lock).unwrap();
        let held = cache.try_lock("etag").unwrap();
        assert!(matches!(held, Lock::Held(_)));
        assert!(matches!(cache.try_lock("etag").unwrap(), Lock::Busy));
        assert!(matches!(cache.try_lock("other").unwrap(), Lock::Held(_)));
        drop(held);
        assert!(matches!(cache.try_lock("etag").unwrap(), Lock::Held(_)));
    }

    #[test]
    fn links_are_relative_at_any_depth() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::new(root.path(), "owner/model");
        fs::create_dir_all(cache.blob("x").parent().unwrap()).unwrap();
        fs::write(cache.blob("x"), "content").unwrap();
        for (name, target) in [("a.json", "../../blobs/x"), ("sub/deep/a.json", "../../../../blobs/x")] {
            let path = cache.link("x", "commit", name).unwrap();
            assert_eq!(fs::read_link(&path).unwrap(), Path::new(target));
            // Again, over the one that is there.
            assert_eq!(fs::read_to_string(cache.link("x", "commit", name).unwrap()).unwrap(), "content");
        }
        cache.set_commit("refs/pr/1", "commit").unwrap();
        assert_eq!((cache.commit_of("refs/pr/1"), cache.commit_of("abc")), ("commit".to_owned(), "abc".to_owned()));
    }
}
