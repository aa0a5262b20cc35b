//! A GGUF file as the source of one model: each tensor that the plan names, under llama.cpp's name and in the checkpoint's order of rows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use half::f16;
use safetensors::Dtype;

use super::config::{config, family};
use super::file::{GgufFile, GgufTensor};
use super::{F16, Family, ROPE_FREQS, gguf_name, is_turned, place};
use crate::error::{BadInput, nearest, size};
use crate::events::{Event, Listener};
use crate::quant::ggml::FILE_TYPES;
use crate::quant::{FormatId, Part};
use crate::weights::bnb::PreQuantized;
use crate::weights::bound::Labels;
use crate::weights::safetensors::listed;
use crate::weights::spec::{HeldAs, MatrixSpec, VectorSpec};
use crate::weights::{Source, SourceInfo, cast};

/// What the file is called by: `None` where all of it is in plain values, which is a checkpoint like any other. The name is that of its
/// recipe; that of the type of most values where the file names no recipe of such types.
pub fn quantized(file: &GgufFile) -> Option<PreQuantized> {
    let mut values: BTreeMap<&str, (usize, FormatId)> = BTreeMap::new();
    for (_, tensor) in file.tensors().filter(|(_, tensor)| tensor.kind.plain.is_none()) {
        values.entry(tensor.kind.name).or_insert((0, tensor.kind.format)).0 += tensor.shape.iter().product::<usize>();
    }
    let (_, commonest) = values.values().max_by_key(|(count, _)| *count)?;
    let number = file.metadata.count("general.file_type");
    let recipe = FILE_TYPES.iter().find(|known| Some(u64::from(known.number)) == number).map(|known| known.format);
    // A recipe of one type that no tensor is in says something else than the file holds.
    let is_held = |format: &FormatId| values.values().any(|(_, held)| held == format);
    let is_one_type = |format: &FormatId| crate::quant::ggml::TYPES.iter().any(|known| known.format == *format);
    let precision = recipe.filter(|recipe| is_held(recipe) || !is_one_type(recipe)).unwrap_or(*commonest);
    Some(PreQuantized::of_format(precision))
}

/// Whether all matrices are in F16.
pub fn is_f16(file: &GgufFile) -> bool {
    file.tensors().filter(|(_, tensor)| tensor.shape.len() > 1).all(|(_, tensor)| tensor.kind.number == F16)
}

/// Marks the matrices with the formats that a quantized file holds them in.
pub fn hold(file: &GgufFile, matrices: &mut [MatrixSpec]) {
    for spec in matrices {
        let tensor = gguf_name(&spec.name).and_then(|name| file.get(&name));
        spec.held = tensor.map(|tensor| HeldAs { format: tensor.kind.format, bytes: tensor.bytes });
    }
}

/// A source that reads a GGUF file.
pub struct GgufSource {
    file: Arc<GgufFile>,
    /// Name in the plan → place in the file.
    places: HashMap<String, Found>,
    is_quantized: bool,
}

/// A tensor of the plan in the file.
struct Found {
    name: String,
    tensor: GgufTensor,
    /// Rows of a head, where they lie in another order.
    head_rows: Option<usize>,
}

impl GgufSource {
    /// Finds every tensor of a model. Fails with [`BadInput`] unless each is there in the right shape. Warns of tensors that nobody reads.
    pub fn new(
        file: Arc<GgufFile>,
        is_quantized: bool,
        (matrices, vectors): (&[MatrixSpec], &[VectorSpec]),
        labels: &Labels,
        events: &dyn Listener,
    ) -> Result<Self> {
        let wanted = matrices.iter().map(|spec| (&spec.name, vec![spec.n, spec.k]));
        let wanted = wanted.chain(vectors.iter().map(|spec| (&spec.name, vec![spec.len])));
        let finder = Finder { file: &file, labels, family: family(&file)?, head_rows: head_dim(&file)? };
        let mut places = HashMap::new();
        for (name, shape) in wanted {
            places.insert(name.clone(), finder.find(name, &shape)?);
        }
        let read: HashSet<&str> = places.values().map(|found: &Found| found.name.as_str()).collect();
        let known = |name: &String| name == ROPE_FREQS || read.contains(name.as_str());
        let unread: Vec<String> = file.names().into_iter().filter(|name| !known(name)).collect();
        if !unread.is_empty() {
            let bytes = unread.iter().filter_map(|name| file.get(name)).map(|tensor| tensor.bytes).sum();
            let names: Vec<String> = unread.iter().map(|name| format!("`{name}`")).collect();
            let message = format!(
                "tensors of `{}` that are not read by `{}`, so that the model is measured without them: {} ({}): {}",
                labels.id,
                labels.model_type,
                unread.len(),
                size(bytes),
                listed(&names)
            );
            events.on(Event::Warning { name: "unread_tensors".to_owned(), message });
        }
        Ok(Self { file, places, is_quantized })
    }

    fn found(&self, name: &str) -> Result<&Found> {
        self.places.get(name).with_context(|| format!("no tensor is named `{name}`"))
    }

