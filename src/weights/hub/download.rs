//! One file into the cache: alone among processes, from where an earlier attempt stopped, checked before it is shown.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::cache::Lock;
use super::client::{Content, Metadata};
use super::refusal::Refusal;
use super::{Remote, Retries};
use crate::events::{Event, Listener, Unit};

/// Progress events are this far apart at least.
const PROGRESS_BYTES: u64 = 4 << 20;

/// Bytes that are read and written at once.
const BUFFER_BYTES: usize = 256 << 10;

impl Remote<'_> {
    /// A file from the cache or the hub.
    pub(super) fn file(&self, commit: &str, name: &str) -> Result<PathBuf, Refusal> {
        if let Some(path) = self.cache.file(commit, name) {
            return Ok(path);
        }
        let metadata = self.metadata(commit, name)?;
        self.file_of(&metadata, commit, name)
    }

    /// As [`Self::file`], of a file about which the hub was asked.
    pub(super) fn file_of(&self, metadata: &Metadata, commit: &str, name: &str) -> Result<PathBuf, Refusal> {
        if let Some(path) = self.cache.file(commit, name) {
            return Ok(path);
        }
        let unwritable = |error| Refusal::of_cache(self.cache.path(), error);
        let lock = self.lock(metadata, name)?;
        if !self.has_blob(metadata) {
            let address = self.address(commit, name);
            match lock {
                Lock::Missing => {
                    let own = self.cache.own_part(&metadata.etag).map_err(unwritable)?;
                    self.download(own.path(), metadata, (name, &address))?;
                    own.persist(self.cache.blob(&metadata.etag)).map_err(|error| unwritable(error.error))?;
                }
                Lock::Held(_) | Lock::Busy => {
                    let part = self.cache.part(&metadata.etag);
                    self.download(&part, metadata, (name, &address))?;
                    std::fs::rename(&part, self.cache.blob(&metadata.etag)).map_err(unwritable)?;
                }
            }
        }
        self.cache.link(&metadata.etag, commit, name).map_err(unwritable)
    }

    /// Whether the content is here already, for another commit or from another process.
    fn has_blob(&self, metadata: &Metadata) -> bool {
        let blob = std::fs::metadata(self.cache.blob(&metadata.etag));
        blob.is_ok_and(|blob| blob.is_file() && metadata.bytes.is_none_or(|bytes| bytes == blob.len()))
    }

    /// Waits until no other process writes the same content.
    fn lock(&self, metadata: &Metadata, name: &str) -> Result<Lock, Refusal> {
        let take = || self.cache.try_lock(&metadata.etag).map_err(|error| Refusal::of_cache(self.cache.path(), error));
        let first = take()?;
        if !matches!(first, Lock::Busy) {
            return Ok(first);
        }
        let label = format!("wait for another process: download {name}");
        let bar = Bar::begin(label, metadata.bytes, self.events);
        loop {
            (self.config.patience.sleep)(self.config.patience.lock_pause);
            let lock = take()?;
            if !matches!(lock, Lock::Busy) {
                return Ok(lock);
            }
            let done = std::fs::metadata(self.cache.part(&metadata.etag)).map_or(0, |part| part.len());
            bar.events.on(Event::Progress { done });
        }
    }

    /// Fills the file at `path` until it is the whole content.
    fn download(&self, path: &Path, metadata: &Metadata, (name, address): (&str, &str)) -> Result<(), Refusal> {
        let unwritable = |error| Refusal::of_cache(self.cache.path(), error);
        let mut part = Part::open(path, metadata).map_err(unwritable)?;
        let mut was_resumed = part.bytes > 0;
        let mut retries = Retries::new(&self.config.patience);
        loop {
            let before = part.bytes;
            match self.attempt(&mut part, metadata, (name, address)) {
                Ok(()) => return Ok(()),
                // What an earlier attempt left may be of something else.
                Err(Refusal::NoSuchRange | Refusal::Corrupt { .. }) if was_resumed => {
                    was_resumed = false;
                    part.restart().map_err(unwritable)?;
                }
                Err(refusal) => {
                    if matches!(refusal, Refusal::Corrupt { .. }) {
                        let _ = std::fs::remove_file(path);
                    }
                    if part.bytes > before {
                        retries = Retries::new(&self.config.patience);
                    }
                    retries.pause(refusal, self.events)?;
                    was_resumed |= part.bytes > 0;
                }
            }
        }
    }

    fn attempt(&self, part: &mut Part, metadata: &Metadata, (name, address): (&str, &str)) -> Result<(), Refusal> {
        if metadata.bytes.is_none() || metadata.bytes != Some(part.bytes) {
            let content = self.client.content(address, part.bytes)?;
            check_length(&content, metadata)?;
            if content.from < part.bytes {
                part.restart().map_err(|error| Refusal::of_cache(self.cache.path(), error))?;
            }
            let total = metadata.bytes.or(content.total);
            let mut bar = Bar::begin(format!("download {name}"), total, self.events);
            bar.report(part.bytes, 1);
            self.read(content, part, total, &mut bar)?;
        }
        part.check(metadata)
    }

    /// Appends what comes.
    fn read(&self, mut content: Content, part: &mut Part, total: Option<u64>, bar: &mut Bar) -> Result<(), Refusal> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match content.reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    if total.is_some_and(|total| part.bytes + n as u64 > total) {
                        return Err(Refusal::Corrupt { reason: "more bytes came than it has".to_owned() });
                    }
                    part.append(&buffer[..n]).map_err(|error| Refusal::of_cache(self.cache.path(), error))?;
                    bar.report(part.bytes, PROGRESS_BYTES);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Refusal::Interrupted { reason: error.to_string() }),
            }
        }
        bar.report(part.bytes, 1);
        match total {
            Some(total) if part.bytes < total => {
                Err(Refusal::Interrupted { reason: format!("{} bytes came of {total}", part.bytes) })
            }
            _ => Ok(()),
        }
    }
}

