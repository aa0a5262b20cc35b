//! A checkpoint as transformers and bitsandbytes save it, in fp16 or quantized: a folder that they load unchanged.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use half::f16;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::bnb::{self, SavedTensor, config};
use super::policy::Formats;
use super::safetensors::SINGLE;
use super::spec::{MatrixSpec, Role, VectorSpec};
use super::{Checkpoint, Source, SourceKind};
use crate::error::BadInput;
use crate::events::{Event, Listener, Unit};
use crate::quant::{self, FormatId, FormatOptions, HalfMatrix};

/// Files that belong to a model besides its weights and config.json; those that are there are copied.
const COPIED: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
];

/// Bytes of plain values that are held at once.
const CHUNK_BYTES: usize = 16 << 20;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Of the weights' file.
    pub bytes: u64,
    /// Finite checkpoint values that became infinite in fp16.
    pub fp16_overflow: usize,
}

/// Writes `checkpoint`, whose model needs these tensors, quantized to `precision` into the new folder `output`, which
/// is written atomically. The tensors pass through a file beside it one by one.
///
/// fp16 is written of random weights, too, so that other engines run the same ones.
///
/// Fails with [`BadInput`] where nothing can be written at `output`, where bitsandbytes has no such precision, and where
/// the checkpoint is quantized already or would be quantized and has no weights of its own.
pub fn export(
    checkpoint: &Checkpoint,
    (matrices, vectors): (&[MatrixSpec], &[VectorSpec]),
    precision: FormatId,
    output: &Path,
    events: &dyn Listener,
) -> Result<Exported> {
    let options = FormatOptions::default();
    let section = match precision == quant::BASELINE {
        true => None,
        false => Some(section(checkpoint, matrices, precision)?),
    };
    check_experts(checkpoint, matrices, section.is_some())?;
    let from = folder_of(checkpoint, section.is_some())?;
    let parent = check_output(output)?;
    let source = checkpoint.source_with(matrices, vectors, events)?;
    // A temporary folder is private; the folder inside it has the usual permissions.
    let temporary = tempfile::Builder::new().prefix(".quantbench-").tempdir_in(&parent);
    let temporary = temporary.map_err(|error| unwritable(output, &error.to_string()))?;
    let folder = temporary.path().join("model");
    fs::create_dir(&folder)?;
    let spool = Spool::new(temporary.path())?;
    let mut writer =
        Writer { source: source.as_ref(), formats: Formats::new(precision, options), spool, fp16_overflow: 0 };
    writer.all(matrices, vectors, precision, events)?;
    let bytes = writer.spool.finish(&folder.join(SINGLE)).with_context(|| format!("writing `{SINGLE}`"))?;
    fs::write(folder.join("config.json"), config_json(&checkpoint.config, section)).context("writing `config.json`")?;
    let copied = COPIED.iter().filter_map(|name| from.map(|from| (name, from.join(name))));
    for (name, path) in copied.filter(|(_, path)| path.is_file()) {
        fs::copy(path, folder.join(name)).with_context(|| format!("copying `{name}`"))?;
    }
    fs::rename(&folder, output).map_err(|error| unwritable(output, &error.to_string()))?;
    Ok(Exported { bytes, fp16_overflow: writer.fp16_overflow })
}

/// The `quantization_config` of a quantized checkpoint.
fn section(checkpoint: &Checkpoint, matrices: &[MatrixSpec], precision: FormatId) -> Result<Value, BadInput> {
    let threshold = FormatOptions::default().int8_threshold;
    let mut section = config::section(precision, threshold).ok_or_else(|| no_such_form(precision))?;
    if let Some(names) = left_alone(checkpoint, matrices)? {
        section["llm_int8_skip_modules"] = json!(names);
    }
    Ok(section)
}

/// transformers 5 has experts in 3-D parameters, which bitsandbytes does not convert.
fn check_experts(checkpoint: &Checkpoint, matrices: &[MatrixSpec], is_quantized: bool) -> Result<(), BadInput> {
    if checkpoint.config["model_type"] == "gpt_oss" {
        let message = "`export` writes no gpt-oss: transformers has its experts in 3-D tensors alone";
        return Err(BadInput::new(message).hint("measure it as it is; its experts are quantized as it loads"));
    }
    match matrices.iter().find(|spec| is_quantized && matches!(spec.role, Role::Expert | Role::Router)) {
        Some(spec) => Err(BadInput::new(format!(
            "transformers 5 loads no quantized experts and no quantized router, such as `{}`",
            spec.name
        ))
        .hint("`--keep-fp16 experts,router` leaves them in fp16, as transformers does")),
        None => Ok(()),
    }
}

