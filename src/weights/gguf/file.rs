//! A GGUF file: header, keys, records of tensors, then their data.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::cursor::{Cursor, bad};
use super::metadata::Metadata;
use super::{ALIGNMENT, MAGIC};
use crate::error::BadInput;
use crate::quant::ggml::{self, GgmlType};
use crate::weights::safetensors::{sample_hash, short};
use crate::weights::{SourceInfo, SourceKind, sniff};

/// ggml's own bound on the dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
const MAX_NAME_BYTES: u64 = 65_535;
/// Name, count of dimensions, one dimension, type and offset.
const MIN_RECORD_BYTES: u64 = 8 + 4 + 8 + 4 + 8;
/// Beyond any file's.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// An opened file; its tensors' data is not read.
pub struct GgufFile {
    file: File,
    /// The last components of its path, for messages.
    pub name: String,
    bytes: u64,
    pub metadata: Metadata,
    tensors: HashMap<String, GgufTensor>,
    pub info: SourceInfo,
}

/// A tensor's record.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    pub kind: &'static GgmlType,
    /// Outermost first, as checkpoints have it: `[n, k]` of a matrix.
    pub shape: Vec<usize>,
    /// In the file.
    offset: u64,
    pub bytes: u64,
}

impl GgufTensor {
    /// Rows, and values of a row.
    pub fn matrix(&self) -> (usize, usize) {
        let k = self.shape.last().copied().unwrap_or(1);
        (self.shape.iter().product::<usize>() / k, k)
    }
}

impl GgufFile {
    /// Reads header, keys and records. Fails with [`BadInput`] on a file that is not whole, on types that are not read, and on tensors that overlap.
    pub fn open(path: &Path) -> Result<Self> {
        let name = short(path);
        let file = File::open(path).with_context(|| format!("opening `{name}`"))?;
        let bytes = file.metadata().with_context(|| format!("opening `{name}`"))?.len();
        let mut cursor = Cursor::new(&file, &name, 0, bytes)?;
        check_kind(&mut cursor, path)?;
        let (tensor_count, key_count) = (cursor.u64("the count of tensors")?, cursor.u64("the count of keys")?);
        let metadata = Metadata::read(&mut cursor, key_count)?;
        check_parts(&metadata, &name)?;
        let alignment = alignment(&cursor, &metadata)?;
        let mut tensors = records(&mut cursor, tensor_count)?;
        let data_start = cursor.at().next_multiple_of(alignment);
        drop(cursor);
        place(&name, &mut tensors, data_start, alignment, bytes)?;
        let hash = sample_hash(&[(&file, &name, bytes, data_start.min(bytes))])?;
        let info = SourceInfo { source: SourceKind::Local, dtype: commonest(&tensors), seed: None, hash };
        Ok(Self { file, name, bytes, metadata, tensors: tensors.into_iter().collect(), info })
    }

    pub fn get(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    pub fn tensors(&self) -> impl Iterator<Item = (&str, &GgufTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The file as lists are read from it.
    pub fn as_lists(&self) -> (&File, &str, u64) {
        (&self.file, &self.name, self.bytes)
    }

    /// Bytes of a tensor from `start` on. Fails on an I/O error and outside of the tensor.
    pub fn read(&self, name: &str, tensor: &GgufTensor, start: u64, out: &mut [u8]) -> Result<()> {
        let end = start.checked_add(out.len() as u64).filter(|end| *end <= tensor.bytes);
        anyhow::ensure!(end.is_some(), "{} bytes at {start} of `{name}`, which has {}", out.len(), tensor.bytes);
        let read = self.file.read_exact_at(out, tensor.offset + start);
        read.with_context(|| format!("reading `{name}` at byte {} of `{}`", tensor.offset + start, self.name))
    }
}

/// Fails unless the file begins as one of a version that is read.
fn check_kind(cursor: &mut Cursor, path: &Path) -> Result<()> {
    let magic = cursor.u32("the signature")?;
    if &magic.to_le_bytes() != MAGIC {
        return Err(match sniff::not_itself(path) {
            Some(error) => error,
            None => cursor.bad("it does not begin with `GGUF`"),
        }
        .into());
    }
    match cursor.u32("the version")? {
        2 | 3 => Ok(()),
        swapped if matches!(swapped.swap_bytes(), 1..=3) => {
            let message = format!("`{}` is a big-endian GGUF file, which is not read", short(path));
            Err(BadInput::new(message).hint("convert the model again on a little-endian machine").into())
        }
        version => {
            let message = format!("`{}` is a GGUF file of version {version}; 2 and 3 are read", short(path));
            Err(BadInput::new(message).hint("convert the model again with a recent llama.cpp").into())
        }
    }
}

/// Fails on a part of a model that is split.
fn check_parts(metadata: &Metadata, name: &str) -> Result<(), BadInput> {
    match metadata.count("split.count") {
        Some(count) if count > 1 => {
            let message = format!("`{name}` is one of {count} files of a model, which are not read one by one");
            Err(BadInput::new(message).hint("join them with llama.cpp's `llama-gguf-split --merge`"))
        }
        _ => Ok(()),
    }
}

fn alignment(cursor: &Cursor, metadata: &Metadata) -> Result<u64, BadInput> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else { return Ok(ALIGNMENT) };
    let alignment = metadata.count(key).filter(|bytes| bytes.is_power_of_two() && *bytes <= MAX_ALIGNMENT);
    alignment
        .ok_or_else(|| cursor.bad(format!("`{key}` is {value:?}; it must be a power of two up to {MAX_ALIGNMENT}")))
}

/// The tensors by name; their offsets count from the start of the data.
fn records(cursor: &mut Cursor, count: u64) -> Result<BTreeMap<String, GgufTensor>, BadInput> {
    cursor.need_all(count, MIN_RECORD_BYTES, &format!("a list of {count} tensors"))?;
    let mut tensors = BTreeMap::new();
    for _ in 0..count {
        let name = cursor.text("the name of a tensor", MAX_NAME_BYTES)?;
        let dimensions = cursor.u32("the dimensions of a tensor")?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(
                cursor.bad(format!("tensor `{name}` has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible"))
            );
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(cursor.u64("a dimension")?);
        }
        // The length of a row stands first.
        shape.reverse();
        let (kind, offset) = (cursor.u32("the type of a tensor")?, cursor.u64("the offset of a tensor")?);
        let kind = ggml::type_of(kind).map_err(|why| {
            BadInput::new(format!("tensor `{name}` is of {why}"))
                .hint(format!("types that are read: {}", ggml::known()))
        })?;
        let (shape, bytes) = sizes(&shape, kind).map_err(|why| cursor.bad(format!("tensor `{name}` {why}")))?;
        if tensors.insert(name.clone(), GgufTensor { kind, shape, offset, bytes }).is_some() {
            return Err(cursor.bad(format!("it has the tensor `{name}` twice")));
        }
    }
    Ok(tensors)
}

