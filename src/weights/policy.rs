//! Which format holds a matrix: what transformers converts by default, and what it leaves alone.

use anyhow::{Result, anyhow};

use super::spec::Role;
use crate::quant::{self, Format, FormatOptions, fp16, fp32};

/// The formats that hold a model at one precision.
pub struct Formats {
    asked: Box<dyn Format>,
    /// Of what no precision quantizes; fp32 at that precision.
    fp16: Box<dyn Format>,
    fp32: Box<dyn Format>,
}

impl Formats {
    /// Fails where `precision` is neither a name of [`quant::FORMATS`] nor `fp32`, which holds every value of the checkpoint
    /// as it is: the reference that precisions are compared with.
    pub fn new(precision: &str, options: FormatOptions) -> Result<Self> {
        let exact = precision == fp32::ENTRY.name;
        let found = if exact { Some(&fp32::ENTRY) } else { quant::find(precision) };
        let asked = found.ok_or_else(|| anyhow!("no format is named `{precision}`"))?;
        let unquantized = if exact { &fp32::ENTRY } else { &fp16::ENTRY };
        let make = |entry: &quant::FormatEntry| (entry.new)(options);
        Ok(Self { asked: make(asked), fp16: make(unquantized), fp32: make(&fp32::ENTRY) })
    }

    /// The precision itself.
    pub fn asked(&self) -> &dyn Format {
        self.asked.as_ref()
    }

    /// Whether matrices of this role keep the checkpoint's own values.
    pub fn is_exact(&self, role: Role) -> bool {
        self.of(role).name() == fp32::ENTRY.name
    }

    /// Whether norm weights and biases do.
    pub fn has_exact_vectors(&self) -> bool {
        self.asked.name() == fp32::ENTRY.name
    }

    pub fn fp16(&self) -> &dyn Format {
        self.fp16.as_ref()
    }

    /// transformers converts linear layers only, without the head; what an architecture lists in `_keep_in_fp32_modules`
    /// stays fp32 when the model's dtype is fp16.
    pub fn of(&self, role: Role) -> &dyn Format {
        match role {
            Role::Projection => self.asked.as_ref(),
            Role::Head | Role::Embedding | Role::Patches => self.fp16.as_ref(),
            Role::HighPrecision => self.fp32.as_ref(),
        }
    }
}
