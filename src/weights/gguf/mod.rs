//! GGUF files, llama.cpp's: a checkpoint as one file, read as stored ([`GgufFile`]) and written ([`export`]).
//!
//! Names, metadata and the order of rows are those of llama.cpp's `constants.py` and `convert_hf_to_gguf.py`; the layout is that of
//! ggml's `docs/gguf.md`, version 3.

mod config;
mod cursor;
mod file;
mod metadata;
mod recipe;
mod source;
mod tokenizer;
mod write;

use anyhow::{Result, ensure};

pub use config::config;
pub use file::GgufFile;
pub use recipe::Recipe;
pub(super) use source::{GgufSource, hold, is_f16, quantized};
pub(super) use tokenizer::{chat_template, open as tokenizer};
pub use write::{export, not_written};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Where tensors begin, unless a key says otherwise.
const ALIGNMENT: u64 = 32;
/// Types of tensors, in ggml's numbers.
const F32: u32 = 0;
const F16: u32 = 1;
/// Types of values, in GGUF's numbers.
const UINT32: u32 = 4;
const FLOAT32: u32 = 6;
const STRING: u32 = 8;

/// Divisors of the rotary frequencies, one for each pair of elements of a head.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A family of models as llama.cpp knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Family {
    /// `model_type` of config.json.
    model_type: &'static str,
    /// `general.architecture`.
    name: &'static str,
    /// Keys and queries turn neighbouring elements, where checkpoints turn the two halves of a head.
    turns_neighbours: bool,
    /// Activation, as config.json names it.
    activation: &'static str,
    /// The key of the norms' epsilon, in config.json and behind the family's name.
    epsilon: (&'static str, &'static str),
    /// Whether a part of each head may turn.
    turns_in_part: bool,
}

const RMS: (&str, &str) = ("rms_norm_eps", "attention.layer_norm_rms_epsilon");

const LLAMA: Family = Family {
    model_type: "llama",
    name: "llama",
    turns_neighbours: true,
    activation: "silu",
    epsilon: RMS,
    turns_in_part: false,
};

const FAMILIES: &[Family] = &[
    LLAMA,
    Family { model_type: "qwen2", name: "qwen2", turns_neighbours: false, ..LLAMA },
    Family { model_type: "qwen3", name: "qwen3", turns_neighbours: false, ..LLAMA },
    Family {
        model_type: "phi",
        name: "phi2",
        turns_neighbours: false,
        activation: "gelu_new",
        epsilon: ("layer_norm_eps", "attention.layer_norm_epsilon"),
        turns_in_part: true,
    },
];

/// Parts of names, the checkpoint's and llama.cpp's.
const NAMES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("model.final_layernorm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.dense", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
];

/// `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`.
fn gguf_name(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let known = |part: &str| NAMES.iter().find(|(own, _)| *own == part).map(|(_, theirs)| *theirs);
    match stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => Some(format!("blk.{layer}.{}.{kind}", known(part)?)),
        None => Some(format!("{}.{kind}", known(stem)?)),
    }
}

/// Whether the rows of a tensor of this name lie in another order than in checkpoints.
fn is_turned(family: &Family, gguf_name: &str) -> bool {
    family.turns_neighbours && [".attn_q.", ".attn_k."].iter().any(|part| gguf_name.contains(part))
}

/// The order of `n` rows in a file, as rows of the checkpoint: of each head, the rows of the two halves by turns.
fn order(n: usize, head_rows: Option<usize>) -> Result<Vec<usize>> {
    let Some(head) = head_rows else { return Ok((0..n).collect()) };
    ensure!(head > 0 && head.is_multiple_of(2) && n.is_multiple_of(head), "{n} rows are no heads of {head}");
    let within = |at: usize| at / 2 + (at % 2) * head / 2;
    Ok((0..n).map(|row| row / head * head + within(row % head)).collect())
}

/// Where row `row` of the checkpoint lies in a file, for heads of `head` rows, an even number.
fn place(row: usize, head: usize) -> usize {
    let at = row % head;
    row - at + if at < head / 2 { 2 * at } else { 2 * at + 1 - head }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_llama_cpps() {
        for (own, theirs) in [
            ("model.embed_tokens.weight", Some("token_embd.weight")),
            ("model.layers.3.mlp.up_proj.weight", Some("blk.3.ffn_up.weight")),
            ("model.layers.12.self_attn.q_proj.bias", Some("blk.12.attn_q.bias")),
            ("model.final_layernorm.bias", Some("output_norm.bias")),
            ("model.layers.0.mlp.experts.0.w1.weight", None),
            ("model.norm.scale", None),
        ] {
            assert_eq!(gguf_name(own).as_deref(), theirs, "{own}");
        }
    }

    /// What `permute` of convert_hf_to_gguf.py does to two heads of four rows.
    #[test]
    fn halves_of_a_head_become_neighbours() {
        assert_eq!(order(8, Some(4)).unwrap(), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order(3, None).unwrap(), [0, 1, 2]);
        assert!(order(6, Some(4)).is_err());
        assert!(order(0, Some(0)).is_err());
        for head in [2, 4, 6, 64] {
            for (place_in_file, row) in order(3 * head, Some(head)).unwrap().into_iter().enumerate() {
                assert_eq!(place(row, head), place_in_file, "row {row} of heads of {head}");
            }
        }
    }
}
