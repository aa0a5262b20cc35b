//! Real weights: one safetensors file, or shards by index, read with positioned reads and no mapping.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use half::f16;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::bnb::{self, Lookup, PreQuantized};
use super::spec::{MatrixSpec, VectorSpec};
use super::{Source, SourceInfo, SourceKind, cast};
use crate::error::BadInput;
use crate::quant::Part;

pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// The longest header that the format allows.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes read at once: large enough for a disk, small enough for a second-level cache to hold until the cast.
const READ_BYTES: usize = 512 << 10;

const SAMPLE_BYTES: u64 = 1 << 20;

/// The files of a checkpoint, in order of their names, with the index where there is one.
pub struct Layout {
    files: Vec<PathBuf>,
    /// Tensor name → file name.
    weight_map: Option<HashMap<String, String>>,
}

impl Layout {
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

/// Finds the weights of a folder: `model.safetensors`, else the shards that the index names.
pub fn layout(folder: &Path) -> Result<Layout> {
    let single = folder.join(SINGLE);
    if single.is_file() {
        return Ok(Layout { files: vec![single], weight_map: None });
    }
    let index = folder.join(INDEX);
    if !index.is_file() {
        return Err(no_weights(folder));
    }
    let weight_map = read_index(&index)?;
    let files: Vec<PathBuf> = shards(&weight_map).iter().map(|file| folder.join(file)).collect();
    let missing: Vec<&PathBuf> = files.iter().filter(|file| !file.is_file()).collect();
    match missing.first() {
        None => Ok(Layout { files, weight_map: Some(weight_map) }),
        Some(first) => Err(BadInput::new(format!(
            "`{}`, which `{INDEX}` names, is missing, as are {} of {} files in all",
            short(first),
            missing.len(),
            files.len()
        ))
        .hint("download the missing files into the folder")
        .into()),
    }
}

fn no_weights(folder: &Path) -> anyhow::Error {
    let error = format!("`{}` holds neither `{SINGLE}` nor `{INDEX}`", short(folder));
    let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| folder.join(name).is_file());
    match pickled {
        true => BadInput::new(format!("{error}, only pytorch_model.bin"))
            .hint("weights must be safetensors: save the model with `save_pretrained(..., safe_serialization=True)`"),
        false => BadInput::new(error).hint("measure the shape of config.json alone with `--weights random`"),
    }
    .into()
}

/// Tensor name → file name of a `model.safetensors.index.json`.
pub fn read_index(path: &Path) -> Result<HashMap<String, String>> {
    let bad = |what: String| BadInput::new(format!("`{}` is not an index of shards: {what}", short(path)));
    let text = std::fs::read_to_string(path).with_context(|| format!("reading `{}`", short(path)))?;
    let index: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map = index.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("no `weight_map`".to_owned()))?;
    let mut weight_map = HashMap::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| bad(format!("the file of `{tensor}` is not a string")))?;
        // An index comes from whoever made the checkpoint: it may name files beside itself and no others.
        if Path::new(file).components().any(|part| !matches!(part, std::path::Component::Normal(_))) || file.is_empty()
        {
            return Err(bad(format!("`{file}` is not a file inside the folder")).into());
        }
        weight_map.insert(tensor.clone(), file.to_owned());
    }
    match weight_map.is_empty() {
        true => Err(bad("`weight_map` is empty".to_owned()).into()),
        false => Ok(weight_map),
    }
}

/// The files of an index, each once, sorted.
pub fn shards(weight_map: &HashMap<String, String>) -> Vec<String> {
    let mut files: Vec<String> = weight_map.values().cloned().collect();
    files.sort();
    files.dedup();
    files
}

/// A source that reads checkpoint files.
pub struct Safetensors {
    info: SourceInfo,
    /// What error messages call the checkpoint.
    label: String,
    files: Vec<Shard>,
    tensors: HashMap<String, Tensor>,
    /// What config.json says its linear layers were quantized into.
    quantized: Option<PreQuantized>,
}

struct Shard {
    file: File,
    name: String,
    bytes: u64,
    /// Where the tensors begin.
    data_start: u64,
}

struct Tensor {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    offset: u64,
    bytes: u64,
}

impl Tensor {
    /// Rows and values a row.
    fn matrix(&self) -> (usize, usize) {
        let rows = self.shape.first().copied().unwrap_or(1);
        // A header may claim `[0, huge, huge]`, which is a valid shape without values.
        (rows, self.shape.iter().skip(1).fold(1, |product: usize, &length| product.saturating_mul(length)))
    }
}

