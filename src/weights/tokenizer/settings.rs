//! The files beside `tokenizer.json`, and which of their keys count.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value};

use super::super::json::{is_empty, shown};
use super::super::open::read_json;
use crate::error::BadInput;

/// Keys of tokenizer_config.json that are applied.
const COMPUTED: &[&str] = &[
    "tokenizer_class",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "image_token",
    "add_prefix_space",
    "legacy",
    "split_special_tokens",
    "extra_ids",
];

/// Keys that change no id of a text: transformers leaves them aside where there is a tokenizer.json, or they are about decoding,
/// padding, truncation, chats and where files lie.
const HARMLESS: &[&str] = &[
    "add_bos_token",
    "add_eos_token",
    "auto_map",
    "backend",
    "chat_control_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "device_map",
    "errors",
    "files_loaded",
    "init_inputs",
    "is_local",
    "local_files_only",
    "max_len",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "processor_class",
    "response_schema",
    "response_template",
    "return_token_type_ids",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "tokenizer_type",
    "transformers_version",
    "truncation",
    "truncation_side",
    "truncation_strategy",
    "use_default_system_prompt",
    "use_fast",
    "verbose",
];

/// What lies beside a `tokenizer.json`.
pub struct TokenizerSettings {
    /// tokenizer_config.json; empty where there is none.
    pub config: Map<String, Value>,
    /// added_tokens.json and special_tokens_map.json, which count where tokenizer_config.json has no `added_tokens_decoder`.
    pub added_tokens: Map<String, Value>,
    pub special_tokens: Map<String, Value>,
}

impl TokenizerSettings {
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| -> Result<Map<String, Value>> {
            Ok(match read_json(&folder.join(name))? {
                Some(Value::Object(map)) => map,
                _ => Map::new(),
            })
        };
        let config = read("tokenizer_config.json")?;
        let is_legacy = !config.contains_key("added_tokens_decoder");
        let legacy = |name: &str| if is_legacy { read(name) } else { Ok(Map::new()) };
        Ok(Self {
            config,
            added_tokens: legacy("added_tokens.json")?,
            special_tokens: legacy("special_tokens_map.json")?,
        })
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        self.config.get(key).and_then(Value::as_bool)
    }

    pub fn splits_special_tokens(&self) -> bool {
        self.bool("split_special_tokens").unwrap_or(false)
    }

    /// Keys that nobody here knows, with a value that may mean something.
    pub fn unapplied(&self) -> impl Iterator<Item = String> {
        let is_known = |key: &str| COMPUTED.contains(&key) || HARMLESS.contains(&key);
        // `image_token` and its kin name a special token each.
        let names_token = |key: &str, value: &Value| key.ends_with("_token") && value.is_string();
        self.config
            .iter()
            .filter(move |(key, value)| !is_known(key) && !is_empty(value) && !names_token(key, value))
            .map(|(key, value)| {
                format!("`{key}` of tokenizer_config.json is {}, which is not applied", shortened(value))
            })
    }
}

/// A value as JSON, cut where it is long.
pub fn shortened(value: &Value) -> String {
    format!("`{}`", shown(value))
}

/// A token that a settings file declares wrongly.
pub fn bad_token(file: &str, value: &Value) -> BadInput {
    BadInput::new(format!("`{file}` declares a token as {}, which is none", shortened(value)))
        .hint("download the file again, or give exact ids with `--prompt-ids`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_with_a_value_are_told() {
        let config = serde_json::json!({
            "add_bos_token": true, "chat_template": "{{ x }}", "bos_token": "<s>", "video_token": "<v>",
            "do_lower_case": true, "do_basic": false, "prefix": null, "suffix": "", "table": {}, "n": 0,
        });
        let Value::Object(config) = config else { unreachable!("written so above") };
        let settings = TokenizerSettings { config, added_tokens: Map::new(), special_tokens: Map::new() };
        let unapplied: Vec<String> = settings.unapplied().collect();
        assert_eq!(
            unapplied,
            [
                "`do_lower_case` of tokenizer_config.json is `true`, which is not applied",
                "`n` of tokenizer_config.json is `0`, which is not applied"
            ]
        );
    }
}
