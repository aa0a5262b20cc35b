//! `quantbench run`: one model at several precisions.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;

use super::{compare, limits};
use crate::cli::{Against, Judgement, Request, RunArgs};
use crate::error::BadInput;
use crate::harness::Case;
use crate::os::interrupt;
use crate::record::{Document, Record, SCHEMA_VERSION, Status, break_even};
use crate::report::compare::Comparison;
use crate::report::{Options, Writer};
use crate::ui::{self, Progress};
use crate::{harness, report};

/// Measures, then reports; 1 if any precision failed or is invalid, 3 if it was compared and something regressed.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    let request = Request::new(args, report::shareable_command(std::env::args()))?;
    let against = args.against.request()?;
    ui::end_on_interrupt();
    let events = Progress::new(request.quiet);
    let cases = harness::with_largest_batches(request.cases, request.options.card_bytes, &events)?;
    let request = Request { cases, ..request };
    let document = |records| self::document(&request, records);
    match against {
        None => {
            let (measured, others) = each(&request.cases, |case| harness::run(case, &events))?;
            and(show(&request, &document(measured.concat())), others)
        }
        Some((Against::Baseline(base), judgement)) => {
            let (measured, others) = each(&request.cases, |case| harness::run(case, &events))?;
            let new = document(measured.concat());
            let shown = and(show(&request, &new), others);
            let judged = judge(&request, (&base, &new), &judgement);
            Ok(regressed_or(both(shown, judged)?))
        }
        Some((Against::Binary(other), judgement)) => {
            let (measured, others) = each(&request.cases, |case| harness::run_ab(case, &other, &events))?;
            let (base, new): (Vec<_>, Vec<_>) = measured.into_iter().unzip();
            let all = document([base.concat(), new.concat()].concat());
            let (base, new) = (document(base.concat()), document(new.concat()));
            let shown = and(show_parts(&request, &all, &new), others);
            let judged = judge(&request, (&base, &new), &judgement);
            Ok(regressed_or(both(shown, judged)?))
        }
    }
}

/// Results of `measure` for each case, and the error of a case that could not run after others had: their results are not lost, and the run
/// fails all the same. A case that cannot run ends the others before the first.
pub fn each<T>(cases: &[Case], measure: impl Fn(&Case) -> Result<T>) -> Result<(Vec<T>, Result<()>)> {
    for case in cases.iter().filter(|_| cases.len() > 1) {
        harness::check(case)?;
    }
    let (mut measured, mut others) = (Vec::new(), Ok(()));
    for case in cases.iter().take_while(|_| !interrupt::is_requested()) {
        match measure(case) {
            Ok(result) => measured.push(result),
            Err(error) if measured.is_empty() => return Err(error),
            Err(error) => others = and(others, Err(error)),
        }
    }
    Ok((measured, others))
}

/// The first result, if the second is no error; both errors are reported.
pub fn and<T>(first: Result<T>, second: Result<()>) -> Result<T> {
    both(first, second).map(|(first, ())| first)
}

/// What was measured, with the card that was asked about and the break-even of several batches.
pub fn document(request: &Request, mut records: Vec<Record>) -> Document {
    records.iter_mut().for_each(|record| record.card_bytes = request.options.card_bytes);
    break_even::fill(&mut records);
    Document { schema_version: SCHEMA_VERSION, records }
}

/// A regression beats what the run itself ended with.
fn regressed_or((run, judged): (ExitCode, ExitCode)) -> ExitCode {
    if judged == ExitCode::SUCCESS { run } else { judged }
}

