//! Tensors of a checkpoint that a model does not read: what is measured is the model without them.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use super::bound::Located;
use super::names::candidates;
use super::safetensors::{Safetensors, listed};
use super::{bnb, packed};
use crate::quant::scheme::Scheme;

/// Tables that older releases saved and every reader makes by itself.
const COMPUTED: &[&str] =
    &[".inv_freq", ".cos_cached", ".sin_cached", ".position_ids", ".masked_bias", ".num_batches_tracked"];

/// T5's decoder had this table once and never used it; transformers drops it without a word.
const UNUSED_T5: &str = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";

/// Warning about the tensors that a model does not read, which takes `names`: name in the plan → name in the files. `None` where
/// there are none, or none that matter. Fails on an I/O error.
pub fn unread(
    files: &Safetensors,
    names: &HashMap<String, Located>,
    scheme: Option<&dyn Scheme>,
    model_type: &str,
) -> Result<Option<String>> {
    let asked: HashSet<&str> = names.keys().map(String::as_str).collect();
    let mut known: HashSet<String> = names.values().map(|located| located.tensor.clone()).collect();
    known.extend(names.values().flat_map(|located| bnb::companions(&located.tensor)));
    known.extend(packed_companions(files, names, scheme)?);
    for (name, Located { tensor: in_file, slice, is_packed }) in names {
        if slice.is_some() || *is_packed {
            continue;
        }
        for other in candidates(name, &asked) {
            // Tensors that share memory are saved twice by some tools.
            let is_there = !known.contains(&other) && files.get(&other).is_some();
            if is_there && files.same_values(in_file, &other)? {
                known.insert(other);
            }
        }
    }
    let is_harmless = |name: &String| COMPUTED.iter().any(|end| name.ends_with(end)) || name.ends_with(UNUSED_T5);
    let unread: Vec<String> =
        files.names().into_iter().filter(|name| !known.contains(name) && !is_harmless(name)).collect();
    if unread.is_empty() {
        return Ok(None);
    }
    let bytes: u64 = unread.iter().filter_map(|name| files.get(name)).map(|tensor| tensor.bytes).sum();
    let names: Vec<String> = unread.iter().map(|name| format!("`{name}`")).collect();
    let (tensors, are, them) = if unread.len() == 1 { ("tensor", "is", "it") } else { ("tensors", "are", "them") };
    Ok(Some(format!(
        "{} {tensors} of the checkpoint ({}) {are} not read by `{model_type}` as config.json has it, so the model is measured without \
         {them}: {}",
        unread.len(),
        size(bytes),
        listed(&names)
    )))
}

/// The tensors that belong to modules which a method quantized, and biases of nothing but zeros, which old tools gave to all of them.
fn packed_companions(
    files: &Safetensors,
    names: &HashMap<String, Located>,
    scheme: Option<&dyn Scheme>,
) -> Result<Vec<String>> {
    let Some(scheme) = scheme else { return Ok(Vec::new()) };
    let mut known = Vec::new();
    for located in names.values().filter(|located| located.is_packed) {
        let module = located.tensor.strip_suffix(".weight").unwrap_or(&located.tensor);
        known.extend(scheme.companions().iter().map(|suffix| packed::tensor_of(module, suffix)));
        let bias = packed::tensor_of(module, "bias");
        if files.get(&bias).is_some_and(|tensor| tensor.is_plain()) {
            let shape = files.get(&bias).map(|tensor| tensor.matrix()).unwrap_or_default();
            let mut values = vec![0.0; shape.0 * shape.1];
            files.read_rows_f32(&bias, 0..shape.0, &mut values)?;
            if values.iter().all(|value| *value == 0.0) {
                known.push(bias);
            }
        }
    }
    Ok(known)
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes < 1024.0 => format!("{bytes} bytes"),
        bytes if bytes < 1024.0 * 1024.0 => format!("{:.1} KiB", bytes / 1024.0),
        bytes if bytes < 1024f64.powi(3) => format!("{:.1} MiB", bytes / 1024f64.powi(2)),
        bytes => format!("{:.2} GiB", bytes / 1024f64.powi(3)),
    }
}
