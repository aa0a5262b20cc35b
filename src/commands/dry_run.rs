//! `quantbench --dry-run`: what a run would do, download and need.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Request, RunArgs};
use crate::error::BadInput;
use crate::report::dry_run::DryRun;
use crate::ui::{self, Progress};
use crate::{harness, report};

/// Fails where the run itself would fail before it starts; whether it fits is said and no failure.
pub fn dry_run(args: &RunArgs) -> Result<ExitCode> {
    let request = Request::new(args, report::shareable_command(std::env::args()))?;
    let events = Progress::new(request.quiet);
    let of = |case| -> Result<DryRun> {
        let mut dry_run = harness::dry_run(case, &events)?;
        dry_run.hold_to(request.options.card_bytes);
        Ok(dry_run)
    };
    let cases = harness::with_largest_batches(request.cases, request.options.card_bytes, &events)?;
    let dry_runs: Vec<DryRun> = cases.iter().map(of).collect::<Result<_>>()?;
    let text = match (request.stdout.name, dry_runs.as_slice()) {
        ("table", _) => dry_runs.iter().map(|one| one.text(&ui::terminal())).collect::<Vec<_>>().join("\n"),
        ("json", [one]) => one.json()?,
        ("json", all) => serde_json::to_string_pretty(all)? + "\n",
        (other, _) => {
            let error = BadInput::new(format!("`--dry-run --format {other}`: there are no records to write"));
            return Err(error.hint("use `--format json`, or no `--format` for text").into());
        }
    };
    ui::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
