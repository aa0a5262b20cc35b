//! From what the user typed to an opened model: a folder, a built-in shape or a hub repository.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::bnb::PreQuantized;
use super::bound::{BoundSource, Labels};
use super::builtin::{self, BuiltIn};
use super::gguf::{GgufFile, GgufSource};
use super::hub::{self, HubConfig, Need, RemoteFile};
use super::random::Random;
use super::safetensors::{self, Safetensors};
use super::spec::{MatrixSpec, VectorSpec};
use super::tokenizer::ChatTemplate;
use super::{
    ModelRequest, Source, SourceKind, WeightsChoice, bound, foreign, gguf, json, processor, settle, sniff, tokenizer,
};
use crate::error::BadInput;
use crate::events::{Event, Listener, Silent};

/// An opened model: its small files are read, its weights are not.
pub struct Checkpoint {
    /// Hub id, built-in name, or the last component of a folder or a file: records hold no user's path.
    pub id: String,
    /// Commit on the hub.
    pub revision: Option<String>,
    /// `config.json`, made to say what the files hold where it says otherwise.
    pub config: Value,
    pub generation_config: Option<Value>,
    /// Why a file that no run needs was not read: what a reader of the result must know.
    pub notes: Vec<String>,
    /// The image processor's settings, of whichever file has them.
    pub preprocessor_config: Option<Value>,
    pub tokenizer: Option<Tokenizer>,
    /// Why a tokenizer that the files hold is not read.
    pub unread_tokenizer: Option<String>,
    /// How a message is written for this model, where its files say it; why that cannot be read, where it cannot.
    pub chat_template: Result<Option<ChatTemplate>, String>,
    /// What the weights were quantized into before they were saved; `None` where they were not, or are random.
    pub quantized: Option<PreQuantized>,
    /// Time to find and download what was missing.
    pub resolve_s: f64,
    weights: Weights,
}

enum Weights {
    Random {
        seed: u64,
        outlier_channels: usize,
    },
    /// `files` are opened once; `None` where that fails or is not yet possible, and then their source gives the reason.
    Files {
        folder: PathBuf,
        source: SourceKind,
        files: Option<Arc<Safetensors>>,
    },
    Gguf {
        path: PathBuf,
        file: Arc<GgufFile>,
    },
}

/// Opens a model with the hub settings of the environment.
pub fn open(request: &ModelRequest, events: &dyn Listener) -> Result<Checkpoint> {
    open_with(request, &HubConfig::from_env(request.offline)?, events)
}

/// Opens a model: a folder where one is meant, else a built-in shape, else a hub repository.
pub fn open_with(request: &ModelRequest, hub: &HubConfig, events: &dyn Listener) -> Result<Checkpoint> {
    let start = Instant::now();
    let mut from_hub = |id: String| from_hub(request, id, hub, events);
    let mut checkpoint = open_place(request, &mut from_hub, events)?;
    checkpoint.resolve_s = start.elapsed().as_secs_f64();
    Ok(checkpoint)
}

/// A model whose weights may still lie on the hub alone.
pub struct Surveyed {
    /// Its source can only be opened where no file is missing.
    pub checkpoint: Checkpoint,
    /// What a run needs of the hub, cached or not; empty for what needs no hub.
    pub files: Vec<RemoteFile>,
}

/// Looks where a model's files are, with the hub settings of the environment.
pub fn survey(request: &ModelRequest, events: &dyn Listener) -> Result<Surveyed> {
    survey_with(request, &HubConfig::from_env(request.offline)?, events)
}

/// As [`open_with`], but of a hub repository it fetches no more than says what else is needed.
pub fn survey_with(request: &ModelRequest, hub: &HubConfig, events: &dyn Listener) -> Result<Surveyed> {
    let mut files = Vec::new();
    let mut from_hub = |id: String| {
        let survey = hub::survey(&id, request.revision.as_deref(), need(request), hub, events)?;
        files = survey.files;
        let mut checkpoint = from_folder(&survey.fetched.folder, id, SourceKind::Hub, false, events)?;
        checkpoint.revision = Some(survey.fetched.commit);
        Ok(checkpoint)
    };
    let checkpoint = open_place(request, &mut from_hub, events)?;
    Ok(Surveyed { checkpoint, files })
}

