//! What files are called: llama.cpp's recipes, each of which gives every tensor a type.

use super::super::{FormatEntry, FormatId, fp16, fp32};
use super::block::{Block, Mixture, mixture};
use super::{k_quants, small};

/// A value of `general.file_type`. It names the recipe of a file; tensors say their types by themselves.
#[derive(Debug, Clone, Copy)]
pub struct FileType {
    pub number: u32,
    /// The row of a file of this recipe.
    pub format: FormatId,
}

macro_rules! mixtures {
    ($($id:ident, $entry:ident, $name:literal, $commonest:ty, $doc:literal;)*) => {
        $(pub const $id: FormatId = FormatId::of(&$entry);
        static $entry: FormatEntry =
            mixture($name, $doc, |_| Box::new(Mixture { id: $id, commonest: <$commonest>::ID }));)*
    };
}

mixtures! {
    Q2_K_S, Q2_K_S_ENTRY, "q2_k_s", k_quants::Q2K, "a file mostly in Q2_K, its smaller mixture";
    Q3_K_S, Q3_K_S_ENTRY, "q3_k_s", k_quants::Q3K, "a file mostly in Q3_K, its smallest mixture";
    Q3_K_M, Q3_K_M_ENTRY, "q3_k_m", k_quants::Q3K, "a file mostly in Q3_K, its middle mixture";
    Q3_K_L, Q3_K_L_ENTRY, "q3_k_l", k_quants::Q3K, "a file mostly in Q3_K, its largest mixture";
    Q4_K_S, Q4_K_S_ENTRY, "q4_k_s", k_quants::Q4K, "a file mostly in Q4_K, its smaller mixture";
    Q4_K_M, Q4_K_M_ENTRY, "q4_k_m", k_quants::Q4K, "a file mostly in Q4_K, part of it in Q6_K";
    Q5_K_S, Q5_K_S_ENTRY, "q5_k_s", k_quants::Q5K, "a file mostly in Q5_K, its smaller mixture";
    Q5_K_M, Q5_K_M_ENTRY, "q5_k_m", k_quants::Q5K, "a file mostly in Q5_K, part of it in Q6_K";
    MXFP4_MOE, MXFP4_MOE_ENTRY, "mxfp4_moe", small::Mxfp4, "a file with experts in MXFP4";
}

/// The recipes whose files can be read.
pub static FILE_TYPES: &[FileType] = &[
    FileType { number: 0, format: fp32::ID },
    FileType { number: 1, format: fp16::ID },
    FileType { number: 2, format: small::Q4_0::ID },
    FileType { number: 3, format: small::Q4_1::ID },
    FileType { number: 7, format: small::Q8_0::ID },
    FileType { number: 8, format: small::Q5_0::ID },
    FileType { number: 9, format: small::Q5_1::ID },
    FileType { number: 10, format: k_quants::Q2K::ID },
    FileType { number: 11, format: Q3_K_S },
    FileType { number: 12, format: Q3_K_M },
    FileType { number: 13, format: Q3_K_L },
    FileType { number: 14, format: Q4_K_S },
    FileType { number: 15, format: Q4_K_M },
    FileType { number: 16, format: Q5_K_S },
    FileType { number: 17, format: Q5_K_M },
    FileType { number: 18, format: k_quants::Q6K::ID },
    FileType { number: 21, format: Q2_K_S },
    FileType { number: 25, format: small::Iq4Nl::ID },
    FileType { number: 30, format: k_quants::Iq4Xs::ID },
    FileType { number: 32, format: small::Bf16::ID },
    FileType { number: 38, format: MXFP4_MOE },
];
