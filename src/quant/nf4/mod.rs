//! NF4 (QLoRA §3): 4-bit codes for the quantiles of a normal distribution, in blocks of 64 weights with one absmax each.
//!
//! Blocks run over the flattened matrix and may cross rows. With double quantization the blocks' absmax values are held as
//! 8-bit codes with an fp32 scale for every 256 and one fp32 offset ([`nested`]).

mod codes;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod nested;
mod saved;
mod state;
mod tile;

use candle_core::Result;
use half::f16;
use safetensors::Dtype;

use self::nested::NestedAbsmax;
use super::{
    CpuMatrix, Format, FormatEntry, FormatId, FormatOptions, HalfMatrix, Part, Stored, take_f32_part, take_part,
};
use crate::kernels::isa::Isa;

pub use codes::{BLOCK, CODES};

pub const ID: FormatId = FormatId::of(&ENTRY);
pub const NO_DOUBLE_QUANT: FormatId = FormatId::of(&ENTRY_NO_DOUBLE_QUANT);

static ENTRY: FormatEntry = FormatEntry {
    aliases: &["4bit"],
    without_double_quant: Some(NO_DOUBLE_QUANT),
    saved: Some(&saved::Nf4Saved(AbsmaxKind::Nested)),
    prefill_bytes: tile::tile_bytes,
    ..FormatEntry::plain(
        "nf4",
        "4-bit NormalFloat in blocks of 64, absmax double-quantized: bitsandbytes' NF4 (QLoRA)",
        |_: FormatOptions| Box::new(Nf4 { absmax: AbsmaxKind::Nested }),
    )
};

static ENTRY_NO_DOUBLE_QUANT: FormatEntry = FormatEntry {
    is_variant: true,
    saved: Some(&saved::Nf4Saved(AbsmaxKind::Plain)),
    prefill_bytes: tile::tile_bytes,
    ..FormatEntry::plain("nf4-nodq", "NF4 with fp32 absmax, without double quantization", |_: FormatOptions| {
        Box::new(Nf4 { absmax: AbsmaxKind::Plain })
    })
};

/// How blocks' absmax values are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AbsmaxKind {
    Plain,
    Nested,
}

impl AbsmaxKind {
    fn format(self) -> FormatId {
        match self {
            AbsmaxKind::Plain => NO_DOUBLE_QUANT,
            AbsmaxKind::Nested => ID,
        }
    }
}

struct Nf4 {
    absmax: AbsmaxKind,
}

impl Format for Nf4 {
    fn id(&self) -> FormatId {
        self.absmax.format()
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        stored_bytes(n, k, self.absmax)
    }

    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        weight.check()?;
        let (packed, absmax) = quantize_blocks(&weight.data);
        let absmax = match self.absmax {
            AbsmaxKind::Plain => Absmax::Plain(absmax),
            AbsmaxKind::Nested => Absmax::Nested(NestedAbsmax::quantize(absmax)),
        };
        Ok(Box::new(Nf4Stored { n: weight.n, k: weight.k, packed, absmax }))
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::cuda::DeviceBytes {
        cuda::device_bytes(n, k, self.absmax)
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, n: usize, k: usize, device: &candle_core::Device) -> Result<Box<dyn super::cuda::CudaEncoder>> {
        cuda::encoder(n, k, self.absmax, device)
    }

    fn restore(&self, n: usize, k: usize, mut parts: Vec<Part>) -> Result<Box<dyn Stored>> {
        let Some(values) = n.checked_mul(k).filter(|values| *values > 0) else {
            candle_core::bail!("a matrix of [{n}, {k}] cannot be stored")
        };
        let blocks = values.div_ceil(BLOCK);
        let packed = take_part(&mut parts, "", Dtype::U8, values.div_ceil(2))?;
        let absmax = match self.absmax {
            AbsmaxKind::Plain => Absmax::Plain(take_f32_part(&mut parts, "absmax", blocks)?),
            AbsmaxKind::Nested => Absmax::Nested(NestedAbsmax {
                codes: take_part(&mut parts, "absmax", Dtype::U8, blocks)?,
                absmax: take_f32_part(&mut parts, "nested_absmax", blocks.div_ceil(nested::NESTED_BLOCK))?,
                offset: take_f32_part(&mut parts, "nested_offset", 1)?[0],
            }),
        };
        Ok(Box::new(Nf4Stored { n, k, packed, absmax }))
    }
}

