//! Real weights: one safetensors file, or shards by index, read with positioned reads and no mapping. Tensors bear the names that
//! they have in the files.

mod header;
mod layout;
mod place;
mod slice;

pub use layout::{FileLayout, layout, read_index, shards};
pub use place::listed;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, ensure};
use half::f16;
use safetensors::Dtype;
use xxhash_rust::xxh3::Xxh3;

use self::header::read_header;
use super::bnb::Lookup;
use super::{SourceInfo, SourceKind, cast};

pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// Bytes read at once: large enough for a disk, small enough for a second-level cache to hold until the cast.
const READ_BYTES: usize = 512 << 10;

const SAMPLE_BYTES: u64 = 1 << 20;

/// The tensors of a checkpoint's files.
pub struct Safetensors {
    info: SourceInfo,
    files: Vec<Shard>,
    tensors: HashMap<String, Tensor>,
    /// Tensors that the index gives to a file which does not hold them.
    misplaced: HashMap<String, String>,
    /// Safetensors files of the folder that are not part of the checkpoint.
    others: Vec<PathBuf>,
    /// What a reader of the result must know of the files: name and message of each warning.
    remarks: Vec<(&'static str, String)>,
    /// Pairs of names whose values were compared, since a large table takes a while.
    compared: Mutex<HashMap<(String, String), bool>>,
}

struct Shard {
    file: File,
    name: String,
    bytes: u64,
    /// Where the tensors begin.
    data_start: u64,
}

#[derive(Clone)]
pub struct Tensor {
    shard: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// In the file.
    offset: u64,
    pub bytes: u64,
}

impl Tensor {
    /// Rows and values a row.
    pub fn matrix(&self) -> (usize, usize) {
        let rows = self.shape.first().copied().unwrap_or(1);
        // A header may claim `[0, huge, huge]`, which is a valid shape without values.
        (rows, self.shape.iter().skip(1).fold(1, |product: usize, &length| product.saturating_mul(length)))
    }

    /// Whether its values are numbers that a cast to fp16 or fp32 reads.
    pub fn is_plain(&self) -> bool {
        matches!(self.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32)
    }
}

impl Safetensors {
    /// Reads the headers of a checkpoint. `etags` are the hub's, where it came from there. A tensor is read from the file that it
    /// lies in, whatever the index says. Fails with [`crate::error::BadInput`] on a file that is not whole, and on a tensor that two files hold with
    /// differing values where readers of the format do not agree which is meant.
    pub fn open(layout: &FileLayout, source: SourceKind, etags: Option<String>) -> Result<Self> {
        let mut files = Vec::new();
        let mut places: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for (index, path) in layout.files.iter().enumerate() {
            let (shard, metadata) = read_header(path)?;
            for (name, info) in metadata.tensors() {
                let (start, end) = info.data_offsets;
                let tensor = Tensor {
                    shard: index,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    offset: shard.data_start + start as u64,
                    bytes: (end - start) as u64,
                };
                places.entry(name).or_default().push(tensor);
            }
            files.push(shard);
        }
        let hash = match etags {
            Some(etags) => etags,
            None => {
                let sampled =
                    files.iter().map(|shard| (&shard.file, shard.name.as_str(), shard.bytes, shard.data_start));
                sample_hash(&sampled.collect::<Vec<_>>())?
            }
        };
        let info = SourceInfo { source, dtype: commonest_dtype(&places), seed: None, hash };
        let mut opened = Self {
            info,
            files,
            tensors: HashMap::new(),
            misplaced: HashMap::new(),
            others: layout.others.clone(),
            remarks: Vec::new(),
            compared: Mutex::default(),
        };
        opened.place(places, layout.weight_map.as_ref())?;
        Ok(opened)
    }

    fn is_file(&self, tensor: &Tensor, file: &str) -> bool {
        Path::new(&self.files[tensor.shard].name).ends_with(file)
    }

    pub fn info(&self) -> &SourceInfo {
        &self.info
    }