fn open_place(
    request: &ModelRequest,
    from_hub: &mut dyn FnMut(String) -> Result<Checkpoint>,
    events: &dyn Listener,
) -> Result<Checkpoint> {
    let random = request.weights == WeightsChoice::Random;
    let mut checkpoint = match Place::of(&request.model_id)? {
        Place::Folder(folder) => {
            refuse_revision(request, "a folder")?;
            from_folder(&folder, folder_name(&folder), SourceKind::Local, !random, events)?
        }
        Place::Gguf(path) => {
            refuse_revision(request, "a file")?;
            from_gguf(&path)?
        }
        Place::BuiltIn(shape) => {
            refuse_revision(request, "a built-in shape")?;
            from_shape(shape, shape.name)
        }
        Place::Hub(id) => match builtin::by_hub_id(&id) {
            Some(shape) if random && request.revision.is_none() => from_shape(shape, shape.hub_id),
            _ => from_hub(id)?,
        },
    };
    if random {
        checkpoint.weights = Weights::Random { seed: 0, outlier_channels: 0 };
        checkpoint.quantized = None;
    }
    match &mut checkpoint.weights {
        Weights::Random { seed, outlier_channels } => {
            (*seed, *outlier_channels) = (request.seed, request.outlier_channels);
        }
        Weights::Files { folder, source, files } => {
            *files = open_files(folder, *source).ok().map(Arc::new);
            checkpoint.quantized = settle::settle(&mut checkpoint.config, folder, files.as_deref(), events)?;
            warn_of_adapter(folder, events);
        }
        Weights::Gguf { .. } => {}
    }
    Ok(checkpoint)
}

fn open_files(folder: &Path, source: SourceKind) -> Result<Safetensors> {
    let layout = safetensors::layout(folder)?;
    let etags = match source {
        SourceKind::Hub => hub::etags(layout.files()),
        SourceKind::Local | SourceKind::Random => None,
    };
    Safetensors::open(&layout, source, etags)
}

/// transformers applies an adapter that lies beside whole weights, where PEFT is installed.
fn warn_of_adapter(folder: &Path, events: &dyn Listener) {
    if folder.join("adapter_config.json").is_file() {
        let message = "the folder also holds a LoRA adapter (adapter_config.json), which is not applied".to_owned();
        events.on(Event::Warning { name: "adapter_ignored".to_owned(), message });
    }
}

impl Checkpoint {
    /// Where its weights come from.
    pub fn source_kind(&self) -> SourceKind {
        match &self.weights {
            Weights::Random { .. } => SourceKind::Random,
            Weights::Files { source, .. } => *source,
            Weights::Gguf { .. } => SourceKind::Local,
        }
    }

    /// Folder of its files; `None` for random weights and for a GGUF file.
    pub fn folder(&self) -> Option<&Path> {
        match &self.weights {
            Weights::Random { .. } | Weights::Gguf { .. } => None,
            Weights::Files { folder, .. } => Some(folder),
        }
    }

    /// The GGUF file that it is.
    pub fn gguf(&self) -> Option<&Path> {
        match &self.weights {
            Weights::Gguf { path, .. } => Some(path),
            Weights::Random { .. } | Weights::Files { .. } => None,
        }
    }

    /// True for a GGUF file whose matrices are all in F16.
    pub fn is_f16_gguf(&self) -> bool {
        match &self.weights {
            Weights::Gguf { file, .. } => gguf::is_f16(file),
            Weights::Random { .. } | Weights::Files { .. } => false,
        }
    }

    /// True where its weights can be read: random, or in files that are here.
    pub fn has_weights(&self) -> bool {
        !matches!(&self.weights, Weights::Files { files: None, .. })
    }

