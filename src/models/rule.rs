//! The rule for the keys of a file: computed, harmless, or known to change what is computed and refused unless it stands at the
//! value that means "off". Any other key is harmless when null, false or empty, and a warning otherwise.
//!
//! The computed keys are those that a model file asks [`super::keys::Keys`] for; the other two lists of each family stand beside
//! its `Config`, these here are for all. "Changes" and "harmless" are about greedy decoding as transformers 5.24 computes it.

use serde_json::Value;

use crate::weights::json::{is_empty, shown};

/// What became of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// A model file asked for it.
    Computed,
    /// It changes nothing.
    Harmless,
    /// It would change what is computed, but stands at "off".
    Off,
    /// It would change the tokens that transformers' `generate` chooses, and becomes a warning.
    NotApplied,
    /// Nobody here knows it: its value, shortened.
    Unknown(String),
}

/// The lists of one object of a file.
pub struct Rule {
    pub harmless: &'static [&'static [&'static str]],
    pub refused: &'static [&'static [(&'static str, Off)]],
}

/// The value at which a key changes nothing. `null` always is one.
#[derive(Debug, Clone, Copy)]
pub enum Off {
    /// false, 0 or empty
    Empty,
    True,
    /// The number, or `false`.
    Number(f64),
    /// One of these texts.
    Words(&'static [&'static str]),
    /// A list whose members all are this text.
    AllWords(&'static str),
    /// A list whose members all are this number.
    AllNumbers(f64),
}

impl Off {
    fn is(self, value: &Value) -> bool {
        match self {
            _ if value.is_null() => true,
            Off::Empty => is_empty(value) || value.as_f64() == Some(0.0),
            Off::True => value == &Value::Bool(true),
            Off::Number(number) => value.as_f64() == Some(number) || value == &Value::Bool(false),
            Off::Words(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Off::AllWords(word) => all(value, |item| item.as_str() == Some(word)),
            Off::AllNumbers(number) => all(value, |item| item.as_f64() == Some(number)),
        }
    }

    fn text(self) -> String {
        match self {
            Off::Empty => "false, 0 or empty".to_owned(),
            Off::True => "true".to_owned(),
            Off::Number(number) => number.to_string(),
            Off::Words(words) => words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" or "),
            Off::AllWords(word) => format!("\"{word}\" in each place"),
            Off::AllNumbers(number) => format!("{number} in each place"),
        }
    }
}

impl Rule {
    /// What becomes of a key that no model file asked for. Fails, saying why, on one that changes what is computed.
    pub fn fate(&self, key: &str, value: &Value) -> Result<Fate, String> {
        if let Some((_, off)) = self.refused.iter().copied().flatten().find(|(name, _)| *name == key) {
            return match off.is(value) {
                true => Ok(Fate::Off),
                false => {
                    Err(format!("it changes the model in a way that is not computed here, unless it is {}", off.text()))
                }
            };
        }
        let is_harmless = self.harmless.iter().copied().flatten().any(|name| *name == key)
            || super::generation::knows(key)
            || is_empty(value);
        Ok(if is_harmless { Fate::Harmless } else { Fate::Unknown(shown(value)) })
    }
}

fn all(value: &Value, is: impl Fn(&Value) -> bool) -> bool {
    value.as_array().is_some_and(|items| items.iter().all(is))
}

/// What a config.json of any family may say without changing a token.
pub const HARMLESS: &[&str] = &[
    // Who made it, with what, for what.
    "architectures",
    "auto_map",
    "finetuning_task",
    "id2label",
    "label2id",
    "language",
    "model_type",
    "name_or_path",
    "num_labels",
    "_commit_hash",
    "_name_or_path",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    // How it is held and run. `weights::bnb` reads the quantization.
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "chunk_size_feed_forward",
    "dtype",
    "_flash_attn_2_enabled",
    "gradient_checkpointing",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pretraining_tp",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
    // Training.
    "attention_dropout",
    "classifier_dropout",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "hidden_dropout",
    "ignore_index",
    "initializer_factor",
    "initializer_range",
    "output_router_logits",
    "resid_pdrop",
    "router_aux_loss_coef",
    "tf_legacy_loss",
    "z_loss",
    // Tokens and lengths that the tokenizer or the user decides.
    "bos_token_id",
    "decoder_start_token_id",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "pad_token_id",
    "prefix",
    "sep_token_id",
    "seq_length",
    // Of `sliding_window`, which is judged by itself.
    "max_window_layers",
    "use_sliding_window",
];

/// What transformers' own code reads for any family, and no model file here computes.
pub const REFUSED: &[(&str, Off)] = &[
    ("add_cross_attention", Off::Empty),
    ("attention_chunk_size", Off::Empty),
    ("is_causal", Off::True),
    ("kv_sharing_modes", Off::Empty),
    ("layer_types", Off::AllWords("full_attention")),
    ("per_layer_config", Off::Empty),
    ("pruned_heads", Off::Empty),
    ("tie_encoder_decoder", Off::Empty),
];

/// What other decoder families add to the same blocks: a file that sets one of these is of another model than its `model_type` says.
pub const REFUSED_IN_DECODERS: &[(&str, Off)] = &[
    ("alibi", Off::Empty),
    ("attention_multiplier", Off::Empty),
    ("attn_logit_softcapping", Off::Empty),
    ("attn_output_gate", Off::Empty),
    ("clip_qkv", Off::Empty),
    ("dim_model_base", Off::Empty),
    ("embedding_multiplier", Off::Number(1.0)),
    ("final_logit_softcapping", Off::Empty),
    ("is_encoder_decoder", Off::Empty),
    ("kv_lora_rank", Off::Empty),
    ("lm_head_multiplier", Off::Number(1.0)),
    ("logit_scale", Off::Number(1.0)),
    ("logits_scaling", Off::Number(1.0)),
    ("n_routed_experts", Off::Empty),
    ("no_rope_layer_interval", Off::Empty),
    ("no_rope_layers", Off::AllNumbers(1.0)),
    ("num_experts", Off::Empty),
    ("num_local_experts", Off::Empty),
    ("position_embedding_type", Off::Words(&["absolute", "rope", "rotary"])),
    ("q_lora_rank", Off::Empty),
    ("qk_layernorm", Off::Empty),
    ("qk_norm", Off::Empty),
    ("query_pre_attn_scalar", Off::Empty),
    ("residual_multiplier", Off::Number(1.0)),
    ("rope_interleave", Off::Empty),
    ("rope_interleaved", Off::Empty),
    ("rope_local_base_freq", Off::Empty),
    ("scale_depth", Off::Empty),
    ("scale_emb", Off::Number(1.0)),
    ("sliding_window_pattern", Off::Empty),
    ("use_bidirectional_attention", Off::Empty),
    ("use_parallel_residual", Off::Empty),
    ("use_qk_norm", Off::Empty),
];

/// The rule of a decoder that has no lists of its own.
pub const DECODER: Rule = Rule { harmless: &[HARMLESS], refused: &[REFUSED, REFUSED_IN_DECODERS] };

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const RULE: Rule = DECODER;

    #[test]
    fn a_key_is_harmless_off_refused_or_told() {
        for (key, value, fate) in [
            ("torch_dtype", json!("float16"), Ok(Fate::Harmless)),
            ("foo", json!(null), Ok(Fate::Harmless)),
            ("foo", json!(false), Ok(Fate::Harmless)),
            ("foo", json!(""), Ok(Fate::Harmless)),
            ("foo", json!([]), Ok(Fate::Harmless)),
            ("foo", json!({}), Ok(Fate::Harmless)),
            ("foo", json!(0), Ok(Fate::Unknown("0".into()))),
            ("foo", json!({"a": 1}), Ok(Fate::Unknown("{\"a\":1}".into()))),
            ("logit_scale", json!(1), Ok(Fate::Off)),
            ("logit_scale", json!(null), Ok(Fate::Off)),
            ("logit_scale", json!(0.0625), Err(())),
            ("is_causal", json!(true), Ok(Fate::Off)),
            ("is_causal", json!(false), Err(())),
            ("layer_types", json!(["full_attention", "full_attention"]), Ok(Fate::Off)),
            ("layer_types", json!(["full_attention", "sliding_attention"]), Err(())),
            ("no_rope_layers", json!([1, 1]), Ok(Fate::Off)),
            ("no_rope_layers", json!([1, 0]), Err(())),
            ("pruned_heads", json!({}), Ok(Fate::Off)),
            ("pruned_heads", json!({"0": [1]}), Err(())),
            ("position_embedding_type", json!("alibi"), Err(())),
        ] {
            assert_eq!(RULE.fate(key, &value).map_err(|_| ()), fate, "{key} {value}");
        }
    }

    #[test]
    fn no_key_is_in_two_lists() {
        let refused = RULE.refused.iter().copied().flatten().map(|(key, _)| *key);
        let mut keys: Vec<&str> = HARMLESS.iter().copied().chain(refused).collect();
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), all);
    }
}
