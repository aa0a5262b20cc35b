//! Where config.json and the files disagree on what the checkpoint is, the files decide: whether the head has weights of its own, and
//! whether the weights are quantized. Models are then built from a config that says what is there.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::beside;
use super::bnb::config::PreQuantized;
use super::bnb::held::{self, Held};
use super::names::{TIED, spellings};
use super::packed;
use super::safetensors::{Safetensors, Tensor, listed};
use crate::error::BadInput;
use crate::events::{Event, Listener};
use crate::quant::FormatId;
use crate::quant::bnb4::Blocks4;

/// Architectures whose configs mean a tied head where they do not say.
const TIED_BY_DEFAULT: &[&str] = &["gemma", "gemma2", "gemma3", "gemma3_text", "mt5", "paligemma", "smollm3", "t5"];

/// Warns of what config.json and `files` disagree on, makes `config` say what the files hold, and gives what they are quantized into.
/// Where config.json has no section, a file of `folder` may be it. `files` are `None` where they cannot be read, or not yet. Fails with [`BadInput`] on a quantization that is not read here, and on
/// one that contradicts the files.
pub fn settle(
    config: &mut Value,
    folder: &Path,
    files: Option<&Safetensors>,
    events: &dyn Listener,
) -> Result<Option<PreQuantized>> {
    let Some(files) = files else { return PreQuantized::of(config) };
    let warn = |name: &str, message: String| events.on(Event::Warning { name: name.to_owned(), message });
    for (name, message) in files.remarks() {
        warn(name, message.clone());
    }
    settle_head(config, files, &warn)?;
    settle_quantization(config, folder, files, &warn)
}

/// The token embedding and the head, by their names in the files.
struct Head {
    table: Option<String>,
    head: Option<String>,
}

impl Head {
    fn of(files: &Safetensors) -> Self {
        let named = |name: &str| spellings(name).into_iter().find(|name| files.get(name).is_some());
        let pairs = TIED.iter().map(|(table, head)| Self { table: named(table), head: named(head) });
        let mut pairs: Vec<Self> = pairs.collect();
        let best = pairs.iter().position(|pair| pair.table.is_some()).unwrap_or(0);
        pairs.swap_remove(best)
    }

    /// Whether the head has values that the table has not.
    fn is_own(&self, files: &Safetensors) -> Result<bool> {
        match (&self.table, &self.head) {
            // A packed head cannot be read; as nothing reads it, a warning is enough.
            (Some(table), Some(head)) if files.get(head).is_some_and(Tensor::is_plain) => {
                Ok(!files.same_values(table, head)?)
            }
            _ => Ok(false),
        }
    }
}

/// transformers 5 ties a head to the token embedding only where the files do not hold another.
fn settle_head(config: &mut Value, files: &Safetensors, warn: &dyn Fn(&str, String)) -> Result<()> {
    let model_type = config["model_type"].as_str().unwrap_or_default().to_owned();
    let explicit = config["tie_word_embeddings"].as_bool();
    let says_tied = explicit.unwrap_or(TIED_BY_DEFAULT.contains(&model_type.as_str()));
    let found = Head::of(files);
    let is_own = found.is_own(files)?;
    let is_t5 = matches!(model_type.as_str(), "t5" | "mt5");
    // transformers 5 saves every T5 as tied, and says apart whether it scales what a tied head reads.
    let scales = config["scale_decoder_outputs"].as_bool();
    let own_is_told = !says_tied || (is_t5 && scales == Some(false));
    if let (true, false, Some(head)) = (is_own, own_is_told, &found.head) {
        let message = "config.json says that the head is tied to the token embedding, but the checkpoint holds \
                       a head of its own: that is used, as transformers 5 does";
        warn("own_head", format!("`{head}`: {message}"));
    }
    let tied = match (is_own, is_t5) {
        (true, _) => false,
        (false, false) => says_tied,
        (false, true) => {
            if !says_tied && found.head.is_none() {
                let message = "config.json says that the head is not tied, and the checkpoint holds none: the table of \
                               tokens is the head, as in transformers 5";
                warn("no_head", message.to_owned());
            }
            true
        }
    };
    if tied != says_tied {
        config["tie_word_embeddings"] = json!(tied);
        if model_type == "t5" && scales.is_none() {
            config["scale_decoder_outputs"] = json!(says_tied);
        }
    }
    if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
        // The outer config decides; the model of the text reads its own.
        if text.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true) != tied {
            text.insert("tie_word_embeddings".to_owned(), json!(tied));
        }
    }
    Ok(())
}

fn settle_quantization(
    config: &mut Value,
    folder: &Path,
    files: &Safetensors,
    warn: &dyn Fn(&str, String),
) -> Result<Option<PreQuantized>> {
    let held = Held::of(files);
    if PreQuantized::method(config).is_none()
        && !held.is_plain()
        && let Some(section) = beside::section(folder)?
    {
        config["quantization_config"] = section;
    }
    let Some(method) = PreQuantized::method(config) else { return Ok(None) };
    if held.is_plain() {
        let message = "config.json says that the weights are quantized, but every one is held in plain values: they are \
                       measured as any plain checkpoint";
        warn("quantization_config_ignored", format!("`{method}`: {message}"));
        if let Some(keys) = config.as_object_mut() {
            held::SECTIONS.iter().for_each(|section| drop(keys.remove(*section)));
        }
        return Ok(None);
    }
    let Some(mut said) = PreQuantized::of(config)? else { return Ok(None) };
    if let Some(scheme) = &said.scheme {
        said.precision = scheme.precision(&packed::modules(files, scheme.as_ref()));
    }
    if let (Some(blocks), "bitsandbytes") = (held.other_blocks, method.as_str()) {
        return in_other_blocks(said, blocks, &held);
    }
    let names = held.names();
    match held.only() {
        // A weight that nothing belongs to: the check of its model names what is missing.
        _ if names.is_empty() => {}
        Some(one) if one == said.precision => {}
        Some(one) if has_same_codes(one, said.precision) => {
            let message = format!("config.json says `{}`, the weights are held in `{one}`", said.precision);
            warn("quantization_config_disagrees", message);
            said.precision = one;
        }
        _ => {
            let several: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
            return Err(BadInput::new(format!(
                "config.json's quantization_config says `{}`, but the checkpoint holds weights in {}",
                said.precision,
                listed(&several)
            ))
            .hint("give the folder the config.json that its weights were saved with")
            .into());
        }
    }
    Ok(Some(said))
}

/// bitsandbytes' 4 bits that are no NF4 in blocks of 64: the files say in which blocks.
fn in_other_blocks(said: PreQuantized, blocks: Blocks4, held: &Held) -> Result<Option<PreQuantized>> {
    let says_fp4 = said.scheme.is_some();
    let says_4_bits = says_fp4 || said.precision.saved.is_some_and(|saved| saved.config().quant_type().is_some());
    if !says_4_bits || says_fp4 != blocks.is_fp4 || (blocks.is_fp4 && !held.names().iter().all(|name| *name == "fp4")) {
        return Err(BadInput::new(format!(
            "config.json's quantization_config says `{}`, but the checkpoint holds weights in `{}`",
            said.precision,
            blocks.format()
        ))
        .hint("give the folder the config.json that its weights were saved with")
        .into());
    }
    Ok(Some(PreQuantized { precision: blocks.format(), scheme: Some(blocks.scheme()), ..said }))
}

/// True if both formats differ in double quantization at most.
fn has_same_codes(a: FormatId, b: FormatId) -> bool {
    a.saved.zip(b.saved).is_some_and(|(a, b)| a.config().quant_type() == b.config().quant_type())
}
