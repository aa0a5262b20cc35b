//! Files that are not whole, or say what cannot be: each a clear error, no panic, and no memory for what is not there.

use std::path::Path;

use quantbench::error::{BadInput, hint};
use quantbench::events::Silent;
use quantbench::harness;
use quantbench::weights::{self, ModelRequest};

use crate::coverage::in_turn;

const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const LIST: u32 = 9;

/// A file of a tiny llama, part by part, so that each part can be made wrong.
#[derive(Clone)]
struct Parts {
    magic: [u8; 4],
    version: u32,
    /// Instead of the true counts.
    tensor_count: Option<u64>,
    key_count: Option<u64>,
    /// Name, type and bytes.
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<Record>,
    /// Zeros behind the header.
    data_bytes: usize,
}

#[derive(Clone)]
struct Record {
    name: String,
    /// The length of a row first.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// Two heads of 16 elements, 2 layers, a vocabulary of 8; projections in Q8_0, norms in F32.
fn tiny() -> Parts {
    let number = |key: &str, n: u32| (format!("llama.{key}"), U32, n.to_le_bytes().to_vec());
    let keys = vec![
        ("general.architecture".to_owned(), STRING, text("llama")),
        ("general.file_type".to_owned(), U32, 7u32.to_le_bytes().to_vec()),
        number("block_count", 1),
        number("context_length", 64),
        number("embedding_length", 32),
        number("feed_forward_length", 32),
        number("attention.head_count", 2),
        number("attention.head_count_kv", 1),
        ("llama.attention.layer_norm_rms_epsilon".to_owned(), F32, 1e-5f32.to_le_bytes().to_vec()),
        ("tokenizer.ggml.model".to_owned(), STRING, text("no_vocab")),
        ("tokenizer.ggml.add_bos_token".to_owned(), BOOL, vec![1]),
        (
            "tokenizer.ggml.tokens".to_owned(),
            LIST,
            [&STRING.to_le_bytes()[..], &2u64.to_le_bytes(), &text("a"), &text("b")].concat(),
        ),
        ("tokenizer.ggml.scores".to_owned(), LIST, [&F32.to_le_bytes()[..], &1u64.to_le_bytes(), &[0; 4]].concat()),
    ];
    let mut parts = Parts {
        magic: *b"GGUF",
        version: 3,
        tensor_count: None,
        key_count: None,
        keys,
        tensors: Vec::new(),
        data_bytes: 0,
    };
    for (name, dims, kind) in [
        ("token_embd.weight", vec![32, 8], 8),
        ("output_norm.weight", vec![32], 0),
        ("blk.0.attn_norm.weight", vec![32], 0),
        ("blk.0.attn_q.weight", vec![32, 32], 8),
        ("blk.0.attn_k.weight", vec![32, 16], 8),
        ("blk.0.attn_v.weight", vec![32, 16], 8),
        ("blk.0.attn_output.weight", vec![32, 32], 8),
        ("blk.0.ffn_norm.weight", vec![32], 0),
        ("blk.0.ffn_gate.weight", vec![32, 32], 8),
        ("blk.0.ffn_up.weight", vec![32, 32], 8),
        ("blk.0.ffn_down.weight", vec![32, 32], 8),
    ] {
        let bytes = if kind == 0 { 128 } else { 34 * dims[1] as usize };
        parts.tensors.push(Record { name: name.to_owned(), dims, kind, offset: parts.data_bytes as u64 });
        parts.data_bytes = (parts.data_bytes + bytes).next_multiple_of(32);
    }
    parts
}

impl Parts {
    fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for Record { name, dims, kind, offset } in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32) + self.data_bytes, 0);
        out
    }

    fn key(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.retain(|(name, ..)| name != key);
        self.keys.push((key.to_owned(), kind, value.to_vec()));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(name, ..)| name != key);
        self.tensors.retain(|tensor| tensor.name != key);
        self
    }

    fn tensor(mut self, name: &str, change: impl Fn(&mut Record)) -> Self {
        change(self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor"));
        self
    }
}

/// Opens a file of these bytes up to the check of its tensors.
fn open(bytes: &[u8], path: &Path) -> anyhow::Result<()> {
    std::fs::write(path, bytes).expect("a file");
    let request = ModelRequest::of(path.display().to_string());
    let checkpoint = weights::open(&request, &Silent)?;
    let model = harness::build(&checkpoint, &request, &Silent)?;
    checkpoint.source(&model.matrices, &model.vectors)?;
    Ok(())
}

fn place() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.gguf");
    (folder, path)
}

