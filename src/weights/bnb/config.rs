//! `quantization_config` of config.json: which precision a saved checkpoint has.

use anyhow::Result;
use serde_json::{Value, json};

use super::forms;
use super::held::SECTIONS;
use crate::error::BadInput;
use crate::quant::FormatId;
use crate::quant::saved::SavedConfig;

/// What config.json says about weights that were quantized before they were saved.
#[derive(Debug, Clone, PartialEq)]
pub struct PreQuantized {
    pub precision: FormatId,
    /// LLM.int8's threshold.
    pub int8_threshold: f32,
    /// Modules that were left alone on purpose: parts of their names.
    pub skipped: Vec<String>,
}

impl PreQuantized {
    /// `None` where config.json describes no quantization. Fails with [`BadInput`] on another method than bitsandbytes' and
    /// on variants of it that are not known here.
    pub fn of(config: &Value) -> Result<Option<Self>> {
        let Some((section, method)) = section_of(config) else { return Ok(None) };
        if method != "bitsandbytes" {
            return Err(other_method(&method).into());
        }
        let threshold = section.get("llm_int8_threshold").and_then(Value::as_f64).unwrap_or(6.0);
        let skipped = section.get("llm_int8_skip_modules").and_then(Value::as_array).into_iter().flatten();
        Ok(Some(Self {
            precision: format_of(section)?,
            int8_threshold: threshold as f32,
            skipped: skipped.filter_map(Value::as_str).map(str::to_owned).collect(),
        }))
    }

    /// The method that config.json names, `None` where it describes no quantization.
    pub fn method(config: &Value) -> Option<String> {
        section_of(config).map(|(_, method)| method)
    }

    /// Whether the tensor `name` belongs to a module that was left alone on purpose.
    pub fn skips(&self, name: &str) -> bool {
        let dotted = format!(".{name}.");
        self.skipped.iter().any(|module| dotted.contains(&format!(".{module}.")))
    }
}

/// The format that a section of bitsandbytes names.
fn format_of(section: &Value) -> Result<FormatId, BadInput> {
    let flag = |key: &str| section.get(key).and_then(Value::as_bool).unwrap_or(false);
    let word = |key: &str| section.get(key).and_then(Value::as_str);
    let wanted = match (flag("load_in_8bit"), flag("load_in_4bit")) {
        (true, false) => SavedConfig::EightBit,
        // transformers' own default where the key is left out.
        (false, true) => SavedConfig::FourBit {
            quant_type: word("bnb_4bit_quant_type").unwrap_or("fp4"),
            double_quant: flag("bnb_4bit_use_double_quant"),
        },
        (int8, four_bit) => {
            let seen = format!("{int8}, {four_bit}");
            return Err(unknown("load_in_8bit and load_in_4bit", &seen, "one of them"));
        }
    };
    let Some((format, _)) = forms().find(|(_, form)| form.config() == wanted) else {
        let mut known: Vec<&str> = forms().filter_map(|(_, form)| form.config().quant_type()).collect();
        known.dedup();
        return Err(unknown("bnb_4bit_quant_type", wanted.quant_type().unwrap_or_default(), &known.join("` or `")));
    };
    match word("bnb_4bit_quant_storage").unwrap_or("uint8") {
        "uint8" => Ok(format),
        other if wanted.quant_type().is_some() => Err(unknown("bnb_4bit_quant_storage", other, "uint8")),
        _ => Ok(format),
    }
}

/// The section of config.json that describes a quantization, and its method.
fn section_of(config: &Value) -> Option<(&Value, String)> {
    let section = |key: &&str| config.get(*key).filter(|section| section.is_object());
    let (key, section) = SECTIONS.iter().find_map(|key| Some((*key, section(key)?)))?;
    let flag = |key: &str| section.get(key).and_then(Value::as_bool).unwrap_or(false);
    let method = match section.get("quant_method").and_then(Value::as_str) {
        Some(method) => method,
        None if flag("load_in_8bit") || flag("load_in_4bit") => "bitsandbytes",
        None if key == "compression_config" => "compressed-tensors",
        // MLX writes its section under both keys, without a method.
        None if section.get("group_size").is_some() && section.get("bits").is_some() => "mlx",
        None => "unknown",
    };
    Some((section, method.to_owned()))
}

/// Methods whose checkpoints are known by name and not read, and what they are made from.
const METHODS: &[(&str, &str)] = &[
    ("gptq", "4-bit integers of GPTQ"),
    ("awq", "4-bit integers of AWQ"),
    ("fp8", "8-bit floats with scales"),
    ("fbgemm_fp8", "8-bit floats with scales"),
    ("compressed-tensors", "tensors compressed by llm-compressor"),
    ("mxfp4", "4-bit floats in blocks of 32"),
    ("mlx", "integers in groups, as MLX packs them"),
    ("modelopt", "weights of NVIDIA's ModelOpt"),
];

fn other_method(method: &str) -> BadInput {
    let what = METHODS.iter().find(|(name, _)| *name == method).map(|(_, what)| format!(" ({what})"));
    BadInput::new(format!(
        "config.json's quantization_config has quant_method `{method}`{}; only `bitsandbytes` can be loaded",
        what.unwrap_or_default()
    ))
    .hint("name the 16-bit model that the checkpoint was made from, or measure its shape with `--weights random`")
}

fn unknown(key: &str, seen: &str, allowed: &str) -> BadInput {
    BadInput::new(format!("config.json's quantization_config has {key} `{seen}`; only `{allowed}` can be loaded"))
        .hint("name the model that the checkpoint was made from, or measure its shape with `--weights random`")
}

/// The section that transformers writes beside weights of this precision; `None` where it has none.
pub fn section(precision: FormatId, int8_threshold: f32) -> Option<Value> {
    // transformers writes its defaults of 4 bits beside 8 bits as well.
    let (four_bit, compute, quant_type, double_quant) = match precision.saved?.config() {
        SavedConfig::EightBit => (false, "float32", "fp4", false),
        SavedConfig::FourBit { quant_type, double_quant } => (true, "float16", quant_type, double_quant),
    };
    Some(json!({
        "_load_in_4bit": four_bit,
        "_load_in_8bit": !four_bit,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": f64::from(int8_threshold),
        "load_in_4bit": four_bit,
        "load_in_8bit": !four_bit,
        "quant_method": "bitsandbytes",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::FORMATS;

    #[test]
    fn sections_come_back_as_their_precision() {
        let mut sections = 0;
        for entry in FORMATS {
            let Some(section) = section(*entry, 6.0) else { continue };
            let found = PreQuantized::of(&json!({ "quantization_config": section })).unwrap();
            assert_eq!(found, Some(PreQuantized { precision: *entry, int8_threshold: 6.0, skipped: Vec::new() }));
            sections += 1;
        }
        assert_eq!(sections, 3);
        assert_eq!(PreQuantized::of(&json!({})).unwrap(), None);
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (section, expected) in [
            (json!({"quant_method": "gptq"}), "`gptq`"),
            (json!({}), "`unknown`"),
            (json!({"quant_method": "bitsandbytes"}), "`false, false`"),
            (json!({"load_in_4bit": true}), "`fp4`"),
            (json!({"load_in_4bit": true, "load_in_8bit": true}), "`true, true`"),
            (
                json!({"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}),
                "`bfloat16`",
            ),
        ] {
            let error = PreQuantized::of(&json!({ "quantization_config": section })).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(crate::error::hint(&error).is_some());
        }
    }
}
