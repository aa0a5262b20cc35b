//! Weights in formats that are not read, recognized by the names of files: what was found and what to do.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::safetensors::{INDEX, SINGLE, short};
use super::sniff::SAVE_SAFETENSORS;
use crate::error::BadInput;

/// Something that a folder holds in place of a checkpoint.
struct Kind {
    what: &'static str,
    hint: &'static str,
    is: fn(&str) -> bool,
}

const GGUF: &str = "name the file itself: `--model-id FOLDER/NAME.gguf`";
const MERGE: &str =
    "merge the adapter into its base model (`merge_and_unload()` in PEFT) and save that, or name the base model";
const RENAME: &str = "where it holds the whole model in transformers' names, call it `model.safetensors`";

/// The first that a file of the folder is decides.
const KINDS: &[Kind] = &[
    Kind { what: "a LoRA adapter", hint: MERGE, is: |name| name.starts_with("adapter_model.") },
    Kind { what: "a LoRA adapter", hint: MERGE, is: |name| name == "adapter_config.json" },
    Kind {
        what: "shards without their index",
        hint: "download `model.safetensors.index.json` beside them, or save the model again with transformers",
        is: |name| name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors"),
    },
    Kind { what: "a GGUF file", hint: GGUF, is: |name| name.ends_with(".gguf") || name.ends_with(".ggml") },
    Kind {
        what: "weights in the original format of their authors",
        hint: "name the repository in transformers' format (often the one that ends in `-hf`), or convert it with transformers' \
               conversion script",
        is: |name| name.starts_with("consolidated.") || name == "params.json",
    },
    Kind {
        what: "weights of a diffusion pipeline",
        hint: "name a language model",
        is: |name| name == "model_index.json" || name.starts_with("diffusion_pytorch_model"),
    },
    Kind {
        what: "a variant of the weights",
        hint: RENAME,
        is: |name| name.starts_with("model.") && name.ends_with(".safetensors"),
    },
    Kind {
        what: "PyTorch pickles",
        hint: SAVE_SAFETENSORS,
        is: |name| !is_of_training(name) && is_any(name, &[".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json"]),
    },
    Kind {
        what: "MLX weights",
        hint: "name the original safetensors model",
        is: |name| is_any(name, &[".npz", ".npy"]),
    },
    Kind {
        what: "TensorFlow or Flax weights",
        hint: SAVE_SAFETENSORS,
        is: |name| is_any(name, &[".h5", ".msgpack", ".keras", ".tflite", ".pb"]) || name.starts_with("model.ckpt"),
    },
    Kind {
        what: "an exported graph",
        hint: "name the original safetensors model",
        is: |name| {
            is_any(name, &[".onnx", ".onnx_data", ".mlpackage", ".mlmodelc", ".engine", ".plan", ".nemo", ".ot"])
                || name == "onnx"
                || name.starts_with("openvino_model")
        },
    },
    Kind { what: "another safetensors file", hint: RENAME, is: |name| name.ends_with(".safetensors") },
];

/// Pickles that a trainer leaves beside the weights.
fn is_of_training(name: &str) -> bool {
    ["training_args", "optimizer", "scheduler", "rng_state", "scaler"].iter().any(|start| name.starts_with(start))
}

fn is_any(name: &str, ends: &[&str]) -> bool {
    ends.iter().any(|end| name.ends_with(end))
}

/// What a folder or repository with these files holds in place of a checkpoint, and what to do.
pub fn found(names: &[String]) -> Option<(String, &'static str)> {
    let of = |kind: &'static Kind| {
        let name = names.iter().find(|name| (kind.is)(&name.to_ascii_lowercase()))?;
        Some((format!("{}: `{name}`", kind.what), kind.hint))
    };
    KINDS.iter().find_map(of)
}

/// File names in a folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The error of a folder without weights that are read.
pub fn no_weights(folder: &Path) -> BadInput {
    let error = format!("`{}` holds neither `{SINGLE}` nor `{INDEX}`", short(folder));
    match found(&names_in(folder)) {
        Some((what, hint)) => BadInput::new(format!("{error}, only {what}{}", base_model(folder))).hint(hint),
        None => BadInput::new(error).hint("measure the shape of config.json alone with `--weights random`"),
    }
}

/// The error of a folder without config.json.
pub fn no_config(folder: &Path, id: &str) -> BadInput {
    let names = names_in(folder);
    let error = format!("`{id}` holds no config.json");
    if let Some((what, hint)) = found(&names).filter(|_| !names.iter().any(|name| name == SINGLE || name == INDEX)) {
        return BadInput::new(format!("{error}, only {what}{}", base_model(folder))).hint(hint);
    }
    let inner = names.iter().find(|name| folder.join(name).join("config.json").is_file());
    let hint = match inner {
        Some(inner) => format!("its folder `{inner}` does: name that one"),
        None if names.iter().any(|name| name == "snapshots") => {
            "it is a repository in the hub's cache: name the folder of a commit inside `snapshots`".to_owned()
        }
        None => "name the folder that holds config.json and the weights".to_owned(),
    };
    BadInput::new(error).hint(hint)
}

/// What an adapter was made for, where it says so.
fn base_model(folder: &Path) -> String {
    let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap_or_default();
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    let base = config["base_model_name_or_path"].as_str().and_then(|base| base.trim_end_matches('/').rsplit_once('/'));
    match base {
        // A path of the adapter's author keeps its last component.
        Some((owner, name)) => {
            format!(", for `{}`", if owner.contains('/') { name.to_owned() } else { format!("{owner}/{name}") })
        }
        None => String::new(),
    }
}

/// Whether a file is called as GGUF files are, or begins as one.
pub fn is_gguf(path: &Path) -> bool {
    let mut head = [0; 4];
    let is_named = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    is_named || File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok_and(|()| &head == b"GGUF")
}

/// The error of a model id that is a file.
pub fn a_file(path: &Path, id: &str) -> BadInput {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let is_safetensors = name.to_ascii_lowercase().ends_with(".safetensors");
    match found(&[name]).filter(|_| !is_safetensors) {
        Some((what, hint)) => BadInput::new(format!("`{id}` is a file, {}", what_alone(&what))).hint(hint),
        None => BadInput::new(format!("`{id}` is a file")).hint("name the folder that holds config.json"),
    }
}

/// Without the name, which the message has already.
fn what_alone(what: &str) -> &str {
    what.split_once(':').map_or(what, |(what, _)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_folder_holds_is_named() {
        for (names, expected) in [
            (&["config.json", "model-00001-of-00002.safetensors"][..], "shards without their index"),
            (&["config.json", "model-Q4_K_M.gguf"], "GGUF"),
            (&["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter: `adapter_model.safetensors`"),
            (&["consolidated.safetensors", "params.json"], "original format"),
            (&["consolidated.00.pth"], "original format"),
            (&["pytorch_model-00001-of-00002.bin"], "PyTorch"),
            (&["model.fp16.safetensors"], "variant"),
            (&["model.pth"], "PyTorch"),
            (&["flax_model.msgpack"], "Flax"),
            (&["tf_model.h5"], "TensorFlow"),
            (&["weights.npz"], "MLX"),
            (&["onnx"], "graph"),
            (&["gptq_model-4bit-128g.safetensors"], "another safetensors file"),
        ] {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let (what, hint) = found(&names).expect(expected);
            assert!(what.contains(expected), "{what}");
            assert!(!hint.is_empty());
        }
        assert!(
            found(&["config.json".to_owned(), "tokenizer.json".to_owned(), "training_args.bin".to_owned()]).is_none()
        );
    }
}