    /// Name and message of each warning about the files.
    pub fn remarks(&self) -> &[(&'static str, String)] {
        &self.remarks
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    pub fn count(&self) -> usize {
        self.tensors.len()
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, tensor: &Tensor) -> &str {
        &self.files[tensor.shard].name
    }

    /// Whether two tensors hold the same values. Fails on an I/O error.
    pub fn same_values(&self, a: &str, b: &str) -> Result<bool> {
        let key = (a.to_owned(), b.to_owned());
        let lock = || self.compared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = lock().get(&key) {
            return Ok(*known);
        }
        let (first, second) = (self.tensor(a)?, self.tensor(b)?);
        let same = match first.dtype == second.dtype {
            true => self.same_bytes(first, second)?,
            false => self.same_numbers((a, first), (b, second))?,
        };
        lock().insert(key, same);
        Ok(same)
    }

    fn same_bytes(&self, a: &Tensor, b: &Tensor) -> Result<bool> {
        if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
            return Ok(false);
        }
        let mut buffers = [vec![0; READ_BYTES], vec![0; READ_BYTES]];
        let mut done = 0;
        while done < a.bytes {
            let size = (a.bytes - done).min(READ_BYTES as u64) as usize;
            for (tensor, buffer) in [a, b].into_iter().zip(&mut buffers) {
                let shard = &self.files[tensor.shard];
                let read = shard.file.read_exact_at(&mut buffer[..size], tensor.offset + done);
                read.with_context(|| format!("reading `{}`", shard.name))?;
            }
            if buffers[0][..size] != buffers[1][..size] {
                return Ok(false);
            }
            done += size as u64;
        }
        Ok(true)
    }

    /// Of differing dtypes, by their values in fp32.
    fn same_numbers(&self, (a, first): (&str, &Tensor), (b, second): (&str, &Tensor)) -> Result<bool> {
        let ((n, k), other) = (first.matrix(), second.matrix());
        if (n, k) != other || !first.is_plain() || !second.is_plain() {
            return Ok(false);
        }
        let step = (READ_BYTES / 4 / k.max(1)).max(1);
        for start in (0..n).step_by(step) {
            let rows = start..n.min(start + step);
            let mut values = [vec![0.0; rows.len() * k], vec![0.0; rows.len() * k]];
            for (name, out) in [a, b].into_iter().zip(&mut values) {
                self.read_rows_f32(name, rows.clone(), out)?;
            }
            if values[0] != values[1] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Safetensors {
    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| anyhow!("no tensor is named `{name}`"))
    }

    /// Hands the bytes of `rows` to `cast`, piece by piece.
    fn read<T>(
        &self,
        name: &str,
        tensor: &Tensor,
        rows: Range<usize>,
        out: &mut [T],
        cast: impl FnMut(&[u8], &mut [T]),
    ) -> Result<()> {
        let (n, k) = tensor.matrix();
        ensure!(rows.start <= rows.end && rows.end <= n, "rows {rows:?} of `{name}`, which has {n}");
        ensure!(out.len() == rows.len() * k, "{} values asked of {} in `{name}`", out.len(), rows.len() * k);
        self.read_values(name, tensor, rows.start * k, out, cast)
    }

    /// Hands the bytes of as many values as `out` has to `cast`, piece by piece. They begin with value `first` of the tensor.
    fn read_values<T>(
        &self,
        name: &str,
        tensor: &Tensor,
        first: usize,
        out: &mut [T],
        mut cast: impl FnMut(&[u8], &mut [T]),
    ) -> Result<()> {
        let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
        let shard = &self.files[tensor.shard];
        let mut offset = tensor.offset + (first * size) as u64;
        let mut buffer = vec![0; READ_BYTES.min(out.len() * size)];
        for out in out.chunks_mut(READ_BYTES / size) {
            let bytes = &mut buffer[..out.len() * size];
            shard
                .file
                .read_exact_at(bytes, offset)
                .with_context(|| format!("reading `{name}` at byte {offset} of `{}`", shard.name))?;
            cast(bytes, out);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// As [`super::Source::read_rows`], by a name of the files.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> Result<usize> {
        let tensor = self.tensor(name)?;
        let cast = match tensor.dtype {
            Dtype::F16 => cast::from_f16,
            Dtype::BF16 => cast::from_bf16,
            Dtype::F32 => cast::from_f32,
            other => return Err(anyhow!("tensor `{name}` is {other}; allowed are F16, BF16 and F32")),
        };
        let mut overflow = 0;
        self.read(name, tensor, rows, out, |bytes, out| overflow += cast(bytes, out))?;
        Ok(overflow)
    }

    /// As [`super::Source::read_rows_f32`], by a name of the files.
    pub fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let widen = match tensor.dtype {
            Dtype::F16 => cast::widen_f16,
            Dtype::BF16 => cast::widen_bf16,
            Dtype::F32 => cast::widen_f32,
            other => return Err(anyhow!("tensor `{name}` is {other}; allowed are F16, BF16 and F32")),
        };
        self.read(name, tensor, rows, out, widen)
    }

    /// As [`super::Source::read_raw`], by a name of the files.
    pub fn read_raw(&self, name: &str, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let (n, k) = tensor.matrix();
        let row_bytes = k * tensor.dtype.bitsize() / 8;
        ensure!(rows.start <= rows.end && rows.end <= n, "rows {rows:?} of `{name}`, which has {n}");
        ensure!(out.len() == rows.len() * row_bytes, "{} bytes asked of {} rows in `{name}`", out.len(), rows.len());
        let offset = tensor.offset + (rows.start * row_bytes) as u64;
        let shard = &self.files[tensor.shard];
        let read = shard.file.read_exact_at(out, offset);
        read.with_context(|| format!("reading `{name}` at byte {offset} of `{}`", shard.name))
    }
}

impl Safetensors {
    /// `len` bytes of a tensor, little-endian as they are saved, from byte `first` on. Fails where it has not as many, and on an I/O error.
    pub fn bytes_at(&self, name: &str, first: usize, len: usize) -> Result<Vec<u8>> {
        let tensor = self.tensor(name)?;
        let end = first.checked_add(len).filter(|end| *end as u64 <= tensor.bytes);
        ensure!(end.is_some(), "{len} bytes at {first} of `{name}`, which has {}", tensor.bytes);
        let shard = &self.files[tensor.shard];
        let (mut bytes, offset) = (vec![0; len], tensor.offset + first as u64);
        let read = shard.file.read_exact_at(&mut bytes, offset);
        read.with_context(|| format!("reading `{name}` at byte {offset} of `{}`", shard.name))?;
        Ok(bytes)
    }
}

impl Lookup for Safetensors {
    fn shape_of(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.tensors.get(name).map(|tensor| (tensor.dtype, tensor.shape.as_slice()))
    }

    fn bytes_of(&self, name: &str) -> Result<Vec<u8>> {
        self.bytes_at(name, 0, self.tensor(name)?.bytes as usize)
    }
}

/// The dtype of most values, as records spell it.
fn commonest_dtype(places: &BTreeMap<String, Vec<Tensor>>) -> String {
    let mut values: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in places.values().filter_map(|places| places.last()) {
        *values.entry(tensor.dtype.to_string().to_lowercase()).or_default() += tensor.shape.iter().product::<usize>();
    }
    values.into_iter().max_by_key(|(_, count)| *count).map(|(dtype, _)| dtype).unwrap_or_default()
}

/// xxh3 over header, size and the first, middle and last MiB of the tensors of each file. Of a file: its name, its bytes, and where the
/// tensors begin.
pub(super) fn sample_hash(files: &[(&File, &str, u64, u64)]) -> Result<String> {
    let mut hash = Xxh3::new();
    let mut buffer = Vec::new();
    for &(file, name, bytes, data_start) in files {
        hash.update(&bytes.to_le_bytes());
        let data_bytes = bytes - data_start;
        let sample = SAMPLE_BYTES.min(data_bytes);
        let last = bytes - sample;
        let middle = data_start + (data_bytes - sample) / 2;
        for (offset, length) in [(0, data_start), (data_start, sample), (middle, sample), (last, sample)] {
            buffer.resize(length as usize, 0);
            file.read_exact_at(&mut buffer, offset).with_context(|| format!("reading `{name}`"))?;
            hash.update(&buffer);
        }
    }
    Ok(format!("xxh3:{:032x}", hash.digest128()))
}

/// The last two components of a path at most: messages end up in records, which hold no user's path.
pub(super) fn short(path: &Path) -> String {
    let parts: Vec<_> =
        path.components().rev().take(2).filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
    let names: Vec<_> = parts.iter().rev().map(|part| part.as_os_str().to_string_lossy()).collect();
    names.join("/")
}
