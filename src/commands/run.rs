//! `quantbench run`: one model at several precisions.

use std::process::ExitCode;

use anyhow::Result;

use super::{compare, limits};
use crate::cli::{Against, Judgement, Request, RunArgs};
use crate::record::{Document, Record, SCHEMA_VERSION, Status};
use crate::report::compare::Comparison;
use crate::ui::{self, Progress};
use crate::{harness, report};

/// Measures, then reports; 1 if any precision failed or is invalid, 3 if it was compared and something regressed.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    let request = Request::new(args, report::shareable_command(std::env::args()))?;
    let against = args.against.request()?;
    let events = Progress::new(request.quiet);
    let document = |records| self::document(&request, records);
    match against {
        None => show(&request, &document(harness::run(&request.case, &events)?)),
        Some((Against::Baseline(base), judgement)) => {
            let new = document(harness::run(&request.case, &events)?);
            let code = show(&request, &new)?;
            judge(&request, (&base, &new), &judgement, code)
        }
        Some((Against::Binary(other), judgement)) => {
            let (base, new) = harness::run_ab(&request.case, &other, &events)?;
            write_file(&request, &document([base.clone(), new.clone()].concat()))?;
            let (base, new) = (document(base), document(new));
            print(&request, &new)?;
            judge(&request, (&base, &new), &judgement, exit_code(&new.records, request.allow_oom))
        }
    }
}

/// What was measured, with the card that was asked about.
pub fn document(request: &Request, mut records: Vec<Record>) -> Document {
    records.iter_mut().for_each(|record| record.card_bytes = request.options.card_bytes);
    Document { schema_version: SCHEMA_VERSION, records }
}

/// Compares and shows it; a regression beats what the run itself ended with.
fn judge(request: &Request, sides: (&Document, &Document), judgement: &Judgement, run: ExitCode) -> Result<ExitCode> {
    let comparison = report::compare::compare(sides.0, sides.1, &judgement.rules)?;
    show_comparison(request, &comparison)?;
    let code = compare::exit_code(&comparison, judgement)?;
    Ok(if code == ExitCode::SUCCESS { run } else { code })
}

/// Below the run where stdout is for people, else on stderr: what programs read stays one document.
fn show_comparison(request: &Request, comparison: &Comparison) -> Result<()> {
    let own = report::compare::find(request.stdout.name).filter(|format| format.name != "json");
    match own {
        Some(format) => Ok(ui::print(&format!("\n{}", (format.write)(comparison)?))?),
        None => {
            ui::print_aside(&(report::compare::FORMATS[0].write)(comparison)?);
            Ok(())
        }
    }
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
    let is_sound = document.records.iter().all(|record| record.status == Status::Ok);
    if request.is_first_look && is_sound && ui::shows_people() {
        text += &limits::block(&document.records, &request.case.model.model_id)?;
    }
    ui::print(&text)
}

fn exit_code(records: &[Record], allow_oom: bool) -> ExitCode {
    let passes = |record: &Record| record.status == Status::Ok || (allow_oom && record.status == Status::Oom);
    match records.iter().all(passes) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    }
}
