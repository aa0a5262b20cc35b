//! Matrices of codes of 4 or 8 bits with a scale, and perhaps a zero, for each group of values: what the checkpoints of GPTQ, AWQ,
//! compressed-tensors, FP8, NVFP4 and bitsandbytes hold. Their formats differ in how the tensors lie, which each folder undoes as it reads;
//! all that follows is written here once.
//!
//! A value is `(meaning[code] − zero) · scale`: the difference is exact in fp32 and the product rounds once, so that the decoded bits are the
//! same on every machine. Products multiply them by unquantized activations.

pub mod codes;
mod cpu;
pub mod scales;

use std::ops::Range;

use candle_core::{Result, bail};
use safetensors::Dtype;

use self::codes::{Fields, Meaning, decode, value};
use self::scales::{Groups, Scales};
use super::{CpuMatrix, Format, FormatEntry, FormatId, FormatOptions, HalfMatrix, Part, Stored, multiply_dense};
use crate::kernels::isa::Isa;

/// All of a matrix but its codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Scaling {
    pub format: FormatId,
    pub n: usize,
    pub k: usize,
    pub meaning: Meaning,
    pub groups: Groups,
    pub scales: Scales,
    /// One for each scale; `None` is 0.
    pub zeros: Option<Fields>,
}

impl Scaling {
    /// Fails unless there are as many scales and zeros as groups, and every column has a group.
    fn check(&self, code_bytes: usize) -> Result<()> {
        let Self { format, n, k, groups, scales, zeros, meaning } = self;
        let groups_n = groups.count(*n, *k).filter(|_| *n > 0 && *k > 0);
        let zero_bytes = zeros.as_ref().map(|zeros| zeros.bytes().len());
        let fits = groups_n == Some(scales.count())
            && n.checked_mul(meaning.row_bytes(*k)) == Some(code_bytes)
            && zero_bytes.is_none_or(|bytes| bytes == meaning.row_bytes(scales.count()));
        let is_listed = match groups {
            Groups::Listed { count, of_column } => {
                of_column.len() == *k && of_column.iter().all(|group| (*group as usize) < *count)
            }
            Groups::Tiles { .. } | Groups::Runs(_) => true,
        };
        match fits && is_listed {
            true => Ok(()),
            false => bail!(
                "a matrix of [{n}, {k}] in {format} cannot be made of {code_bytes} bytes of codes and {} scales",
                scales.count()
            ),
        }
    }

    /// Decodes `columns` of `row`, whose codes are `bytes`.
    #[inline(always)]
    fn decode(&self, bytes: &[u8], row: usize, columns: Range<usize>, out: &mut [f32]) {
        let scale_and_zero = |group: usize| {
            (self.scales.get(group), self.zeros.as_ref().map_or(0.0, |zeros| f32::from(zeros.get(group))))
        };
        if let Groups::Listed { count, of_column } = &self.groups {
            let first = row * count;
            let listed = &of_column[columns.clone()];
            for ((out, column), group) in out.iter_mut().zip(columns).zip(listed) {
                let (scale, zero) = scale_and_zero(first + *group as usize);
                *out = (value(&self.meaning, bytes, column) - zero) * scale;
            }
            return;
        }
        let mut column = columns.start;
        let mut out = out;
        while column < columns.end {
            let (group, end) = self.groups.at(self.k, row, column);
            let (run, rest) = out.split_at_mut(end.min(columns.end) - column);
            decode(&self.meaning, bytes, column, scale_and_zero(group), run);
            column += run.len();
            out = rest;
        }
    }

    /// Hands out the memory of the scales, zeros and groups that `rows` are decoded with.
    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        let groups = self.groups.of_rows(rows, self.k);
        self.scales.memory_of(groups.clone(), piece);
        if let Some(zeros) = &self.zeros {
            piece(zeros.of(groups));
        }
        if let Groups::Listed { of_column, .. } = &self.groups {
            piece(bytemuck::cast_slice(of_column));
        }
    }

    /// Bytes of scales, zeros and groups.
    fn bytes(&self) -> usize {
        self.scales.bytes() + self.zeros.as_ref().map_or(0, |zeros| zeros.bytes().len()) + self.groups.bytes()
    }
}

/// A matrix with all that a checkpoint holds of it: `n` rows of codes, each beginning at a byte, low nibbles first.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaledStored {
    scaling: Scaling,
    bytes: Vec<u8>,
}

impl ScaledStored {
    /// Fails where parts have not the sizes that the others need.
    pub fn new(scaling: Scaling, bytes: Vec<u8>) -> Result<Self> {
        scaling.check(bytes.len())?;
        Ok(Self { scaling, bytes })
    }
}

impl Stored for ScaledStored {
    fn shape(&self) -> (usize, usize) {
        (self.scaling.n, self.scaling.k)
    }

