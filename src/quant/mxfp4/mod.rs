//! MXFP4 (OCP Microscaling): E2M1 values with a power of two for each 32 of a row. Bytes hold neighbouring elements, the first in the low nibble,
//! which is not ggml's order; a matrix is put into ggml's blocks, so that both are one format with the same kernels.
//!
//! gpt-oss holds the experts of a layer in one tensor: `*_blocks` `[experts, n, k / 32, 16]` with `*_scales` `[experts, n, k / 32]`.
//! compressed-tensors holds the same bytes as `weight_packed` `[n, k / 2]` and `weight_scale` `[n, k / 32]`.

use std::sync::Arc;

use anyhow::Result;
use safetensors::Dtype;

use super::ggml::MXFP4;
use super::scaled::codes::E2M1;
use super::scaled::scales::{Groups, Scales};
use super::scaled::{ScaledStored, Scaling};
use super::scheme::{Module, ModuleSlice, Patterns, QuantMethod, Scheme, Section, finite};
use super::{FormatId, FormatOptions, Part, Stored};

/// Values that share a scale.
const BLOCK: usize = 32;
/// Bytes of a block's codes.
const BLOCK_BYTES: usize = BLOCK / 2;

/// A matrix of codes `[n, ⌈k / 2⌉]` and exponents `[n, ⌈k / 32⌉]`.
fn matrix(module: &Module, suffix: &str, codes: Vec<u8>, scales: Vec<u8>) -> Result<Box<dyn Stored>> {
    let (n, k) = (module.n, module.k);
    let Scales::E8m0(scales) = finite(module, suffix, Scales::E8m0(scales))? else { anyhow::bail!("other scales") };
    if !k.is_multiple_of(BLOCK) {
        let (groups, scales) = (Groups::of_row(Some(BLOCK), k), Scales::E8m0(scales));
        let scaling = Scaling { format: MXFP4, n, k, meaning: E2M1, groups, scales, zeros: None };
        return Ok(Box::new(ScaledStored::new(scaling, codes)?));
    }
    let mut bytes = Vec::with_capacity(codes.len() + scales.len());
    for (codes, scale) in codes.as_chunks::<BLOCK_BYTES>().0.iter().zip(&scales) {
        bytes.push(*scale);
        let element = |at: usize| codes[at / 2] >> (at % 2 * 4) & 15;
        bytes.extend((0..BLOCK_BYTES).map(|at| element(at) | element(at + BLOCK_BYTES) << 4));
    }
    let parts = vec![Part { suffix: "", dtype: Dtype::U8, shape: vec![bytes.len()], bytes }];
    Ok((MXFP4.new)(FormatOptions::default()).restore(n, k, parts)?)
}

/// Bytes of a matrix in this format.
fn bytes(module: &Module) -> u64 {
    (module.n * (module.k.div_ceil(2) + module.k.div_ceil(BLOCK))) as u64
}

fn check_packed(module: &Module) -> Result<()> {
    module.expect("weight_packed", &[Dtype::U8], &[&[module.n, module.k.div_ceil(2)]])?;
    module.expect("weight_scale", &[Dtype::U8, Dtype::F8_E8M0], &[&[module.n, module.k.div_ceil(BLOCK)]])?;
    Ok(())
}

/// As [`Scheme::held`] gives it for compressed-tensors.
pub fn held(module: &Module) -> Result<(FormatId, u64)> {
    check_packed(module)?;
    Ok((MXFP4, bytes(module)))
}

/// As [`Scheme::read`] gives it for compressed-tensors.
pub fn read(module: &Module) -> Result<Box<dyn Stored>> {
    check_packed(module)?;
    matrix(module, "weight_scale", module.bytes("weight_packed")?, module.bytes("weight_scale")?)
}

/// gpt-oss.
pub struct GptOss;

impl QuantMethod for GptOss {
    fn name(&self) -> &'static str {
        "mxfp4"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        section.harmless(&["quant_method", "dequantize"]);
        let key = "modules_to_not_convert";
        Ok(Arc::new(GptOssScheme(Patterns::of_transformers(key, section.words(key)?)?)))
    }
}

#[derive(Debug)]
struct GptOssScheme(Patterns);

const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";

/// Where the matrix of a module lies in its tensors; a module without a slice is all of them.
fn slice(module: &Module) -> ModuleSlice {
    let whole = ModuleSlice { index: 0, count: 1, start: 0, step: 1, rows: module.n };
    module.slice.unwrap_or(whole)
}

fn check_blocks(module: &Module) -> Result<()> {
    if !module.k.is_multiple_of(BLOCK) {
        let name = module.tensor(BLOCKS);
        return Err(
            module.fault(format!("`{name}` holds blocks of {BLOCK}, of which rows of {} are not made", module.k))
        );
    }
    let (ModuleSlice { count, rows, .. }, blocks) = (slice(module), module.k / BLOCK);
    let of = |shape: Vec<usize>| if module.slice.is_some() { [vec![count], shape].concat() } else { shape };
    module.expect(BLOCKS, &[Dtype::U8], &[&of(vec![rows, blocks, BLOCK_BYTES])])?;
    module.expect(SCALES, &[Dtype::U8, Dtype::F8_E8M0], &[&of(vec![rows, blocks])])?;
    Ok(())
}

/// The rows of a module of a tensor with `row_bytes` bytes a row.
fn rows(module: &Module, suffix: &str, row_bytes: usize) -> Result<Vec<u8>> {
    let ModuleSlice { index, start, step, rows, .. } = slice(module);
    let all = module.tensors.read(suffix, index * rows * row_bytes, rows * row_bytes)?;
    Ok((0..module.n).flat_map(|row| &all[(start + row * step) * row_bytes..][..row_bytes]).copied().collect())
}

impl Scheme for GptOssScheme {
    fn precision(&self, _: &[String]) -> FormatId {
        MXFP4
    }

    fn marks(&self) -> &'static [&'static str] {
        &[BLOCKS]
    }

    fn companions(&self) -> &'static [&'static str] {
        &[BLOCKS, SCALES]
    }

    fn skips(&self, module: &str) -> bool {
        self.0.matches(module)
    }

    fn skip_key(&self) -> &'static str {
        "modules_to_not_convert"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        check_blocks(module)?;
        Ok((MXFP4, bytes(module)))
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        check_blocks(module)?;
        let blocks = module.k / BLOCK;
        let codes = rows(module, BLOCKS, blocks * BLOCK_BYTES)?;
        matrix(module, SCALES, codes, rows(module, SCALES, blocks)?)
    }
}
