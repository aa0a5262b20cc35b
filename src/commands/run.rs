//! `quantbench run`: one model at several precisions.

use std::process::ExitCode;

use anyhow::Result;

use super::limits;
use crate::cli::{Request, RunArgs};
use crate::record::{Document, Record, SCHEMA_VERSION, Status};
use crate::ui::{self, Progress};
use crate::{harness, report};

/// Measures, then reports; 1 if any precision failed or is invalid.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    let request = Request::new(args, report::shareable_command(std::env::args()))?;
    let records = harness::run(&request.case, &Progress::new(request.quiet))?;
    let document = Document { schema_version: SCHEMA_VERSION, records };

    show(&request, &document)
}

/// Writes what was measured to where it was asked for; the exit code says whether all of it is sound.
pub fn show(request: &Request, document: &Document) -> Result<ExitCode> {
    write_file(request, document)?;
    print(request, document)?;
    Ok(exit_code(&document.records, request.allow_oom))
}

fn write_file(request: &Request, document: &Document) -> Result<()> {
    match &request.file {
        Some((path, writer)) => report::write_file(path, &(writer.write)(document, &request.options)?),
        None => Ok(()),
    }
}

fn print(request: &Request, document: &Document) -> Result<()> {
    let mut text = (request.stdout.write)(document, &request.options)?;
    if request.is_first_look {
        text += &limits::block(&document.records)?;
    }
    Ok(ui::print(&text)?)
}

fn exit_code(records: &[Record], allow_oom: bool) -> ExitCode {
    let passes = |record: &Record| record.status == Status::Ok || (allow_oom && record.status == Status::Oom);
    match records.iter().all(passes) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    }
}
