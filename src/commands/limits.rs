//! What the bandwidth just measured allows for models that were not run: the end of a first look.

use std::path::Path;

use anyhow::{Context, Result};

use crate::plan::Model;
use crate::quant::{FormatId, FormatOptions};
use crate::record::Record;
use crate::report::{self, ModelBytes, PrecisionBytes, Terminal};
use crate::weights;
use crate::weights::policy::Formats;
use crate::{cli, models};

/// What the next command measures: the first of these that was not measured now. Built-in shapes, so that no network is needed.
const NEXT_MODEL_IDS: [&str; 2] = ["llama-3.2-1b", "phi-2"];

/// The block under the table, empty where no record measured a bandwidth. `measured` is the built-in shape that the records
/// are about.
pub fn block(records: &[Record], measured: &str, terminal: &Terminal) -> Result<String> {
    let Some(read_gb_s) = records.iter().filter_map(|record| record.bandwidth.read_gb_s).reduce(f64::max) else {
        return Ok(String::new());
    };
    let precisions: Vec<FormatId> = records.iter().filter_map(|record| FormatId::named(&record.precision)).collect();
    // The smallest one is no model whose limit anyone asks for.
    let shown = |name: &str| name != measured && name != cli::DEFAULT_MODEL_ID;
    let others = weights::builtin_models().iter().filter(|shape| shown(shape.name));
    let models: Vec<ModelBytes> = others
        .map(|shape| {
            let model =
                models::build(&shape.config()).with_context(|| format!("the built-in shape `{}`", shape.name))?;
            Ok(bytes_of(shape.name, &model, &precisions))
        })
        .collect::<Result<_>>()?;
    let next = NEXT_MODEL_IDS.iter().find(|name| **name != measured).unwrap_or(&NEXT_MODEL_IDS[0]);
    Ok(format!("\n{}", report::limits(read_gb_s, &models, &format!("{} --model-id {next}", program()), terminal)))
}

/// This program as it was typed, so that the next command works. Not where that says whose machine this is.
fn program() -> String {
    let typed = std::env::args().next().filter(|typed| !Path::new(typed).is_absolute());
    typed.unwrap_or_else(|| "quantbench".into())
}

fn bytes_of(name: &str, model: &Model, precisions: &[FormatId]) -> ModelBytes {
    let precision_bytes = |&precision: &FormatId| {
        let formats = Formats::new(precision, FormatOptions::default());
        let matrix_bytes: Vec<usize> = model.matrices.iter().map(|spec| formats.stored_bytes(spec) as usize).collect();
        PrecisionBytes {
            precision: precision.to_string(),
            bytes_per_token: model.weight_bytes_per_token(&matrix_bytes) as u64,
            weights_bytes: (matrix_bytes.iter().sum::<usize>() + model.vector_bytes()) as u64,
        }
    };
    ModelBytes { name: name.to_owned(), precisions: precisions.iter().map(precision_bytes).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{fp16, int8, nf4};

    /// Linear and head parameters of phi-2 are 2,516,582,400 and 131,072,000: what a step reads, and the bits of each format
    /// (int8: a byte and 4 bytes a row; nf4: half a byte, a byte for 64, 4 bytes for 16,384 weights), give these ratios.
    #[test]
    fn phi_2_reads_what_its_shape_says() {
        let phi =
            weights::builtin_models().iter().find(|shape| shape.name.contains("phi-2")).expect("a built-in shape");
        let model = models::build(&phi.config()).unwrap();
        let bytes = bytes_of(phi.name, &model, &[fp16::ID, int8::ID, nf4::ID]);
        let read = |index: usize| bytes.precisions[index].bytes_per_token as f64;
        for (index, ratio) in [(1, 1.90), (2, 3.39)] {
            assert!((read(0) / read(index) - ratio).abs() < 0.02, "{}", read(0) / read(index));
        }
        let nf4_gib = bytes.precisions[2].weights_bytes as f64 / (1u64 << 30) as f64;
        assert!((nf4_gib - 1.70).abs() < 0.017, "{nf4_gib}");
    }
}
