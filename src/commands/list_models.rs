//! `quantbench --list-models`: the built-in shapes.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::{models, ui, weights};

/// One line a shape: name, architecture, parameters.
pub fn list_models() -> Result<ExitCode> {
    let mut text = String::new();
    for shape in weights::builtin_models() {
        let model = models::build(&shape.config()).with_context(|| format!("the built-in shape `{}`", shape.name))?;
        let millions = model.parameters() as f64 / 1e6;
        text += &format!("{:<20} {:<10} {millions:>8.1} M parameters\n", shape.name, model.architecture);
    }
    ui::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
