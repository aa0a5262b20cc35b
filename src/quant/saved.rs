//! How bitsandbytes saves the matrices of a format, and how config.json names the format. Each format that bitsandbytes has
//! implements [`SavedForm`] in its folder.

use anyhow::Result;
use safetensors::Dtype;

use super::Part;
use crate::error::BadInput;

/// Keys of `quantization_config` that transformers writes for a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedConfig<'a> {
    /// `load_in_8bit`.
    EightBit,
    /// `load_in_4bit`, with `bnb_4bit_quant_type` and `bnb_4bit_use_double_quant`.
    FourBit { quant_type: &'a str, double_quant: bool },
}

impl<'a> SavedConfig<'a> {
    /// `bnb_4bit_quant_type`; `None` for 8 bits. Formats that share it differ in double quantization at most.
    pub fn quant_type(self) -> Option<&'a str> {
        match self {
            Self::EightBit => None,
            Self::FourBit { quant_type, double_quant: _ } => Some(quant_type),
        }
    }
}

/// A tensor that belongs to a saved matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Companion {
    /// As [`Part::suffix`] has it.
    pub suffix: &'static str,
    pub dtype: Dtype,
    /// Count of its values; `None` for any.
    pub len: Option<usize>,
    pub is_optional: bool,
}

impl Companion {
    pub fn new(suffix: &'static str, dtype: Dtype, len: usize) -> Self {
        Self { suffix, dtype, len: Some(len), is_optional: false }
    }
}

/// A matrix in a checkpoint.
pub struct SavedMatrix<'a> {
    /// The weight's name, for messages.
    pub name: &'a str,
    pub n: usize,
    pub k: usize,
    /// Reads a companion; `None` where it is absent.
    pub read: &'a dyn Fn(&'static str) -> Result<Option<Part>>,
}

impl SavedMatrix<'_> {
    /// Those of `suffixes` that are there.
    pub fn parts(&self, suffixes: &[&'static str]) -> Result<Vec<Part>> {
        let parts = suffixes.iter().map(|suffix| (self.read)(suffix));
        parts.filter_map(Result::transpose).collect()
    }

    /// Fails with [`BadInput`] unless `holds`.
    pub fn ensure(&self, holds: bool, message: impl Fn(&str) -> String) -> Result<()> {
        match holds {
            true => Ok(()),
            false => {
                Err(BadInput::new(message(self.name)).hint("name the model that the checkpoint was made from").into())
            }
        }
    }
}

/// The form in which bitsandbytes saves a format's matrices.
pub trait SavedForm: Send + Sync {
    fn config(&self) -> SavedConfig<'static>;

    /// The tensors of an `[n, k]` matrix, the weight itself first.
    fn companions(&self, n: usize, k: usize) -> Vec<Companion>;

    /// True if a weight of this dtype is held in this form; `has` says which companions are beside it.
    fn holds(&self, dtype: Dtype, has: &dyn Fn(&str) -> bool) -> bool;

    /// The matrix's [`Part`]s. Fails with [`BadInput`] where its texts and tables say something else than its bytes mean here.
    fn read(&self, matrix: &SavedMatrix) -> Result<Vec<Part>>;

    /// The tensors that bitsandbytes saves for an `[n, k]` matrix in `parts`.
    fn write(&self, shape: (usize, usize), parts: Vec<Part>) -> Result<Vec<Part>>;
}
