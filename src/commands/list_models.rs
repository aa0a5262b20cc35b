//! `quantbench --list-models`: the built-in shapes.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::engine::needs::stored_bytes;
use crate::quant::{FORMATS, FormatId, FormatOptions};
use crate::report::grid::{self, Line};
use crate::weights::policy::Formats;
use crate::{models, ui, weights};

/// One line a shape: name, architecture, parameters, and what its weights take at each precision.
pub fn list_models() -> Result<ExitCode> {
    // Variants of a format take the same bytes but for a few per cent.
    let formats: Vec<FormatId> = FORMATS.iter().copied().filter(|format| !format.name.contains('-')).collect();
    // Both columns of words are left-aligned: to the grid they are one.
    let first = |name: &str, architecture: &str| format!("{name:<20} {architecture:<12}");
    let head = [first("shape", "architecture"), "parameters (M)".to_owned()].into_iter();
    let head = head.chain(formats.iter().map(|format| format!("{} GiB", format.name))).collect();
    let mut lines = vec![Line::Cells(head)];
    for shape in weights::builtin_models() {
        let model = models::build(&shape.config()).with_context(|| format!("the built-in shape `{}`", shape.name))?;
        let millions = model.parameters() as f64 / 1e6;
        let gib = |format: &FormatId| {
            let bytes = stored_bytes(&model, &Formats::new(*format, FormatOptions::default()));
            format!("{:.2}", bytes as f64 / (1u64 << 30) as f64)
        };
        let words = [first(shape.name, model.architecture), format!("{millions:.1}")];
        lines.push(Line::Cells(words.into_iter().chain(formats.iter().map(gib)).collect()));
    }
    ui::print(&grid::folded(&lines, ui::terminal().columns, 1))?;
    Ok(ExitCode::SUCCESS)
}
