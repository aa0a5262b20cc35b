//! The type that each tensor of a file is written in, by llama.cpp's recipes: those of `llama-quantize` without an importance matrix.

use super::{F16, F32};
use crate::quant::FormatId;
use crate::quant::ggml::{GgmlType, TYPES};

/// ggml's numbers.
const Q4_0: u32 = 2;
const Q5_0: u32 = 6;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;
const Q5_K: u32 = 13;
const Q6_K: u32 = 14;

/// A recipe.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// As files of it are called.
    name: &'static str,
    /// `general.file_type`; `None` where llama.cpp has no number for it.
    pub file_type: Option<u32>,
    /// The type of most matrices, and of the head.
    usual: u32,
    head: u32,
    /// Whether some values and downs take a wider type.
    is_mixed: bool,
}

const RECIPES: &[Recipe] = &[
    Recipe { name: "fp16", file_type: Some(1), usual: F16, head: F16, is_mixed: false },
    Recipe { name: "q8_0", file_type: Some(7), usual: Q8_0, head: Q8_0, is_mixed: false },
    Recipe { name: "q4_0", file_type: Some(2), usual: Q4_0, head: Q6_K, is_mixed: false },
    Recipe { name: "q4_k", file_type: None, usual: Q4_K, head: Q6_K, is_mixed: false },
    Recipe { name: "q4_k_m", file_type: Some(15), usual: Q4_K, head: Q6_K, is_mixed: true },
    Recipe { name: "q6_k", file_type: Some(18), usual: Q6_K, head: Q6_K, is_mixed: false },
];

/// The names of all recipes.
pub fn names() -> impl Iterator<Item = &'static str> {
    RECIPES.iter().map(|recipe| recipe.name)
}

impl Recipe {
    /// The recipe of a format's files; `None` where none is written.
    pub fn of(format: FormatId) -> Option<Self> {
        RECIPES.iter().find(|recipe| recipe.name == format.name).copied()
    }

    /// The type of the matrix `name` (llama.cpp's) whose rows have `k` values, in a model of `layers` layers with a head of its own or without.
    pub fn kind(&self, name: &str, k: usize, layers: usize, has_head: bool) -> &'static GgmlType {
        let is_head = name == "output.weight" || (name == "token_embd.weight" && !has_head);
        let wanted = if is_head { self.head } else { self.of_layer(name, layers) };
        // Rows that are no whole blocks take the next wider type of small blocks.
        let narrower = match wanted {
            Q4_K => Q5_0,
            Q5_K | Q6_K => Q8_0,
            other => other,
        };
        let fits = |number: u32| TYPES.iter().find(|kind| kind.number == number && kind.row_bytes(k).is_some());
        [wanted, narrower, F16].into_iter().find_map(fits).unwrap_or(plain(F16))
    }

    fn of_layer(&self, name: &str, layers: usize) -> u32 {
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let Some((layer, part)) = layer.and_then(|(layer, part)| Some((layer.parse().ok()?, part))) else {
            return self.usual;
        };
        match part {
            "attn_v.weight" | "ffn_down.weight" if self.is_mixed && takes_more_bits(layer, layers) => Q6_K,
            // Their values are shared by eight heads.
            "attn_v.weight" if self.is_mixed && layers == LAYERS_OF_70B => Q5_K,
            _ => self.usual,
        }
    }
}

/// Models that llama.cpp calls 70B.
const LAYERS_OF_70B: usize = 80;

/// The first and the last eighth of the layers, and each third between.
fn takes_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// A type of plain values.
pub fn plain(number: u32) -> &'static GgmlType {
    TYPES.iter().find(|kind| kind.number == number).unwrap_or(&TYPES[if number == F32 { 0 } else { 1 }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_a_format_and_every_type_is_made() {
        for recipe in RECIPES {
            let format = FormatId::named(recipe.name).expect("a format");
            assert_eq!(Recipe::of(format).map(|found| found.name), Some(recipe.name));
            for name in ["output.weight", "token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"] {
                for k in [100, 96, 256] {
                    let kind = recipe.kind(name, k, 2, true);
                    assert!(kind.row_bytes(k).is_some() && (kind.format.is_made || kind.plain.is_some()), "{name} {k}");
                }
            }
        }
        assert!(Recipe::of(crate::quant::nf4::ID).is_none());
    }

    #[test]
    fn wider_types_are_where_llama_cpp_has_them() {
        let wide = |layers: usize| (0..layers).filter(|layer| takes_more_bits(*layer, layers)).collect::<Vec<_>>();
        assert_eq!(wide(2), [1]);
        assert_eq!(wide(16), [0, 1, 4, 7, 10, 13, 14, 15]);
    }
}
