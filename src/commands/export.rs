//! `quantbench export`: a checkpoint that other engines load: transformers and bitsandbytes a folder, llama.cpp a file.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{ExportArgs, ExportForm, ExportRequest};
use crate::error::size;
use crate::ui::{self, Progress};
use crate::weights::{export, gguf};
use crate::{harness, weights};

/// Writes the folder, or nothing.
pub fn export(args: &ExportArgs) -> Result<ExitCode> {
    let request = ExportRequest::new(args)?;
    let events = Progress::new(args.quiet);
    let checkpoint = weights::open(&request.model, &events)?;
    let mut model = harness::build(&checkpoint, &request.model, &events)?;
    harness::select(&mut model, &checkpoint, &request.selection)?;
    let tensors = (model.matrices.as_slice(), model.vectors.as_slice());
    let (bytes, fp16_overflow) = match request.form {
        ExportForm::Gguf => gguf::export(&checkpoint, tensors, request.precision, &request.output, &events)?,
        ExportForm::Safetensors => {
            let exported = export::export(&checkpoint, tensors, request.precision, &request.output, &events)?;
            (exported.bytes, exported.fp16_overflow)
        }
    };
    let overflow = match fp16_overflow {
        0 => String::new(),
        count => format!("; {count} values were too large for fp16 and became infinite"),
    };
    let (output, bytes) = (request.output.display(), size(bytes));
    ui::print(&format!(
        "wrote `{output}`: {} of `{}`, {bytes} of weights{overflow}\n",
        request.precision, checkpoint.id
    ))?;
    Ok(ExitCode::SUCCESS)
}
