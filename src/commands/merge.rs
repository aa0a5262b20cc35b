//! `quantbench merge`: the results of many machines as one file.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::MergeArgs;
use crate::suite::{self, ResultLines};
use crate::{report, ui};

/// Writes the rows of all files, each case once, in the order of the suite.
pub fn merge(args: &MergeArgs) -> Result<ExitCode> {
    args.output.as_deref().map(report::check_writable).transpose()?;
    let files = args.files.iter().map(|path| Ok(suite::read_rows(path)?)).collect::<Result<Vec<ResultLines>>>()?;
    let merged = suite::merge(&files);
    for note in &merged.notes {
        ui::note(&format!("warning: {note}"));
    }
    match &args.output {
        Some(path) => {
            let is_document = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
            let text = if is_document { merged.document()? } else { merged.text.clone() };
            report::write_file(path, &text)?;
            ui::print(&format!("wrote `{}`: {} rows of {} files\n", path.display(), merged.n_rows, files.len()))?;
        }
        None => ui::print(&merged.text)?,
    }
    Ok(ExitCode::SUCCESS)
}
