//! Checkpoints that transformers and bitsandbytes saved quantized: their names, their texts, their section of config.json.
//!
//! A matrix of formats' [`Part`]s is a handful of tensors there: the weight under its own name, what belongs to it behind
//! that name or beside it, and for 4 bits a blob of JSON with the rest.

pub mod config;
pub mod held;

use anyhow::{Context, Result};
use safetensors::Dtype;

use super::spec::{MatrixSpec, Role};
use crate::error::BadInput;
use crate::quant::saved::{Companion, SavedForm, SavedMatrix};
use crate::quant::{FORMATS, FormatId, Part};

pub use config::PreQuantized;

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

/// Every format that bitsandbytes saves, with its form.
pub fn forms() -> impl Iterator<Item = (FormatId, &'static dyn SavedForm)> {
    FORMATS.iter().filter_map(|format| Some((*format, format.saved?)))
}

/// Fails with [`BadInput`] unless all tensors of a matrix that is stored quantized are there, in the shapes of `spec`.
pub fn check(spec: &MatrixSpec, precision: FormatId, tensors: &dyn Lookup) -> Result<()> {
    let companions = precision.saved.map_or(Vec::new(), |form| form.companions(spec.n, spec.k));
    for Companion { suffix, dtype, len, .. } in companions.into_iter().filter(|companion| !companion.is_optional) {
        let name = name_of(&spec.name, suffix);
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

/// Where bitsandbytes saves a part of the matrix `weight`.
fn name_of(weight: &str, suffix: &str) -> String {
    match suffix {
        "" => weight.to_owned(),
        "SCB" | "weight_format" => format!("{}.{suffix}", weight.strip_suffix(".weight").unwrap_or(weight)),
        _ => format!("{weight}.{suffix}"),
    }
}

/// The names of all that may belong to the weight `weight` that was quantized before it was saved.
pub fn companions(weight: &str) -> Vec<String> {
    forms().flat_map(|(_, form)| form.companions(1, 1)).map(|companion| name_of(weight, companion.suffix)).collect()
}

/// The parts of a matrix that [`check`] passed. Fails with [`BadInput`] where its texts and tables say something else than
/// the bytes of `precision` mean.
pub fn parts(spec: &MatrixSpec, precision: FormatId, tensors: &dyn Lookup) -> Result<Vec<Part>> {
    let MatrixSpec { name: weight, n, k, .. } = spec;
    let read = |suffix: &'static str| -> Result<Option<Part>> {
        let name = name_of(weight, suffix);
        let Some((dtype, shape)) = tensors.shape_of(&name) else { return Ok(None) };
        Ok(Some(Part { suffix, dtype, shape: shape.to_vec(), bytes: tensors.bytes_of(&name)? }))
    };
    let form = precision.saved.with_context(|| format!("bitsandbytes saves no `{precision}`"))?;
    form.read(&SavedMatrix { name: weight, n: *n, k: *k, read: &read })
}

/// The tensors that bitsandbytes saves for a matrix `[n, k]` of `precision` in `parts`.
pub fn tensors(weight: &str, shape: (usize, usize), precision: FormatId, parts: Vec<Part>) -> Result<Vec<SavedTensor>> {
    let form = precision.saved.with_context(|| format!("bitsandbytes saves no `{precision}`"))?;
    let parts = form.write(shape, parts).with_context(|| format!("saving `{weight}`"))?;
    let named =
        |Part { suffix, dtype, shape, bytes }| SavedTensor { name: name_of(weight, suffix), dtype, shape, bytes };
    Ok(parts.into_iter().map(named).collect())
}
