//! `quantbench import`: rows that other tools measured.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueHint};

use crate::error::BadInput;
use crate::record::import::{self, Given, Imported, TOOLS};
use crate::record::{Document, SCHEMA_VERSION};

/// What was typed for `quantbench import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Files that other tools wrote.
    #[arg(value_name = "FILES", required = true, value_hint = ValueHint::FilePath)]
    pub files: Vec<PathBuf>,

    /// Tool that wrote them [default: found by content].
    #[arg(long, value_name = "TOOL", value_parser = tool_names(), help_heading = "Rows")]
    pub from: Option<String>,

    /// Model of all rows, where the files do not say or say it otherwise.
    #[arg(short, long, alias = "model", value_name = "ID", help_heading = "Rows")]
    pub model_id: Option<String>,

    /// Precision of all rows, likewise.
    #[arg(long, value_name = "NAME", help_heading = "Rows")]
    pub precision: Option<String>,

    /// Prompt tokens of rows whose file does not say.
    #[arg(long, value_name = "N", help_heading = "Rows")]
    pub prompt_tokens: Option<u64>,

    /// Generated tokens of rows whose file does not say.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Rows")]
    pub max_new_tokens: Option<u64>,

    /// Sequences at a time of rows whose file does not say.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Rows")]
    pub batch_size: Option<u64>,

    /// File to write, in the format of its extension [default: JSON on stdout].
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub output: Option<PathBuf>,

    /// Format, where the file's extension does not name it [default: json on stdout].
    #[arg(long, value_name = "FORMAT", value_parser = super::report::writer_names(), help_heading = "Output")]
    pub format: Option<String>,
}

/// An import as it will be written.
pub struct ImportRequest {
    pub document: Document,
    pub output: super::Destination,
    /// What the reader must know of the files, a sentence each.
    pub notes: Vec<String>,
}

impl ImportRequest {
    /// Fails with [`BadInput`] on a file that cannot be read or is no known tool's, and on an output that cannot be written.
    pub fn new(args: &ImportArgs) -> Result<Self> {
        let output = super::report::output(args.output.as_deref(), args.format.as_deref(), "json")?;
        let given = Given {
            model_id: args.model_id.clone(),
            precision: args.precision.clone(),
            n_prompt: args.prompt_tokens,
            n_gen: args.max_new_tokens,
            batch_size: args.batch_size,
        };
        let (mut records, mut notes) = (Vec::new(), Vec::new());
        for path in &args.files {
            let imported = read(path, args.from.as_deref(), &given)?;
            records.extend(imported.records);
            notes.extend(imported.notes.iter().map(|note| format!("`{}`: {note}", path.display())));
        }
        Ok(Self { document: Document { schema_version: SCHEMA_VERSION, records }, output, notes })
    }
}

fn read(path: &Path, from: Option<&str>, given: &Given) -> Result<Imported, BadInput> {
    let bad = |why: String| BadInput::new(format!("cannot import `{}`: {why}", path.display()));
    let text = std::fs::read(path).map_err(|error| error.to_string()).and_then(import::decode).map_err(bad)?;
    import::import(&text, from, given).map_err(|error| bad(error.to_string()))
}

fn tool_names() -> PossibleValuesParser {
    PossibleValuesParser::new(TOOLS.iter().map(|tool| tool.name))
}
