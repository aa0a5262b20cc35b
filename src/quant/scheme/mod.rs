//! Checkpoints in safetensors that were quantized before they were saved: what `quantization_config` says of them ([`Section`]), and how the
//! tensors of a module become a matrix ([`Scheme`]). Each method has a folder that reads both; [`METHODS`] lists them.

mod module;
mod patterns;
mod section;

use std::fmt::Debug;
use std::sync::Arc;

use anyhow::Result;

pub use module::{Module, ModuleSlice, ModuleTensors, finite};
pub use patterns::Patterns;
pub use section::Section;

use super::{FormatId, Stored};
use crate::error::BadInput;

/// A `quant_method` whose checkpoints are read.
pub trait QuantMethod: Send + Sync {
    /// As `quantization_config` names it.
    fn name(&self) -> &'static str;

    /// Fails with [`BadInput`] on settings that are not computed here.
    fn read(&self, section: &Section) -> Result<Arc<dyn Scheme>>;
}

/// How a checkpoint holds the matrices that its method quantized.
pub trait Scheme: Debug + Send + Sync {
    /// The format that rows of such a checkpoint are called by. Of several it is the one that most of `modules` are in.
    fn precision(&self, modules: &[String]) -> FormatId;

    /// Names of tensors, behind the module's, of which one is there for each module that was quantized.
    fn marks(&self) -> &'static [&'static str];

    /// Names of all tensors that may belong to a module, behind the module's.
    fn companions(&self) -> &'static [&'static str];

    /// Whether a module was left alone on purpose.
    fn skips(&self, module: &str) -> bool;

    /// The key that lists such modules.
    fn skip_key(&self) -> &'static str;

    /// The format of a module and the bytes of its matrix, from shapes alone. Fails with [`BadInput`] where they are not those of an `[n, k]`
    /// matrix.
    fn held(&self, module: &Module) -> Result<(FormatId, u64)>;

    /// The matrix of a module. Fails where [`Self::held`] does, on an I/O error, and with [`BadInput`] on values without a meaning.
    fn read(&self, module: &Module) -> Result<Box<dyn Stored>>;
}

/// The methods that are read.
pub static METHODS: &[&dyn QuantMethod] = &[
    &super::gptq::Gptq,
    &super::awq::Awq,
    &super::fp8::Fp8,
    &super::fp8::Fbgemm,
    &super::compressed_tensors::CompressedTensors,
    &super::mxfp4::GptOss,
    &super::modelopt::ModelOpt,
];

/// The method of this name.
pub fn method(name: &str) -> Option<&'static dyn QuantMethod> {
    METHODS.iter().copied().find(|method| method.name() == name)
}

/// The error for a value of a section that is not computed.
pub fn not_read(key: &str, seen: impl std::fmt::Display, allowed: &str) -> anyhow::Error {
    BadInput::new(format!("config.json's quantization_config has {key} {seen}; {allowed} can be read"))
        .hint(OTHER_MODEL)
        .into()
}

/// What to do about a checkpoint that is not read.
pub const OTHER_MODEL: &str =
    "name the 16-bit model that the checkpoint was made from, or measure its shape with `--weights random`";
