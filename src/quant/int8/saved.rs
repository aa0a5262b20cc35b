//! LLM.int8 in a checkpoint of bitsandbytes: codes, the rows' absmax as `SCB`, and a byte that says in which order the codes lie.

use anyhow::Result;
use safetensors::Dtype;

use crate::quant::Part;
use crate::quant::saved::{Companion, SavedConfig, SavedForm, SavedMatrix};

pub struct Int8Saved;

const WEIGHT_FORMAT: &str = "weight_format";

impl SavedForm for Int8Saved {
    fn config(&self) -> SavedConfig<'static> {
        SavedConfig::EightBit
    }

    fn companions(&self, n: usize, k: usize) -> Vec<Companion> {
        let weight_format = Companion { is_optional: true, ..Companion::new(WEIGHT_FORMAT, Dtype::U8, 1) };
        vec![Companion::new("", Dtype::I8, n.saturating_mul(k)), Companion::new("SCB", Dtype::F32, n), weight_format]
    }

    fn holds(&self, dtype: Dtype, has: &dyn Fn(&str) -> bool) -> bool {
        dtype == Dtype::I8 && has("SCB")
    }

    fn read(&self, matrix: &SavedMatrix) -> Result<Vec<Part>> {
        let format = (matrix.read)(WEIGHT_FORMAT)?;
        let is_by_row = format.is_none_or(|format| format.bytes.iter().all(|byte| *byte == 0));
        matrix.ensure(is_by_row, |name| {
            format!("`{name}` is int8 in a layout of bitsandbytes before 0.45; only rows are known")
        })?;
        matrix.parts(&["", "SCB"])
    }

    fn write(&self, _: (usize, usize), mut parts: Vec<Part>) -> Result<Vec<Part>> {
        parts.push(Part { suffix: WEIGHT_FORMAT, dtype: Dtype::U8, shape: Vec::new(), bytes: vec![0] });
        Ok(parts)
    }
}
