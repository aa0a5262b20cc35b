//! Checkpoints that transformers and bitsandbytes saved quantized: their names, their texts, their section of config.json.
//!
//! A matrix of formats' [`Part`]s is a handful of tensors there: the weight under its own name, what belongs to it behind
//! that name or beside it, and for 4 bits a blob of JSON with the rest.

pub mod config;
pub mod held;
pub mod state;

use anyhow::{Context, Result, ensure};
use safetensors::Dtype;

use self::state::QuantState;
use super::spec::{MatrixSpec, Role};
use crate::error::BadInput;
use crate::quant::{FormatId, Part, nf4};

pub use config::PreQuantized;

const QUANT_STATE: &str = "quant_state.bitsandbytes__nf4";

/// Rounding that a table of codes may differ by from ours: what another machine makes of the same formula.
const TABLE_TOLERANCE: f32 = 1e-6;

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little-endian.
    pub bytes: Vec<u8>,
}

/// Where a checkpoint's tensors are looked up.
pub trait Lookup {
    /// `None` where there is no such tensor.
    fn shape_of(&self, name: &str) -> Option<(Dtype, &[usize])>;

    /// Little-endian bytes of a tensor that is there.
    fn bytes_of(&self, name: &str) -> Result<Vec<u8>>;
}

/// Whether a matrix of this role may be stored quantized. Tables of rows may not, and transformers leaves them alone.
pub fn may_be_quantized(role: Role) -> bool {
    role.is_quantized() || role == Role::HighPrecision
}

/// Fails with [`BadInput`] unless all tensors of a matrix that is stored quantized are there, in the shapes of `spec`.
pub fn check(spec: &MatrixSpec, precision: FormatId, tensors: &dyn Lookup) -> Result<()> {
    for Wanted { name, dtype, len } in wanted(spec, precision) {
        let found = tensors.shape_of(&name);
        let fits = found
            .is_some_and(|(seen, shape)| seen == dtype && len.is_none_or(|len| len == shape.iter().product::<usize>()));
        if fits {
            continue;
        }
        let length = len.map(|len| format!(" of {len} values")).unwrap_or_default();
        let seen = found.map_or("absent".to_owned(), |(seen, shape)| format!("{seen} of shape {shape:?}"));
        return Err(BadInput::new(format!(
            "tensor `{name}` of a `{precision}` checkpoint must be {dtype}{length}; it is {seen}"
        ))
        .hint("check that config.json and the weights belong together; packed weights must be `uint8`")
        .into());
    }
    Ok(())
}

struct Wanted {
    name: String,
    dtype: Dtype,
    /// `None`: any.
    len: Option<usize>,
}

fn wanted(spec: &MatrixSpec, precision: FormatId) -> Vec<Wanted> {
    let values = spec.n * spec.k;
    let blocks = values.div_ceil(nf4::BLOCK);
    let one = |suffix: &str, dtype, len: usize| Wanted { name: name_of(&spec.name, suffix), dtype, len: Some(len) };
    let text = Wanted { name: name_of(&spec.name, QUANT_STATE), dtype: Dtype::U8, len: None };
    match precision.name {
        "int8" => vec![one("", Dtype::I8, values), one("SCB", Dtype::F32, spec.n)],
        "nf4-nodq" => vec![
            one("", Dtype::U8, values.div_ceil(2)),
            one("absmax", Dtype::F32, blocks),
            one("quant_map", Dtype::F32, nf4::CODES.len()),
            text,
        ],
        _ => vec![
            one("", Dtype::U8, values.div_ceil(2)),
            one("absmax", Dtype::U8, blocks),
            one("quant_map", Dtype::F32, nf4::CODES.len()),
            one("nested_absmax", Dtype::F32, blocks.div_ceil(nf4::nested::NESTED_BLOCK)),
            one("nested_quant_map", Dtype::F32, nf4::nested::VALUES.len()),
            text,
        ],
    }
}

/// Where bitsandbytes saves a part of the matrix `weight`.
fn name_of(weight: &str, suffix: &str) -> String {
    match suffix {
        "" => weight.to_owned(),
        "SCB" | "weight_format" => format!("{}.{suffix}", weight.strip_suffix(".weight").unwrap_or(weight)),
        _ => format!("{weight}.{suffix}"),
    }
}

