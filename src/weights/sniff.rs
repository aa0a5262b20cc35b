//! Recognizes a file whose contents are not what its name says, by its first bytes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::safetensors::short;
use crate::error::BadInput;

const AGAIN: &str = "download the file again";

/// How a pointer file of Git LFS begins.
const POINTERS: [&str; 2] = ["version https://git-lfs.github.com/spec/", "version https://hawser."];

/// Enough for every signature, and for the three lines of a Git LFS pointer.
const HEAD_BYTES: u64 = 512;

/// First bytes of formats that a file of weights is found to be in under another's name.
const SIGNATURES: &[(&[u8], &str, &str)] = &[
    (b"GGUF", "a GGUF file", "give it a name that ends in `.gguf` and name the file itself"),
    (b"PK\x03\x04", "a zip archive, as `torch.save` writes", SAVE_SAFETENSORS),
    (b"\x80\x02", "a Python pickle", SAVE_SAFETENSORS),
    (b"\x80\x04", "a Python pickle", SAVE_SAFETENSORS),
    (b"\x89HDF\r\n", "an HDF5 file, as TensorFlow writes", SAVE_SAFETENSORS),
    (b"\x1f\x8b", "compressed with gzip", "decompress it with `gunzip`"),
];

/// What to do about weights in another framework's format.
pub const SAVE_SAFETENSORS: &str =
    "load the model with transformers and save it as safetensors: `model.save_pretrained(FOLDER)`";

/// Names a file that cannot be what it is called: empty, a Git LFS pointer, a web page, another format. `None` for every other, and
/// for one that cannot be opened.
pub fn not_itself(path: &Path) -> Option<BadInput> {
    let mut head = Vec::new();
    File::open(path).ok()?.take(HEAD_BYTES).read_to_end(&mut head).ok()?;
    let name = short(path);
    let start = String::from_utf8_lossy(&head).trim_start().to_ascii_lowercase();
    let is_pointer = POINTERS.iter().any(|line| start.starts_with(line));
    if head.is_empty() {
        return Some(BadInput::new(format!("`{name}` is empty: 0 bytes")).hint(AGAIN));
    }
    if is_pointer {
        let size = start.lines().find_map(|line| line.strip_prefix("size ")).unwrap_or("?").trim();
        return Some(
            BadInput::new(format!("`{name}` is a Git LFS pointer: the file itself, of {size} bytes, is not here"))
                .hint("run `git lfs pull` in the folder (`git lfs install` once before), or download the file again"),
        );
    }
    if start.starts_with("<!doctype html") || start.starts_with("<html") || start.starts_with("<?xml") {
        return Some(
            BadInput::new(format!("`{name}` is a web page: what was saved is an error or a login page"))
                .hint("download the file again, with the access that it needs"),
        );
    }
    let found = SIGNATURES.iter().find(|(signature, ..)| head.starts_with(signature));
    found.map(|(_, what, hint)| BadInput::new(format!("`{name}` is {what}")).hint(*hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_by_their_first_bytes() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("x");
        let sniffed = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            not_itself(&path).map(|error| error.to_string())
        };
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1020640\n";
        for (bytes, expected) in [
            (&pointer[..], "Git LFS pointer: the file itself, of 1020640 bytes"),
            (b"", "empty: 0 bytes"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"PK\x03\x04", "torch.save"),
        ] {
            assert!(sniffed(bytes).is_some_and(|said| said.contains(expected)), "{expected}");
        }
        for bytes in [&b"{\"model_type\": \"llama\"}"[..], b"\x08\0\0\0\0\0\0\0{}      ", b"version 2"] {
            assert_eq!(sniffed(bytes), None);
        }
        assert!(not_itself(&place.path().join("absent")).is_none());
    }
}
