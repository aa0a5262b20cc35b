//! Scales in the types that checkpoints hold them in, and which values share one.

use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;

use super::super::nf4::nested::{self, NestedAbsmax};
use super::codes::e4m3;

/// Scales of a matrix, by group.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    /// Powers of two: `2^(e − 127)`.
    E8m0(Vec<u8>),
    /// E4M3 with one fp32 factor for the matrix.
    E4m3 {
        scales: Vec<u8>,
        global: f32,
        order: GlobalOrder,
    },
    /// bitsandbytes' absmax values that are quantized themselves.
    Nested(NestedAbsmax),
}

/// How the scale of a group and the one of the matrix make one: each rounds in fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GlobalOrder {
    /// `scale / global`, as compressed-tensors has it.
    Divides,
    /// `scale · global`, as ModelOpt has it.
    Multiplies,
}

/// `2^(e − 127)`; 255 is no number.
#[inline(always)]
pub fn e8m0(e: u8) -> f32 {
    f32::from_bits(match e {
        // Subnormal.
        0 => 0x0040_0000,
        255 => 0x7fc0_0000,
        _ => u32::from(e) << 23,
    })
}

impl Scales {
    #[inline(always)]
    pub fn get(&self, group: usize) -> f32 {
        match self {
            Scales::F32(scales) => scales[group],
            Scales::F16(scales) => scales[group].to_f32(),
            Scales::Bf16(scales) => scales[group].to_f32(),
            Scales::E8m0(scales) => e8m0(scales[group]),
            Scales::E4m3 { scales, global, order: GlobalOrder::Divides } => e4m3(scales[group]) / global,
            Scales::E4m3 { scales, global, order: GlobalOrder::Multiplies } => e4m3(scales[group]) * global,
            Scales::Nested(nested) => nested.get(group),
        }
    }

    /// The number of groups.
    pub fn count(&self) -> usize {
        match self {
            Scales::F32(scales) => scales.len(),
            Scales::F16(scales) => scales.len(),
            Scales::Bf16(scales) => scales.len(),
            Scales::E8m0(scales) | Scales::E4m3 { scales, .. } => scales.len(),
            Scales::Nested(nested) => nested.codes.len(),
        }
    }

    /// Little-endian tensors: name, dtype and bytes.
    pub fn tensors(&self) -> Vec<(&'static str, Dtype, Vec<u8>)> {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        match self {
            Scales::F32(scales) => vec![("scales", Dtype::F32, floats(scales))],
            Scales::F16(scales) => {
                vec![("scales", Dtype::F16, scales.iter().flat_map(|value| value.to_le_bytes()).collect())]
            }
            Scales::Bf16(scales) => {
                vec![("scales", Dtype::BF16, scales.iter().flat_map(|value| value.to_le_bytes()).collect())]
            }
            Scales::E8m0(scales) => vec![("scales", Dtype::F8_E8M0, scales.clone())],
            Scales::E4m3 { scales, global, .. } => {
                vec![("scales", Dtype::F8_E4M3, scales.clone()), ("global", Dtype::F32, floats(&[*global]))]
            }
            Scales::Nested(NestedAbsmax { codes, absmax, offset }) => vec![
                ("scales", Dtype::U8, codes.clone()),
                ("nested_absmax", Dtype::F32, floats(absmax)),
                ("nested_offset", Dtype::F32, floats(&[*offset])),
            ],
        }
    }

    /// Hands out the memory of the scales of `groups`.
    pub fn memory_of(&self, groups: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        match self {
            Scales::F32(scales) => piece(bytemuck::cast_slice(&scales[groups])),
            Scales::F16(scales) => piece(bytemuck::cast_slice(&scales[groups])),
            Scales::Bf16(scales) => piece(bytemuck::cast_slice(&scales[groups])),
            Scales::E8m0(scales) | Scales::E4m3 { scales, .. } => piece(&scales[groups]),
            Scales::Nested(nested) => {
                piece(&nested.codes[groups.clone()]);
                let outer = groups.start / nested::NESTED_BLOCK..groups.end.div_ceil(nested::NESTED_BLOCK);
                piece(bytemuck::cast_slice(&nested.absmax[outer]));
            }
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Scales::F32(scales) => size_of_val(&scales[..]),
            Scales::F16(scales) => size_of_val(&scales[..]),
            Scales::Bf16(scales) => size_of_val(&scales[..]),
            Scales::E8m0(scales) => scales.len(),
            Scales::E4m3 { scales, .. } => scales.len() + size_of::<f32>(),
            Scales::Nested(nested) => nested::stored_bytes(nested.codes.len()),
        }
    }
}

/// Which values of an `[n, k]` matrix share a scale.
#[derive(Debug, Clone, PartialEq)]
pub enum Groups {
    /// Those of a tile; tiles at the ends may be smaller.
    Tiles { rows: usize, columns: usize },
    /// Runs of this length of the flattened matrix, which may cross rows.
    Runs(usize),
    /// Those of a row whose columns are listed under the same of `count` groups.
    Listed { count: usize, of_column: Vec<u32> },
}

impl Groups {
    /// A scale for `columns` values of a row; for all of them if `None`.
    pub fn of_row(columns: Option<usize>, k: usize) -> Self {
        Groups::Tiles { rows: 1, columns: columns.unwrap_or(k) }
    }

    /// Scales of a matrix; `None` where they cannot be counted, and for groups of nothing.
    pub fn count(&self, n: usize, k: usize) -> Option<usize> {
        match self {
            Groups::Tiles { rows, columns } if *rows > 0 && *columns > 0 => {
                n.div_ceil(*rows).checked_mul(k.div_ceil(*columns))
            }
            Groups::Runs(length) if *length > 0 => Some(n.checked_mul(k)?.div_ceil(*length)),
            Groups::Tiles { .. } | Groups::Runs(_) => None,
            Groups::Listed { count, .. } => n.checked_mul(*count),
        }
    }

    /// The groups of whole rows.
    pub fn of_rows(&self, rows: Range<usize>, k: usize) -> Range<usize> {
        match self {
            Groups::Tiles { rows: height, columns } => {
                let in_row = k.div_ceil(*columns);
                rows.start / height * in_row..rows.end.div_ceil(*height) * in_row
            }
            Groups::Runs(length) => rows.start * k / length..(rows.end * k).div_ceil(*length),
            Groups::Listed { count, .. } => rows.start * count..rows.end * count,
        }
    }

    /// Bytes of a list of groups.
    pub fn bytes(&self) -> usize {
        match self {
            Groups::Listed { of_column, .. } => size_of_val(&of_column[..]),
            Groups::Tiles { .. } | Groups::Runs(_) => 0,
        }
    }

    /// The group of the value at `row` and `column`, and the column at which another one begins.
    #[inline(always)]
    pub fn at(&self, k: usize, row: usize, column: usize) -> (usize, usize) {
        match self {
            Groups::Tiles { rows, columns } => {
                let tile = column / columns;
                (row / rows * k.div_ceil(*columns) + tile, (tile + 1) * columns)
            }
            Groups::Runs(length) => {
                let run = (row * k + column) / length;
                (run, ((run + 1) * length).saturating_sub(row * k))
            }
            Groups::Listed { count, of_column } => (row * count + of_column[column] as usize, column + 1),
        }
    }
}
