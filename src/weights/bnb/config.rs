//! `quantization_config` of config.json: which precision a saved checkpoint has.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{Value, json};

use super::forms;
use super::held::SECTIONS;
use crate::error::BadInput;
use crate::quant::bnb4::Blocks4;
use crate::quant::saved::SavedConfig;
use crate::quant::scheme::{Scheme, Section};
use crate::quant::{self, FormatId};

/// What config.json says about weights that were quantized before they were saved.
#[derive(Debug, Clone)]
pub struct PreQuantized {
    pub precision: FormatId,
    /// LLM.int8's threshold.
    pub int8_threshold: f32,
    /// Modules that were left alone on purpose: parts of their names.
    pub skipped: Vec<String>,
    /// How another method than bitsandbytes' holds its matrices.
    pub scheme: Option<Arc<dyn Scheme>>,
    /// Settings that are not computed: what a reader of the result must know.
    pub notes: Vec<String>,
}

impl PreQuantized {
    /// Weights of which no more is known.
    pub fn of_format(precision: FormatId) -> Self {
        Self { precision, int8_threshold: 6.0, skipped: Vec::new(), scheme: None, notes: Vec::new() }
    }

    /// `None` where config.json describes no quantization. Fails with [`BadInput`] on methods and on variants of them that are not known
    /// here.
    pub fn of(config: &Value) -> Result<Option<Self>> {
        let Some((section, method)) = section_of(config) else { return Ok(None) };
        if method != "bitsandbytes" {
            let known = quant::scheme::method(&method).ok_or_else(|| other_method(&method))?;
            let keys = Section::new(section.as_object().ok_or_else(|| other_method(&method))?);
            let scheme = known.read(&keys)?;
            let own = Self::of_format(scheme.precision(&[]));
            return Ok(Some(Self { scheme: Some(scheme), notes: keys.into_notes(), ..own }));
        }
        let threshold = section.get("llm_int8_threshold").and_then(Value::as_f64).unwrap_or(6.0);
        let skipped = section.get("llm_int8_skip_modules").and_then(Value::as_array).into_iter().flatten();
        let other_blocks = blocks_of(section);
        let precision = match other_blocks {
            Some(blocks) => blocks.format(),
            None => format_of(section)?,
        };
        Ok(Some(Self {
            precision,
            scheme: other_blocks.map(Blocks4::scheme),
            int8_threshold: threshold as f32,
            skipped: skipped.filter_map(Value::as_str).map(str::to_owned).collect(),
            ..Self::of_format(quant::BASELINE)
        }))
    }

    /// The method that config.json names, `None` where it describes no quantization.
    pub fn method(config: &Value) -> Option<String> {
        section_of(config).map(|(_, method)| method)
    }

    /// Whether the tensor `name` belongs to a module that was left alone on purpose.
    pub fn skips(&self, name: &str) -> bool {
        if self.scheme.as_ref().is_some_and(|scheme| scheme.skips(name.strip_suffix(".weight").unwrap_or(name))) {
            return true;
        }
        let dotted = format!(".{name}.");
        self.skipped.iter().any(|module| dotted.contains(&format!(".{module}.")))
    }
}

/// 4 bits that are no NF4 in blocks of 64, as far as a section says it: transformers' own default is `fp4`.
fn blocks_of(section: &Value) -> Option<Blocks4> {
    let flag = |key: &str| section.get(key).and_then(Value::as_bool).unwrap_or(false);
    let word = |key: &str| section.get(key).and_then(Value::as_str);
    let is_alone = flag("load_in_4bit") && !flag("load_in_8bit");
    let is_stored = word("bnb_4bit_quant_storage").unwrap_or("uint8") == "uint8";
    let quant_type = word("bnb_4bit_quant_type").unwrap_or("fp4");
    let blocks = Blocks4::of(quant_type, flag("bnb_4bit_use_double_quant"));
    blocks.filter(|blocks| is_alone && is_stored && blocks.is_fp4)
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
const OTHER_METHODS: &[(&str, &str)] = &[
    ("mlx", "integers in groups, as MLX packs them"),
    ("hqq", "integers of HQQ"),
    ("aqlm", "codebooks of AQLM"),
    ("quanto", "weights of quanto"),
    ("torchao", "weights of torchao"),
    ("eetq", "8-bit integers of EETQ"),
    ("higgs", "codebooks of HIGGS"),
    ("vptq", "codebooks of VPTQ"),
    ("spqr", "weights of SpQR"),
    ("bitnet", "ternary weights"),
    ("quark", "weights of AMD's Quark"),
    ("auto-round", "integers of AutoRound"),
];

fn other_method(method: &str) -> BadInput {
    let what = OTHER_METHODS.iter().find(|(name, _)| *name == method).map(|(_, what)| format!(" ({what})"));
    BadInput::new(format!(
        "config.json's quantization_config has quant_method `{method}`{}; `bitsandbytes`, {} can be loaded",
        what.unwrap_or_default(),
        quant::scheme::METHODS.iter().map(|known| format!("`{}`", known.name())).collect::<Vec<_>>().join(", ")
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
            let found = found.expect("a quantization");
            assert_eq!((found.precision, found.int8_threshold, found.skipped), (*entry, 6.0, Vec::new()));
            sections += 1;
        }
        assert_eq!(sections, 3);
        assert!(PreQuantized::of(&json!({})).unwrap().is_none());
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (section, expected) in [
            (json!({"quant_method": "hqq"}), "`hqq` (integers of HQQ)"),
            (json!({}), "`unknown`"),
            (json!({"quant_method": "bitsandbytes"}), "`false, false`"),
            (json!({"load_in_4bit": true, "bnb_4bit_quant_type": "fp5"}), "`fp5`"),
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