#[track_caller]
fn refused(bytes: &[u8], words: &[&str]) {
    let (_folder, path) = place();
    let error = open(bytes, &path).err().unwrap_or_else(|| panic!("opened, in spite of {words:?}"));
    assert!(error.downcast_ref::<BadInput>().is_some(), "{error:#}");
    let said = format!("{error:#} {}", hint(&error).unwrap_or_default());
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

#[test]
fn a_tiny_file_is_whole() {
    let (_folder, path) = place();
    open(&tiny().bytes(), &path).expect("a model");
    open(&tiny().key("general.alignment", U32, &32u32.to_le_bytes()).bytes(), &path).expect("a model");
    open(&Parts { version: 2, ..tiny() }.bytes(), &path).expect("version 2 has the same layout");
}

#[test]
fn a_file_cut_anywhere_is_truncated() {
    let whole = tiny().bytes();
    let (_folder, path) = place();
    let header = tiny().header().len();
    for length in (0..header).chain((header..whole.len()).step_by(97)) {
        let error = open(&whole[..length], &path).err().unwrap_or_else(|| panic!("opened at {length} bytes"));
        assert!(error.downcast_ref::<BadInput>().is_some(), "{length}: {error:#}");
        if length > 8 {
            assert!(error.to_string().contains("truncated"), "{length}: {error:#}");
        }
        let folder = path.parent().and_then(Path::to_str).expect("a path");
        assert!(!error.to_string().contains(folder), "a message ends up in records: {error:#}");
    }
}

/// Nothing that a byte of a header can say makes it panic.
#[test]
fn a_file_with_any_byte_changed_opens_or_says_why() {
    let parts = tiny();
    let (whole, header) = (parts.bytes(), parts.header().len());
    let (_folder, path) = place();
    let mut opened = 0;
    for at in 0..header {
        for change in in_turn(&[0x01, 0x7f, 0x80, 0xff], at) {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            opened += usize::from(open(&bytes, &path).is_ok());
        }
    }
    // Such as letters of a name that nobody reads.
    assert!(opened > 0);
}

/// What a header may claim without a byte of it being there.
#[test]
fn claims_beyond_the_file_are_refused_before_memory_is_taken() {
    const HUGE: u64 = 1 << 60;
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let text_of = |length: u64| length.to_le_bytes().to_vec();
    let first = |parts: Parts| Parts { keys: Vec::new(), tensors: Vec::new(), ..parts };
    let mut long_key = first(tiny());
    long_key.keys.push((String::new(), 0, vec![0]));
    let mut bytes = long_key.header();
    let at = bytes.len() - 13;
    bytes[at..at + 8].copy_from_slice(&HUGE.to_le_bytes());
    refused(&bytes, &["a key", "1152921504606846976 bytes"]);
    refused(&Parts { tensor_count: Some(HUGE), ..tiny() }.bytes(), &["1152921504606846976 tensors", "truncated"]);
    refused(&Parts { key_count: Some(HUGE), ..tiny() }.bytes(), &["1152921504606846976 keys", "truncated"]);
    refused(&Parts { key_count: Some(u64::MAX), ..tiny() }.bytes(), &["keys", "truncated"]);
    for (kind, value) in [
        (STRING, text_of(HUGE)),
        (STRING, text_of(u64::MAX)),
        (LIST, list(U32, HUGE)),
        (LIST, list(12, u64::MAX)),
        (LIST, list(STRING, HUGE)),
        (LIST, [list(STRING, 1), text_of(HUGE)].concat()),
        (LIST, [list(STRING, 1), text_of(u64::MAX)].concat()),
    ] {
        refused(&tiny().key("x", kind, &value).bytes(), &["`x`"]);
    }
    let embedding = "token_embd.weight";
    let sized = |dims: &'static [u64]| tiny().tensor(embedding, |tensor| tensor.dims = dims.to_vec()).bytes();
    refused(&sized(&[1 << 60, 8]), &[embedding, "truncated"]);
    refused(&sized(&[1 << 60, 32]), &[embedding, "larger than can be counted"]);
    refused(&sized(&[1 << 40, 1 << 40]), &[embedding, "larger than can be counted"]);
    refused(&sized(&[u64::MAX - 31, 2]), &[embedding]);
    refused(&sized(&[32, 1 << 40]), &[embedding, "truncated"]);
    refused(&tiny().tensor(embedding, |tensor| tensor.offset = u64::MAX - 31).bytes(), &[embedding, "truncated"]);
}

#[test]
fn what_cannot_be_is_named() {
    let embedding = "token_embd.weight";
    let with = |change: &dyn Fn(&mut Record)| tiny().tensor(embedding, change).bytes();
    refused(&with(&|tensor| tensor.dims = vec![0, 8]), &[embedding, "empty"]);
    refused(&with(&|tensor| tensor.dims = Vec::new()), &[embedding, "0 dimensions", "1 to 4"]);
    refused(&with(&|tensor| tensor.dims = vec![32, 1, 1, 1, 1]), &[embedding, "5 dimensions"]);
    refused(&with(&|tensor| tensor.dims = vec![33, 8]), &[embedding, "no whole blocks of 32 in Q8_0"]);
    refused(&with(&|tensor| tensor.kind = 19), &[embedding, "IQ1_S", "Q4_K"]);
    refused(&with(&|tensor| tensor.kind = 4_000_000), &[embedding, "type 4000000", "not known"]);
    refused(&with(&|tensor| tensor.offset = 1), &[embedding, "no multiple of 32"]);
    refused(&with(&|tensor| tensor.offset = 32 * 20), &["overlap", embedding]);
    refused(&with(&|tensor| tensor.name = "output_norm.weight".to_owned()), &["twice", "output_norm.weight"]);
    refused(&Parts { magic: *b"GGML", ..tiny() }.bytes(), &["does not begin with `GGUF`"]);
    refused(&Parts { version: 1, ..tiny() }.bytes(), &["version 1"]);
    refused(&Parts { version: 99, ..tiny() }.bytes(), &["version 99", "2 and 3"]);
    refused(&Parts { version: 3 << 24, ..tiny() }.bytes(), &["big-endian"]);
    let mut twice = tiny();
    twice.keys.push(twice.keys[2].clone());
    refused(&twice.bytes(), &["twice", "llama.block_count"]);
    refused(&tiny().key("x", 13, &[]).bytes(), &["`x`", "type 13"]);
    refused(&tiny().key("x", LIST, &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).bytes(), &["`x`", "list of type 9"]);
    refused(&tiny().key("x", STRING, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).bytes(), &["`x`", "UTF-8"]);
    for alignment in [0u32, 3, 1 << 31] {
        refused(&tiny().key("general.alignment", U32, &alignment.to_le_bytes()).bytes(), &["power of two"]);
    }
    refused(&tiny().key("split.count", U32, &3u32.to_le_bytes()).bytes(), &["one of 3 files", "--merge"]);
    refused(b"<!DOCTYPE html><html>", &["web page"]);
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1020640\n", &["Git LFS pointer"]);
}

#[test]
fn models_that_are_not_read_are_refused_by_name() {
    refused(
        &tiny().key("general.architecture", STRING, &text("qwen4")).bytes(),
        &["`qwen4`", "nearest is `qwen", "`llama`"],
    );
    refused(&tiny().without("general.architecture").bytes(), &["general.architecture"]);
    refused(&tiny().without("llama.block_count").bytes(), &["llama.block_count"]);
    refused(&tiny().without("llama.attention.layer_norm_rms_epsilon").bytes(), &["layer_norm_rms_epsilon"]);
    let set = |key: &str, value: u32| tiny().key(&format!("llama.{key}"), U32, &value.to_le_bytes()).bytes();
    refused(&set("expert_count", 8), &["llama.expert_count", "another model"]);
    refused(&set("attention.value_length", 8), &["llama.attention.value_length", "16"]);
    refused(&set("rope.dimension_count", 8), &["llama.rope.dimension_count", "16"]);
    refused(&set("attention.head_count", 0), &["num_attention_heads"]);
    refused(&set("attention.head_count", u32::MAX), &["num_attention_heads"]);
    refused(&set("block_count", u32::MAX), &["num_hidden_layers"]);
    refused(&set("block_count", 2), &["blk.1.", "absent"]);
    refused(&set("embedding_length", 64), &["[8, 32]", "[8, 64]"]);
    let per_layer = [&U32.to_le_bytes()[..], &1u64.to_le_bytes(), &1u32.to_le_bytes()].concat();
    refused(&tiny().key("llama.attention.head_count_kv", LIST, &per_layer).bytes(), &["head_count_kv", "as a list"]);
    refused(&tiny().key("llama.rope.scaling.type", STRING, &text("yarn")).bytes(), &["`yarn`", "`linear`"]);
    refused(&tiny().key("llama.rope.freq_base", F32, &f32::NAN.to_le_bytes()).bytes(), &["rope.freq_base", "finite"]);
    refused(&tiny().without("token_embd.weight").bytes(), &["token_embd.weight"]);
    refused(&tiny().without("blk.0.ffn_up.weight").bytes(), &["blk.0.ffn_up.weight", "absent", "nearest"]);
    let quantized_norm = |tensor: &mut Record| tensor.kind = 8;
    refused(&tiny().tensor("output_norm.weight", quantized_norm).bytes(), &["output_norm.weight", "Q8_0", "F32"]);
    let ropes = Record { name: "rope_freqs.weight".to_owned(), dims: vec![4, 2], kind: 0, offset: 0 };
    let mut parts = tiny();
    parts.tensors.push(Record { offset: parts.data_bytes as u64, ..ropes.clone() });
    parts.data_bytes += 32;
    refused(&parts.bytes(), &["rope_freqs.weight", "short list"]);
    let mut parts = tiny();
    parts.tensors.push(Record { offset: parts.data_bytes as u64, dims: vec![8], ..ropes });
    parts.data_bytes += 32;
    refused(&parts.bytes(), &["short_factor", "above 0"]);
}
