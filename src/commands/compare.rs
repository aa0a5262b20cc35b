//! `quantbench compare`: two files, three verdicts, one exit code.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{CompareArgs, CompareRequest, Judgement};
use crate::error::BadInput;
use crate::report::Terminal;
use crate::report::compare::{self, Comparison, Verdict};
use crate::{report, ui};

/// A regression that is proven.
pub(super) const REGRESSED: u8 = 3;

/// Reads, compares, reports; 3 where something regressed.
pub fn compare(args: &CompareArgs) -> Result<ExitCode> {
    let request = CompareRequest::new(args)?;
    let comparison = compare::compare(&request.base, &request.new, &request.judgement.rules)?;
    let written = request
        .file
        .as_ref()
        .map_or(Ok(()), |(path, format)| report::write_file(path, &(format.write)(&comparison, &Terminal::default())?));
    ui::print_measured(&(request.stdout.write)(&comparison, &ui::terminal())?)?;
    written?;
    exit_code(&comparison, &request.judgement)
}

/// 3 for a proven regression, and under `--strict` for what these runs leave open. A named gate that compared nothing is an
/// error, since it would never fail.
pub fn exit_code(comparison: &Comparison, judgement: &Judgement) -> Result<ExitCode> {
    let empty = &comparison.empty_gates;
    match comparison.verdict {
        Verdict::Regressed => Ok(ExitCode::from(REGRESSED)),
        _ if comparison.checks.is_empty() || (judgement.is_named && !empty.is_empty()) => {
            Err(BadInput::new(format!("a gate compared nothing: {}", empty.join(", ")))
                .hint("measure it on both sides, or drop the gate")
                .into())
        }
        Verdict::CannotTell if judgement.strict => Ok(ExitCode::from(REGRESSED)),
        _ => Ok(ExitCode::SUCCESS),
    }
}
