//! `quantbench report`: what a run or a suite wrote, as a page or in another format.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Destination, ReportArgs, ReportRequest};
use crate::error::BadInput;
use crate::record::Document;
use crate::report::Options;
use crate::{report, ui};

/// Writes the report and, where asked for, its charts.
pub fn report(args: &ReportArgs) -> Result<ExitCode> {
    let request = ReportRequest::new(args)?;
    if let Some(folder) = &request.svg {
        pictures(&request.document, folder)?;
    }
    write(&request.document, &request.output, &request.options)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes to a file, atomically, or to stdout.
pub(super) fn write(document: &Document, output: &Destination, options: &Options) -> Result<()> {
    match output {
        Destination::File(path, writer) => report::write_file(path, &(writer.write)(document, options)?),
        Destination::Stdout(writer) => {
            ui::print(&(writer.write)(document, &Options { terminal: ui::terminal(), ..*options })?)
        }
    }
}

fn pictures(document: &Document, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| BadInput::new(format!("`--svg {}`: {error}", folder.display())))?;
    for (name, svg) in report::pictures(document) {
        report::write_file(&folder.join(name), &svg)?;
    }
    Ok(())
}
