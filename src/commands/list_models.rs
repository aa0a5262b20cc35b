//! `quantbench --list-models`: the built-in shapes.

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::engine::needs::stored_bytes;
use crate::quant::{FORMATS, FormatId, FormatOptions};
use crate::weights::policy::Formats;
use crate::{models, ui, weights};

/// One line a shape: name, architecture, parameters, and what its weights take at each precision.
pub fn list_models() -> Result<ExitCode> {
    // Variants of a format take the same bytes but for a few per cent.
    let formats: Vec<FormatId> = FORMATS.iter().copied().filter(|format| !format.name.contains('-')).collect();
    let head: String = formats.iter().map(|format| format!(" {:>7} GiB", format.name)).collect();
    let mut text = format!("{:<20} {:<12} {:>13}{head}\n", "shape", "architecture", "parameters (M)");
    for shape in weights::builtin_models() {
        let model = models::build(&shape.config()).with_context(|| format!("the built-in shape `{}`", shape.name))?;
        let millions = model.parameters() as f64 / 1e6;
        let gib = |format: &FormatId| {
            let bytes = stored_bytes(&model, &Formats::new(*format, FormatOptions::default()));
            format!(" {:>11.2}", bytes as f64 / (1u64 << 30) as f64)
        };
        let gib: String = formats.iter().map(gib).collect();
        text += &format!("{:<20} {:<12} {millions:>14.1}{gib}\n", shape.name, model.architecture);
    }
    ui::print(&text)?;
    Ok(ExitCode::SUCCESS)
}
