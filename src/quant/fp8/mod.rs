//! FP8: E4M3 values with one scale for the matrix, for each row, or for each block, usually of 128 × 128.
//!
//! A value is `code · scale`, whatever the tensor of scales is called: `weight_scale_inv` is multiplied, too. Scales of activations belong to
//! 8-bit activations; activations are left as they are here. Checkpoints: transformers' `fp8` and `fbgemm_fp8`, AutoFP8.

use std::sync::Arc;

use anyhow::Result;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::scaled::codes::{Meaning, to_e4m3};
use super::scaled::scales::{Groups, Scales};
use super::scaled::{NominalSize, ScaledStored, Scaling, scaled_formats};
use super::scheme::{Module, Patterns, QuantMethod, Scheme, Section};
use super::{FormatId, HalfMatrix, Stored};

scaled_formats! {
    ID, "fp8", "8-bit floats (E4M3) with a scale for each row, block or matrix; made at load with fp32 scales for rows",
        NominalSize { code_bits: 8, group: 0, scale_bits: 32 }, quantize;
}

/// The largest E4M3 value.
const MAX: f32 = 448.0;

/// A row's scale is its largest magnitude over 448, as FBGEMM and compressed-tensors choose it.
fn quantize(HalfMatrix { n, k, data }: HalfMatrix) -> candle_core::Result<ScaledStored> {
    let (mut codes, mut scales, mut values) = (Vec::with_capacity(n * k), Vec::with_capacity(n), vec![0.0; k]);
    for row in data.chunks_exact(k) {
        row.convert_to_f32_slice(&mut values);
        let scale = super::absmax(&values) / MAX;
        scales.push(scale);
        codes.extend(values.iter().map(|value| if scale == 0.0 { 0 } else { to_e4m3(value / scale) }));
    }
    let (groups, scales) = (Groups::of_row(None, k), Scales::F32(scales));
    ScaledStored::new(Scaling { format: ID, n, k, meaning: Meaning::E4m3, groups, scales, zeros: None }, codes)
}

/// Which values share a scale, where shapes alone do not say it.
pub type Fp8Tile = Option<(usize, usize)>;

/// All tensors that may belong to such a module.
pub const COMPANIONS: &[&str] = &[
    "weight",
    "weight_scale",
    "weight_scale_inv",
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "k_scale",
    "v_scale",
];

/// The scales of a module in FP8: the name of their tensor, and what shares one. Fails where shapes are others.
fn layout(module: &Module, tile: Fp8Tile) -> Result<(&'static str, Groups)> {
    let (n, k) = (module.n, module.k);
    module.expect("weight", &[Dtype::F8_E4M3], &[&[n, k]])?;
    let suffix = match (module.has("weight_scale"), module.has("weight_scale_inv")) {
        (false, true) => "weight_scale_inv",
        (true, true) => {
            let names = ["weight_scale", "weight_scale_inv"].map(|suffix| module.tensor(suffix));
            return Err(module.fault(format!("`{}` and `{}` are both there; one is needed", names[0], names[1])));
        }
        _ => "weight_scale",
    };
    let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E8M0];
    let Some((rows, columns)) = tile else {
        let (_, shape) = module.expect(suffix, &dtypes, &[&[n, 1], &[n], &[1], &[], &[1, 1]])?;
        let is_one = shape.iter().all(|length| *length == 1);
        return Ok((suffix, if is_one { Groups::Tiles { rows: n, columns: k } } else { Groups::of_row(None, k) }));
    };
    module.expect(suffix, &dtypes, &[&[n.div_ceil(rows), k.div_ceil(columns)]])?;
    Ok((suffix, Groups::Tiles { rows, columns }))
}

/// As [`Scheme::held`] gives it.
pub fn held(module: &Module, tile: Fp8Tile) -> Result<(FormatId, u64)> {
    let (suffix, groups) = layout(module, tile)?;
    let scale_bytes = module.get(suffix)?.0.bitsize() / 8;
    let scales = groups.count(module.n, module.k).unwrap_or(0);
    Ok((ID, (module.n * module.k + scales * scale_bytes) as u64))
}

