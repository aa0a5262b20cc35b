//! Model shapes that the binary carries: they need no network, and run with random weights.

use serde_json::Value;

/// A known model's `config.json`.
pub struct BuiltIn {
    /// What a user types.
    pub name: &'static str,
    /// The repository whose `config.json` this is.
    pub hub_id: &'static str,
    config: &'static str,
}

impl BuiltIn {
    pub fn config(&self) -> Value {
        // A test reads every row of the table.
        serde_json::from_str(self.config).expect("built-in configs are JSON")
    }
}

/// Every built-in shape, the default first.
pub fn builtin_models() -> &'static [BuiltIn] {
    BUILT_IN
}

static BUILT_IN: &[BuiltIn] = &[
    BuiltIn {
        name: "smollm2-135m",
        hub_id: "HuggingFaceTB/SmolLM2-135M-Instruct",
        config: include_str!("../../configs/models/smollm2-135m.json"),
    },
    BuiltIn {
        name: "llama-3.2-1b",
        hub_id: "meta-llama/Llama-3.2-1B",
        config: include_str!("../../configs/models/llama-3.2-1b.json"),
    },
    BuiltIn { name: "phi-2", hub_id: "microsoft/phi-2", config: include_str!("../../configs/models/phi-2.json") },
    BuiltIn {
        name: "flan-t5-base",
        hub_id: "google/flan-t5-base",
        config: include_str!("../../configs/models/flan-t5-base.json"),
    },
    BuiltIn {
        name: "paligemma-3b-pt-224",
        hub_id: "google/paligemma-3b-pt-224",
        config: include_str!("../../configs/models/paligemma-3b-pt-224.json"),
    },
    BuiltIn {
        name: "qwen3-0.6b",
        hub_id: "Qwen/Qwen3-0.6B",
        config: include_str!("../../configs/models/qwen3-0.6b.json"),
    },
    BuiltIn { name: "qwen3-4b", hub_id: "Qwen/Qwen3-4B", config: include_str!("../../configs/models/qwen3-4b.json") },
    BuiltIn { name: "qwen3-8b", hub_id: "Qwen/Qwen3-8B", config: include_str!("../../configs/models/qwen3-8b.json") },
    BuiltIn {
        name: "qwen3-30b-a3b",
        hub_id: "Qwen/Qwen3-30B-A3B",
        config: include_str!("../../configs/models/qwen3-30b-a3b.json"),
    },
    BuiltIn {
        name: "llama-3.1-8b",
        hub_id: "meta-llama/Llama-3.1-8B",
        config: include_str!("../../configs/models/llama-3.1-8b.json"),
    },
    BuiltIn {
        name: "mistral-7b",
        hub_id: "mistralai/Mistral-7B-v0.3",
        config: include_str!("../../configs/models/mistral-7b.json"),
    },
    BuiltIn {
        name: "mixtral-8x7b",
        hub_id: "mistralai/Mixtral-8x7B-v0.1",
        config: include_str!("../../configs/models/mixtral-8x7b.json"),
    },
    BuiltIn {
        name: "gpt-oss-20b",
        hub_id: "openai/gpt-oss-20b",
        config: include_str!("../../configs/models/gpt-oss-20b.json"),
    },
    BuiltIn {
        name: "gemma-3-1b",
        hub_id: "google/gemma-3-1b-pt",
        config: include_str!("../../configs/models/gemma-3-1b.json"),
    },
    BuiltIn {
        name: "gemma-3-4b",
        hub_id: "google/gemma-3-4b-pt",
        config: include_str!("../../configs/models/gemma-3-4b.json"),
    },
    BuiltIn {
        name: "phi-4-mini",
        hub_id: "microsoft/Phi-4-mini-instruct",
        config: include_str!("../../configs/models/phi-4-mini.json"),
    },
    BuiltIn {
        name: "smollm3-3b",
        hub_id: "HuggingFaceTB/SmolLM3-3B",
        config: include_str!("../../configs/models/smollm3-3b.json"),
    },
    BuiltIn {
        name: "olmo-2-1b",
        hub_id: "allenai/OLMo-2-0425-1B",
        config: include_str!("../../configs/models/olmo-2-1b.json"),
    },
];

/// The shape with this short name.
pub fn by_name(name: &str) -> Option<&'static BuiltIn> {
    BUILT_IN.iter().find(|shape| shape.name == name)
}

/// The shape of this repository. The hub ignores case in ids.
pub fn by_hub_id(id: &str) -> Option<&'static BuiltIn> {
    BUILT_IN.iter().find(|shape| shape.hub_id.eq_ignore_ascii_case(id))
}

/// The short name that is near to what was typed, if one is.
pub fn nearest(word: &str) -> Option<&'static str> {
    crate::error::nearest(word, BUILT_IN.iter().map(|shape| shape.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_found_by_both_names_and_has_a_model_type() {
        for shape in builtin_models() {
            assert!(shape.config()["model_type"].is_string(), "{}", shape.name);
            assert_eq!(by_name(shape.name).map(|s| s.hub_id), Some(shape.hub_id));
            assert_eq!(nearest("nosuch"), None);
            assert_eq!(by_hub_id(&shape.hub_id.to_lowercase()).map(|s| s.name), Some(shape.name));
            assert_eq!(nearest(&shape.name[..shape.name.len() - 1]), Some(shape.name));
        }
    }
}
