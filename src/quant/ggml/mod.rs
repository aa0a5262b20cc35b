//! The block formats of ggml, in which GGUF files hold matrices: rows of blocks with scales of their own. They are read as stored; most are
//! made at load as well (`encode.rs`).
//!
//! Each type is a `Block` that decodes its bytes to fp32; all that a format needs beyond that is written once, over blocks. A product
//! multiplies the decoded values by unquantized activations, which is another arithmetic than llama.cpp's, whose kernels round activations to
//! 8 bits.
//!
//! Every value is `d·s·q`, exact in fp32, plus or minus at most one other exact product: one rounding, so that the decoded bits are the same on
//! every machine. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.

mod block;
mod cpu;
mod encode;
mod files;
mod k_quants;
mod small;

use safetensors::Dtype;

use super::{FormatId, fp16, fp32};
use block::Block;

pub use files::{FILE_TYPES, FileType};

/// A type that a GGUF file may give a tensor.
#[derive(Debug, Clone, Copy)]
pub struct GgmlType {
    /// In a tensor's record.
    pub number: u32,
    /// As llama.cpp spells it.
    pub name: &'static str,
    /// The format of a matrix of this type.
    pub format: FormatId,
    /// Values of a block, which lie in one row.
    pub block_len: usize,
    pub block_bytes: usize,
    /// The dtype of plain values; `None` for blocks.
    pub plain: Option<Dtype>,
}

impl GgmlType {
    const fn plain(number: u32, name: &'static str, format: FormatId, bytes: usize, dtype: Dtype) -> Self {
        Self { number, name, format, block_len: 1, block_bytes: bytes, plain: Some(dtype) }
    }

    const fn blocks<B: Block>(number: u32, name: &'static str) -> Self {
        Self { number, name, format: B::ID, block_len: B::LEN, block_bytes: B::BYTES, plain: None }
    }

    /// Bytes of a row of `k` values; `None` where it is no whole number of blocks, and where it has more bytes than can be counted.
    pub fn row_bytes(&self, k: usize) -> Option<usize> {
        (k / self.block_len).checked_mul(self.block_bytes).filter(|_| k.is_multiple_of(self.block_len))
    }
}

/// MXFP4, whose matrices other files hold in another order.
pub const MXFP4: FormatId = small::Mxfp4::ID;

/// Every type that is read.
pub static TYPES: &[GgmlType] = &[
    GgmlType::plain(0, "F32", fp32::ID, 4, Dtype::F32),
    GgmlType::plain(1, "F16", fp16::ID, 2, Dtype::F16),
    GgmlType { plain: Some(Dtype::BF16), ..GgmlType::blocks::<small::Bf16>(30, "BF16") },
    GgmlType::blocks::<small::Q8_0>(8, "Q8_0"),
    GgmlType::blocks::<small::Q4_0>(2, "Q4_0"),
    GgmlType::blocks::<small::Q4_1>(3, "Q4_1"),
    GgmlType::blocks::<small::Q5_0>(6, "Q5_0"),
    GgmlType::blocks::<small::Q5_1>(7, "Q5_1"),
    GgmlType::blocks::<k_quants::Q2K>(10, "Q2_K"),
    GgmlType::blocks::<k_quants::Q3K>(11, "Q3_K"),
    GgmlType::blocks::<k_quants::Q4K>(12, "Q4_K"),
    GgmlType::blocks::<k_quants::Q5K>(13, "Q5_K"),
    GgmlType::blocks::<k_quants::Q6K>(14, "Q6_K"),
    GgmlType::blocks::<small::Iq4Nl>(20, "IQ4_NL"),
    GgmlType::blocks::<k_quants::Iq4Xs>(23, "IQ4_XS"),
    GgmlType::blocks::<small::Mxfp4>(39, "MXFP4"),
];

/// Names of types that are known and not read.
const UNREAD: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// The formats that files hold: those of tensors, and the mixtures that files are named by.
pub static FORMATS: &[FormatId] = &[
    small::Bf16::ID,
    small::Q8_0::ID,
    small::Q4_0::ID,
    small::Q4_1::ID,
    small::Q5_0::ID,
    small::Q5_1::ID,
    k_quants::Q2K::ID,
    k_quants::Q3K::ID,
    k_quants::Q4K::ID,
    k_quants::Q5K::ID,
    k_quants::Q6K::ID,
    small::Iq4Nl::ID,
    k_quants::Iq4Xs::ID,
    small::Mxfp4::ID,
    files::Q2_K_S,
    files::Q3_K_S,
    files::Q3_K_M,
    files::Q3_K_L,
    files::Q4_K_S,
    files::Q4_K_M,
    files::Q5_K_S,
    files::Q5_K_M,
    files::MXFP4_MOE,
];

/// The type of this number. Fails with its name where it is known.
pub fn type_of(number: u32) -> Result<&'static GgmlType, String> {
    TYPES.iter().find(|known| known.number == number).ok_or_else(|| {
        let name = UNREAD.iter().find(|(unread, _)| *unread == number).map(|(_, name)| *name);
        name.map_or_else(|| format!("type {number}, which is not known"), |name| format!("{name}, which is not read"))
    })
}

/// As messages list them.
pub fn known() -> String {
    TYPES.iter().map(|known| known.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_and_every_format_is_there_once() {
        let mut numbers: Vec<u32> =
            TYPES.iter().map(|known| known.number).chain(UNREAD.iter().map(|(n, _)| *n)).collect();
        numbers.sort_unstable();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        let blocks = TYPES.iter().filter(|known| known.format.is_stored);
        assert!(blocks.clone().all(|known| FORMATS.contains(&known.format)));
        assert_eq!(blocks.count(), TYPES.len() - 2);
        for known in TYPES {
            assert_eq!(type_of(known.number).unwrap().name, known.name);
            let mut format = (known.format.new)(super::super::FormatOptions::default());
            assert_eq!(format.id(), known.format);
            assert_eq!(Some(format.stored_bytes(3, 512)), known.row_bytes(512).map(|bytes| 3 * bytes));
            format = (known.format.new)(super::super::FormatOptions { int8_threshold: 0.0 });
            assert_eq!(format.id(), known.format);
        }
        assert_eq!(type_of(19).unwrap_err(), "IQ1_S, which is not read");
        assert_eq!(type_of(u32::MAX).unwrap_err(), "type 4294967295, which is not known");
        assert_eq!(type_of(12).unwrap().row_bytes(100), None, "no whole block");
        assert_eq!(type_of(0).unwrap().row_bytes(usize::MAX), None, "more than can be counted");
    }

    #[test]
    fn mixtures_are_named_by_their_files_and_hold_nothing_themselves() {
        for file_type in FILE_TYPES {
            let format = (file_type.format.new)(super::super::FormatOptions::default());
            assert_eq!(format.id(), file_type.format);
            assert!(format.stored_bytes(3, 512) > 0);
        }
        let mixture = (files::Q4_K_M.new)(super::super::FormatOptions::default());
        assert_eq!(mixture.stored_bytes(2, 256), 288, "its commonest type");
        assert!(mixture.restore(1, 256, Vec::new()).is_err());
    }
}
