//! Which format holds a matrix: what transformers converts by default, and what it leaves alone.

use anyhow::{Result, anyhow};

use super::spec::Role;
use crate::quant::{self, Format, FormatOptions, fp16, fp32};

/// The formats that hold a model at one precision.
pub struct Formats {
    asked: Box<dyn Format>,
    fp16: Box<dyn Format>,
    fp32: Box<dyn Format>,
}

impl Formats {
    /// Fails where `precision` is no name of [`quant::FORMATS`].
    pub fn new(precision: &str, options: FormatOptions) -> Result<Self> {
        let asked = quant::find(precision).ok_or_else(|| anyhow!("no format is named `{precision}`"))?;
        let make = |entry: &quant::FormatEntry| (entry.new)(options);
        Ok(Self { asked: make(asked), fp16: make(&fp16::ENTRY), fp32: make(&fp32::ENTRY) })
    }

    /// The precision itself.
    pub fn asked(&self) -> &dyn Format {
        self.asked.as_ref()
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
