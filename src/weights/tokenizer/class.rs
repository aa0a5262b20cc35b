//! The classes of transformers that take the vocabulary of a `tokenizer.json` and make the steps before it anew.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::settings::TokenizerSettings;

/// What transformers makes of a `tokenizer.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Class {
    /// The file as it is.
    AsSaved,
    /// `GPT2Tokenizer` and `CodeGenTokenizer`.
    ByteLevel,
    Llama,
    Gemma,
    T5,
    /// One that is not known here; the file is used as it is.
    Unknown(String),
}

/// The parts of a tokenizer.json that a class may replace.
#[derive(serde::Deserialize)]
struct Steps {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
}

impl Class {
    /// The class that `AutoTokenizer` chooses: the one that the files name, else the model's.
    pub fn of(settings: &TokenizerSettings, config: &Value, tokenizer_json: &[u8]) -> Self {
        let of_model = match config["model_type"].as_str() {
            Some("phi") => "GPT2Tokenizer",
            Some("t5" | "mt5") => "T5Tokenizer",
            Some("gemma" | "gemma2" | "gemma3_text") => "GemmaTokenizer",
            _ => "TokenizersBackend",
        };
        let named =
            settings.config.get("tokenizer_class").or_else(|| config.get("tokenizer_class")).and_then(Value::as_str);
        let name = named.unwrap_or(of_model);
        match name.trim_end_matches("Fast") {
            "TokenizersBackend" | "PythonBackend" | "PreTrainedTokenizer" => Self::AsSaved,
            "GPT2Tokenizer" | "CodeGenTokenizer" => Self::ByteLevel,
            // Llama 3 names this class and has another kind of tokenizer.
            "LlamaTokenizer" if is_byte_level(tokenizer_json) => Self::AsSaved,
            "LlamaTokenizer" => Self::Llama,
            "GemmaTokenizer" => Self::Gemma,
            "T5Tokenizer" => Self::T5,
            _ => Self::Unknown(name.to_owned()),
        }
    }

    /// The tokenizer.json with the steps that the class makes; `None` where they are those of the file.
    pub fn rebuild(&self, settings: &TokenizerSettings, tokenizer_json: &[u8]) -> Result<Option<Vec<u8>>> {
        if matches!(self, Self::AsSaved | Self::Unknown(_)) {
            return Ok(None);
        }
        let saved: Steps = serde_json::from_slice(tokenizer_json)?;
        let made = self.steps(settings, &saved);
        let replaced = [
            ("normalizer", &saved.normalizer, made.normalizer),
            ("pre_tokenizer", &saved.pre_tokenizer, made.pre_tokenizer),
            ("post_processor", &saved.post_processor, made.post_processor),
        ];
        let mut replaced = replaced.into_iter().filter(|(_, saved, made)| *saved != made).peekable();
        if replaced.peek().is_none() {
            return Ok(None);
        }
        let mut tokenizer: Value = serde_json::from_slice(tokenizer_json)?;
        for (name, _, made) in replaced {
            tokenizer.as_object_mut().context("it is not a JSON object")?.insert(name.to_owned(), made);
        }
        Ok(Some(serde_json::to_vec(&tokenizer)?))
    }

    fn steps(&self, settings: &TokenizerSettings, saved: &Steps) -> Steps {
        let post_processor = saved.post_processor.clone();
        let add_prefix_space = settings.bool("add_prefix_space");
        let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
        match self {
            Self::ByteLevel => Steps {
                normalizer: Value::Null,
                pre_tokenizer: json!({
                    "type": "ByteLevel",
                    "add_prefix_space": add_prefix_space.unwrap_or(false),
                    "trim_offsets": true,
                    "use_regex": true,
                }),
                post_processor,
            },
            Self::Llama => {
                let scheme = match (add_prefix_space.unwrap_or(true), settings.bool("legacy").unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                Steps { normalizer: Value::Null, pre_tokenizer: metaspace(scheme, false), post_processor }
            }
            Self::Gemma => Steps {
                normalizer: json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                pre_tokenizer: json!({
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                    "invert": false,
                }),
                post_processor,
            },
            Self::T5 => Steps {
                normalizer: precompiled(&saved.normalizer),
                pre_tokenizer: json!({
                    "type": "Sequence",
                    "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace("always", true)],
                }),
                post_processor,
            },
            Self::AsSaved | Self::Unknown(_) => Steps {
                normalizer: saved.normalizer.clone(),
                pre_tokenizer: saved.pre_tokenizer.clone(),
                post_processor,
            },
        }
    }

    /// A sentence about a class whose steps are not known here.
    pub fn unapplied(&self) -> Option<String> {
        let Self::Unknown(name) = self else { return None };
        Some(format!("`tokenizer_class` is `{name}`, which may change tokenizer.json; the file is used as it is"))
    }
}

/// The character map that SentencePiece compiled, the one normalizer that T5's class keeps.
fn precompiled(normalizer: &Value) -> Value {
    let is_one = |value: &&Value| value["type"] == "Precompiled";
    let parts = normalizer.get("normalizers").and_then(Value::as_array);
    let all = parts.map_or(std::slice::from_ref(normalizer), Vec::as_slice);
    all.iter().find(is_one).cloned().unwrap_or(Value::Null)
}

fn is_byte_level(tokenizer_json: &[u8]) -> bool {
    let word = b"\"ByteLevel\"";
    tokenizer_json.windows(word.len()).any(|part| part == word)
}
