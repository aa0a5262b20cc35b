//! generation_config.json: the tokens that end a text, and the settings with which transformers' `generate` would choose other tokens
//! than greedy decoding does.

use candle_core::Result;
use serde_json::{Map, Value};

use super::keys::{Keys, Report};
use super::rule::Fate;
use crate::error::without_backtrace;
use crate::plan::Model;
use crate::weights::json::{is_empty, shown};

pub const FILE: &str = "generation_config.json";

/// What changes nothing in greedy decoding of one sequence whose length the user says.
const HARMLESS: &[&str] = &[
    // Sampling: this tool takes the largest logit.
    "do_sample",
    "epsilon_cutoff",
    "eta_cutoff",
    "min_p",
    "renormalize_logits",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    // Of beams, which are judged by `num_beams`.
    "diversity_penalty",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "num_beam_groups",
    "num_return_sequences",
    // Lengths.
    "max_length",
    "max_new_tokens",
    "max_time",
    // How it is computed: caches, compilers, drafts that are checked.
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "disable_compile",
    "is_assistant",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "speculation_type",
    "target_lookbehind",
    "use_cache",
    "use_mtp",
    // What is given back beside the tokens.
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    // Who made it, and tokens that the tokenizer puts.
    "bos_token_id",
    "chat_format",
    "_commit_hash",
    "_from_model_config",
    "pad_token_id",
    "transformers_version",
];

/// What makes `generate` choose other tokens, and the number at which it does not; `null`, false and empty never do.
pub const NOT_APPLIED: &[(&str, Option<f64>)] = &[
    ("bad_words_ids", None),
    ("begin_suppress_tokens", None),
    ("constraints", None),
    ("dola_layers", None),
    ("encoder_no_repeat_ngram_size", Some(0.0)),
    ("encoder_repetition_penalty", Some(1.0)),
    ("exponential_decay_length_penalty", None),
    ("force_words_ids", None),
    ("forced_bos_token_id", None),
    ("forced_decoder_ids", None),
    ("forced_eos_token_id", None),
    ("guidance_scale", Some(1.0)),
    ("min_length", Some(0.0)),
    ("min_new_tokens", Some(0.0)),
    ("no_repeat_ngram_size", Some(0.0)),
    ("num_beams", Some(1.0)),
    ("penalty_alpha", Some(0.0)),
    ("repetition_penalty", Some(1.0)),
    ("sequence_bias", None),
    ("stop_strings", None),
    ("suppress_tokens", None),
    ("token_healing", None),
    ("watermarking_config", None),
];

fn is_off((_, off): &(&str, Option<f64>), value: &Value) -> bool {
    is_empty(value) || off.is_some_and(|off| value.as_f64() == Some(off))
}

/// The setting that this key is, where `generate` applies it and greedy decoding does not.
fn not_applied(key: &str) -> Option<&'static (&'static str, Option<f64>)> {
    NOT_APPLIED.iter().find(|(name, _)| *name == key)
}

/// Whether a config.json, where older files have such settings, may say this without changing a token.
pub fn knows(key: &str) -> bool {
    HARMLESS.contains(&key) || not_applied(key).is_some()
}

/// Takes what the file says of the first and the last tokens into `model`; what it says of others becomes a warning.
pub fn apply(object: &Map<String, Value>, model: &mut Model, report: &Report) -> Result<()> {
    let keys = Keys::new(object, FILE, report);
    let named = keys.raw("eos_token_id").is_some();
    match keys.token_ids("eos_token_id") {
        // transformers' generate looks nowhere else where there is this file.
        Ok(ids) => {
            let ids = ids.unwrap_or_default();
            if !named && !model.eos.is_empty() {
                let message = format!(
                    "{FILE} names no `eos_token_id`, so no token ends the text, as in transformers; {:?} of config.json is not read",
                    model.eos
                );
                report.note("generation_setting_not_read", message);
            }
            model.eos = ids;
        }
        // It is needed by `--stop-at-eos` alone.
        Err(error) => {
            let message = format!("{}; config.json's is read", without_backtrace(&error.to_string()));
            report.note("generation_setting_not_read", message);
        }
    }
    if let (Some(start), Some(ids)) = (&mut model.decoder_start, keys.token_ids("decoder_start_token_id")?) {
        *start = ids.first().copied().unwrap_or(*start);
    }
    warn(object, FILE, report);
    for (key, value) in object {
        report.push(FILE, key.clone(), fate(key, value));
    }
    Ok(())
}

fn fate(key: &str, value: &Value) -> Fate {
    match not_applied(key) {
        _ if matches!(key, "eos_token_id" | "decoder_start_token_id") => Fate::Computed,
        _ if HARMLESS.contains(&key) => Fate::Harmless,
        Some(setting) if is_off(setting, value) => Fate::Off,
        Some(_) => Fate::NotApplied,
        None if is_empty(value) => Fate::Harmless,
        None => Fate::Unknown(shown(value)),
    }
}

/// One note with all settings of `file` that `generate` applies and this tool does not.
pub fn warn(object: &Map<String, Value>, file: &str, report: &Report) {
    let unapplied =
        object.iter().filter(|(key, value)| not_applied(key).is_some_and(|setting| !is_off(setting, value)));
    let unapplied: Vec<String> = unapplied.map(|(key, value)| format!("`{key}` {}", shown(value))).collect();
    if !unapplied.is_empty() {
        let message = format!(
            "{file} sets {}: transformers' generate applies that, the greedy decoding here does not, so that it may choose other tokens",
            unapplied.join(", ")
        );
        report.note("generation_setting_not_applied", message);
    }
}