/// What may belong to the weight `weight` that was quantized before it was saved.
pub fn companions(weight: &str) -> Vec<String> {
    let suffixes = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "nested_offset",
        "SCB",
        "weight_format",
        QUANT_STATE,
    ];
    suffixes.iter().map(|suffix| name_of(weight, suffix)).collect()
}

/// The parts of a matrix that [`check`] passed. Fails with [`BadInput`] where its texts and tables say something else than
/// the bytes of `precision` mean.
pub fn parts(spec: &MatrixSpec, tensors: &dyn Lookup) -> Result<Vec<Part>> {
    let spec_name = &spec.name;
    let part = |suffix: &'static str| -> Result<Option<Part>> {
        let name = name_of(spec_name, suffix);
        let Some((dtype, shape)) = tensors.shape_of(&name) else { return Ok(None) };
        Ok(Some(Part { suffix, dtype, shape: shape.to_vec(), bytes: tensors.bytes_of(&name)? }))
    };
    let mut parts = Vec::new();
    for suffix in ["", "absmax", "nested_absmax", "SCB"] {
        parts.extend(part(suffix)?);
    }
    if let Some(format) = part("weight_format")? {
        ensure_bad(format.bytes.iter().all(|byte| *byte == 0), || {
            format!("`{spec_name}` is int8 in a layout of bitsandbytes before 0.45; only rows are known")
        })?;
    }
    check_table(spec_name, part("quant_map")?, &nf4::CODES)?;
    check_table(spec_name, part("nested_quant_map")?, &nf4::nested::VALUES[..])?;
    if let Some(text) = part(QUANT_STATE)? {
        let state =
            QuantState::parse(&text.bytes).with_context(|| format!("reading the quant_state of `{spec_name}`"))?;
        ensure_bad((state.n, state.k) == (spec.n, spec.k), || {
            format!(
                "the quant_state of `{spec_name}` says [{}, {}], the model needs [{}, {}]",
                state.n, state.k, spec.n, spec.k
            )
        })?;
        parts.extend(state.nested_offset.map(|offset| Part {
            suffix: "nested_offset",
            dtype: Dtype::F32,
            shape: vec![1],
            bytes: offset.to_le_bytes().to_vec(),
        }));
    }
    Ok(parts)
}

fn check_table(name: &str, table: Option<Part>, ours: &[f32]) -> Result<()> {
    let Some(table) = table else { return Ok(()) };
    let theirs = table.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let same = theirs.zip(ours).all(|(theirs, ours)| (theirs - ours).abs() <= TABLE_TOLERANCE * ours.abs());
    ensure_bad(same, || format!("`{name}` was quantized to other values than NF4's: its quant_map differs"))
}

fn ensure_bad(holds: bool, message: impl Fn() -> String) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(BadInput::new(message()).hint("name the model that the checkpoint was made from").into()),
    }
}

/// The tensors that bitsandbytes saves for a matrix `[n, k]` in `parts`.
pub fn tensors(weight: &str, (n, k): (usize, usize), parts: Vec<Part>) -> Result<Vec<SavedTensor>> {
    let table = |suffix: &str, values: &[f32]| SavedTensor {
        name: name_of(weight, suffix),
        dtype: Dtype::F32,
        shape: vec![values.len()],
        bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let mut saved = Vec::new();
    let (mut is_nf4, mut nested_offset) = (false, None);
    for part in parts {
        match part.suffix {
            "nested_offset" => {
                let offset = part.bytes.as_chunks::<4>().0.first();
                ensure!(offset.is_some(), "the nested offset of `{weight}` is empty");
                nested_offset = offset.map(|bytes| f32::from_le_bytes(*bytes));
                saved.push(table("nested_quant_map", &nf4::nested::VALUES[..]));
                continue;
            }
            "absmax" => {
                is_nf4 = true;
                saved.push(table("quant_map", &nf4::CODES));
            }
            "SCB" => saved.push(SavedTensor {
                name: name_of(weight, "weight_format"),
                dtype: Dtype::U8,
                shape: Vec::new(),
                bytes: vec![0],
            }),
            _ => {}
        }
        let Part { suffix, dtype, shape, bytes } = part;
        saved.push(SavedTensor { name: name_of(weight, suffix), dtype, shape, bytes });
    }
    if is_nf4 {
        let bytes = QuantState { n, k, nested_offset }.to_json().into_bytes();
        saved.push(SavedTensor {
            name: name_of(weight, QUANT_STATE),
            dtype: Dtype::U8,
            shape: vec![bytes.len()],
            bytes,
        });
    }
    Ok(saved)
}
