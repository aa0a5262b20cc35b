//! `quantbench quality`: what each precision of a model costs in quality, without its speed.

use std::process::ExitCode;

use anyhow::Result;

use super::run;
use crate::cli::{QualityArgs, Request};
use crate::ui::Progress;
use crate::{harness, report};

/// Measures, then reports; 1 if any precision failed.
pub fn quality(args: &QualityArgs) -> Result<ExitCode> {
    let request = Request::for_quality(args, report::shareable_command(std::env::args()))?;
    let events = Progress::new(request.quiet);
    let (measured, others) = run::each(&request.cases, |case| harness::quality(case, &events))?;
    run::and(run::show(&request, &run::document(&request, measured.concat())), others)
}
