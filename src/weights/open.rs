//! From what the user typed to an opened model: a folder, a built-in shape or a hub repository.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use tokenizers::Tokenizer;

use super::bnb::PreQuantized;
use super::builtin::{self, BuiltIn};
use super::hub::{self, HubConfig, Need, RemoteFile};
use super::random::Random;
use super::safetensors::{self, Safetensors};
use super::spec::{MatrixSpec, VectorSpec};
use super::{Request, Source, SourceKind, WeightsChoice, processor, tokenizer};
use crate::error::BadInput;
use crate::events::Listener;

/// An opened model: its small files are read, its weights are not.
pub struct Checkpoint {
    /// Hub id, built-in name, or the folder's last component: records hold no user's path.
    pub id: String,
    /// Commit on the hub.
    pub revision: Option<String>,
    /// `config.json`
    pub config: Value,
    pub generation_config: Option<Value>,
    /// The image processor's settings, of whichever file has them.
    pub preprocessor_config: Option<Value>,
    pub tokenizer: Option<Tokenizer>,
    /// What the weights were quantized into before they were saved; `None` where they were not, or are random.
    pub quantized: Option<PreQuantized>,
    /// Time to find and download what was missing.
    pub resolve_s: f64,
    weights: Weights,
}

enum Weights {
    Random { seed: u64, outlier_channels: usize },
    Files { folder: PathBuf, source: SourceKind },
}

/// Opens a model with the hub settings of the environment.
pub fn open(request: &Request, events: &dyn Listener) -> Result<Checkpoint> {
    open_with(request, &HubConfig::from_env(request.offline)?, events)
}

/// Opens a model: a folder where one is meant, else a built-in shape, else a hub repository.
pub fn open_with(request: &Request, hub: &HubConfig, events: &dyn Listener) -> Result<Checkpoint> {
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
pub fn survey(request: &Request, events: &dyn Listener) -> Result<Surveyed> {
    survey_with(request, &HubConfig::from_env(request.offline)?, events)
}

/// As [`open_with`], but of a hub repository it fetches no more than says what else is needed.
pub fn survey_with(request: &Request, hub: &HubConfig, events: &dyn Listener) -> Result<Surveyed> {
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
    request: &Request,
    from_hub: &mut dyn FnMut(String) -> Result<Checkpoint>,
    events: &dyn Listener,
) -> Result<Checkpoint> {
    let random = request.weights == WeightsChoice::Random;
    let mut checkpoint = match Place::of(&request.model_id)? {
        Place::Folder(folder) => {
            refuse_revision(request, "a folder")?;
            from_folder(&folder, folder_name(&folder), SourceKind::Local, !random, events)?
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
    }
    match &mut checkpoint.weights {
        Weights::Random { seed, outlier_channels } => {
            (*seed, *outlier_channels) = (request.seed, request.outlier_channels);
        }
        Weights::Files { .. } => checkpoint.quantized = PreQuantized::of(&checkpoint.config)?,
    }
    Ok(checkpoint)
}

impl Checkpoint {
    /// Where its weights come from.
    pub fn source_kind(&self) -> SourceKind {
        match &self.weights {
            Weights::Random { .. } => SourceKind::Random,
            Weights::Files { source, .. } => *source,
        }
    }

    /// Where its files lie; `None` where its weights are made up.
    pub fn folder(&self) -> Option<&Path> {
        match &self.weights {
            Weights::Random { .. } => None,
            Weights::Files { folder, .. } => Some(folder),
        }
    }

    /// The weights, once it is sure that every tensor is there in its right shape; random ones are made from the specs.
    pub fn source(&self, matrices: &[MatrixSpec], vectors: &[VectorSpec]) -> Result<Box<dyn Source>> {
        let (folder, source) = match &self.weights {
            Weights::Random { seed, outlier_channels } => {
                return Ok(Box::new(Random::new(*seed, *outlier_channels, matrices, vectors)));
            }
            Weights::Files { folder, source } => (folder, *source),
        };
        let layout = safetensors::layout(folder)?;
        let etags = match source {
            SourceKind::Hub => hub::etags(layout.files()),
            SourceKind::Local | SourceKind::Random => None,
        };
        let opened = Safetensors::open(&layout, &self.id, source, etags, self.quantized.clone())?;
        opened.check(self.config["model_type"].as_str().unwrap_or("the model"), matrices, vectors)?;
        Ok(Box::new(opened))
    }
}

/// Where a model id points.
enum Place {
    Folder(PathBuf),
    BuiltIn(&'static BuiltIn),
    Hub(String),
}

impl Place {
    fn of(id: &str) -> Result<Self> {
        let path = Path::new(id);
        if path.is_dir() {
            return Ok(Place::Folder(path.to_owned()));
        }
        if path.is_file() {
            return Err(BadInput::new(format!("`{id}` is a file"))
                .hint("name the folder that holds config.json")
                .into());
        }
        if let Some(shape) = builtin::by_name(id) {
            return Ok(Place::BuiltIn(shape));
        }
        if id.starts_with(['.', '/', '~']) || id.matches('/').count() > 1 || id.ends_with('/') {
            return Err(BadInput::new(format!("no such folder: `{id}`"))
                .hint("a hub id has the form `owner/name`; `--list-models` shows the built-in shapes")
                .into());
        }
        match hub::is_repository_id(id) {
            true => Ok(Place::Hub(id.to_owned())),
            false => Err(BadInput::new(format!(
                "`{id}` is no folder, no built-in shape and no hub id of the form `owner/name`; nearest shape is `{}`",
                builtin::nearest(id)
            ))
            .hint("`--list-models` shows the built-in shapes")
            .into()),
        }
    }
}

fn refuse_revision(request: &Request, what: &str) -> Result<()> {
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

fn from_shape(shape: &BuiltIn, id: &str) -> Checkpoint {
    Checkpoint {
        id: id.to_owned(),
        revision: None,
        config: shape.config(),
        generation_config: None,
        preprocessor_config: None,
        tokenizer: None,
        quantized: None,
        resolve_s: 0.0,
        weights: Weights::Random { seed: 0, outlier_channels: 0 },
    }
}

fn need(request: &Request) -> Need {
    match request.weights {
        WeightsChoice::Auto => Need::Everything,
        WeightsChoice::Random => Need::Config,
    }
}

fn from_hub(request: &Request, id: String, hub: &HubConfig, events: &dyn Listener) -> Result<Checkpoint> {
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
    let config = read_json(&folder.join("config.json"))?.ok_or_else(|| {
        BadInput::new(format!("`{id}` holds no config.json"))
            .hint("name the folder that holds config.json and the weights")
    })?;
    if needs_weights {
        safetensors::layout(folder)?;
    }
    let tokenizer = tokenizer::open(folder, &config, events)?;
    let preprocessor_config = processor::open(folder, &config, events)?;
    if needs_weights {
        processor::tell_defaults(&config, preprocessor_config.as_ref(), events);
    }
    Ok(Checkpoint {
        id,
        revision: None,
        config,
        generation_config: read_json(&folder.join("generation_config.json"))?,
        preprocessor_config,
        tokenizer,
        quantized: None,
        resolve_s: 0.0,
        weights: Weights::Files { folder: folder.to_owned(), source },
    })
}

/// A JSON object, `None` where there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let name = safetensors::short(path);
    let bytes = std::fs::read(path).with_context(|| format!("reading `{name}`"))?;
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|error| BadInput::new(format!("`{name}` is not JSON: {error}")))?;
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
