//! The file that a suite appends to: rows of ended cases, whatever ended the program.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::row::{ResultLine, read_lines};
use crate::error::BadInput;
use crate::record::Status;
use crate::report;

/// Treatment of rows that the file has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// There must be none.
    No,
    /// Keep those of cases that ended.
    Ended,
    /// Keep those of cases that ended well.
    EndedWell,
}

/// An open file of results. No other process writes to it at the same time.
pub struct Results {
    path: PathBuf,
    file: File,
    ended: BTreeMap<String, bool>,
    /// A line that was cut in the middle was removed.
    pub recovered: bool,
}

impl Results {
    /// Opens or makes the file. What was cut in the middle of a write is removed, so that its case runs again; every other row
    /// stays. Fails with [`BadInput`] where the file cannot be used.
    pub fn open(path: &Path, resume: Resume) -> Result<Self> {
        report::check_writable(path)?;
        let file = open(path)?;
        let old = file.metadata().is_ok_and(|seen| seen.is_file() && seen.len() > 0);
        let empty = |file| Self { path: path.to_owned(), file, ended: BTreeMap::new(), recovered: false };
        match (old, resume) {
            (false, _) => Ok(empty(file)),
            (true, Resume::No) => Err(BadInput::new(format!("`{}` holds results already", path.display()))
                .hint("`--resume` goes on where they end; or name another file")
                .into()),
            (true, _) => empty(file).recover(resume),
        }
    }

    /// The cases that were there and need not run, by hash; whether all of their rows are ok.
    pub fn ended(&self) -> &BTreeMap<String, bool> {
        &self.ended
    }

    /// Adds the rows of a case in one write, and waits until the disk has them.
    pub fn append(&mut self, rows: &str) -> Result<()> {
        let written = self.file.write_all(rows.as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|error| {
            BadInput::new(format!(
                "cannot write `{}`: {error}; the rows of this case stand on stdout",
                self.path.display()
            ))
            .hint("make room and go on with `--resume`")
        })?;
        // A pipe or a device has no disk to wait for.
        let _ = self.file.sync_data();
        Ok(())
    }

    /// Sorts what is there, and rewrites the file atomically where something has to go.
    fn recover(mut self, resume: Resume) -> Result<Self> {
        let found = read_lines(&self.path)?;
        for (case, (n_found, n_rows, is_ok)) in counts(&found.lines) {
            if n_found >= n_rows && (is_ok || resume == Resume::Ended) {
                self.ended.insert(case.to_owned(), is_ok);
            }
        }
        let stays = |line: &&ResultLine| line.suite.as_ref().is_none_or(|info| self.ended.contains_key(&info.case));
        let text: String = found.lines.iter().filter(stays).map(|line| format!("{}\n", line.text)).collect();
        self.recovered = found.torn;
        if std::fs::read(&self.path).with_context(|| format!("reading `{}`", self.path.display()))? != text.as_bytes() {
            report::write_file(&self.path, &text)?;
            self.file = open(&self.path)?;
        }
        Ok(self)
    }
}

/// For appending, and locked where the file system can lock.
fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|error| BadInput::new(format!("cannot write `{}`: {error}", path.display())))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(BadInput::new(format!("another process writes to `{}`", path.display()))
            .hint("wait for it, or name another file; `quantbench merge` joins them")
            .into()),
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

/// By case: rows found, rows that it has, and whether those found are ok.
fn counts(lines: &[ResultLine]) -> BTreeMap<&str, (usize, usize, bool)> {
    let mut counts = BTreeMap::new();
    for (info, record) in lines.iter().filter_map(|line| Some((line.suite.as_ref()?, &line.record))) {
        let (n_found, n_rows, is_ok) = counts.entry(info.case.as_str()).or_insert((0, 0, true));
        (*n_found, *n_rows) = (*n_found + 1, info.n_rows);
        *is_ok &= record.status == Status::Ok;
    }
    counts
}
