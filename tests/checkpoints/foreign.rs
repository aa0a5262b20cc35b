//! Folders and files of other formats, and files that are not what they are called.

use std::fs;

use quantbench::events::Silent;
use quantbench::weights::{self, ModelRequest, WeightsChoice};

use crate::folder::{Folder, INDEX, SINGLE, refused};

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1020640\n";

/// A golden folder whose weights bear another name.
fn weights_called(name: &str) -> Folder {
    let folder = Folder::of("llama-odd");
    fs::rename(folder.path().join(SINGLE), folder.path().join(name)).unwrap();
    folder
}

#[test]
fn weights_that_are_not_read_are_named_with_what_to_do() {
    for (name, what, hint) in [
        ("model-00001-of-00002.safetensors", "shards without their index", INDEX),
        ("model-Q4_K_M.gguf", "a GGUF file", "name the file itself"),
        ("adapter_model.safetensors", "a LoRA adapter", "merge"),
        ("consolidated.safetensors", "the original format", "transformers"),
        ("consolidated.00.pth", "the original format", "transformers"),
        ("pytorch_model.bin", "PyTorch pickles", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch pickles", "save_pretrained"),
        ("model.pth", "PyTorch pickles", "save_pretrained"),
        ("flax_model.msgpack", "TensorFlow or Flax", "save_pretrained"),
        ("tf_model.h5", "TensorFlow or Flax", "save_pretrained"),
        ("model.onnx", "an exported graph", "original"),
        ("weights.npz", "MLX", "original"),
        ("model.fp16.safetensors", "a variant", SINGLE),
        ("gptq_model-4bit.safetensors", "another safetensors file", SINGLE),
    ] {
        let said = weights_called(name).refused(&["holds neither", what, name, hint]);
        assert!(!said.contains("--weights random"), "{said}");
        // The same without a config.json, as these folders often are.
        let folder = weights_called(name);
        fs::remove_file(folder.path().join("config.json")).unwrap();
        folder.refused(&["holds no config.json", what, name, hint]);
        // Their config.json is a shape all the same.
        let folder = weights_called(name);
        let request = ModelRequest { weights: WeightsChoice::Random, ..folder.request() };
        assert!(weights::open(&request, &Silent).is_ok(), "{name}");
    }
}

#[test]
fn an_adapter_names_its_base_model() {
    for (base, said) in [("owner/base", "for `owner/base`"), ("/home/me/models/base", "for `base`")] {
        let folder = weights_called("adapter_model.safetensors");
        fs::remove_file(folder.path().join("config.json")).unwrap();
        let config = format!("{{\"base_model_name_or_path\": \"{base}\"}}");
        fs::write(folder.path().join("adapter_config.json"), config).unwrap();
        let message = folder.refused(&[said, "merge"]);
        assert!(!message.contains("/home"), "{message}");
    }
    let folder = Folder::of("llama-odd");
    fs::write(folder.path().join("adapter_config.json"), "{}").unwrap();
    folder.run("fp16").warns(&["adapter_ignored"]);
}

#[test]
fn a_file_is_no_model_and_says_what_to_name() {
    let place = tempfile::tempdir().unwrap();
    for (name, words) in [
        ("pytorch_model.bin", ["is a file, PyTorch pickles", "save_pretrained"]),
        ("model.onnx", ["is a file, an exported graph", "original"]),
        ("model.safetensors", ["is a file", "name the folder that holds config.json"]),
        ("config.json", ["is a file", "name the folder that holds config.json"]),
    ] {
        let path = place.path().join(name);
        fs::write(&path, "x").unwrap();
        let error = weights::open(&ModelRequest::of(path.display().to_string()), &Silent).err().unwrap();
        refused(&error, &words);
    }
}

#[test]
fn a_folder_above_the_model_names_the_folder_within() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("inner")).unwrap();
    fs::write(place.path().join("inner/config.json"), "{}").unwrap();
    let error = weights::open(&ModelRequest::of(place.path().display().to_string()), &Silent).err().unwrap();
    refused(&error, &["holds no config.json", "`inner`"]);
}

#[test]
fn a_pointer_of_git_lfs_is_called_so_wherever_it_lies() {
    for name in [SINGLE, "tokenizer.json", "config.json", "generation_config.json"] {
        let folder = Folder::of("llama-odd");
        fs::write(folder.path().join(name), POINTER).unwrap();
        folder.refused(&[name, "Git LFS pointer", "1020640 bytes", "git lfs pull"]);
    }
    let folder = Folder::of("llama-odd");
    fs::remove_file(folder.path().join(SINGLE)).unwrap();
    fs::write(folder.path().join(INDEX), POINTER).unwrap();
    folder.refused(&[INDEX, "Git LFS pointer"]);
    let shards = Folder::of("llama-odd");
    let map = shards.tensors.keys().map(|name| (name.clone(), "a.safetensors".to_owned())).collect();
    let shards = shards.write_shards(&[], &map);
    fs::write(shards.path().join("a.safetensors"), POINTER).unwrap();
    shards.refused(&["a.safetensors", "Git LFS pointer", "git lfs pull"]);
}

#[test]
fn files_that_are_something_else_are_called_what_they_are() {
    let whole = fs::read(Folder::of("llama-odd").path().join(SINGLE)).unwrap();
    for (name, bytes, words) in [
        (SINGLE, &b""[..], ["is empty", "download"]),
        (SINGLE, b"<!DOCTYPE html>\n<html>", ["is a web page", "download"]),
        (SINGLE, b"GGUF\x03\0\0\0\0\0\0\0", ["is a GGUF file", "name the file itself"]),
        (SINGLE, b"PK\x03\x04\0\0\0\0\0\0\0\0", ["torch.save", "save_pretrained"]),
        (SINGLE, &whole[..whole.len() - 1], ["truncated", "download"]),
        ("config.json", b"", ["is empty", "download"]),
        ("config.json", b"<html>", ["is a web page", "download"]),
        ("tokenizer.json", b"", ["is empty", "download"]),
        ("tokenizer.json", b"<html>", ["is a web page", "download"]),
    ] {
        let folder = Folder::of("llama-odd");
        fs::write(folder.path().join(name), bytes).unwrap();
        folder.refused(&[name, words[0], words[1]]);
    }
}
