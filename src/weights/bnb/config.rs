//! `quantization_config` of config.json: which precision a saved checkpoint has.

use anyhow::Result;
use serde_json::{Value, json};

use crate::error::BadInput;

/// What config.json says about weights that were quantized before they were saved.
#[derive(Debug, Clone, PartialEq)]
pub struct PreQuantized {
    /// A name of [`crate::quant::FORMATS`].
    pub precision: &'static str,
    /// LLM.int8's threshold.
    pub int8_threshold: f32,
}

impl PreQuantized {
    /// `None` where config.json tells of no quantization. Fails with [`BadInput`] on another method than bitsandbytes' and
    /// on variants of it that are not known here.
    pub fn of(config: &Value) -> Result<Option<Self>> {
        let section = match config.get("quantization_config") {
            None | Some(Value::Null) => return Ok(None),
            Some(section) => section,
        };
        let flag = |key: &str| section.get(key).and_then(Value::as_bool).unwrap_or(false);
        let word = |key: &str| section.get(key).and_then(Value::as_str);
        let (int8, four_bit) = (flag("load_in_8bit"), flag("load_in_4bit"));
        let method = word("quant_method").unwrap_or(if int8 || four_bit { "bitsandbytes" } else { "unknown" });
        if method != "bitsandbytes" {
            return Err(unknown("quant_method", method, "bitsandbytes").into());
        }
        let threshold = section.get("llm_int8_threshold").and_then(Value::as_f64).unwrap_or(6.0);
        let of = |precision| Ok(Some(Self { precision, int8_threshold: threshold as f32 }));
        match (int8, four_bit) {
            (true, false) => return of("int8"),
            (false, true) => {}
            _ => {
                return Err(
                    unknown("load_in_8bit and load_in_4bit", &format!("{int8}, {four_bit}"), "one of them").into()
                );
            }
        }
        // transformers' own defaults where a key is left out.
        let quant_type = word("bnb_4bit_quant_type").unwrap_or("fp4");
        if quant_type != "nf4" {
            return Err(unknown("bnb_4bit_quant_type", quant_type, "nf4").into());
        }
        let storage = word("bnb_4bit_quant_storage").unwrap_or("uint8");
        if storage != "uint8" {
            return Err(unknown("bnb_4bit_quant_storage", storage, "uint8").into());
        }
        of(if flag("bnb_4bit_use_double_quant") { "nf4" } else { "nf4-nodq" })
    }
}

fn unknown(key: &str, seen: &str, allowed: &str) -> BadInput {
    BadInput::new(format!("config.json's quantization_config has {key} `{seen}`; only `{allowed}` can be loaded"))
        .hint("name the model that the checkpoint was made from, or measure its shape with `--weights random`")
}

/// The section that transformers writes beside weights of this precision; `None` where it has none.
pub fn section(precision: &str, int8_threshold: f32) -> Option<Value> {
    let (four_bit, double_quant) = match precision {
        "int8" => (false, false),
        "nf4" => (true, true),
        "nf4-nodq" => (true, false),
        _ => return None,
    };
    // transformers writes its defaults of 4 bits beside 8 bits as well.
    let (compute, quant_type) = if four_bit { ("float16", "nf4") } else { ("float32", "fp4") };
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
            let Some(section) = section(entry.name, 6.0) else { continue };
            let found = PreQuantized::of(&json!({ "quantization_config": section })).unwrap();
            assert_eq!(found, Some(PreQuantized { precision: entry.name, int8_threshold: 6.0 }));
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
