//! bitsandbytes' 4 bits beside NF4 in blocks of 64: FP4, and both in other blocks. Codes lie over the flattened matrix, the first of two in the
//! high nibble; a code means a value of the table that the checkpoint holds (`quant_map`), times its block's absmax.
//!
//! FP4's table is bitsandbytes' own and not E2M1. With double quantization the absmax values are codes of 8 bits themselves.

use std::sync::Arc;

use anyhow::{Context, Result};
use safetensors::Dtype;
use serde::Deserialize;

use super::nf4::nested::{self, NESTED_BLOCK, NestedAbsmax};
use super::scaled::codes::{Fields, Meaning};
use super::scaled::scales::{Groups, Scales};
use super::scaled::{NominalSize, ScaledStored, Scaling, scaled_formats};
use super::scheme::{Module, Scheme, finite, not_read};
use super::{FormatId, Stored};

const fn size(block: usize) -> NominalSize {
    NominalSize { code_bits: 4, group: block, scale_bits: 32 }
}

const fn nested(block: usize) -> NominalSize {
    NominalSize { code_bits: 4, group: block, scale_bits: 8 }
}

scaled_formats! {
    FP4, "bnb-fp4", "bitsandbytes' FP4 in blocks of 64", size(64);
    FP4_B128, "bnb-fp4-b128", "bitsandbytes' FP4 in blocks of 128", size(128);
    FP4_B256, "bnb-fp4-b256", "bitsandbytes' FP4 in blocks of 256", size(256);
    FP4_BLOCKS, "bnb-fp4-blocks", "bitsandbytes' FP4 in blocks of another size", size(512);
    FP4_NESTED, "bnb-fp4-dq", "bitsandbytes' FP4 in blocks of 64, absmax double-quantized", nested(64);
    FP4_NESTED_BLOCKS, "bnb-fp4-blocks-dq", "bitsandbytes' FP4 in blocks of another size, absmax double-quantized", nested(128);
    NF4_B128, "bnb-nf4-b128", "bitsandbytes' NF4 in blocks of 128", size(128);
    NF4_B256, "bnb-nf4-b256", "bitsandbytes' NF4 in blocks of 256", size(256);
    NF4_BLOCKS, "bnb-nf4-blocks", "bitsandbytes' NF4 in blocks of another size", size(512);
    NF4_NESTED_BLOCKS, "bnb-nf4-blocks-dq", "bitsandbytes' NF4 in other blocks than of 64, absmax double-quantized", nested(128);
}

/// What a checkpoint says of its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks4 {
    pub is_fp4: bool,
    /// Values that share an absmax.
    pub block: usize,
    pub is_nested: bool,
}

impl Blocks4 {
    /// Of the `quant_type` of a section; `None` for others.
    pub fn of(quant_type: &str, is_nested: bool) -> Option<Self> {
        let is_fp4 = match quant_type {
            "fp4" => true,
            "nf4" => false,
            _ => return None,
        };
        Some(Self { is_fp4, block: 64, is_nested })
    }

    /// As a `quant_state` says it. Fails with [`crate::error::BadInput`] on text that is none.
    pub fn parse(text: &[u8]) -> Result<Self> {
        Ok(QuantText::parse(text)?.0)
    }

    pub fn format(self) -> FormatId {
        match (self.is_fp4, self.block, self.is_nested) {
            (true, 64, false) => FP4,
            (true, 128, false) => FP4_B128,
            (true, 256, false) => FP4_B256,
            (true, _, false) => FP4_BLOCKS,
            (true, 64, true) => FP4_NESTED,
            (true, _, true) => FP4_NESTED_BLOCKS,
            (false, 128, false) => NF4_B128,
            (false, 256, false) => NF4_B256,
            (false, _, false) => NF4_BLOCKS,
            (false, _, true) => NF4_NESTED_BLOCKS,
        }
    }

    /// The scheme of a checkpoint whose matrices are held so.
    pub fn scheme(self) -> Arc<dyn Scheme> {
        Arc::new(self)
    }
}