/// Two results that do not need each other. The first error of two is reported at once.
fn both<A, B>(first: Result<A>, second: Result<B>) -> Result<(A, B)> {
    match (first, second) {
        (Ok(first), Ok(second)) => Ok((first, second)),
        (Err(first), Err(second)) => {
            ui::print_error(&first);
            Err(second)
        }
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

/// Compares and shows it.
fn judge(request: &Request, sides: (&Document, &Document), judgement: &Judgement) -> Result<ExitCode> {
    let comparison = report::compare::compare(sides.0, sides.1, &judgement.rules)?;
    show_comparison(request, &comparison)?;
    compare::exit_code(&comparison, judgement)
}

/// Below the run where stdout is for people, else on stderr: what programs read stays one document.
fn show_comparison(request: &Request, comparison: &Comparison) -> Result<()> {
    let own = report::compare::find(request.stdout.name).filter(|format| format.name != "json");
    match own {
        Some(format) => Ok(ui::print(&format!("\n{}", (format.write)(comparison, &ui::terminal())?))?),
        None => {
            ui::print_aside(&(report::compare::FORMATS[0].write)(comparison, &ui::terminal_aside())?);
            Ok(())
        }
    }
}

/// Writes what was measured to where it was asked for; the exit code says whether all of it is sound.
pub fn show(request: &Request, document: &Document) -> Result<ExitCode> {
    show_parts(request, document, document)
}

/// The same where the file holds more than stdout. What cannot be written to one place is written to the other all the same: a
/// measurement may have taken hours.
fn show_parts(request: &Request, in_file: &Document, on_stdout: &Document) -> Result<ExitCode> {
    both(write_files(request, in_file), print(request, on_stdout))?;
    logits_were_saved(&in_file.records)?;
    if interrupt::is_requested() {
        ui::note(&interrupted(&on_stdout.records, request.cases.len()));
        return Ok(ExitCode::from(ui::INTERRUPTED));
    }
    Ok(exit_code(&on_stdout.records, request.allow_oom))
}

/// Says how much of an interrupted run is kept: `interrupted: 4 repeats of each precision are kept`.
fn interrupted(records: &[Record], n_cases: usize) -> String {
    let counts: Vec<usize> = records.iter().map(|record| record.samples.end_to_end_ns.len()).collect();
    let (least, most) = (counts.iter().min().copied().unwrap_or(0), counts.iter().max().copied().unwrap_or(0));
    let of_cases = if n_cases > 1 { ", of the cases above" } else { "" };
    match (least, most) {
        (_, 0) => "interrupted before anything was measured".to_owned(),
        (least, most) if least == most => format!("interrupted: {least} repeats of each precision are kept{of_cases}"),
        (least, most) => format!("interrupted: {least} to {most} repeats of each precision are kept{of_cases}"),
    }
}

/// Writes every file. Fails, saying where a file is now, if it could not be written where it was asked for.
fn write_files(request: &Request, document: &Document) -> Result<()> {
    let write = |(path, writer): &(PathBuf, &'static Writer)| -> Result<()> {
        let text = (writer.write)(document, &request.options)?;
        report::write_file(path, &text).map_err(|error| {
            let elsewhere = keep(path, &text).map(|kept| format!("it was written to `{}` instead", kept.display()));
            let hint = elsewhere.unwrap_or_else(|| "what was measured stands on stdout alone".to_owned());
            BadInput::new(format!("{error:#}")).hint(hint).into()
        })
    };
    let mut all = Ok(());
    for one in request.files.iter().map(write) {
        all = and(all, one);
    }
    all
}

/// Writes `text` into the folder for temporary files, where it stays; `None` where that cannot be done either.
fn keep(path: &Path, text: &str) -> Option<PathBuf> {
    let extension = path.extension().map(|extension| format!(".{}", extension.to_string_lossy())).unwrap_or_default();
    let mut file = tempfile::Builder::new().prefix("quantbench-").suffix(&extension).tempfile().ok()?;
    file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).ok()?;
    Some(file.keep().ok()?.1)
}

/// Fails where logits were asked for and not all of them could be saved; the record says so too.
fn logits_were_saved(records: &[Record]) -> Result<()> {
    let prefix = format!("{}: ", harness::LOGITS_NOT_SAVED);
    let problem =
        |record: &Record| record.warnings.iter().find_map(|text| text.strip_prefix(&prefix).map(str::to_owned));
    match records.iter().find_map(problem) {
        None => Ok(()),
        Some(problem) => Err(BadInput::new(problem)
            .hint("name another file with `--save-logits`; what was measured is there")
            .into()),
    }
}

fn print(request: &Request, document: &Document) -> Result<()> {
    let options = Options { terminal: ui::terminal(), ..request.options };
    let mut text = (request.stdout.write)(document, &options)?;
    let is_sound = document.records.iter().all(|record| record.status == Status::Ok);
    if request.is_first_look && is_sound && ui::shows_people() {
        text += &limits::block(&document.records, &request.cases[0].model.model_id, &options.terminal)?;
    }
    ui::print_measured(&text)
}

fn exit_code(records: &[Record], allow_oom: bool) -> ExitCode {
    let passes = |record: &Record| record.status == Status::Ok || (allow_oom && record.status == Status::Oom);
    match records.iter().all(passes) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_case_that_fails_behind_others_fails_the_run_and_keeps_theirs() {
        let cli = Cli::try_parse_from(["quantbench", "-p", "1,2,3"]).unwrap();
        let request = Request::new(&cli.run, "a command".to_owned()).unwrap();
        let turn = Cell::new(0);
        let measure = |_: &Case| {
            turn.set(turn.get() + 1);
            if turn.get() == 2 { Err(anyhow::anyhow!("the second")) } else { Ok(turn.get()) }
        };
        let (measured, others) = each(&request.cases, measure).unwrap();
        assert_eq!(measured, [1, 3]);
        assert_eq!(others.unwrap_err().to_string(), "the second");
        let first = each(&request.cases, |_| -> Result<()> { Err(anyhow::anyhow!("the first")) });
        assert_eq!(first.unwrap_err().to_string(), "the first");
    }
}
