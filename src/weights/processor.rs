//! The image processor's settings of a folder: which file counts, and which of its keys nobody applies.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use super::json::is_empty;
use super::open::read_json;
use super::tokenizer::shortened;
use crate::events::{Event, Listener};

/// Keys that `harness::picture` computes, or refuses where they ask for what is not computed.
const COMPUTED: &[&str] = &[
    "image_processor_type",
    "do_resize",
    "size",
    "default_to_square",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
    "data_format",
    "input_data_format",
];

/// Keys that change no pixel: a picture is RGB before any of them counts, and the rest is about files, devices and batches.
const HARMLESS: &[&str] = &[
    "auto_map",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "feature_extractor_type",
    "image_seq_length",
    "model_input_names",
    "processor_class",
    "return_tensors",
    "transformers_version",
];

/// The settings that transformers (5.24) takes: the `image_processor` of processor_config.json, else preprocessor_config.json. Tells
/// of keys in them that nobody here knows.
pub fn open(folder: &Path, config: &Value, events: &dyn Listener) -> Result<Option<Value>> {
    let nested = read_json(&folder.join("processor_config.json"))?.and_then(|mut processor| {
        let nested = processor.as_object_mut()?.shift_remove("image_processor")?;
        (!nested.is_null()).then_some(nested)
    });
    let settings = match nested {
        Some(settings) => Some(("processor_config.json", settings)),
        None => read_json(&folder.join("preprocessor_config.json"))?.map(|own| ("preprocessor_config.json", own)),
    };
    // Text models may have such a file too, and show nobody a picture.
    let sees = config.get("vision_config").is_some();
    if let Some((file, Value::Object(keys))) = settings.as_ref().filter(|_| sees) {
        for message in unapplied(file, keys) {
            events.on(Event::Warning { name: "unapplied_processor_setting".to_owned(), message });
        }
    }
    Ok(settings.map(|(_, settings)| settings))
}

/// Warns that a vision-language model has no image processor settings.
pub fn report_defaults(config: &Value, settings: Option<&Value>, events: &dyn Listener) {
    if config.get("vision_config").is_some() && settings.is_none() {
        let message =
            "neither processor_config.json nor preprocessor_config.json says how a picture is read: the usual way of \
                       SigLIP is taken"
                .to_owned();
        events.on(Event::Warning { name: "no_processor_settings".to_owned(), message });
    }
}

fn unapplied<'a>(file: &'a str, keys: &'a Map<String, Value>) -> impl Iterator<Item = String> + 'a {
    let is_known = |key: &str| COMPUTED.contains(&key) || HARMLESS.contains(&key) || key.starts_with('_');
    let unknown = keys.iter().filter(move |(key, value)| !is_known(key) && !is_empty(value));
    unknown.map(move |(key, value)| format!("`{key}` of {file} is {}, which is not applied", shortened(value)))
}