    fn parts(&self) -> Vec<Part> {
        let Scaling { n, k, meaning, scales, zeros, groups, .. } = &self.scaling;
        let part = |suffix, dtype: Dtype, bytes: Vec<u8>| Part {
            suffix,
            dtype,
            shape: vec![bytes.len() * 8 / dtype.bitsize()],
            bytes,
        };
        let codes = part("", Dtype::U8, self.bytes.clone());
        let mut parts = vec![Part { shape: vec![*n, meaning.row_bytes(*k)], ..codes }];
        parts.extend(scales.tensors().into_iter().map(|(suffix, dtype, bytes)| part(suffix, dtype, bytes)));
        parts.extend(zeros.as_ref().map(|zeros| part("zeros", Dtype::U8, zeros.bytes().to_vec())));
        if let Groups::Listed { of_column, .. } = groups {
            let bytes = of_column.iter().flat_map(|group| group.to_le_bytes()).collect();
            parts.push(part("g_idx", Dtype::U32, bytes));
        }
        parts
    }

    fn dequantize(&self) -> Vec<f32> {
        let (n, k) = self.shape();
        let mut values = vec![0.0; n * k];
        let rows = self.bytes.chunks_exact(self.scaling.meaning.row_bytes(k)).zip(values.chunks_exact_mut(k));
        rows.enumerate().for_each(|(row, (bytes, out))| self.scaling.decode(bytes, row, 0..k, out));
        values
    }

    /// Sums in fp64 over decoded fp32 weights, rounded once.
    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32> {
        multiply_dense(&self.dequantize(), self.shape(), x, m)
    }

    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix> {
        Box::new(cpu::ScaledMatrix::new(*self, isa))
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, _: &candle_core::Device) -> Result<Box<dyn super::CudaMatrix>> {
        bail!("matrices in {} do not run on CUDA yet", self.scaling.format)
    }
}

/// Makes a matrix at load.
pub type ScaledMaker = fn(HalfMatrix) -> Result<ScaledStored>;

/// What a matrix of a format takes where no checkpoint says it.
#[derive(Debug, Clone, Copy)]
pub struct NominalSize {
    pub code_bits: usize,
    /// Values of a row that share a scale; 0 is a whole row.
    pub group: usize,
    /// Of a scale and its zero.
    pub scale_bits: usize,
}

/// A format of such matrices.
pub struct ScaledFormat {
    pub id: FormatId,
    pub size: NominalSize,
    pub make: Option<ScaledMaker>,
}

/// The row of such a format.
pub const fn entry(
    name: &'static str,
    doc: &'static str,
    is_made: bool,
    new: fn(FormatOptions) -> Box<dyn Format>,
) -> FormatEntry {
    FormatEntry { is_stored: true, is_made, runs_on_cuda: false, ..FormatEntry::plain(name, doc, new) }
}

/// The rows of a folder: a constant for each format, and `FORMATS`, all of them.
macro_rules! scaled_formats {
    ($($id:ident, $name:literal, $doc:expr, $size:expr $(, $make:expr)?;)*) => {
        $(pub const $id: $crate::quant::FormatId = {
            const MAKE: Option<$crate::quant::scaled::ScaledMaker> = {
                #[allow(unused_mut, unused_assignments)]
                let mut make: Option<$crate::quant::scaled::ScaledMaker> = None;
                $(make = Some($make);)?
                make
            };
            static ENTRY: $crate::quant::FormatEntry =
                $crate::quant::scaled::entry($name, $doc, MAKE.is_some(), |_| {
                    Box::new($crate::quant::scaled::ScaledFormat { id: $id, size: $size, make: MAKE })
                });
            $crate::quant::FormatId::of(&ENTRY)
        };)*
        /// The formats of this folder.
        pub static FORMATS: &[$crate::quant::FormatId] = &[$($id),*];
    };
}
pub(in crate::quant) use scaled_formats;

impl Format for ScaledFormat {
    fn id(&self) -> FormatId {
        self.id
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        let NominalSize { code_bits, group, scale_bits } = self.size;
        let groups = if group == 0 { 1 } else { k.div_ceil(group) };
        n * (k * code_bits).div_ceil(8) + (n * groups * scale_bits).div_ceil(8)
    }

    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        let Some(make) = self.make else {
            bail!("matrices in {} are read from checkpoints; nothing makes them here", self.id)
        };
        weight.check()?;
        Ok(Box::new(make(weight)?))
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::cuda::DeviceBytes {
        super::cuda::DeviceBytes { resident: self.stored_bytes(n, k), transient: 0 }
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, _: usize, _: usize, _: &candle_core::Device) -> Result<Box<dyn super::cuda::CudaEncoder>> {
        bail!("matrices in {} do not run on CUDA yet", self.id)
    }

    fn restore(&self, _: usize, _: usize, _: Vec<Part>) -> Result<Box<dyn Stored>> {
        bail!("a matrix in {} is read by the method that its checkpoint names", self.id)
    }
}
