//! The tokenizer in a file's keys, as a `tokenizer.json` says the same.
//!
//! Which splitting of a text comes before the merges is a name alone, `tokenizer.ggml.pre`, whose meaning is in llama.cpp's code. Those that are
//! known here give the ids of the tokenizer.json that the file was made from; with any other no text becomes ids.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::file::GgufFile;
use super::metadata::MetaValue;
use crate::error::BadInput;
use crate::weights::tokenizer::ChatTemplate;

/// More than any tokenizer has.
const MOST_MERGES: u64 = 1 << 22;

/// Types of tokens, in GGUF's numbers.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// A splitting of a text.
struct Splitting {
    /// `tokenizer.ggml.pre`
    name: &'static str,
    /// Digits stand alone.
    splits_digits: bool,
}

const SPLITTINGS: &[Splitting] =
    &[Splitting { name: "gpt-2", splits_digits: false }, Splitting { name: "smollm", splits_digits: true }];

/// The tokenizer of a file whose model has `vocabulary` tokens. Fails with the reason why it has none that is known here.
pub fn open(file: &GgufFile, vocabulary: usize) -> Result<Tokenizer, String> {
    let saved = tokenizer_json(file, vocabulary)?;
    Tokenizer::from_bytes(saved.to_string()).map_err(|error| format!("its tokenizer cannot be used: {error}"))
}

/// The chat template of a file.
pub fn chat_template(file: &GgufFile) -> Option<ChatTemplate> {
    let source = file.metadata.text("tokenizer.chat_template")?;
    let tokens = texts(file, "tokenizer.ggml.tokens", MOST_MERGES).ok()?;
    let token = |key: &str| file.metadata.count(key).and_then(|id| tokens.get(usize::try_from(id).ok()?));
    let named = [("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id")];
    let named = named.into_iter().filter_map(|(name, key)| Some((name.to_owned(), json!(token(key)?))));
    Some(ChatTemplate::new(source, &named.collect()))
}

fn tokenizer_json(file: &GgufFile, vocabulary: usize) -> Result<Value, String> {
    let word = |key: &str| file.metadata.text(key);
    match word("tokenizer.ggml.model") {
        Some("gpt2") => {}
        Some("no_vocab") | None => return Err("the file holds no tokenizer".to_owned()),
        Some(other) => return Err(format!("the file's tokenizer is of the kind `{other}`; `gpt2` is read")),
    }
    let pre = word("tokenizer.ggml.pre").unwrap_or("default");
    let splitting = SPLITTINGS.iter().find(|splitting| splitting.name == pre).ok_or_else(|| {
        let known = SPLITTINGS.iter().map(|splitting| splitting.name).collect::<Vec<_>>().join("`, `");
        format!("the file's tokenizer splits texts as `{pre}` (`tokenizer.ggml.pre`); known are `{known}`")
    })?;
    let tokens = texts(file, "tokenizer.ggml.tokens", vocabulary as u64)?;
    let kinds = integers(file, "tokenizer.ggml.token_type", tokens.len())?;
    let merges = texts(file, "tokenizer.ggml.merges", MOST_MERGES)?;
    let distinct: HashSet<&String> = tokens.iter().collect();
    if distinct.len() != tokens.len() {
        return Err("the file's vocabulary has a token twice".to_owned());
    }
    let added = tokens.iter().zip(&kinds).enumerate().filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind));
    let added: Vec<Value> = added
        .map(|(id, (content, kind))| {
            json!({
                "id": id, "content": content, "special": *kind == CONTROL,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let pre_tokenizer = match splitting.splits_digits {
        true => json!({"type": "Sequence", "pretokenizers": [digits, byte_level]}),
        false => byte_level.clone(),
    };
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": first_token(file, &tokens)?,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges,
        },
    }))
}

/// The step that puts the token of the beginning before a text, where the file wants one.
fn first_token(file: &GgufFile, tokens: &[String]) -> Result<Value, String> {
    if !file.metadata.flag("tokenizer.ggml.add_bos_token").unwrap_or(false) {
        return Ok(Value::Null);
    }
    let id = file.metadata.count("tokenizer.ggml.bos_token_id");
    let token = id.and_then(|id| tokens.get(usize::try_from(id).ok()?));
    let (id, token) = id.zip(token).ok_or("the file's texts begin with a token that its vocabulary has not")?;
    let first = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let (a, b) = (json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"Sequence": {"id": "B", "type_id": 1}}));
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, first, b],
        "special_tokens": { token: {"id": token, "ids": [id], "tokens": [token]} },
    }))
}

fn texts(file: &GgufFile, key: &str, most: u64) -> Result<Vec<String>, String> {
    let read = match file.metadata.get(key) {
        Some(MetaValue::List(list)) => list.texts(file.as_lists(), most),
        _ => Ok(None),
    };
    listed(read, key, &format!("a list of at most {most} texts"))
}

fn integers(file: &GgufFile, key: &str, count: usize) -> Result<Vec<i64>, String> {
    let what = format!("a list of {count} numbers");
    let read = match file.metadata.get(key) {
        Some(MetaValue::List(list)) => list.integers(file.as_lists(), count as u64),
        _ => Ok(None),
    };
    let items = listed(read, key, &what)?;
    if items.len() == count {
        Ok(items)
    } else {
        Err(format!("the file's `{key}` has {} items; it must be {what}", items.len()))
    }
}

fn listed<T>(read: Result<Option<Vec<T>>, BadInput>, key: &str, what: &str) -> Result<Vec<T>, String> {
    match read {
        Ok(Some(items)) => Ok(items),
        Ok(None) => Err(format!("the file's `{key}` must be {what}")),
        Err(error) => Err(error.to_string()),
    }
}
