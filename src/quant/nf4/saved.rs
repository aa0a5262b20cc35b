//! NF4 in a checkpoint of bitsandbytes: codes, absmax values, the tables of both, and a blob of JSON with the rest.

use anyhow::{Context, Result, ensure};
use safetensors::Dtype;

use super::nested::{self, NESTED_BLOCK};
use super::state::QuantState;
use super::{AbsmaxKind, BLOCK, CODES, fp32_part};
use crate::quant::Part;
use crate::quant::saved::{Companion, SavedConfig, SavedForm, SavedMatrix};

pub struct Nf4Saved(pub(super) AbsmaxKind);

const QUANT_STATE: &str = "quant_state.bitsandbytes__nf4";
const NESTED_ABSMAX: &str = "nested_absmax";

/// Rounding that a table of codes may differ by from ours: what another machine makes of the same formula.
const TABLE_TOLERANCE: f32 = 1e-6;

impl SavedForm for Nf4Saved {
    fn config(&self) -> SavedConfig<'static> {
        SavedConfig::FourBit { quant_type: "nf4", double_quant: self.0 == AbsmaxKind::Nested }
    }

    fn companions(&self, n: usize, k: usize) -> Vec<Companion> {
        let values = n.saturating_mul(k);
        let blocks = values.div_ceil(BLOCK);
        let codes = Companion::new("", Dtype::U8, values.div_ceil(2));
        let table = Companion::new("quant_map", Dtype::F32, CODES.len());
        let state = Companion { len: None, ..Companion::new(QUANT_STATE, Dtype::U8, 0) };
        match self.0 {
            AbsmaxKind::Plain => vec![codes, Companion::new("absmax", Dtype::F32, blocks), table, state],
            AbsmaxKind::Nested => vec![
                codes,
                Companion::new("absmax", Dtype::U8, blocks),
                table,
                Companion::new(NESTED_ABSMAX, Dtype::F32, blocks.div_ceil(NESTED_BLOCK)),
                Companion::new("nested_quant_map", Dtype::F32, nested::VALUES.len()),
                state,
            ],
        }
    }

    fn holds(&self, dtype: Dtype, has: &dyn Fn(&str) -> bool) -> bool {
        dtype == Dtype::U8 && has(QUANT_STATE) && has(NESTED_ABSMAX) == (self.0 == AbsmaxKind::Nested)
    }

    fn read(&self, matrix: &SavedMatrix) -> Result<Vec<Part>> {
        check_table(matrix, "quant_map", &CODES)?;
        check_table(matrix, "nested_quant_map", &nested::VALUES[..])?;
        let mut parts = matrix.parts(&["", "absmax", NESTED_ABSMAX])?;
        let Some(text) = (matrix.read)(QUANT_STATE)? else { return Ok(parts) };
        let state =
            QuantState::parse(&text.bytes).with_context(|| format!("reading the quant_state of `{}`", matrix.name))?;
        matrix.ensure((state.n, state.k) == (matrix.n, matrix.k), |name| {
            let (n, k) = (matrix.n, matrix.k);
            format!("the quant_state of `{name}` says [{}, {}], the model needs [{n}, {k}]", state.n, state.k)
        })?;
        parts.extend(state.nested_offset.map(|offset| fp32_part("nested_offset", &[offset])));
        Ok(parts)
    }

    /// The offset of double quantization lies in the blob.
    fn write(&self, (n, k): (usize, usize), parts: Vec<Part>) -> Result<Vec<Part>> {
        let mut saved = vec![fp32_part("quant_map", &CODES)];
        let mut nested_offset = None;
        for part in parts {
            if part.suffix == "nested_offset" {
                let offset = part.bytes.as_chunks::<4>().0.first();
                ensure!(offset.is_some(), "the nested offset is empty");
                nested_offset = offset.map(|bytes| f32::from_le_bytes(*bytes));
                saved.push(fp32_part("nested_quant_map", &nested::VALUES[..]));
            } else {
                saved.push(part);
            }
        }
        let bytes = QuantState { n, k, nested_offset }.to_json().into_bytes();
        saved.push(Part { suffix: QUANT_STATE, dtype: Dtype::U8, shape: vec![bytes.len()], bytes });
        Ok(saved)
    }
}

fn check_table(matrix: &SavedMatrix, suffix: &'static str, ours: &[f32]) -> Result<()> {
    let Some(table) = (matrix.read)(suffix)? else { return Ok(()) };
    let theirs = table.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let same = theirs.zip(ours).all(|(theirs, ours)| (theirs - ours).abs() <= TABLE_TOLERANCE * ours.abs());
    matrix.ensure(same, |name| format!("`{name}` was quantized to other values than NF4's: its quant_map differs"))
}
