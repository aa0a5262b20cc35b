//! A file's keys as the config.json that its model's file reads.

use serde_json::{Map, Value, json};

use super::file::GgufFile;
use super::metadata::MetaValue;
use super::{FAMILIES, Family, ROPE_FREQS};
use crate::error::{BadInput, nearest};

/// Keys behind the family's name that are read here, or change nothing.
const KNOWN: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

/// Keys behind the family's name that mean another model, unless they are 0 or false.
const REFUSED: &[&str] = &[
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "pooling_type",
    "residual_scale",
    "use_parallel_residual",
];

/// Keys with tokens that end a text.
const ENDS: &[&str] = &["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];

/// The family of a file. Fails with [`BadInput`] on one that is not read.
pub fn family(file: &GgufFile) -> Result<&'static Family, BadInput> {
    let own = file.metadata.text("general.architecture").ok_or_else(|| {
        BadInput::new(format!("`{}` has no text `general.architecture`, so that its model is not known", file.name))
    })?;
    FAMILIES.iter().find(|family| family.name == own).ok_or_else(|| {
        let names = || FAMILIES.iter().map(|family| family.name);
        let near = nearest(own, names()).map_or(String::new(), |near| format!("; the nearest is `{near}`"));
        let known = names().collect::<Vec<_>>().join("`, `");
        BadInput::new(format!(
            "`{}` holds a model of the architecture `{own}`, which is not read from GGUF files",
            file.name
        ))
        .hint(format!("`{known}` are{near}; name the safetensors model that it was made from"))
    })
}

/// The config.json of the model in a file. Fails with [`BadInput`] on keys that are missing, and on those that mean another model.
pub fn config(file: &GgufFile) -> Result<Value, BadInput> {
    let family = family(file)?;
    let keys = Keys { file, family };
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
    let (hidden, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let head_dim = match keys.number("attention.key_length")? {
        Some(length) => length,
        None => hidden / heads.max(1),
    };
    if let Some(other) = keys.number("attention.value_length")?.filter(|length| *length != head_dim) {
        return Err(keys.refused("attention.value_length", other, &format!("keys have {head_dim} elements")));
    }
    set("model_type", json!(family.model_type));
    set("hidden_size", json!(hidden));
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(keys.number("attention.head_count_kv")?.unwrap_or(heads)));
    if !family.turns_in_part {
        set("head_dim", json!(head_dim));
    }
    set("num_hidden_layers", json!(keys.needed("block_count")?));
    set("intermediate_size", json!(keys.needed("feed_forward_length")?));
    set("max_position_embeddings", json!(keys.needed("context_length")?));
    set("vocab_size", json!(keys.vocabulary()?));
    set("hidden_act", json!(family.activation));
    set(family.epsilon.0, json!(keys.float(family.epsilon.1)?.ok_or_else(|| keys.missing(family.epsilon.1))?));
    set("tie_word_embeddings", json!(file.get("output.weight").is_none()));
    set("rope_theta", json!(keys.float("rope.freq_base")?.unwrap_or(10_000.0)));
    if family.model_type == super::LLAMA.model_type {
        set("attention_bias", json!(file.get("blk.0.attn_q.bias").is_some()));
        set("mlp_bias", json!(file.get("blk.0.ffn_gate.bias").is_some()));
    }
    if let Some(part) = keys.turned(head_dim)? {
        set("partial_rotary_factor", part);
    }
    if let Some(scaling) = keys.rope_scaling()? {
        set("rope_scaling", scaling);
    }
    let ends: Vec<u64> = ENDS.iter().filter_map(|key| file.metadata.count(key)).collect();
    if !ends.is_empty() {
        set("eos_token_id", json!(ends));
    }
    keys.others(&mut set)?;
    Ok(Value::Object(config))
}

