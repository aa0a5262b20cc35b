//! Records from a file that a run, a suite or an import wrote.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::BadInput;
use crate::record::import::decode;
use crate::record::{Document, Record, SCHEMA_VERSION, break_even};

/// What a file holds beside its records; a record line has it too.
#[derive(Deserialize)]
struct Versioned {
    schema_version: u32,
}

/// A document, or records one a line; of a folder, all files of either kind in it, by name. Fails with [`BadInput`] where a file cannot be
/// read, is neither, is of another schema or holds no record, and where a folder has none.
pub fn read(path: &Path) -> Result<Document, BadInput> {
    let mut document = read_all(path)?;
    // Cases of a suite are rows of their own.
    break_even::fill(&mut document.records);
    Ok(document)
}

fn read_all(path: &Path) -> Result<Document, BadInput> {
    if !path.is_dir() {
        return read_file(path);
    }
    let bad = |why: String| BadInput::new(format!("cannot read records from `{}`: {why}", path.display()));
    let entries = fs::read_dir(path).map_err(|error| bad(error.to_string()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.is_file() && file.extension().is_some_and(|end| end == "json" || end == "jsonl"));
    files.sort();
    if files.is_empty() {
        return Err(bad("the folder holds no .json or .jsonl file".into()));
    }
    let mut records = Vec::new();
    for file in files {
        records.extend(read_file(&file)?.records);
    }
    Ok(Document { schema_version: SCHEMA_VERSION, records })
}

fn read_file(path: &Path) -> Result<Document, BadInput> {
    let bad = |why: String| BadInput::new(format!("cannot read records from `{}`: {why}", path.display()));
    let bytes = fs::read(path).map_err(|error| bad(error.to_string()))?;
    let text = decode(bytes).map_err(bad)?;
    let mut records = records(&text).map_err(|why| {
        bad(why).hint("name a file that `quantbench --output` wrote as .json or .jsonl; other tools' files go through `quantbench import`")
    })?;
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    records.iter_mut().for_each(|record| record.file.clone_from(&file));
    match records.is_empty() {
        true => Err(bad("it holds no record".into())),
        false => Ok(Document { schema_version: SCHEMA_VERSION, records }),
    }
}

fn records(text: &str) -> Result<Vec<Record>, String> {
    let is_document = |value: &Value| value.get("records").is_some();
    match serde_json::from_str::<Value>(text) {
        Ok(value) if is_document(&value) => {
            check_version(&value)?;
            let document: Document = serde_json::from_value(value).map_err(|error| error.to_string())?;
            Ok(document.records)
        }
        _ => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            lines.map(|(at, line)| record(line).map_err(|why| format!("line {}: {why}", at + 1))).collect()
        }
    }
}

fn record(line: &str) -> Result<Record, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    check_version(&value)?;
    serde_json::from_value(value).map_err(|error| error.to_string())
}

fn check_version(value: &Value) -> Result<(), String> {
    let seen = Versioned::deserialize(value).map_err(|_| "no `schema_version` in it".to_owned())?.schema_version;
    match seen {
        SCHEMA_VERSION => Ok(()),
        other => Err(format!("its schema_version is {other}, this program reads {SCHEMA_VERSION}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = include_str!("../../tests/golden/records/three_precisions.json");

    #[test]
    fn documents_and_lines_hold_the_same_records() {
        let document: Document = serde_json::from_str(DOCUMENT).expect("an example");
        assert_eq!(records(DOCUMENT).as_ref(), Ok(&document.records));
        let line = |record: &Record| {
            let mut value = serde_json::to_value(record).expect("a record is JSON");
            value["schema_version"] = SCHEMA_VERSION.into();
            value.to_string()
        };
        let lines: Vec<_> = document.records.iter().map(line).collect();
        assert_eq!(records(&(lines.join("\n\n") + "\n")), Ok(document.records));
    }

    #[test]
    fn what_is_no_record_says_where() {
        for (text, why) in [
            ("{", "line 1: "),
            ("[]", "line 1: no `schema_version`"),
            (r#"{"schema_version": 2, "records": []}"#, "its schema_version is 2"),
            (r#"{"schema_version": 1}"#, "line 1: missing field"),
            ("\n\nx", "line 3: "),
        ] {
            let error = records(text).unwrap_err();
            assert!(error.starts_with(why), "{text}: {error}");
        }
    }
}