/// `quant_state`, as Python's `json.dumps` writes it.
#[derive(Deserialize)]
struct QuantText {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

impl QuantText {
    fn parse(text: &[u8]) -> Result<(Blocks4, Self)> {
        let key = "quant_state";
        let text: Self = serde_json::from_slice(text).map_err(|error| {
            not_read(key, format!("that cannot be read ({error})"), "those that bitsandbytes saves")
        })?;
        let Some(blocks) = Blocks4::of(&text.quant_type, text.nested_offset.is_some()) else {
            return Err(not_read(key, format!("of `{}`", text.quant_type), "`nf4` and `fp4`"));
        };
        if text.blocksize == 0 || text.nested_blocksize.is_some_and(|block| block != NESTED_BLOCK) {
            let seen = format!("of blocks of {} and {:?}", text.blocksize, text.nested_blocksize);
            return Err(not_read(key, seen, "blocks of a positive size, and nested ones of 256"));
        }
        Ok((Blocks4 { block: text.blocksize, ..blocks }, text))
    }
}

const FP4_STATE: &str = "weight.quant_state.bitsandbytes__fp4";
const NF4_STATE: &str = "weight.quant_state.bitsandbytes__nf4";
/// Longer texts are none.
const MOST_TEXT_BYTES: usize = 1 << 16;

impl Blocks4 {
    /// The blocks of a module, and the offset of their nested absmax values. Fails where the tensors are others.
    fn of_module(self, module: &Module) -> Result<(Self, Option<f64>)> {
        let suffix = if module.has(FP4_STATE) { FP4_STATE } else { NF4_STATE };
        let (dtype, length) = module.get(suffix)?;
        if dtype != Dtype::U8 || length.len() != 1 || length[0] > MOST_TEXT_BYTES {
            return Err(module.fault(format!("`{}`, {dtype} of shape {length:?}, is no text", module.tensor(suffix))));
        }
        let (blocks, text) =
            QuantText::parse(&module.bytes(suffix)?).with_context(|| format!("reading `{}`", module.tensor(suffix)))?;
        let (n, k) = (module.n, module.k);
        if text.shape != [n, k] {
            let message = format!(
                "`{}` says {:?}, the model of config.json needs {:?}",
                module.tensor(suffix),
                text.shape,
                [n, k]
            );
            return Err(module.fault(message));
        }
        let values = n.saturating_mul(k);
        let (packed, absmax) = (values.div_ceil(2), values.div_ceil(blocks.block));
        module.expect("weight", &[Dtype::U8], &[&[packed, 1], &[packed]])?;
        module.expect("weight.quant_map", &[Dtype::F32], &[&[16]])?;
        match blocks.is_nested {
            false => module.expect("weight.absmax", &[Dtype::F32], &[&[absmax]])?,
            true => {
                module.expect("weight.absmax", &[Dtype::U8], &[&[absmax]])?;
                module.expect("weight.nested_absmax", &[Dtype::F32], &[&[absmax.div_ceil(NESTED_BLOCK)]])?;
                module.expect("weight.nested_quant_map", &[Dtype::F32], &[&[256]])?
            }
        };
        Ok((blocks, text.nested_offset))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

impl Scheme for Blocks4 {
    fn precision(&self, _: &[String]) -> FormatId {
        self.format()
    }

    fn marks(&self) -> &'static [&'static str] {
        &[FP4_STATE, NF4_STATE]
    }

    fn companions(&self) -> &'static [&'static str] {
        &[
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            FP4_STATE,
            NF4_STATE,
        ]
    }

    /// bitsandbytes' own lists are looked up elsewhere.
    fn skips(&self, _: &str) -> bool {
        false
    }

    fn skip_key(&self) -> &'static str {
        "llm_int8_skip_modules"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        let (blocks, _) = self.of_module(module)?;
        let (n, k) = (module.n, module.k);
        let absmax = (n * k).div_ceil(blocks.block);
        let scales = if blocks.is_nested { nested::stored_bytes(absmax) } else { absmax * size_of::<f32>() };
        Ok((blocks.format(), (n * k.div_ceil(2) + scales) as u64))
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        let (blocks, offset) = self.of_module(module)?;
        let (n, k) = (module.n, module.k);
        let packed = module.bytes("weight")?;
        let code = |at: usize| packed[at / 2] >> (4 - at % 2 * 4) & 15;
        let row = |row: usize| Fields::new(4, &(row * k..(row + 1) * k).map(code).collect::<Vec<u8>>());
        let codes = (0..n).flat_map(|at| row(at).bytes().to_vec()).collect();
        let table = floats(&module.bytes("weight.quant_map")?);
        let scales = match offset {
            None => Scales::F32(floats(&module.bytes("weight.absmax")?)),
            Some(offset) => {
                let theirs = floats(&module.bytes("weight.nested_quant_map")?);
                let same = theirs.iter().zip(nested::VALUES.iter()).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs());
                if !same {
                    let name = module.tensor("weight.nested_quant_map");
                    return Err(module.fault(format!("`{name}` has other values than bitsandbytes' 8-bit map")));
                }
                Scales::Nested(NestedAbsmax {
                    codes: module.bytes("weight.absmax")?,
                    absmax: floats(&module.bytes("weight.nested_absmax")?),
                    offset: offset as f32,
                })
            }
        };
        let scaling = Scaling {
            format: blocks.format(),
            n,
            k,
            meaning: Meaning::Nibbles(std::array::from_fn(|code| table[code])),
            groups: Groups::Runs(blocks.block),
            scales: finite(module, "weight.absmax", scales)?,
            zeros: None,
        };
        Ok(Box::new(ScaledStored::new(scaling, codes)?))
    }
}