fn stored_bytes(n: usize, k: usize, absmax: AbsmaxKind) -> usize {
    let blocks = (n * k).div_ceil(BLOCK);
    let absmax = match absmax {
        AbsmaxKind::Plain => blocks * size_of::<f32>(),
        AbsmaxKind::Nested => nested::stored_bytes(blocks),
    };
    (n * k).div_ceil(2) + absmax
}

/// Packed codes, high nibble first, and each block's absmax.
fn quantize_blocks(weights: &[f16]) -> (Vec<u8>, Vec<f32>) {
    let mut packed = vec![0u8; weights.len().div_ceil(2)];
    let mut absmax = vec![0.0f32; weights.len().div_ceil(BLOCK)];
    cpu::encode(weights, &mut packed, &mut absmax);
    (packed, absmax)
}

/// One absmax for each block.
#[derive(Debug, Clone, PartialEq)]
enum Absmax {
    Plain(Vec<f32>),
    Nested(NestedAbsmax),
}

impl Absmax {
    #[inline]
    fn get(&self, block: usize) -> f32 {
        match self {
            Absmax::Plain(values) => values[block],
            Absmax::Nested(nested) => nested.get(block),
        }
    }

    fn stored_bytes(&self) -> usize {
        match self {
            Absmax::Plain(values) => size_of_val(&values[..]),
            Absmax::Nested(nested) => nested::stored_bytes(nested.codes.len()),
        }
    }

    fn kind(&self) -> AbsmaxKind {
        match self {
            Absmax::Plain(_) => AbsmaxKind::Plain,
            Absmax::Nested(_) => AbsmaxKind::Nested,
        }
    }

    fn parts(&self) -> Vec<Part> {
        match self {
            Absmax::Plain(values) => vec![fp32_part("absmax", values)],
            Absmax::Nested(nested) => vec![
                Part {
                    suffix: "absmax",
                    dtype: Dtype::U8,
                    shape: vec![nested.codes.len()],
                    bytes: nested.codes.clone(),
                },
                fp32_part("nested_absmax", &nested.absmax),
                fp32_part("nested_offset", &[nested.offset]),
            ],
        }
    }
}

fn fp32_part(suffix: &'static str, values: &[f32]) -> Part {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Part { suffix, dtype: Dtype::F32, shape: vec![values.len()], bytes }
}

/// A matrix in the bytes that bitsandbytes stores.
#[derive(Debug, Clone, PartialEq)]
struct Nf4Stored {
    n: usize,
    k: usize,
    /// Two codes a byte, the even element in the high nibble; `n * k / 2` bytes, rounded up.
    packed: Vec<u8>,
    absmax: Absmax,
}

impl Nf4Stored {
    #[inline]
    fn code(&self, element: usize) -> u8 {
        code(&self.packed, element)
    }
}

#[inline]
fn code(packed: &[u8], element: usize) -> u8 {
    let byte = packed[element / 2];
    if element.is_multiple_of(2) { byte >> 4 } else { byte & 0xf }
}

impl Stored for Nf4Stored {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn parts(&self) -> Vec<Part> {
        let packed =
            Part { suffix: "", dtype: Dtype::U8, shape: vec![self.packed.len(), 1], bytes: self.packed.clone() };
        let mut parts = vec![packed];
        parts.extend(self.absmax.parts());
        parts
    }

    fn dequantize(&self) -> Vec<f32> {
        let value = |element| CODES[usize::from(self.code(element))] * self.absmax.get(element / BLOCK);
        (0..self.n * self.k).map(value).collect()
    }

    /// Sums in fp64 over dequantized fp32 weights, rounded once.
    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32> {
        super::multiply_dense(&self.dequantize(), self.shape(), x, m)
    }

    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix> {
        Box::new(cpu::Nf4Matrix::new(*self, isa))
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, device: &candle_core::Device) -> Result<Box<dyn super::CudaMatrix>> {
        cuda::upload(self, device)
    }
}
