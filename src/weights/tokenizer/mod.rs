//! Text to ids and back, by a checkpoint's `tokenizer.json` and the settings beside it, as transformers' `AutoTokenizer` (5.24)
//! reads them.

mod added;
mod chat;
mod class;
mod settings;

use std::path::Path;

use anyhow::Result;
use tokenizers::Tokenizer;

pub use self::chat::{ChatMessage, ChatTemplate};
use self::class::Class;
use self::settings::TokenizerSettings;
pub(super) use self::settings::shortened;
use super::safetensors::short;
use super::sniff;
use crate::error::BadInput;
use crate::events::{Event, Listener};

/// The tokenizer of a folder, `None` where there is no `tokenizer.json`. `config` is the model's config.json.
///
/// Tells of settings that change what a text becomes and are not applied.
pub fn open(folder: &Path, config: &serde_json::Value, events: &dyn Listener) -> Result<Option<Tokenizer>> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Ok(None);
    }
    if let Some(error) = sniff::not_itself(&path) {
        return Err(error.into());
    }
    let settings = TokenizerSettings::read(folder)?;
    let unusable = |error: String| {
        BadInput::new(format!("`{}` is not a tokenizer that can be used: {error}", short(&path)))
            .hint("download the file again; models without a tokenizer take ids, as in `--prompt-tokens 8`")
    };
    let text = std::fs::read(&path).map_err(|error| unusable(error.to_string()))?;
    let class = Class::of(&settings, config, &text);
    let rebuilt = class.rebuild(&settings, &text).map_err(|error| unusable(error.to_string()))?;
    let parsed = Tokenizer::from_bytes(rebuilt.as_ref().unwrap_or(&text));
    let mut tokenizer = parsed.map_err(|error| unusable(error.to_string()))?;
    // A trainer leaves its own there; a prompt is neither filled up nor cut.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| unusable(error.to_string()))?;
    let misplaced = added::add(&mut tokenizer, &settings).map_err(|error| unusable(error.to_string()))?;
    tokenizer.set_encode_special_tokens(settings.splits_special_tokens());
    for message in settings.unapplied().chain(class.unapplied()).chain(misplaced) {
        events.on(Event::Warning { name: "unapplied_tokenizer_setting".to_owned(), message });
    }
    Ok(Some(tokenizer))
}

/// The ids of a text, with the special tokens that the tokenizer's post-processor adds.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode(text, true)
        .map_err(|error| BadInput::new(format!("the model's tokenizer cannot encode the prompt: {error}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// The text of some ids, special tokens spelled out: a record shows all that was generated.
pub fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
    tokenizer
        .decode(ids, false)
        .map_err(|error| BadInput::new(format!("the model's tokenizer cannot decode its ids: {error}")).into())
}