fn no_such_form(precision: FormatId) -> BadInput {
    let quantized = bnb::forms().map(|(format, _)| format.name);
    let written: Vec<&str> = std::iter::once(quant::BASELINE.name).chain(quantized).collect();
    BadInput::new(format!("bitsandbytes saves no `{precision}`: `export` writes {}", written.join(", ")))
        .hint("name one of them with `--precision`")
}

/// The layers that transformers must not convert, where there are any besides those that it leaves alone by itself. A list takes the
/// place of its own, which has the head.
fn left_alone(checkpoint: &Checkpoint, matrices: &[MatrixSpec]) -> Result<Option<Vec<String>>, BadInput> {
    // Experts and routers are left alone without being named.
    let kept = matrices.iter().filter(|spec| spec.role == Role::Kept && spec.others.is_empty());
    let kept: Vec<String> = kept.map(|spec| spec.name.trim_end_matches(".weight").to_owned()).collect();
    if kept.is_empty() {
        return Ok(None);
    }
    if checkpoint.config["model_type"] == "paligemma" {
        let message = "`--keep-fp16`: transformers calls PaliGemma's layers otherwise than its checkpoints do";
        return Err(BadInput::new(message).hint("export it without `--keep-fp16`"));
    }
    Ok(Some(kept.into_iter().chain(["lm_head".to_owned()]).collect()))
}

/// Where the small files come from; `None` for random weights.
fn folder_of(checkpoint: &Checkpoint, is_quantized: bool) -> Result<Option<&Path>, BadInput> {
    if let Some(own) = &checkpoint.quantized {
        return Err(BadInput::new(format!("`{}` is saved in `{}` already", checkpoint.id, own.precision))
            .hint("name the model that it was made from"));
    }
    match checkpoint.folder() {
        None if checkpoint.source_kind() != SourceKind::Random => {
            Err(BadInput::new(format!("`{}` is a GGUF file, and a folder is made of a folder alone", checkpoint.id))
                .hint("name the safetensors model that it was made from"))
        }
        None if is_quantized => Err(BadInput::new(format!(
            "`{}` is a shape without weights, so there is nothing to quantize",
            checkpoint.id
        ))
        .hint("name a folder or a hub repository with weights, or write random ones with `--precision fp16`")),
        folder => Ok(folder),
    }
}

/// The folder that will hold `output`. An empty folder at `output` is replaced.
pub fn check_output(output: &Path) -> Result<PathBuf, BadInput> {
    if output.file_name().is_none() {
        return Err(unwritable(output, "this names no folder"));
    }
    match fs::read_dir(output).map(|mut files| files.next().is_none()) {
        Ok(false) => return Err(unwritable(output, "it already exists and is not empty")),
        Err(_) if output.exists() => return Err(unwritable(output, "it exists and is no folder")),
        Ok(true) | Err(_) => {}
    }
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match parent.is_dir() {
        true => Ok(parent.to_owned()),
        false => Err(unwritable(output, &format!("there is no folder `{}`", parent.display()))),
    }
}

fn unwritable(output: &Path, why: &str) -> BadInput {
    BadInput::new(format!("cannot write `{}`: {why}", output.display()))
        .hint("name a new folder with `--output`; its parent folder must exist")
}