/// The shape and its bytes. Fails, saying why, on an empty tensor, on rows of no whole blocks, and beyond what can be counted.
fn sizes(dimensions: &[u64], kind: &GgmlType) -> Result<(Vec<usize>, u64), String> {
    let shape: Option<Vec<usize>> = dimensions.iter().map(|&dimension| usize::try_from(dimension).ok()).collect();
    let too_large = || format!("of shape {dimensions:?} is larger than can be counted");
    let shape = shape.ok_or_else(too_large)?;
    if shape.contains(&0) {
        return Err(format!("of shape {dimensions:?} is empty"));
    }
    let (k, rows) = shape.split_last().map_or((1, &[][..]), |(k, rows)| (*k, rows));
    if !k.is_multiple_of(kind.block_len) {
        return Err(format!(
            "has rows of {k} values, which are no whole blocks of {} in {}",
            kind.block_len, kind.name
        ));
    }
    let values = shape.iter().try_fold(1usize, |all, dimension| all.checked_mul(*dimension));
    let bytes = kind.row_bytes(k).and_then(|row| rows.iter().try_fold(row, |all, rows| all.checked_mul(*rows)));
    match values.and(bytes) {
        Some(bytes) => Ok((shape, bytes as u64)),
        None => Err(too_large()),
    }
}

/// Counts offsets from the start of the file. Fails unless every tensor lies within it, aligned, and apart from the others.
fn place(
    name: &str,
    tensors: &mut BTreeMap<String, GgufTensor>,
    data_start: u64,
    alignment: u64,
    bytes: u64,
) -> Result<(), BadInput> {
    let mut places: Vec<(u64, u64, String)> = Vec::new();
    for (tensor, record) in &mut *tensors {
        if !record.offset.is_multiple_of(alignment) {
            return Err(bad(
                name,
                format!("tensor `{tensor}` begins at {}, which is no multiple of {alignment}", record.offset),
            ));
        }
        let begin = data_start.checked_add(record.offset);
        let end = begin.and_then(|begin| begin.checked_add(record.bytes));
        let Some((begin, end)) = begin.zip(end.filter(|end| *end <= bytes)) else {
            let (taken, offset) = (record.bytes, record.offset);
            let what = format!(
                "tensor `{tensor}` takes {taken} bytes from {offset} of the data on, and the file has {bytes} in all"
            );
            return Err(bad(name, format!("{what}: it is truncated")));
        };
        record.offset = begin;
        places.push((begin, end, tensor.clone()));
    }
    places.sort();
    match places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some([(.., first), (.., second)]) => Err(bad(name, format!("the tensors `{first}` and `{second}` overlap"))),
        _ => Ok(()),
    }
}

/// The type of most values, as records spell it.
fn commonest(tensors: &BTreeMap<String, GgufTensor>) -> String {
    let mut values: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in tensors.values() {
        *values.entry(tensor.kind.name).or_default() += tensor.shape.iter().product::<usize>() as u64;
    }
    values.into_iter().max_by_key(|(_, count)| *count).map(|(name, _)| name.to_lowercase()).unwrap_or_default()
}
