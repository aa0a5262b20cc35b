//! `quantbench history`: a folder of runs, and whether the newest is as fast as those before it.

use std::process::ExitCode;

use anyhow::Result;

use super::compare::exit_code;
use crate::cli::{AddArgs, HistoryArgs, HistoryCheckArgs, HistoryCheckRequest, HistoryCommand, ListArgs};
use crate::record::Document;
use crate::report::{Terminal, history};
use crate::{report, ui};

pub fn history(args: &HistoryArgs) -> Result<ExitCode> {
    match &args.command {
        HistoryCommand::Add(args) => add(args),
        HistoryCommand::Check(args) => check(args),
        HistoryCommand::List(args) => list(args),
    }
}

fn add(args: &AddArgs) -> Result<ExitCode> {
    // All are read before the first is added.
    let documents: Vec<Document> = args.results.iter().map(|path| report::read(path)).collect::<Result<_, _>>()?;
    for (path, document) in args.results.iter().zip(&documents) {
        let added = history::add(&args.folder.dir, document)?;
        let known = match added.n_known {
            0 => String::new(),
            n => format!(", {n} were there already"),
        };
        ui::print(&format!(
            "{}: {} {} added to `{}`{known}\n",
            path.display(),
            added.n_new,
            if added.n_new == 1 { "record" } else { "records" },
            args.folder.dir.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn check(args: &HistoryCheckArgs) -> Result<ExitCode> {
    let request = HistoryCheckRequest::new(args)?;
    let kept = report::read(&args.folder.dir)?.records;
    let (new, past) = match &args.result {
        Some(path) => (report::read(path)?.records, kept),
        None => history::newest(kept),
    };
    let comparison = history::check(&past, &new, &request.rules)?;
    let written = request
        .file
        .as_ref()
        .map_or(Ok(()), |(path, format)| report::write_file(path, &(format.write)(&comparison, &Terminal::default())?));
    ui::print_measured(&(request.stdout.write)(&comparison, &ui::terminal())?)?;
    written?;
    match comparison.checks.is_empty() && comparison.empty_gates.is_empty() {
        // The first run of a history has nothing before it, which is no mistake.
        true if !request.judgement.strict => Ok(ExitCode::SUCCESS),
        true => Ok(ExitCode::from(super::compare::REGRESSED)),
        false => exit_code(&comparison, &request.judgement),
    }
}

fn list(args: &ListArgs) -> Result<ExitCode> {
    let format = args.format()?;
    ui::print(&(format.write)(&report::read(&args.folder.dir)?.records, &ui::terminal())?)?;
    Ok(ExitCode::SUCCESS)
}