    /// Gives each matrix the format that a file of several formats holds it in.
    pub fn hold(&self, matrices: &mut [MatrixSpec]) {
        match (&self.weights, &self.quantized) {
            (Weights::Gguf { file, .. }, Some(_)) => gguf::hold(file, matrices),
            (Weights::Files { files: Some(files), .. }, Some(own)) => bound::hold(files, own, matrices),
            _ => {}
        }
    }

    /// [`Self::source_with`] without warnings of tensors that are not read.
    pub fn source(&self, matrices: &[MatrixSpec], vectors: &[VectorSpec]) -> Result<Box<dyn Source>> {
        self.source_with(matrices, vectors, &Silent)
    }

    /// The weights, once it is sure that every tensor is there in its right shape; random ones are made from the specs. Warns of
    /// what the files hold beside them.
    pub fn source_with(
        &self,
        matrices: &[MatrixSpec],
        vectors: &[VectorSpec],
        events: &dyn Listener,
    ) -> Result<Box<dyn Source>> {
        let labels = Labels { id: &self.id, model_type: self.config["model_type"].as_str().unwrap_or("the model") };
        let files = match &self.weights {
            Weights::Gguf { file, .. } => {
                let is_quantized = self.quantized.is_some();
                let source = GgufSource::new(file.clone(), is_quantized, (matrices, vectors), &labels, events)?;
                return Ok(Box::new(source));
            }
            Weights::Random { seed, outlier_channels } => {
                return Ok(Box::new(Random::new(*seed, *outlier_channels, matrices, vectors)));
            }
            Weights::Files { files: Some(files), .. } => files.clone(),
            Weights::Files { folder, source, files: None } => Arc::new(open_files(folder, *source)?),
        };
        let bound = BoundSource::new(files, self.quantized.clone(), (matrices, vectors), &labels, events)?;
        Ok(Box::new(bound))
    }
}

