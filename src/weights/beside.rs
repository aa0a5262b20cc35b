//! Files beside config.json in which tools said how weights are quantized before transformers' config had a section for it.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::open::read_json;

/// A file, the method that writes it, and its names for keys that config.json calls otherwise.
struct Beside {
    file: &'static str,
    method: &'static str,
    renamed: &'static [(&'static str, &'static str)],
}

const FILES: &[Beside] = &[
    Beside { file: "quantize_config.json", method: "gptq", renamed: &[] },
    Beside { file: "quant_config.json", method: "awq", renamed: &[("w_bit", "bits"), ("q_group_size", "group_size")] },
    Beside { file: "hf_quant_config.json", method: "modelopt", renamed: &[] },
];

/// The section that a file of the folder is instead; `None` where there is none. Fails where one cannot be read.
pub fn section(folder: &Path) -> Result<Option<Value>> {
    for Beside { file, method, renamed } in FILES {
        let Some(mut section) = read_json(&folder.join(file))? else { continue };
        if let Some(keys) = section.as_object_mut() {
            for (theirs, ours) in *renamed {
                if let Some(value) = keys.remove(*theirs) {
                    keys.entry(*ours).or_insert(value);
                }
            }
            keys.entry("quant_method").or_insert(json!(method));
        }
        return Ok(Some(section));
    }
    Ok(None)
}
