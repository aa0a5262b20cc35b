//! `quantbench doctor`: what this machine has for measuring, what is missing, and what to do.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{DoctorArgs, PlainFormat};
use crate::{harness, ui};

/// Always 0: a machine that lacks something is no error.
pub fn doctor(args: &DoctorArgs) -> Result<ExitCode> {
    let examination = harness::doctor::examine(args.python.as_deref());
    ui::print(&match args.format {
        PlainFormat::Table => examination.page(&ui::terminal()),
        PlainFormat::Json => examination.json()?,
    })?;
    Ok(ExitCode::SUCCESS)
}