impl Safetensors {
    /// Reads the headers of a checkpoint. `label` is what messages call it; `etags` are the hub's, where it came from
    /// there.
    pub fn open(
        layout: &Layout,
        label: &str,
        source: SourceKind,
        etags: Option<String>,
        quantized: Option<PreQuantized>,
    ) -> Result<Self> {
        let mut files = Vec::new();
        let mut tensors = HashMap::new();
        for (index, path) in layout.files.iter().enumerate() {
            let (shard, metadata) = read_header(path)?;
            let here = |name: &str| match &layout.weight_map {
                // A name that the index does not know may lie anywhere; one that it gives to another file is stale.
                Some(map) => map.get(name).is_none_or(|file| path.ends_with(file)),
                None => true,
            };
            for (name, info) in metadata.tensors().into_iter().filter(|(name, _)| here(name)) {
                let (start, end) = info.data_offsets;
                let tensor = Tensor {
                    shard: index,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    offset: shard.data_start + start as u64,
                    bytes: (end - start) as u64,
                };
                tensors.insert(name, tensor);
            }
            files.push(shard);
        }
        let hash = match etags {
            Some(etags) => etags,
            None => sample_hash(&files)?,
        };
        let info = SourceInfo { source, dtype: commonest_dtype(&tensors), seed: None, hash };
        Ok(Self { info, label: label.to_owned(), files, tensors, quantized })
    }

    /// Fails unless every tensor that a model needs is there in the right shape and in a dtype that can be cast.
    pub fn check(&self, model_type: &str, matrices: &[MatrixSpec], vectors: &[VectorSpec]) -> Result<()> {
        let wanted = matrices
            .iter()
            .map(|spec| (&spec.name, vec![spec.n, spec.k]))
            .chain(vectors.iter().map(|spec| (&spec.name, vec![spec.len])));
        let (present, absent): (Vec<_>, Vec<_>) = wanted.partition(|(name, _)| self.tensors.contains_key(*name));
        if let Some((first, _)) = absent.first() {
            return Err(self.absent(model_type, first, absent.len()));
        }
        let quantized: HashSet<&String> =
            matrices.iter().filter(|spec| self.stored_precision(spec).is_some()).map(|spec| &spec.name).collect();
        for (name, shape) in present.into_iter().filter(|(name, _)| !quantized.contains(name)) {
            self.check_tensor(name, &shape, &self.tensors[name])?;
        }
        let stored = matrices.iter().filter_map(|spec| Some((spec, self.stored_precision(spec)?)));
        stored.into_iter().try_for_each(|(spec, precision)| bnb::check(spec, precision, self))
    }

    /// The precision that a matrix is stored in, `None` where its values are plain.
    fn stored_precision(&self, spec: &MatrixSpec) -> Option<&'static str> {
        let is_packed = matches!(self.tensors.get(&spec.name)?.dtype, Dtype::U8 | Dtype::I8);
        let quantized = self.quantized.as_ref().filter(|_| is_packed && bnb::may_be_quantized(spec.role))?;
        Some(quantized.precision)
    }

    fn absent(&self, model_type: &str, name: &str, count: usize) -> anyhow::Error {
        let others = match count - 1 {
            0 => String::new(),
            others => format!(" and {others} others"),
        };
        let nearest = self.tensors.keys().min_by_key(|have| (strsim::levenshtein(have, name), have.as_str()));
        let nearest = nearest.map(|nearest| format!("; nearest is `{nearest}`")).unwrap_or_default();
        BadInput::new(format!(
            "`{model_type}` needs tensor `{name}`{others}, absent from `{}`: {} tensors read{nearest}",
            self.label,
            self.tensors.len()
        ))
        .hint("check that config.json and the weights belong together")
        .into()
    }

    fn check_tensor(&self, name: &str, shape: &[usize], tensor: &Tensor) -> Result<()> {
        let file = &self.files[tensor.shard].name;
        if !matches!(tensor.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32) {
            let hint = match tensor.dtype {
                Dtype::U8 | Dtype::I8 => {
                    "the checkpoint is quantized in a way that config.json does not tell of; name the one that it was made from"
                }
                _ => "save the weights in one of these dtypes",
            };
            return Err(BadInput::new(format!(
                "tensor `{name}` in `{file}` is {}, which cannot be cast to fp16; allowed are F16, BF16 and F32",
                tensor.dtype
            ))
            .hint(hint)
            .into());
        }
        // A convolution's `[n, channels, height, width]` is an `[n, k]` matrix, a scalar is a vector of 1.
        let (rows, columns) = tensor.matrix();
        let fits = match shape {
            [len] => tensor.shape.iter().product::<usize>() == *len && tensor.shape.len() <= 1,
            _ => tensor.shape.len() > 1 && shape == [rows, columns],
        };
        match fits {
            true => Ok(()),
            false => Err(BadInput::new(format!(
                "tensor `{name}` in `{file}` has shape {:?}, the model of config.json needs {shape:?}",
                tensor.shape
            ))
            .hint("check that config.json and the weights belong together")
            .into()),
        }
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
        mut cast: impl FnMut(&[u8], &mut [T]),
    ) -> Result<()> {
        let (n, k) = tensor.matrix();
        ensure!(rows.start <= rows.end && rows.end <= n, "rows {rows:?} of `{name}`, which has {n}");
        ensure!(out.len() == rows.len() * k, "{} values asked of {} in `{name}`", out.len(), rows.len() * k);
        let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
        let shard = &self.files[tensor.shard];
        let mut offset = tensor.offset + (rows.start * k * size) as u64;
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
}

