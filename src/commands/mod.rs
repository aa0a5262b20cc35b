//! One file per command, each a table of contents.

mod compare;
mod completions;
mod doctor;
mod dry_run;
mod export;
mod history;
mod import;
mod limits;
mod list_models;
mod man;
mod merge;
mod quality;
mod report;
mod run;
mod suite;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Cli, Command, RunArgs};
use crate::{harness, ui};

/// Runs what was asked for. The exit code is 0, or 1 where a case failed; setting up and usage fail with an error.
pub fn dispatch(cli: &Cli) -> Result<ExitCode> {
    ui::set_color(cli.color);
    match &cli.command {
        None => run(&cli.run),
        Some(Command::Run(args)) => run(args),
        Some(Command::Quality(args)) => quality::quality(args),
        Some(Command::Suite(args)) => suite::suite(args),
        Some(Command::Merge(args)) => merge::merge(args),
        Some(Command::Compare(args)) => compare::compare(args),
        Some(Command::Import(args)) => import::import(args),
        Some(Command::History(args)) => history::history(args),
        Some(Command::Report(args)) => report::report(args),
        Some(Command::Export(args)) => export::export(args),
        Some(Command::Doctor(args)) => doctor::doctor(args),
        Some(Command::Completions { shell }) => completions::completions(*shell),
        Some(Command::Man(args)) => man::man(args),
        Some(Command::Case) => crate::suite::case_main().map(|()| ExitCode::SUCCESS),
        Some(Command::Worker) => harness::worker_main().map(|()| ExitCode::SUCCESS),
    }
}

fn run(args: &RunArgs) -> Result<ExitCode> {
    match (args.list_models, args.dry_run) {
        (true, _) => list_models::list_models(),
        (false, true) => dry_run::dry_run(args),
        (false, false) => run::run(args),
    }
}
