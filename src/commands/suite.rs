//! `quantbench suite`: a matrix of cases, one after the other.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{SuiteArgs, suite_keys, suite_task};
use crate::record::{Document, SCHEMA_VERSION};
use crate::report;
use crate::suite::{self, CaseEnd, OnFailure, Results, Resume, Shard, SuiteCase, Watcher};
use crate::ui::{self, Progress};

/// Runs the cases of this shard, or lists them; 1 if any precision of any case failed or is invalid.
pub fn suite(args: &SuiteArgs) -> Result<ExitCode> {
    let shard = args.shard()?;
    let planned = suite::read(&args.file, &suite_keys())?;
    let tasks = planned.into_iter().map(suite_task).collect::<Result<Vec<SuiteCase>>>()?;
    let tasks: Vec<SuiteCase> = tasks.into_iter().filter(|task| shard.has(task.planned.index)).collect();
    if shard != Shard::WHOLE && !args.quiet {
        ui::note(&format!("part {} of {}: {} cases", shard.index, shard.count, tasks.len()));
    }
    match (args.dry_run, &args.output) {
        (true, _) => list(&tasks),
        (false, Some(path)) => to_file(args, path, &tasks),
        (false, None) => to_stdout(args, &tasks),
    }
}

fn list(tasks: &[SuiteCase]) -> Result<ExitCode> {
    let line = |task: &SuiteCase| {
        let planned = &task.planned;
        let command: Vec<String> = planned.command().iter().map(|word| report::quote(word)).collect();
        format!("{}/{} {} {}\n", planned.index, planned.n_cases, planned.hash, command.join(" "))
    };
    ui::print(&tasks.iter().map(line).collect::<String>())?;
    Ok(ExitCode::SUCCESS)
}

/// Rows to a file as cases end, then the table of all that it holds.
fn to_file(args: &SuiteArgs, path: &Path, tasks: &[SuiteCase]) -> Result<ExitCode> {
    let resume = match (args.resume, args.retry_failed) {
        (false, _) => Resume::No,
        (true, false) => Resume::Ended,
        (true, true) => Resume::EndedWell,
    };
    let mut results = Results::open(path, resume)?;
    let ended = results.ended().clone();
    let n_before = tasks.iter().filter(|task| ended.contains_key(&task.planned.hash)).count();
    if results.recovered && !args.quiet {
        ui::note(&format!("the last line of `{}` was cut; its case runs again", path.display()));
    }
    if n_before > 0 && !args.quiet {
        ui::note(&format!("{n_before} of {} cases ended before and do not run again", tasks.len()));
    }
    let all_ok = run(args, tasks, &ended, &mut |rows| {
        // Rows that the file does not take are shown: the case may have taken hours.
        results.append(rows).inspect_err(|_| drop(ui::print_measured(rows)))
    })?;
    let records = suite::read_lines(path)?.lines.into_iter().map(|line| line.record).collect();
    let document = Document { schema_version: SCHEMA_VERSION, records };
    // The default format stands first: the table.
    ui::print(&(report::WRITERS[0].write)(
        &document,
        &report::Options { terminal: ui::terminal(), ..report::Options::default() },
    )?)?;
    Ok(exit_code(all_ok))
}

/// Rows to stdout as cases end.
fn to_stdout(args: &SuiteArgs, tasks: &[SuiteCase]) -> Result<ExitCode> {
    let all_ok = run(args, tasks, &BTreeMap::new(), &mut ui::print_measured)?;
    Ok(exit_code(all_ok))
}

fn run(
    args: &SuiteArgs,
    tasks: &[SuiteCase],
    ended: &BTreeMap<String, bool>,
    append: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<bool> {
    let on_failure = if args.fail_fast { OnFailure::Stop } else { OnFailure::GoOn };
    suite::run(tasks, ended, append, on_failure, (&Notes { quiet: args.quiet }, &Progress::new(args.quiet)))
}

/// A line on stderr for each case.
struct Notes {
    quiet: bool,
}

impl Watcher for Notes {
    fn on_case(&self, end: &CaseEnd) {
        if !self.quiet {
            ui::note(&end.line());
        }
    }
}

fn exit_code(all_ok: bool) -> ExitCode {
    if all_ok { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