/// Refuses content whose length is not the announced one, before any of it is kept.
fn check_length(content: &Content, metadata: &Metadata) -> Result<(), Refusal> {
    match (metadata.bytes, content.total) {
        (Some(announced), Some(sent)) if announced != sent => Err(match content.is_web_page {
            true => Refusal::NoHub { reason: "a web page came, as from a sign-in page or a proxy".to_owned() },
            false => Refusal::Corrupt { reason: format!("it has {announced} bytes, and {sent} bytes are sent") },
        }),
        _ => Ok(()),
    }
}

/// What came so far of a file.
struct Part {
    file: File,
    bytes: u64,
    /// Of those bytes, where the etag says what it must become.
    hash: Option<Sha256>,
}

impl Part {
    /// Goes on with what is there, or starts a file.
    fn open(path: &Path, metadata: &Metadata) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let bytes = file.metadata()?.len();
        let hash = is_sha256(&metadata.etag).then(Sha256::new);
        let mut part = Self { file, bytes, hash };
        if metadata.bytes.is_some_and(|whole| bytes > whole) {
            part.restart()?;
        }
        if let Some(hash) = part.hash.as_mut().filter(|_| part.bytes > 0) {
            io::copy(&mut (&part.file).take(part.bytes), hash)?;
        }
        part.file.seek(SeekFrom::Start(part.bytes))?;
        Ok(part)
    }

    fn restart(&mut self) -> io::Result<()> {
        if self.bytes > 0 {
            self.file.set_len(0)?;
        }
        self.file.seek(SeekFrom::Start(0))?;
        self.bytes = 0;
        self.hash = self.hash.take().map(|_| Sha256::new());
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        Ok(())
    }

    fn check(&self, metadata: &Metadata) -> Result<(), Refusal> {
        let Some(hash) = &self.hash else { return Ok(()) };
        let seen: String = hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        match seen == metadata.etag {
            true => Ok(()),
            false => Err(Refusal::Corrupt { reason: format!("its SHA-256 is {seen}, not {}", metadata.etag) }),
        }
    }
}

/// What the hub stores as a large file has the SHA-256 of its content as its etag.
fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// A phase of a download as events; it ends when it is dropped, also where a download fails.
struct Bar<'a> {
    events: &'a dyn Listener,
    reported: u64,
}

impl<'a> Bar<'a> {
    fn begin(label: String, total: Option<u64>, events: &'a dyn Listener) -> Self {
        events.on(Event::Begin { label, total: total.unwrap_or(0), unit: Unit::Bytes });
        Self { events, reported: 0 }
    }

    /// Reports `done` bytes where they are at least `step` more than the last report.
    fn report(&mut self, done: u64, step: u64) {
        if done >= self.reported + step {
            self.reported = done;
            self.events.on(Event::Progress { done });
        }
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.events.on(Event::End);
    }
}
