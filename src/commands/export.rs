//! `quantbench export`: a quantized checkpoint that transformers and bitsandbytes load.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{ExportArgs, ExportRequest};
use crate::ui::{self, Progress};
use crate::weights::export;
use crate::{harness, weights};

/// Writes the folder, or nothing.
pub fn export(args: &ExportArgs) -> Result<ExitCode> {
    let request = ExportRequest::new(args)?;
    let events = Progress::new(args.quiet);
    let checkpoint = weights::open(&request.model, &events)?;
    let mut model = harness::build(&checkpoint, &request.model, &events)?;
    harness::select(&mut model, &checkpoint, &request.selection)?;
    let tensors = (model.matrices.as_slice(), model.vectors.as_slice());
    let exported = export::export(&checkpoint, tensors, request.precision, &request.output, &events)?;
    let overflow = match exported.fp16_overflow {
        0 => String::new(),
        count => format!("; {count} values were too large for fp16 and became infinite"),
    };
    let (output, bytes) = (request.output.display(), exported.bytes);
    ui::print(&format!(
        "wrote `{output}`: {} of `{}`, {bytes} bytes of weights{overflow}\n",
        request.precision, checkpoint.id
    ))?;
    Ok(ExitCode::SUCCESS)
}
