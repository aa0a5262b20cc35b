//! JSON as it stands in the record's types: bytes are bytes, an undefined number is `null`.

use anyhow::Result;
use serde::Serialize;

use super::{Options, Writer};
use crate::record::{Document, Record};

pub const WRITER: Writer = Writer {
    name: "json",
    extensions: &["json"],
    doc: "the whole document with raw samples, as docs/record.schema.json describes it",
    write,
};

pub const LINES_WRITER: Writer = Writer {
    name: "jsonl",
    extensions: &["jsonl", "ndjson"],
    doc: "one record a line, each with its schema_version",
    write: write_lines,
};

fn write(document: &Document, _: &Options) -> Result<String> {
    Ok(serde_json::to_string_pretty(document)? + "\n")
}

/// A record that can be read without the document around it.
#[derive(Serialize)]
struct RecordLine<'a> {
    schema_version: u32,
    #[serde(flatten)]
    record: &'a Record,
}

fn write_lines(document: &Document, _: &Options) -> Result<String> {
    lines(document)
}

/// A record a line.
pub(super) fn lines(document: &Document) -> Result<String> {
    let mut out = String::new();
    for record in &document.records {
        let line = RecordLine { schema_version: document.schema_version, record };
        out += &serde_json::to_string(&line)?;
        out.push('\n');
    }
    Ok(out)
}
