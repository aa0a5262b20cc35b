//! The engines that this binary has adapters for, each with its formats by width.

use serde::{Deserialize, Serialize};

use crate::quant::{self, FormatId, int8, nf4};

/// A width in bits, as `16bit` asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Width {
    Bits16,
    Bits8,
    Bits4,
}

/// Every width, the widest first.
pub const WIDTHS: [Width; 3] = [Width::Bits16, Width::Bits8, Width::Bits4];

impl Width {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Width::Bits16 => "16bit",
            Width::Bits8 => "8bit",
            Width::Bits4 => "4bit",
        }
    }

    pub fn parse(word: &str) -> Option<Self> {
        WIDTHS.into_iter().find(|width| width.name() == word)
    }

    /// Our own format of this width.
    pub fn own(self) -> FormatId {
        match self {
            Width::Bits16 => quant::BASELINE,
            Width::Bits8 => int8::ID,
            Width::Bits4 => nf4::ID,
        }
    }
}

/// What an engine is asked to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// Its own format of the width.
    Width(Width),
    /// A format by its own name.
    Name(String),
}

/// The form in which an engine takes a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelForm {
    /// A folder with config.json and safetensors files.
    Folder,
    /// One GGUF file.
    Gguf,
}

/// A Python package that an adapter imports.
#[derive(Debug)]
pub struct Package {
    pub name: &'static str,
    /// The oldest version whose interface the adapter calls.
    pub least: &'static str,
}

/// An engine that this binary has an adapter for, in Python.
pub struct Adapter {
    pub name: &'static str,
    /// One line for help.
    pub doc: &'static str,
    /// The adapter's code, behind the part that all share.
    pub source: &'static str,
    pub packages: &'static [Package],
    pub form: ModelForm,
    /// Its formats by width, and those that are asked for by name alone.
    pub formats: &'static [(Option<Width>, &'static str)],
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const BITSANDBYTES: &[(Option<Width>, &str)] = &[
    (Some(Width::Bits16), "fp16"),
    (Some(Width::Bits8), "int8"),
    (Some(Width::Bits4), "nf4"),
    (None, "nf4-nodq"),
    (None, "bf16"),
    (None, "fp32"),
];

/// transformers 4.56 renamed an argument to `dtype`; bitsandbytes 0.46 is the first with 4 bits on CPUs.
const TRANSFORMERS: &[Package] = &[
    Package { name: "torch", least: "2.4" },
    Package { name: "transformers", least: "4.56" },
    Package { name: "bitsandbytes", least: "0.46" },
];

/// The engines with an adapter.
pub static ADAPTERS: &[Adapter] = &[
    Adapter {
        name: "transformers",
        doc: "transformers' generate, eager; int8 and nf4 by bitsandbytes",
        source: include_str!("python/transformers_engine.py"),
        packages: TRANSFORMERS,
        form: ModelForm::Folder,
        formats: BITSANDBYTES,
    },
    Adapter {
        name: "transformers-compile",
        doc: "the same with a static cache and torch.compile",
        source: include_str!("python/transformers_engine.py"),
        packages: TRANSFORMERS,
        form: ModelForm::Folder,
        formats: BITSANDBYTES,
    },
    Adapter {
        name: "llama.cpp",
        doc: "llama.cpp through llama-cpp-python",
        source: include_str!("python/llama_cpp_engine.py"),
        // The first with llama.cpp's `llama_memory` calls.
        packages: &[Package { name: "llama-cpp-python", least: "0.3.10" }],
        form: ModelForm::Gguf,
        formats: &[(Some(Width::Bits16), "f16"), (Some(Width::Bits8), "q8_0"), (Some(Width::Bits4), "q4_0")],
    },
];

impl Adapter {
    /// The format that stands nearest: of the same width, else the first.
    pub fn nearest(&self, asked: &Asked) -> &'static str {
        let width = match asked {
            Asked::Width(width) => Some(*width),
            Asked::Name(name) => width_of(name),
        };
        let same = self.formats.iter().find(|(own, _)| width.is_some() && *own == width);
        same.or(self.formats.first()).map_or("", |(_, name)| name)
    }
}

/// Width of a format that any engine has.
pub fn width_of(name: &str) -> Option<Width> {
    let by_adapters = ADAPTERS.iter().flat_map(|adapter| adapter.formats);
    let known = by_adapters.filter(|(_, own)| *own == name).find_map(|(width, _)| *width);
    known.or_else(|| WIDTHS.into_iter().find(|width| width.own().name == name)).or(match name {
        "nf4-nodq" => Some(Width::Bits4),
        "bf16" => Some(Width::Bits16),
        _ => None,
    })
}

/// True for a name that some adapter has a format of.
pub fn is_format(name: &str) -> bool {
    ADAPTERS.iter().flat_map(|adapter| adapter.formats).any(|(_, own)| *own == name)
}
