//! A history of runs: a folder of JSON lines that lives in git beside the code, without a server.
//!
//! Each file holds the records of one model on one device, a record a line, the oldest first; `report` and `compare` read them as any
//! other file of records.

mod check;
mod list;

pub use check::{CheckRules, check, newest};
pub use list::{FORMATS, ListFormat, find};

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{json, read, write_file};
use crate::error::BadInput;
use crate::record::{Document, Record, SCHEMA_VERSION};

/// Makes git join the lines of two branches that both added runs.
const ATTRIBUTES: (&str, &str) = (".gitattributes", "*.jsonl merge=union\n");

/// Result of [`add`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Added {
    pub n_new: usize,
    /// Records that were there already.
    pub n_known: usize,
    /// Files that grew.
    pub files: Vec<PathBuf>,
}

/// Appends the records of `document` to the files of `folder`, which is made where it is missing. A record that is there already is not
/// added twice. The times of single decode steps and the readings of sensors stay out: one run would take what a hundred do now.
/// Fails with [`BadInput`] where a file of the folder holds no records, or cannot be written.
pub fn add(folder: &Path, document: &Document) -> Result<Added> {
    make(folder)?;
    let mut added = Added::default();
    let mut files: BTreeMap<PathBuf, Vec<Record>> = BTreeMap::new();
    for record in &document.records {
        files.entry(folder.join(file_name(record))).or_default().push(slim(record));
    }
    for (path, records) in files {
        let old = if path.exists() { text_of(&path)? } else { String::new() };
        let document = Document { schema_version: SCHEMA_VERSION, records };
        let lines = json::lines(&document)?;
        let new: String = lines.lines().filter(|line| !old.lines().any(|known| known == *line)).map(ended).collect();
        let n_new = new.lines().count();
        (added.n_new, added.n_known) = (added.n_new + n_new, added.n_known + document.records.len() - n_new);
        if n_new > 0 {
            write_file(&path, &(old + &new))?;
            added.files.push(path);
        }
    }
    Ok(added)
}

/// A file of records as text, its last line ended.
fn text_of(path: &Path) -> Result<String> {
    read(path)?;
    let text = fs::read_to_string(path)
        .map_err(|error| BadInput::new(format!("cannot read `{}`: {error}", path.display())))?;
    Ok(text.lines().filter(|line| !line.trim().is_empty()).map(ended).collect())
}

fn ended(line: &str) -> String {
    format!("{line}\n")
}

fn make(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(|error| {
        BadInput::new(format!("cannot make the folder `{}`: {error}", folder.display()))
            .hint("name another with `--dir`")
    })?;
    let (name, text) = ATTRIBUTES;
    write_file(&folder.join(name), text)
}

/// Model and device, so that machines and models do not share files: `phi-2-NVIDIA-H200.jsonl`.
fn file_name(record: &Record) -> String {
    let device = if record.device.name.is_empty() { &record.device.kind } else { &record.device.name };
    let words = format!("{} {device}", record.model.id);
    let is_kept = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
    let parts = words.split(|c| !is_kept(c)).filter(|part| !part.is_empty());
    format!("{}.jsonl", parts.collect::<Vec<_>>().join("-").trim_matches('.'))
}

/// Without what one repeat has thousands of. One value a repeat stays, and every summary.
fn slim(record: &Record) -> Record {
    let mut slim = record.clone();
    for steps in [&mut slim.samples.decode_step_ns, &mut slim.samples.device_step_ns, &mut slim.samples.synced_step_ns]
    {
        steps.clear();
    }
    for times in
        [&mut slim.samples.alone_step_ns, &mut slim.samples.alone_arithmetic_ns, &mut slim.samples.alone_memory_ns]
    {
        times.clear();
    }
    slim.series.clear();
    slim
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::metrics;

    fn example(name: &str) -> Document {
        let path = format!("{}/tests/golden/records/{name}.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn records_are_added_once() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("history");
        let document = example("with_quality");
        let first = add(&dir, &document).unwrap();
        assert_eq!((first.n_new, first.n_known, first.files.len()), (3, 0, 1));
        let again = add(&dir, &document).unwrap();
        assert_eq!((again.n_new, again.n_known, again.files.len()), (0, 3, 0));
        let mut later = document.clone();
        later.records.iter_mut().for_each(|record| record.timestamp = "2026-02-01T00:00:00Z".into());
        assert_eq!(add(&dir, &later).unwrap().n_new, 3);
        let read = read(&first.files[0]).unwrap();
        assert_eq!(read.records.len(), 6);
        // What runs are compared by is all there.
        for (kept, record) in read.records.iter().zip(&document.records) {
            assert!(kept.samples.decode_step_ns.is_empty() && !record.samples.decode_step_ns.is_empty());
            assert_eq!(kept.metrics, record.metrics);
            assert_eq!(metrics::repeats(kept, "decode_tps"), metrics::repeats(record, "decode_tps"));
            assert_eq!(kept.quality, record.quality);
        }
        assert_eq!(fs::read_to_string(dir.join(".gitattributes")).unwrap(), "*.jsonl merge=union\n");
    }

    #[test]
    fn a_file_that_is_no_history_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let document = example("three_precisions");
        let path = folder.path().join(file_name(&document.records[0]));
        fs::write(&path, "notes\n").unwrap();
        let error = add(folder.path(), &document).unwrap_err().to_string();
        assert!(error.contains("cannot read records from"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes\n");
    }

    #[test]
    fn files_are_named_after_model_and_device() {
        let mut record = example("three_precisions").records.remove(0);
        for (model, device, name) in [
            ("phi-2", "NVIDIA H200", "phi-2-NVIDIA-H200.jsonl"),
            ("google/flan-t5-base", "AMD EPYC", "google-flan-t5-base-AMD-EPYC.jsonl"),
            ("../../x", "a/b:c", "..-..-x-a-b-c.jsonl"),
            ("m", "", "m-cpu.jsonl"),
        ] {
            record.model.id = model.into();
            (record.device.name, record.device.kind) = (device.into(), "cpu".into());
            let found = file_name(&record);
            assert_eq!(found, name.trim_matches('.'), "{model}");
            assert!(!found.contains('/'));
        }
    }
}