impl Source for Safetensors {
    fn info(&self) -> &SourceInfo {
        &self.info
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|tensor| tensor.shape.clone())
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort();
        names
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> Result<usize> {
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

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let widen = match tensor.dtype {
            Dtype::F16 => cast::widen_f16,
            Dtype::BF16 => cast::widen_bf16,
            Dtype::F32 => cast::widen_f32,
            other => return Err(anyhow!("tensor `{name}` is {other}; allowed are F16, BF16 and F32")),
        };
        self.read(name, tensor, rows, out, widen)
    }

    fn raw_dtype(&self, name: &str) -> Option<Dtype> {
        let dtype = self.tensors.get(name)?.dtype;
        matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32).then_some(dtype)
    }

    fn read_raw(&self, name: &str, rows: Range<usize>, out: &mut [u8]) -> Result<()> {
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

    fn is_quantized(&self) -> bool {
        self.quantized.is_some()
    }

    fn parts(&self, spec: &MatrixSpec) -> Option<Result<Vec<Part>>> {
        self.stored_precision(spec).map(|_| bnb::parts(spec, self))
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |tensor| tensor.bytes)
    }
}

impl Lookup for Safetensors {
    fn shape_of(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.tensors.get(name).map(|tensor| (tensor.dtype, tensor.shape.as_slice()))
    }

    fn bytes_of(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = self.tensor(name)?;
        let shard = &self.files[tensor.shard];
        let mut bytes = vec![0; tensor.bytes as usize];
        shard
            .file
            .read_exact_at(&mut bytes, tensor.offset)
            .with_context(|| format!("reading `{name}` at byte {} of `{}`", tensor.offset, shard.name))?;
        Ok(bytes)
    }
}

/// Opens a file and reads its header: 8 bytes of length, then JSON, then the tensors without gaps to the end.
fn read_header(path: &Path) -> Result<(Shard, Metadata)> {
    let name = short(path);
    let bad = |what: String| {
        BadInput::new(format!("`{name}` is not a whole safetensors file: {what}")).hint("download the file again")
    };
    let file = File::open(path).with_context(|| format!("opening `{name}`"))?;
    let bytes = file.metadata().with_context(|| format!("opening `{name}`"))?.len();
    let mut length = [0; 8];
    if bytes < 8 {
        return Err(bad(format!("{bytes} bytes, where the header alone needs 8")).into());
    }
    file.read_exact_at(&mut length, 0).with_context(|| format!("reading `{name}`"))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > bytes - 8 {
        let allowed = MAX_HEADER_BYTES.min(bytes - 8);
        return Err(bad(format!("its header claims {header_bytes} bytes, at most {allowed} are possible")).into());
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact_at(&mut header, 8).with_context(|| format!("reading `{name}`"))?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| bad(format!("its header cannot be read: {error}")))?;
    let data_start = 8 + header_bytes;
    let expected = data_start.checked_add(metadata.data_len() as u64);
    match expected {
        Some(expected) if expected == bytes => Ok((Shard { file, name, bytes, data_start }, metadata)),
        Some(expected) if expected > bytes => {
            Err(bad(format!("it is truncated: {bytes} bytes, its header tells of {expected}")).into())
        }
        _ => Err(bad(format!("{bytes} bytes, but its tensors end before the file does")).into()),
    }
}

/// The dtype of most values, as records spell it.
fn commonest_dtype(tensors: &HashMap<String, Tensor>) -> String {
    let mut values: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in tensors.values() {
        *values.entry(tensor.dtype.to_string().to_lowercase()).or_default() += tensor.shape.iter().product::<usize>();
    }
    values.into_iter().max_by_key(|(_, count)| *count).map(|(dtype, _)| dtype).unwrap_or_default()
}

/// xxh3 over header, size and the first, middle and last MiB of the tensors of each file.
fn sample_hash(files: &[Shard]) -> Result<String> {
    let mut hash = Xxh3::new();
    let mut buffer = Vec::new();
    for shard in files {
        hash.update(&shard.bytes.to_le_bytes());
        let data_bytes = shard.bytes - shard.data_start;
        let sample = SAMPLE_BYTES.min(data_bytes);
        let last = shard.bytes - sample;
        let middle = shard.data_start + (data_bytes - sample) / 2;
        for (offset, length) in [(0, shard.data_start), (shard.data_start, sample), (middle, sample), (last, sample)] {
            buffer.resize(length as usize, 0);
            shard.file.read_exact_at(&mut buffer, offset).with_context(|| format!("reading `{}`", shard.name))?;
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
