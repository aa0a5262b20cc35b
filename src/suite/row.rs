//! The lines of a suite's results: a record each, with the case that it belongs to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::BadInput;
use crate::record::import::decode;
use crate::record::{Record, SCHEMA_VERSION};

/// The case and the suite of a row: the key `suite` of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaseInfo {
    /// Name of the suite.
    pub name: String,
    /// Content hash of the case.
    pub case: String,
    /// From 1, in the whole suite.
    pub index: usize,
    pub n_cases: usize,
    /// Rows that the case has; with fewer it has not ended.
    pub n_rows: usize,
}

/// A line of a file.
#[derive(Debug, Clone)]
pub struct ResultLine {
    /// The line as in the file, without its end.
    pub text: String,
    /// `None` for a row that no suite wrote.
    pub suite: Option<CaseInfo>,
    pub record: Record,
}

/// A file of rows.
#[derive(Debug, Clone)]
pub struct ResultLines {
    pub path: PathBuf,
    pub lines: Vec<ResultLine>,
    /// The last line was cut in the middle of a write.
    pub torn: bool,
}

#[derive(Serialize)]
struct RowLine<'a> {
    schema_version: u32,
    suite: &'a CaseInfo,
    #[serde(flatten)]
    record: &'a Record,
}

#[derive(Deserialize)]
struct LineHeader {
    schema_version: Option<u32>,
    suite: Option<CaseInfo>,
}

/// One line for each record of a case, each with its end. `info.n_rows` is set here.
pub fn write(info: &CaseInfo, records: &[Record]) -> serde_json::Result<String> {
    let suite = &CaseInfo { n_rows: records.len(), ..info.clone() };
    let row = |record| serde_json::to_string(&RowLine { schema_version: SCHEMA_VERSION, suite, record });
    records.iter().map(|record| Ok(row(record)? + "\n")).collect()
}

/// The rows of a file of either kind: one a line, or a document as `--output FILE.json` writes it.
pub fn read_rows(path: &Path) -> Result<ResultLines, BadInput> {
    let bytes =
        std::fs::read(path).map_err(|error| BadInput::new(format!("cannot read `{}`: {error}", path.display())))?;
    let document = decode(bytes).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let Some(Value::Object(mut document)) = document.filter(|value| value.get("records").is_some()) else {
        return read_lines(path);
    };
    let version = document.remove("schema_version").unwrap_or_default();
    let records = document.remove("records").and_then(|records| records.as_array().cloned()).unwrap_or_default();
    let row = |(at, mut record): (usize, Value)| {
        // A record of a document leaves its version to it; a line has its own.
        if let Some(info) = record.as_object_mut() {
            info.insert("schema_version".to_owned(), version.clone());
        }
        line(&record.to_string()).map_err(|what| {
            BadInput::new(format!("`{}` record {}: {what}", path.display(), at + 1))
                .hint("merge files of the same version of quantbench")
        })
    };
    let lines = records.into_iter().enumerate().map(row).collect::<Result<_, _>>()?;
    Ok(ResultLines { path: path.to_owned(), lines, torn: false })
}

/// Reads a file of rows. Fails on a line that is no row of this version's; one that was cut at the end is left out.
pub fn read_lines(path: &Path) -> Result<ResultLines, BadInput> {
    let bytes =
        std::fs::read(path).map_err(|error| BadInput::new(format!("cannot read `{}`: {error}", path.display())))?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let bad = |line: usize, what: &str| {
        BadInput::new(format!("`{}` line {line}: {what}", path.display()))
            .hint("a file of results is a document, or has one JSON object a line, as `quantbench suite` and `--output` write them")
    };
    let text = std::str::from_utf8(&bytes[..whole]).map_err(|_| bad(1, "the file is no text"))?;
    let mut lines = Vec::new();
    for (number, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        lines.push(line(text).map_err(|what| bad(number + 1, &what))?);
    }
    let rest = std::str::from_utf8(&bytes[whole..]).unwrap_or_default();
    let last = line(rest).ok();
    let torn = whole < bytes.len() && last.is_none();
    lines.extend(last);
    Ok(ResultLines { path: path.to_owned(), lines, torn })
}

/// Fails with what is wrong.
fn line(text: &str) -> Result<ResultLine, String> {
    let head: LineHeader = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match head.schema_version {
        Some(SCHEMA_VERSION) => {}
        Some(other) => {
            return Err(format!("`schema_version` is {other}, and this version of quantbench reads {SCHEMA_VERSION}"));
        }
        None => return Err("there is no `schema_version`".to_owned()),
    }
    let record = serde_json::from_str(text).map_err(|error| error.to_string())?;
    Ok(ResultLine { text: text.to_owned(), suite: head.suite, record })
}