/// As [`Scheme::read`] gives it.
pub fn read(module: &Module, tile: Fp8Tile) -> Result<Box<dyn Stored>> {
    let (suffix, groups) = layout(module, tile)?;
    let scales = module.scales(suffix)?;
    let (n, k) = (module.n, module.k);
    let scaling = Scaling { format: ID, n, k, meaning: Meaning::E4m3, groups, scales, zeros: None };
    Ok(Box::new(ScaledStored::new(scaling, module.bytes("weight")?)?))
}

/// What a reader must know of a checkpoint that declares 8-bit activations.
pub fn note_of_activations(key: &str, seen: &str) -> String {
    format!(
        "config.json's quantization_config declares quantized activations ({key} `{seen}`), which are left as they are here"
    )
}

/// transformers' `fp8`, and AutoFP8's.
pub struct Fp8;

impl QuantMethod for Fp8 {
    fn name(&self) -> &'static str {
        "fp8"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        let sizes = || section.refused("weight_block_size", "pairs of positive numbers");
        let tile = match section.value("weight_block_size") {
            None => None,
            Some(value) => {
                let sizes_of =
                    |value: &serde_json::Value| usize::try_from(value.as_u64()?).ok().filter(|size| *size > 0);
                let pair: Option<Vec<usize>> = value.as_array().and_then(|pair| pair.iter().map(sizes_of).collect());
                match pair.as_deref() {
                    Some(&[rows, columns]) => Some((rows, columns)),
                    _ => return Err(sizes()),
                }
            }
        };
        section.one_of("fmt", &["e4m3", "float8_e4m3fn"], "e4m3")?;
        if let Some(scheme) = section.word("activation_scheme")? {
            section.note(note_of_activations("activation_scheme", scheme));
        }
        if section.value("kv_cache_scheme").is_some() {
            section.note(NOTE_OF_CACHE);
        }
        // Scales are of the dtype that their tensors have; dequantizing at load changes no value.
        section.harmless(&["quant_method", "scale_fmt", "dequantize", "use_deep_gemm"]);
        let (key, older) = ("modules_to_not_convert", "ignored_layers");
        let words = section.words(key)?.into_iter().chain(section.words(older)?).collect();
        Ok(Arc::new(Fp8Scheme { tile, skipped: Patterns::of_transformers(key, words)? }))
    }
}

/// What a reader must know of a checkpoint that declares a quantized cache.
pub const NOTE_OF_CACHE: &str = "config.json's quantization_config declares a quantized key/value cache, which is held as at every other precision here";

/// FBGEMM's rows.
pub struct Fbgemm;

impl QuantMethod for Fbgemm {
    fn name(&self) -> &'static str {
        "fbgemm_fp8"
    }

    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>> {
        if let Some(bound) = section.value("activation_scale_ub") {
            section.note(note_of_activations("activation_scale_ub", &bound.to_string()));
        }
        section.harmless(&["quant_method"]);
        let key = "modules_to_not_convert";
        Ok(Arc::new(Fp8Scheme { tile: None, skipped: Patterns::of_transformers(key, section.words(key)?)? }))
    }
}

#[derive(Debug)]
struct Fp8Scheme {
    tile: Fp8Tile,
    skipped: Patterns,
}

impl Scheme for Fp8Scheme {
    fn precision(&self, _: &[String]) -> FormatId {
        ID
    }

    fn marks(&self) -> &'static [&'static str] {
        &["weight_scale", "weight_scale_inv"]
    }

    fn companions(&self) -> &'static [&'static str] {
        COMPANIONS
    }

    fn skips(&self, module: &str) -> bool {
        self.skipped.matches(module)
    }

    fn skip_key(&self) -> &'static str {
        "modules_to_not_convert"
    }

    fn held(&self, module: &Module) -> Result<(FormatId, u64)> {
        held(module, self.tile)
    }

    fn read(&self, module: &Module) -> Result<Box<dyn Stored>> {
        read(module, self.tile)
    }
}
