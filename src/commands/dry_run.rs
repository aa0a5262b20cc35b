//! `quantbench --dry-run`: what a run would do, download and need.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Request, RunArgs};
use crate::error::BadInput;
use crate::ui::{self, Progress};
use crate::{harness, report};

/// Fails where the run itself would fail before it starts; whether it fits is said and no failure.
pub fn dry_run(args: &RunArgs) -> Result<ExitCode> {
    let request = Request::new(args, report::shareable_command(std::env::args()))?;
    let mut dry_run = harness::dry_run(&request.case, &Progress::new(request.quiet))?;
    dry_run.hold_to(request.options.card_bytes);
    let text = match request.stdout.name {
        "table" => dry_run.text(),
        "json" => dry_run.json()?,
        other => {
            let error = BadInput::new(format!("`--dry-run --format {other}`: there are no records to write"));
            return Err(error.hint("use `--format json`, or no `--format` for text").into());
        }
    };
    ui::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
