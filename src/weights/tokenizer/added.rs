//! Tokens that the files beside `tokenizer.json` declare.

use anyhow::{Result, anyhow};
use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::settings::{TokenizerSettings, bad_token, shortened};

const CONFIG: &str = "tokenizer_config.json";

/// Special tokens that every tokenizer may name.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds the declared tokens in the order in which transformers adds them: those with an id by that id, then the named special ones
/// that are still missing, then the extra ones. Gives a sentence for each that got another id than it was declared with.
pub fn add(tokenizer: &mut Tokenizer, settings: &TokenizerSettings) -> Result<Vec<String>> {
    let declared = declared(settings)?;
    let mut missing: Vec<AddedToken> = declared.iter().map(|(_, token)| token.clone()).collect();
    let own = tokenizer.get_added_tokens_decoder();
    let mut known: Vec<String> = own.values().chain(&missing).map(|token| token.content.clone()).collect();
    for token in special(settings)? {
        if !known.contains(&token.content) {
            known.push(token.content.clone());
            missing.push(token);
        }
    }
    tokenizer.add_tokens(missing).map_err(|error| anyhow!("{error}"))?;
    let misplaced = declared.iter().filter_map(|(id, token)| {
        let seen = tokenizer.token_to_id(&token.content).filter(|seen| seen != id)?;
        let content = shortened(&Value::from(token.content.as_str()));
        Some(format!("the token {content} is declared with id {id} and has id {seen}, as in transformers"))
    });
    Ok(misplaced.collect())
}

/// Tokens with the ids that they are declared with, by id.
fn declared(settings: &TokenizerSettings) -> Result<Vec<(u32, AddedToken)>> {
    let mut declared = Vec::new();
    if let Some(decoder) = settings.config.get("added_tokens_decoder").and_then(Value::as_object) {
        for (id, value) in decoder {
            let id = id.trim().parse().map_err(|_| bad_token(CONFIG, &Value::from(id.as_str())))?;
            declared.push((id, token(value, false).ok_or_else(|| bad_token(CONFIG, value))?));
        }
    }
    let special: Vec<String> = special(settings)?.into_iter().map(|token| token.content).collect();
    for (content, id) in &settings.added_tokens {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| bad_token("added_tokens.json", &Value::from(content.as_str())))?;
        declared.push((id, AddedToken::from(content.as_str(), special.contains(content))));
    }
    declared.sort_by_key(|(id, _)| *id);
    Ok(declared)
}

/// Special tokens by name, and extra ones. special_tokens_map.json counts before tokenizer_config.json.
fn special(settings: &TokenizerSettings) -> Result<Vec<AddedToken>> {
    let value = |key: &str| settings.special_tokens.get(key).or_else(|| settings.config.get(key));
    let mut found = Vec::new();
    let mut keep = |value: &Value| match token(value, true) {
        Some(token) => {
            found.push(token);
            Ok(())
        }
        None => Err(bad_token(CONFIG, value)),
    };
    for value in NAMED.iter().filter_map(|name| value(name)).filter(|value| !value.is_null()) {
        keep(value)?;
    }
    let own = |(key, value): &(&String, &Value)| {
        key.ends_with("_token") && !NAMED.contains(&key.as_str()) && value.is_string()
    };
    for (_, value) in settings.config.iter().filter(own) {
        keep(value)?;
    }
    let is_given = |value: &&Value| match value {
        Value::Array(values) => !values.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => false,
    };
    let extra = value("extra_special_tokens").filter(is_given).or_else(|| value("additional_special_tokens"));
    match extra {
        Some(Value::Array(values)) => values.iter().try_for_each(&mut keep)?,
        Some(Value::Object(map)) => map.values().try_for_each(&mut keep)?,
        _ => {}
    }
    Ok(found)
}

/// A token as a string or with its flags; `None` for anything else.
fn token(value: &Value, is_special: bool) -> Option<AddedToken> {
    let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let is_special = is_special || flag("special").unwrap_or(false);
    let token = AddedToken::from(content, is_special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false));
    Some(token.normalized(flag("normalized").unwrap_or(!is_special)))
}