    /// Bytes of rows `rows`, in the checkpoint's order, and how many a row has.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<(&Found, Vec<u8>)> {
        let found = self.found(name)?;
        let (n, row_bytes) = found.rows();
        ensure!(rows.start <= rows.end && rows.end <= n, "rows {rows:?} of `{name}`, which has {n}");
        let mut bytes = vec![0; rows.len() * row_bytes];
        match found.head_rows {
            None => self.file.read(&found.name, &found.tensor, (rows.start * row_bytes) as u64, &mut bytes)?,
            Some(head) => {
                // Whole heads are read at once and put in order.
                let heads = rows.start / head * head..rows.end.next_multiple_of(head);
                let mut turned = vec![0; heads.len() * row_bytes];
                self.file.read(&found.name, &found.tensor, (heads.start * row_bytes) as u64, &mut turned)?;
                for (row, out) in rows.zip(bytes.chunks_exact_mut(row_bytes)) {
                    let at = place(row, head) - heads.start;
                    out.copy_from_slice(&turned[at * row_bytes..][..row_bytes]);
                }
            }
        }
        Ok((found, bytes))
    }

    /// Plain values of rows, and their dtype.
    fn plain(&self, name: &str, rows: Range<usize>, len: usize) -> Result<(Dtype, Vec<u8>)> {
        let (found, bytes) = self.rows(name, rows)?;
        let Some(dtype) = found.tensor.kind.plain else {
            anyhow::bail!("tensor `{}` is {}; allowed are F16, BF16 and F32", found.name, found.tensor.kind.name)
        };
        ensure!(bytes.len() * 8 == len * dtype.bitsize(), "{len} values asked of {} bytes in `{name}`", bytes.len());
        Ok((dtype, bytes))
    }
}

impl Found {
    /// Rows and bytes of a row; each value of a vector is a row.
    fn rows(&self) -> (usize, usize) {
        let n = self.tensor.shape.first().copied().unwrap_or(1);
        (n, self.tensor.bytes as usize / n)
    }
}

/// What tensors are found by.
struct Finder<'a> {
    file: &'a GgufFile,
    labels: &'a Labels<'a>,
    family: &'static Family,
    head_rows: usize,
}

impl Finder<'_> {
    /// The tensor `name` of the plan, in the shape that it needs.
    fn find(&self, name: &str, shape: &[usize]) -> Result<Found, BadInput> {
        let Self { file, labels, family, head_rows: head } = *self;
        let theirs = gguf_name(name).ok_or_else(|| self.absent(name))?;
        let tensor = file.get(&theirs).ok_or_else(|| self.absent(&theirs))?;
        if tensor.shape != shape {
            let message = format!(
                "tensor `{theirs}` of `{}` has shape {:?}, the model of its keys needs {shape:?}",
                labels.id, tensor.shape
            );
            return Err(BadInput::new(message).hint("download the file again"));
        }
        if let ([_], None) = (shape, tensor.kind.plain) {
            let kind = tensor.kind.name;
            let message =
                format!("tensor `{theirs}` of `{}` is {kind}; norms and biases are F32, F16 or BF16", labels.id);
            return Err(BadInput::new(message));
        }
        let turned = is_turned(family, &theirs);
        if turned && !(head >= 2 && head.is_multiple_of(2) && shape[0].is_multiple_of(head)) {
            let message =
                format!("tensor `{theirs}` of `{}` has {} rows, which are no heads of {head}", labels.id, shape[0]);
            return Err(BadInput::new(message));
        }
        Ok(Found { name: theirs, tensor: tensor.clone(), head_rows: turned.then_some(head) })
    }

    fn absent(&self, theirs: &str) -> BadInput {
        let names = self.file.names();
        let near = nearest(theirs, names.iter().map(String::as_str));
        let near = near.map_or(String::new(), |near| format!("; the nearest is `{near}`"));
        let Labels { id, model_type } = self.labels;
        BadInput::new(format!("`{model_type}` needs tensor `{theirs}`, absent from `{id}`{near}"))
            .hint("name a file that holds the whole model")
    }
}

/// Elements of a head, 0 where that is not known.
fn head_dim(file: &GgufFile) -> Result<usize, BadInput> {
    Ok(config(file)?["head_dim"].as_u64().and_then(|length| usize::try_from(length).ok()).unwrap_or(0))
}

impl Source for GgufSource {
    fn info(&self) -> &SourceInfo {
        &self.file.info
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.places.get(name)?.tensor.shape.clone())
    }

    fn names(&self) -> Vec<String> {
        self.file.names()
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> Result<usize> {
        let (dtype, bytes) = self.plain(name, rows, out.len())?;
        Ok(match dtype {
            Dtype::F16 => cast::from_f16(&bytes, out),
            Dtype::BF16 => cast::from_bf16(&bytes, out),
            _ => cast::from_f32(&bytes, out),
        })
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (dtype, bytes) = self.plain(name, rows, out.len())?;
        match dtype {
            Dtype::F16 => cast::widen_f16(&bytes, out),
            Dtype::BF16 => cast::widen_bf16(&bytes, out),
            _ => cast::widen_f32(&bytes, out),
        }
        Ok(())
    }

    fn is_quantized(&self) -> bool {
        self.is_quantized
    }

    fn parts(&self, spec: &MatrixSpec) -> Option<Result<Vec<Part>>> {
        let format = spec.held?.format;
        Some(self.rows(&spec.name, 0..spec.n).map(|(found, bytes)| {
            // Plain values that have a format of their own; others are blocks.
            let plain = found.tensor.kind.plain.filter(|_| !format.is_stored);
            let dtype = plain.unwrap_or(Dtype::U8);
            vec![Part { suffix: "", dtype, shape: vec![bytes.len() * 8 / dtype.bitsize()], bytes }]
        }))
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.places.get(name).map_or(0, |found| found.tensor.bytes)
    }
}
