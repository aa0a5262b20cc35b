//! `quantbench import`: other tools' files as records.

use std::process::ExitCode;

use anyhow::Result;

use super::report;
use crate::cli::{ImportArgs, ImportRequest};
use crate::report::Options;
use crate::ui;

/// Reads, then writes what `quantbench report` and `quantbench compare` read.
pub fn import(args: &ImportArgs) -> Result<ExitCode> {
    let request = ImportRequest::new(args)?;
    for note in &request.notes {
        ui::note(&format!("warning: {note}"));
    }
    report::write(&request.document, &request.output, &Options::default())?;
    Ok(ExitCode::SUCCESS)
}