/// Where a model id points.
enum Place {
    Folder(PathBuf),
    Gguf(PathBuf),
    BuiltIn(&'static BuiltIn),
    Hub(String),
}

impl Place {
    fn of(id: &str) -> Result<Self> {
        let path = Path::new(id);
        if path.is_dir() {
            return Ok(Place::Folder(path.to_owned()));
        }
        if path.is_file() && foreign::is_gguf(path) {
            return Ok(Place::Gguf(path.to_owned()));
        }
        if path.is_file() {
            return Err(foreign::a_file(path, id).into());
        }
        if let Some(shape) = builtin::by_name(id) {
            return Ok(Place::BuiltIn(shape));
        }
        if id.starts_with(['.', '/', '~']) || id.matches('/').count() > 1 || id.ends_with('/') {
            return Err(BadInput::new(format!("no such folder: `{id}`"))
                .hint("a hub id has the form `owner/name`; `--list-models` shows the built-in models")
                .into());
        }
        match hub::is_repository_id(id) {
            true => Ok(Place::Hub(id.to_owned())),
            false => Err(BadInput::new(format!(
                "`{id}` not found as a folder, built-in model or hub id (`owner/name`){}",
                builtin::nearest(id)
                    .map(|name| format!("; the nearest built-in model is `{name}`"))
                    .unwrap_or_default()
            ))
            .hint("`--list-models` shows the built-in models")
            .into()),
        }
    }
}

fn refuse_revision(request: &ModelRequest, what: &str) -> Result<()> {
    match &request.revision {
        None => Ok(()),
        Some(revision) => Err(BadInput::new(format!(
            "`--revision {revision}` names a commit of a hub repository, `{}` is {what}",
            request.model_id
        ))
        .hint("drop `--revision`")
        .into()),
    }
}

fn from_gguf(path: &Path) -> Result<Checkpoint> {
    let file = GgufFile::open(path)?;
    let config = gguf::config(&file)?;
    let vocabulary = config["vocab_size"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
    let (tokenizer, unread_tokenizer) = match gguf::tokenizer(&file, vocabulary) {
        Ok(tokenizer) => (Some(tokenizer), None),
        Err(why) => (None, Some(why)),
    };
    Ok(Checkpoint {
        id: folder_name(path),
        revision: None,
        config,
        generation_config: None,
        notes: Vec::new(),
        preprocessor_config: None,
        tokenizer,
        unread_tokenizer,
        chat_template: Ok(gguf::chat_template(&file)),
        quantized: gguf::quantized(&file),
        resolve_s: 0.0,
        weights: Weights::Gguf { path: path.to_owned(), file: Arc::new(file) },
    })
}

fn from_shape(shape: &BuiltIn, id: &str) -> Checkpoint {
    Checkpoint {
        id: id.to_owned(),
        revision: None,
        config: shape.config(),
        generation_config: None,
        notes: Vec::new(),
        preprocessor_config: None,
        tokenizer: None,
        unread_tokenizer: None,
        chat_template: Ok(None),
        quantized: None,
        resolve_s: 0.0,
        weights: Weights::Random { seed: 0, outlier_channels: 0 },
    }
}

fn need(request: &ModelRequest) -> Need {
    match request.weights {
        WeightsChoice::Auto => Need::Everything,
        WeightsChoice::Random => Need::Config,
    }
}

fn from_hub(request: &ModelRequest, id: String, hub: &HubConfig, events: &dyn Listener) -> Result<Checkpoint> {
    let need = need(request);
    let fetched = hub::fetch(&id, request.revision.as_deref(), need, hub, events)?;
    let mut checkpoint = from_folder(&fetched.folder, id, SourceKind::Hub, need == Need::Everything, events)?;
    checkpoint.revision = Some(fetched.commit);
    Ok(checkpoint)
}

fn from_folder(
    folder: &Path,
    id: String,
    source: SourceKind,
    needs_weights: bool,
    events: &dyn Listener,
) -> Result<Checkpoint> {
    let config = read_json(&folder.join("config.json"))?.ok_or_else(|| foreign::no_config(folder, &id))?;
    if needs_weights {
        safetensors::layout(folder)?;
    }
    let tokenizer = tokenizer::open(folder, &config, events)?;
    let preprocessor_config = processor::open(folder, &config, events)?;
    if needs_weights {
        processor::report_defaults(&config, preprocessor_config.as_ref(), events);
    }
    // What it says is of use to a run, but none needs it. A file that is another is a sign of a broken download.
    let generation_json = folder.join("generation_config.json");
    if let Some(error) = sniff::not_itself(&generation_json) {
        return Err(error.into());
    }
    let (generation_config, notes) = match read_json(&generation_json) {
        Ok(generation_config) => (generation_config, Vec::new()),
        Err(error) => (None, vec![format!("{error:#}: it is not read")]),
    };
    Ok(Checkpoint {
        id,
        revision: None,
        config,
        generation_config,
        notes,
        preprocessor_config,
        tokenizer,
        unread_tokenizer: None,
        chat_template: ChatTemplate::read(folder).map_err(|error| format!("{error:#}")),
        quantized: None,
        resolve_s: 0.0,
        weights: Weights::Files { folder: folder.to_owned(), source, files: None },
    })
}

/// A JSON object, `None` where there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    if let Some(error) = sniff::not_itself(path) {
        return Err(error.into());
    }
    let name = safetensors::short(path);
    let bytes = std::fs::read(path).with_context(|| format!("reading `{name}`"))?;
    let value = json::parse(&bytes).map_err(|error| BadInput::new(format!("`{name}` is not JSON: {error}")))?;
    match value.is_object() {
        true => Ok(Some(value)),
        false => Err(BadInput::new(format!("`{name}` is JSON, but not an object")).into()),
    }
}

/// The last component, resolved where it is `.` or `..`.
fn folder_name(folder: &Path) -> String {
    let resolved = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let named = folder.file_name().or(resolved.file_name());
    named.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
