//! Model architectures: each file reads a `config.json` and builds a plan. A model never names a precision.

mod blocks;
mod config;
mod decoder;
mod experts;
mod frequencies;
mod gemma;
mod gemma2;
mod gemma3;
mod generation;
mod gpt_oss;
mod keys;
mod llama;
mod ministral;
mod mistral;
mod mixtral;
mod olmo2;
mod paligemma;
mod phi;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope;
mod rule;
mod siglip;
mod smollm3;
mod t5;

use candle_core::{Result, bail};
use serde_json::{Map, Value};

use keys::{Keys, Report};
pub use keys::{Note, Walked};
pub use rope::{RopeKind, RopeSettings};
pub use rule::Fate;

use crate::plan::Model;

/// A row of [`ARCHITECTURES`].
pub struct Architecture {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// For help and README.
    pub doc: &'static str,
    build: fn(&Keys) -> Result<Model>,
}

/// Every architecture that can be run.
pub static ARCHITECTURES: &[Architecture] = &[
    llama::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
    qwen3_moe::ARCHITECTURE,
    mistral::ARCHITECTURE,
    ministral::ARCHITECTURE,
    mixtral::ARCHITECTURE,
    gemma::ARCHITECTURE,
    gemma2::ARCHITECTURE,
    gemma3::ARCHITECTURE,
    gemma3::NESTED,
    phi::ARCHITECTURE,
    phi3::ARCHITECTURE,
    olmo2::ARCHITECTURE,
    smollm3::ARCHITECTURE,
    gpt_oss::ARCHITECTURE,
    t5::ARCHITECTURE,
    t5::MT5,
    paligemma::ARCHITECTURE,
];

/// The files that say what a model is.
pub struct Files<'a> {
    /// config.json
    pub config: &'a Value,
    /// generation_config.json
    pub generation: Option<&'a Value>,
}

/// A model, and what was read to build it.
#[derive(Debug)]
pub struct Built {
    pub model: Model,
    /// What a reader of the result must know.
    pub notes: Vec<Note>,
    /// What became of each key of the files.
    pub keys: Vec<Walked>,
    /// The rotary settings, where it has any.
    pub rope: Option<RopeSettings>,
}

/// The model that a `config.json` describes.
pub fn build(config: &Value) -> Result<Model> {
    Ok(read(&Files { config, generation: None })?.model)
}

/// The model that these files describe. Fails on an unknown `model_type`, a mistyped key, and on settings that the
/// architecture's file does not compute.
pub fn read(files: &Files) -> Result<Built> {
    let nothing = Map::new();
    let config = files.config.as_object().unwrap_or(&nothing);
    let architecture = architecture(files.config)?;
    let report = Report::default();
    let mut model = (architecture.build)(&Keys::new(config, "config.json", &report))?;
    match files.generation.and_then(Value::as_object) {
        Some(generation) => generation::apply(generation, &mut model, &report)?,
        // Where older models have such settings.
        None => generation::warn(config, "config.json", &report),
    }
    let (keys, mut notes) = (report.walked.into_inner(), report.notes.into_inner());
    notes.extend(["config.json", generation::FILE].into_iter().filter_map(|file| unknown(file, &keys)));
    Ok(Built { model, notes, keys, rope: report.rope.into_inner() })
}

/// Names the keys of a file that are in no list.
fn unknown(file: &str, keys: &[Walked]) -> Option<Note> {
    let unread = keys.iter().filter(|walked| walked.file == file).filter_map(|walked| match &walked.fate {
        Fate::Unknown(value) => Some(format!("`{}` {value}", walked.key)),
        _ => None,
    });
    let unread: Vec<String> = unread.collect();
    if unread.is_empty() {
        return None;
    }
    let message =
        format!("{file} has keys that are not read here, and might change what is computed: {}", unread.join(", "));
    Some(Note { name: UNKNOWN_KEY, message })
}

/// The name of the note about a file that cannot be read and need not be.
pub const UNREAD_FILE: &str = "file_not_read";

/// The name of the note about keys that are in no list.
pub const UNKNOWN_KEY: &str = "unknown_config_key";

fn architecture(config: &Value) -> Result<&'static Architecture> {
    let known = || ARCHITECTURES.iter().map(|a| format!("`{}`", a.model_type)).collect::<Vec<_>>().join(", ");
    let Some(model_type) = config.get("model_type").and_then(Value::as_str) else {
        bail!("config.json has no `model_type`; known are {}", known());
    };
    match ARCHITECTURES.iter().find(|architecture| architecture.model_type == model_type) {
        Some(architecture) => Ok(architecture),
        None => {
            let nearest = nearest(model_type, config).map(|nearest| format!("; {nearest}")).unwrap_or_default();
            bail!("config.json says `model_type` `{model_type}`{nearest}; known are {}", known())
        }
    }
}

/// Says which known family is nearest to one that is not, and what of this config that family does not compute. Names that begin
/// alike count most, then how few keys are left over. `None` where neither says anything.
fn nearest(model_type: &str, config: &Value) -> Option<String> {
    let common = |name: &str| match name.chars().zip(model_type.chars()).take_while(|(a, b)| a == b).count() {
        // Fewer letters are chance.
        0..=2 => 0,
        common => common,
    };
    let rank = |(family, left_over): &(&Architecture, std::result::Result<Vec<String>, String>)| {
        let (fails, count) = (left_over.is_err(), left_over.as_ref().map_or(0, Vec::len));
        (std::cmp::Reverse(common(family.model_type)), fails, count)
    };
    let probed = ARCHITECTURES.iter().map(|family| (family, left_over(family, config)));
    let (family, left_over) = probed.min_by_key(rank)?;
    let name = family.model_type;
    if common(name) == 0 && config.as_object().is_none_or(|config| config.len() < 2) {
        return None;
    }
    Some(match left_over {
        Err(error) => format!("nearest is `{name}`, which cannot be built from it ({error})"),
        Ok(keys) if keys.is_empty() => format!("nearest is `{name}`, which computes all of its keys"),
        Ok(keys) => format!("nearest is `{name}`, which does not compute {}", keys.join(", ")),
    })
}

/// Keys of a config that a family does not compute, or why it cannot be built from it at all.
fn left_over(family: &Architecture, config: &Value) -> std::result::Result<Vec<String>, String> {
    let nothing = Map::new();
    let report = Report { is_probe: true, ..Report::default() };
    let built = (family.build)(&Keys::new(config.as_object().unwrap_or(&nothing), "config.json", &report));
    built.map_err(|error| crate::error::without_backtrace(&error.to_string()).to_owned())?;
    let walked = report.walked.borrow();
    let unread = walked.iter().filter(|key| matches!(key.fate, Fate::Unknown(_)));
    Ok(unread.map(|key| format!("`{}`", key.key)).collect())
}