/// The model's own config.json with the section, if it has one; keys sorted as transformers sorts them.
fn config_json(config: &Value, section: Option<Value>) -> String {
    let mut config = config.clone();
    if let Some(keys) = config.as_object_mut() {
        // Older releases read the second name; it is kept where the model has it.
        if keys.contains_key("torch_dtype") {
            keys.insert("torch_dtype".to_owned(), json!("float16"));
        }
        keys.insert("dtype".to_owned(), json!("float16"));
        if let Some(section) = section {
            keys.insert("quantization_config".to_owned(), section);
        }
    }
    format!("{:#}\n", sorted(config))
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(keys) => {
            let mut keys: Vec<(String, Value)> = keys.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            keys.sort_by(|(a, _), (b, _)| a.cmp(b));
            Value::Object(keys.into_iter().collect())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Passes tensors from the source to the spool.
struct Writer<'a> {
    source: &'a dyn Source,
    formats: Formats,
    spool: Spool,
    fp16_overflow: usize,
}

impl Writer<'_> {
    fn all(
        &mut self,
        matrices: &[MatrixSpec],
        vectors: &[VectorSpec],
        precision: FormatId,
        events: &dyn Listener,
    ) -> Result<()> {
        let total = matrices.iter().map(|spec| self.source.stored_bytes(&spec.name)).sum();
        events.on(Event::Begin { label: format!("export {precision}"), total, unit: Unit::Bytes });
        let mut done = 0;
        for spec in matrices {
            self.matrix(spec)?;
            done += self.source.stored_bytes(&spec.name);
            events.on(Event::Progress { done });
        }
        for spec in vectors {
            self.half(&spec.name, spec.len, 1)?;
        }
        events.on(Event::End);
        Ok(())
    }

    fn matrix(&mut self, spec: &MatrixSpec) -> Result<()> {
        let &MatrixSpec { ref name, n, k, role, others: _, held: _ } = spec;
        match role {
            _ if self.formats.precision() == quant::BASELINE && role != Role::HighPrecision => self.half(name, n, k),
            Role::Embedding | Role::Head | Role::Patches | Role::Kept => self.half(name, n, k),
            Role::HighPrecision => self.full(name, n, k),
            Role::Projection | Role::Expert | Role::Router => {
                let mut data = vec![f16::ZERO; n * k];
                self.fp16_overflow += self.source.read_rows(name, 0..n, &mut data)?;
                let stored = self.formats.asked().quantize(HalfMatrix { n, k, data });
                let stored = stored.with_context(|| format!("quantizing `{name}`"))?;
                let tensors = bnb::tensors(name, (n, k), self.formats.precision(), stored.parts())?;
                tensors.into_iter().try_for_each(|tensor| self.spool.put(tensor))
            }
        }
    }

    /// Values cast to fp16.
    fn half(&mut self, name: &str, n: usize, k: usize) -> Result<()> {
        let shape = self.source.shape(name).unwrap_or_else(|| vec![n, k]);
        self.spool.begin(name, Dtype::F16, self.as_checkpoints(name, shape));
        let rows_at_once = (CHUNK_BYTES / size_of::<f16>() / k).max(1);
        for first in (0..n).step_by(rows_at_once) {
            let rows = first..(first + rows_at_once).min(n);
            let mut data = vec![f16::ZERO; rows.len() * k];
            self.fp16_overflow += self.source.read_rows(name, rows, &mut data)?;
            self.spool.append(&data.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    }

    /// Random weights have each matrix as `[n, k]`, where checkpoints have patches as `[n, 3, size, size]`.
    fn as_checkpoints(&self, name: &str, shape: Vec<usize>) -> Vec<usize> {
        match *shape.as_slice() {
            [n, k] if name.ends_with("patch_embedding.weight") => {
                let size = (k / 3).isqrt();
                vec![n, 3, size, size]
            }
            _ => shape,
        }
    }

    /// Values as they are, in fp32.
    fn full(&mut self, name: &str, n: usize, k: usize) -> Result<()> {
        let shape = self.source.shape(name).unwrap_or_else(|| vec![n, k]);
        self.spool.begin(name, Dtype::F32, shape);
        let mut data = vec![0.0f32; n * k];
        self.source.read_rows_f32(name, 0..n, &mut data)?;
        self.spool.append(&data.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }
}

/// Tensors in the order they come. The file that transformers writes has them in another, and its header, which comes
/// first, holds lengths that are known last: so they wait here.
struct Spool {
    file: BufWriter<File>,
    tensors: Vec<Spooled>,
    bytes: u64,
}

struct Spooled {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    bytes: u64,
}

impl Spool {
    /// The file has no name and is gone when it is closed.
    fn new(folder: &Path) -> Result<Self> {
        Ok(Self { file: BufWriter::new(tempfile::tempfile_in(folder)?), tensors: Vec::new(), bytes: 0 })
    }

    fn begin(&mut self, name: &str, dtype: Dtype, shape: Vec<usize>) {
        self.tensors.push(Spooled { name: name.to_owned(), dtype, shape, offset: self.bytes, bytes: 0 });
    }

    /// To the tensor that was begun last.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).context("writing the weights")?;
        self.bytes += bytes.len() as u64;
        if let Some(last) = self.tensors.last_mut() {
            last.bytes += bytes.len() as u64;
        }
        Ok(())
    }

    fn put(&mut self, tensor: SavedTensor) -> Result<()> {
        self.begin(&tensor.name, tensor.dtype, tensor.shape);
        self.append(&tensor.bytes)
    }

    /// Writes the safetensors file at `path`: wide dtypes first, then by name. Returns its size.
    fn finish(&mut self, path: &Path) -> Result<u64> {
        self.tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let header = header(&self.tensors);
        let mut file = File::create_new(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        self.file.flush()?;
        let spooled = self.file.get_mut();
        for tensor in &self.tensors {
            spooled.seek(SeekFrom::Start(tensor.offset))?;
            let copied = std::io::copy(&mut std::io::Read::take(&mut *spooled, tensor.bytes), &mut file)?;
            anyhow::ensure!(copied == tensor.bytes, "the temporary file lost a part of `{}`", tensor.name);
        }
        file.sync_all()?;
        Ok(8 + header.len() as u64 + self.bytes)
    }
}

/// The header, padded so that the tensors begin at a multiple of 8.
fn header(tensors: &[Spooled]) -> String {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for Spooled { name, dtype, shape, bytes, .. } in tensors {
        let offsets = [start, start + bytes];
        entries.insert(name.clone(), json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": offsets}));
        start += bytes;
    }
    let mut text = Value::Object(entries).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}