/// The keys behind a family's name.
struct Keys<'a> {
    file: &'a GgufFile,
    family: &'static Family,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.family.name)
    }

    fn missing(&self, key: &str) -> BadInput {
        BadInput::new(format!("`{}` has no key `{}`", self.file.name, self.full(key)))
            .hint("convert the model again with llama.cpp's `convert_hf_to_gguf.py`")
    }

    fn refused(&self, key: &str, seen: impl std::fmt::Display, why: &str) -> BadInput {
        BadInput::new(format!(
            "`{}` has `{}` {seen}, which is not computed here: {why}",
            self.file.name,
            self.full(key)
        ))
    }

    /// A whole number. Fails on another value, such as one for each layer.
    fn number(&self, key: &str) -> Result<Option<u64>, BadInput> {
        let full = self.full(key);
        match self.file.metadata.get(&full) {
            None => Ok(None),
            Some(MetaValue::List(_)) => Err(self.refused(key, "as a list", "one number for all layers is")),
            Some(value) => match self.file.metadata.count(&full) {
                Some(count) => Ok(Some(count)),
                None => Err(self.refused(key, format!("{value:?}"), "it must be a whole number")),
            },
        }
    }

    fn needed(&self, key: &str) -> Result<u64, BadInput> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, BadInput> {
        let full = self.full(key);
        match self.file.metadata.get(&full) {
            None => Ok(None),
            Some(MetaValue::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(value) => Err(self.refused(key, format!("{value:?}"), "it must be a finite number")),
        }
    }

    /// Rows of the token embedding.
    fn vocabulary(&self) -> Result<usize, BadInput> {
        let table = self.file.get("token_embd.weight");
        table.map(|table| table.matrix().0).ok_or_else(|| {
            BadInput::new(format!("`{}` has no tensor `token_embd.weight`", self.file.name))
                .hint("name a file that holds a whole model")
        })
    }

    /// The part of each head that turns, where it may be a part.
    fn turned(&self, head_dim: u64) -> Result<Option<Value>, BadInput> {
        let Some(turned) = self.number("rope.dimension_count")? else { return Ok(None) };
        match self.family.turns_in_part {
            // A half more, so that the product with the head's elements is cut to this count.
            true => Ok(Some(json!((turned as f64 + 0.5) / head_dim.max(1) as f64))),
            false if turned == head_dim => Ok(None),
            false => {
                Err(self.refused("rope.dimension_count", turned, &format!("all {head_dim} elements of a head turn")))
            }
        }
    }

    /// Long contexts: divisors of the frequencies as a tensor, or one divisor.
    fn rope_scaling(&self) -> Result<Option<Value>, BadInput> {
        let kind = self.file.metadata.text(&self.full("rope.scaling.type")).unwrap_or("none");
        let factor = match kind {
            "none" => None,
            "linear" => self.float("rope.scaling.factor")?.or(self.float("rope.scale_linear")?),
            other => return Err(self.refused("rope.scaling.type", format!("`{other}`"), "`none` and `linear` are")),
        };
        let factors = self.rope_factors()?;
        match (factor.filter(|factor| *factor != 1.0 && *factor != 0.0), factors) {
            (None, None) => Ok(None),
            (Some(factor), None) => Ok(Some(json!({ "rope_type": "linear", "factor": factor }))),
            (Some(factor), Some(_)) => Err(self.refused(
                "rope.scaling.factor",
                factor,
                &format!("`{ROPE_FREQS}` divides the frequencies already"),
            )),
            // LongRoPE with one list for all lengths and no other factor.
            (None, Some(factors)) => Ok(Some(json!({
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": self.needed("context_length")?,
            }))),
        }
    }

    fn rope_factors(&self) -> Result<Option<Vec<f32>>, BadInput> {
        let Some(tensor) = self.file.get(ROPE_FREQS) else { return Ok(None) };
        let unread = |why: String| BadInput::new(format!("tensor `{ROPE_FREQS}` of `{}` {why}", self.file.name));
        if tensor.kind.number != super::F32 || tensor.shape.len() != 1 || tensor.bytes > 1 << 20 {
            return Err(unread(format!(
                "is {} of shape {:?}; it must be a short list of F32",
                tensor.kind.name, tensor.shape
            )));
        }
        let mut bytes = vec![0; tensor.bytes as usize];
        self.file
            .read(ROPE_FREQS, tensor, 0, &mut bytes)
            .map_err(|error| unread(format!("cannot be read: {error:#}")))?;
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()))
    }

    /// Refuses keys that mean another model. Gives those that nobody here knows to the model's file, which warns of them.
    fn others(&self, set: &mut dyn FnMut(&str, Value)) -> Result<(), BadInput> {
        let start = self.full("");
        for (full, value) in self.file.metadata.iter() {
            let Some(key) = full.strip_prefix(&start) else { continue };
            let is_off = matches!(
                value,
                MetaValue::Unsigned(0) | MetaValue::Signed(0) | MetaValue::Flag(false) | MetaValue::Float(0.0)
            );
            if is_off || KNOWN.contains(&key) || key == self.family.epsilon.1 {
                continue;
            }
            if REFUSED.contains(&key) {
                return Err(self.refused(key, format!("{value:?}"), "it means another model"));
            }
            set(full, shown(value));
        }
        Ok(())
    }
}

fn shown(value: &MetaValue) -> Value {
    match value {
        MetaValue::Unsigned(value) => json!(value),
        MetaValue::Signed(value) => json!(value),
        MetaValue::Float(value) => json!(value),
        MetaValue::Flag(value) => json!(value),
        MetaValue::Text(value) => json!(value),
        MetaValue::List(list) => json!(format!("a list of {}", list.count)),
    }
}
