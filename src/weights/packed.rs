//! Modules that a method of `quant::scheme` quantized before they were saved, in the files of a checkpoint.

use anyhow::{Result, ensure};
use safetensors::Dtype;

use super::bnb::PreQuantized;
use super::bound::Located;
use super::safetensors::{Safetensors, Tensor};
use super::spec::{HeldAs, MatrixSpec};
use crate::quant::scheme::{Module, ModuleSlice, ModuleTensors, Scheme};
use crate::quant::{self, FormatOptions, Part, Stored};

/// The tensors of a module, by what stands behind its name.
struct InFiles<'a> {
    files: &'a Safetensors,
    module: &'a str,
}

/// The name of a tensor of a module.
pub fn tensor_of(module: &str, suffix: &str) -> String {
    if suffix.starts_with('_') { format!("{module}{suffix}") } else { format!("{module}.{suffix}") }
}

impl ModuleTensors for InFiles<'_> {
    fn find(&self, suffix: &str) -> Option<(Dtype, Vec<usize>)> {
        self.files.get(&tensor_of(self.module, suffix)).map(|tensor| (tensor.dtype, tensor.shape.clone()))
    }

    fn read(&self, suffix: &str, first: usize, len: usize) -> Result<Vec<u8>> {
        self.files.bytes_at(&tensor_of(self.module, suffix), first, len)
    }
}

/// Whether the files hold a module of this name in the form of `scheme`.
pub fn is_packed(files: &Safetensors, scheme: &dyn Scheme, module: &str) -> bool {
    let has = |suffix: &&str| files.get(&tensor_of(module, suffix)).is_some();
    // A weight that is no plain values lacks its scales, which is said as it is read.
    let is_weight = scheme.companions().contains(&"weight");
    let is_coded = || files.get(&tensor_of(module, "weight")).is_some_and(|weight| !weight.is_plain());
    scheme.marks().iter().any(has) || (is_weight && is_coded())
}

/// The names of all modules that the files hold in the form of `scheme`.
pub fn modules(files: &Safetensors, scheme: &dyn Scheme) -> Vec<String> {
    let names = files.names();
    let stems = names.iter().filter_map(|name| {
        scheme.marks().iter().find_map(|mark| name.strip_suffix(&tensor_of("", mark))).map(str::to_owned)
    });
    let mut modules: Vec<String> = stems.collect();
    modules.dedup();
    modules
}

/// The name without `.weight`.
fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Does `with` on the module that holds a matrix.
fn with_module<T>(files: &Safetensors, spec: &MatrixSpec, located: &Located, with: impl FnOnce(&Module) -> T) -> T {
    let name = stem(&located.tensor);
    let slice = located.slice.map(|(slice, _)| ModuleSlice {
        index: slice.index,
        count: slice.count,
        start: slice.start,
        step: slice.step,
        rows: slice.rows,
    });
    let tensors = InFiles { files, module: name };
    with(&Module { name, planned: stem(&spec.name), n: spec.n, k: spec.k, slice, tensors: &tensors })
}

/// How the files hold a matrix. Fails where its tensors are not what its method needs.
pub fn held(files: &Safetensors, scheme: &dyn Scheme, spec: &MatrixSpec, located: &Located) -> Result<Option<HeldAs>> {
    if located.is_packed {
        let (format, bytes) = with_module(files, spec, located, |module| scheme.held(module))?;
        return Ok(Some(HeldAs { format, bytes }));
    }
    let dtype = files.get(&located.tensor).map(|tensor| tensor.dtype);
    let bytes = |dtype: Dtype| (spec.n * spec.k * dtype.bitsize() / 8) as u64;
    Ok(dtype.and_then(|dtype| Some(HeldAs { format: quant::of_plain(dtype)?, bytes: bytes(dtype) })))
}

/// Bytes in the files of the tensors of a module; a share of them for one matrix of several.
pub fn bytes(files: &Safetensors, scheme: &dyn Scheme, located: &Located) -> u64 {
    let names = scheme.companions().iter().map(|suffix| tensor_of(stem(&located.tensor), suffix));
    let all: u64 = names.filter_map(|name| files.get(&name)).map(|tensor| tensor.bytes).sum();
    match &located.slice {
        None => all,
        // Rows have as many bytes each.
        Some((slice, _)) => {
            let rows = slice.rows.saturating_mul(slice.count).max(1) as u64;
            let of_matrix = (slice.rows / slice.step.max(1)).max(1) as u64;
            all / rows * of_matrix
        }
    }
}

/// A matrix as the files hold it: plain values keep their type.
pub fn read(
    files: &Safetensors,
    own: &PreQuantized,
    spec: &MatrixSpec,
    located: &Located,
) -> Option<Result<Box<dyn Stored>>> {
    let scheme = own.scheme.as_deref()?;
    Some(match located.is_packed {
        true => with_module(files, spec, located, |module| scheme.read(module)),
        false => plain(files, spec, located),
    })
}

fn plain(files: &Safetensors, spec: &MatrixSpec, located: &Located) -> Result<Box<dyn Stored>> {
    let name = &located.tensor;
    let tensor = files.get(name).filter(|tensor| tensor.is_plain());
    let Some((tensor, format)) = tensor.and_then(|tensor: &Tensor| Some((tensor, quant::of_plain(tensor.dtype)?)))
    else {
        anyhow::bail!("tensor `{name}` holds no plain values")
    };
    let bytes = match &located.slice {
        None => files.bytes_at(name, 0, tensor.bytes as usize)?,
        Some((slice, _)) => {
            let mut values = vec![0.0; spec.n * spec.k];
            files.read_slice_f32(name, slice, 0..spec.n, &mut values)?;
            of_dtype(tensor.dtype, &values)
        }
    };
    ensure!(bytes.len() == spec.n * spec.k * tensor.dtype.bitsize() / 8, "`{name}` has {} bytes", bytes.len());
    // Those of a type that has a format of blocks are bytes.
    let dtype = if format.is_stored { Dtype::U8 } else { tensor.dtype };
    let shape = vec![bytes.len() * 8 / dtype.bitsize()];
    let parts = vec![Part { suffix: "", dtype, shape, bytes }];
    Ok((format.new)(FormatOptions::default()).restore(spec.n, spec.k, parts)?)
}

/// Values that `dtype` holds exactly.
fn of_dtype(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}
