//! Text to ids and back, by a checkpoint's `tokenizer.json`.

use std::path::Path;

use anyhow::Result;
use tokenizers::Tokenizer;

use crate::error::BadInput;

/// Reads a `tokenizer.json`.
pub fn load(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|error| {
        BadInput::new(format!("`{}` is not a tokenizer that can be used: {error}", super::safetensors::short(path)))
            .hint("download the file again; models without a tokenizer take ids, as in `--prompt-tokens 8`")
            .into()
    })
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
