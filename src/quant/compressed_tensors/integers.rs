//! Integers of 4 and 8 bits, packed into words (`pack-quantized`) or in bytes (`int-quantized`), with a scale and perhaps a zero for each group, row
//! or matrix.
//!
//! Element i of a word of `weight_packed` `[n, ⌈k · bits / 32⌉]` is counted from the low end, plus `2^(bits − 1)`; so are zeros, packed
//! along the rows: `weight_zero_point` `[⌈n · bits / 32⌉, groups]`. A value is `(code − zero) · scale`.

use anyhow::Result;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::super::scaled::codes::{CENTRED, Fields, Meaning, UNSIGNED};
use super::super::scaled::scales::{Groups, Scales};
use super::super::scaled::{NominalSize, ScaledStored, Scaling, scaled_formats};
use super::super::scheme::Module;
use super::super::words::{fields, rows};
use super::super::{FormatId, HalfMatrix, Stored, absmax};

const fn size(code_bits: usize, group: usize) -> NominalSize {
    NominalSize { code_bits, group, scale_bits: 16 }
}

scaled_formats! {
    W4A16, "w4a16", "4-bit integers with a scale for a row or a matrix, activations as they are: compressed-tensors'", size(4, 0);
    W4A16_G32, "w4a16-g32", "4-bit integers with a scale for 32, activations as they are: compressed-tensors'", size(4, 32);
    W4A16_G64, "w4a16-g64", "4-bit integers with a scale for 64, activations as they are: compressed-tensors'", size(4, 64);
    W4A16_G128, "w4a16-g128", "4-bit integers with a bf16 scale for 128, activations as they are: compressed-tensors'",
        size(4, 128), quantize_w4a16_g128;
    W4A16_GROUPS, "w4a16-groups", "4-bit integers with a scale for groups of another size, activations as they are: compressed-tensors'",
        size(4, 128);
    W8A16, "w8a16", "8-bit integers with a bf16 scale for a row, activations as they are: compressed-tensors'", size(8, 0), quantize_w8a16;
    W8A16_G128, "w8a16-g128", "8-bit integers with a scale for 128, activations as they are: compressed-tensors'", size(8, 128);
    W8A16_GROUPS, "w8a16-groups", "8-bit integers with a scale for groups of another size, activations as they are: compressed-tensors'",
        size(8, 128);
}

fn quantize_w4a16_g128(weight: HalfMatrix) -> candle_core::Result<ScaledStored> {
    quantize(weight, 4, Some(128))
}

fn quantize_w8a16(weight: HalfMatrix) -> candle_core::Result<ScaledStored> {
    quantize(weight, 8, None)
}

/// Symmetric, as compressed-tensors' min-max observer does it: the scale is the largest magnitude over half of the range, in bf16, and codes are
/// the nearest, the even of two.
fn quantize(
    HalfMatrix { n, k, data }: HalfMatrix,
    bits: usize,
    group: Option<usize>,
) -> candle_core::Result<ScaledStored> {
    let integers = Integers { bits, group, is_symmetric: true };
    let middle = f32::from(1u8 << (bits - 1));
    let mut values = vec![0.0; k];
    let (mut scales, mut bytes) = (Vec::new(), Vec::with_capacity(n * integers.meaning().row_bytes(k)));
    for row in data.chunks_exact(k) {
        row.convert_to_f32_slice(&mut values);
        let mut codes = Vec::with_capacity(k);
        for values in values.chunks(group.unwrap_or(k)) {
            let scale = bf16::from_f32(absmax(values) / (middle - 0.5));
            scales.push(scale);
            let scale = scale.to_f32();
            let code = |value: &f32| (value / scale).round_ties_even().clamp(-middle, middle - 1.0) + middle;
            codes.extend(values.iter().map(|value| if scale == 0.0 { middle as u8 } else { code(value) as u8 }));
        }
        bytes.extend_from_slice(Fields::new(bits, &codes).bytes());
    }
    let (format, meaning, groups) = (integers.format(), integers.meaning(), Groups::of_row(group, k));
    ScaledStored::new(Scaling { format, n, k, meaning, groups, scales: Scales::Bf16(scales), zeros: None }, bytes)
}

/// Whether zeros are signed bytes and no words.
fn zeros_are_bytes(module: &Module) -> Result<bool> {
    Ok(module.get("weight_zero_point")?.0 == Dtype::I8)
}

/// What a group of targets says of its integers.
#[derive(Debug, Clone, Copy)]
pub struct Integers {
    /// 4 or 8.
    pub bits: usize,
    /// Values of a row that share a scale.
    pub group: Option<usize>,
    pub is_symmetric: bool,
}

const WORDS: &[Dtype] = &[Dtype::I32, Dtype::U32];
const FLOATS: &[Dtype] = &[Dtype::BF16, Dtype::F16, Dtype::F32];

impl Integers {
    pub fn format(self) -> FormatId {
        match (self.bits, self.group) {
            (4, None) => W4A16,
            (4, Some(32)) => W4A16_G32,
            (4, Some(64)) => W4A16_G64,
            (4, Some(128)) => W4A16_G128,
            (4, Some(_)) => W4A16_GROUPS,
            (_, None) => W8A16,
            (_, Some(128)) => W8A16_G128,
            (_, Some(_)) => W8A16_GROUPS,
        }
    }

    /// Of codes that are stored with the middle of their range as zero, or with zeros of their own.
    fn meaning(self) -> Meaning {
        match (self.bits, self.is_symmetric) {
            (4, true) => CENTRED,
            (4, false) => UNSIGNED,
            (_, true) => Meaning::Bytes { offset: 128.0 },
            (_, false) => Meaning::Bytes { offset: 0.0 },
        }
    }

    /// What shares a scale, once the shapes are right.
    fn groups(self, module: &Module) -> Result<Groups> {
        let (n, k) = (module.n, module.k);
        let words = |values: usize| (values * self.bits).div_ceil(32);
        match module.has("weight_packed") {
            true => module.expect("weight_packed", WORDS, &[&[n, words(k)]])?,
            false => module.expect("weight", &[Dtype::I8], &[&[n, k]])?,
        };
        if module.has("weight_shape") {
            self.check_shape(module)?;
        }
        let count = self.group.map_or(1, |group| k.div_ceil(group));
        let of_row: &[&[usize]] =
            if self.group.is_some() { &[&[n, count]] } else { &[&[n, 1], &[n], &[1], &[], &[1, 1]] };
        let (_, shape) = module.expect("weight_scale", FLOATS, of_row)?;
        let is_one = self.group.is_none() && shape.iter().all(|length| *length == 1);
        let tiles = if is_one { Groups::Tiles { rows: n, columns: k } } else { Groups::of_row(self.group, k) };
        if !self.is_symmetric {
            // One zero of all is not packed along the rows of anything.
            let rows = if is_one { 1 } else { n };
            // Older files hold them in bytes beside packed codes, too.
            match zeros_are_bytes(module)? {
                false => module.expect("weight_zero_point", WORDS, &[&[words(rows), count]])?,
                true => module.expect("weight_zero_point", &[Dtype::I8], &[&[rows, count], &shape])?,
            };
        }
        match module.has("weight_g_idx") {
            true => self.listed(module, count, tiles),
            false => Ok(tiles),
        }
    }

    /// `weight_shape` says `[n, k]`.
    fn check_shape(self, module: &Module) -> Result<()> {
        let (dtype, _) = module.expect("weight_shape", &[Dtype::I64, Dtype::I32], &[&[2]])?;
        let bytes = module.bytes("weight_shape")?;
        let lengths: Vec<i64> = match dtype {
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
            _ => bytes.as_chunks::<4>().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        };
        let wanted = [module.n, module.k].map(|length| i64::try_from(length).unwrap_or(-1));
        match lengths == wanted {
            true => Ok(()),
            false => Err(module.fault(format!(
                "`{}` says {lengths:?}, the model of config.json needs {wanted:?}",
                module.tensor("weight_shape")
            ))),
        }
    }

    /// The groups of `weight_g_idx`; all of −1 means that there are none.
    fn listed(self, module: &Module, count: usize, in_turn: Groups) -> Result<Groups> {
        module.expect("weight_g_idx", WORDS, &[&[module.k]])?;
        let of_column = module.words("weight_g_idx")?;
        let size = self.group.unwrap_or(module.k);
        let is_in_turn = of_column.iter().enumerate().all(|(column, group)| column / size == *group as usize);
        if is_in_turn || of_column.iter().all(|group| *group == u32::MAX) {
            return Ok(in_turn);
        }
        match of_column.iter().find(|group| **group as usize >= count) {
            None => Ok(Groups::Listed { count, of_column }),
            Some(group) => Err(module.fault(format!(
                "`{}` has group {}; there are groups 0 to {}",
                module.tensor("weight_g_idx"),
                group.cast_signed(),
                count - 1
            ))),
        }
    }

    pub fn held(self, module: &Module) -> Result<(FormatId, u64)> {
        let groups = self.groups(module)?;
        let scales = groups.count(module.n, module.k).unwrap_or(0);
        let scale_bytes = module.get("weight_scale")?.0.bitsize() / 8;
        let zeros = if self.is_symmetric { 0 } else { (scales * self.bits).div_ceil(8) };
        let codes = module.n * self.meaning().row_bytes(module.k);
        Ok((self.format(), (codes + scales * scale_bytes + zeros + groups.bytes()) as u64))
    }

    pub fn read(self, module: &Module) -> Result<Box<dyn Stored>> {
        let groups = self.groups(module)?;
        let (n, k, meaning) = (module.n, module.k, self.meaning());
        let codes = match module.has("weight_packed") {
            true => rows(&module.words("weight_packed")?, (k * self.bits).div_ceil(32), meaning.row_bytes(k)),
            false => self.of_bytes(&module.bytes("weight")?, k),
        };
        let zeros = if self.is_symmetric { None } else { Some(self.zeros(module, &groups)?) };
        let scales = module.scales("weight_scale")?;
        let scaling = Scaling { format: self.format(), n, k, meaning, groups, scales, zeros };
        Ok(Box::new(ScaledStored::new(scaling, codes)?))
    }

    /// Rows of signed bytes as they would be packed.
    fn of_bytes(self, bytes: &[u8], k: usize) -> Vec<u8> {
        let middle = 1u8 << (self.bits - 1);
        let row = |row: &[u8]| {
            let codes: Vec<u8> = row.iter().map(|code| code.wrapping_add(middle)).collect();
            Fields::new(self.bits, &codes).bytes().to_vec()
        };
        bytes.chunks_exact(k).flat_map(row).collect()
    }

    /// Zeros in the order of the scales.
    fn zeros(self, module: &Module, groups: &Groups) -> Result<Fields> {
        let scales = groups.count(module.n, module.k).unwrap_or(0);
        if zeros_are_bytes(module)? {
            let middle = 1u8 << (self.bits - 1);
            let zeros: Vec<u8> =
                module.bytes("weight_zero_point")?.iter().map(|zero| zero.wrapping_add(middle)).collect();
            return Ok(Fields::new(self.bits, &zeros));
        }
        let count = self.group.map_or(1, |group| module.k.div_ceil(group));
        let outputs = scales / count.max(1);
        let per_word = 32 / self.bits;
        // Words [r, g]: the zeros of rows per_word · r and on.
        let words = module.words("weight_zero_point")?;
        let by_group: Vec<u32> =
            (0..count).flat_map(|group| words.iter().skip(group).step_by(count).copied().collect::<Vec<_>>()).collect();
        debug_assert_eq!(by_group.len(), outputs.div_ceil(per_word) * count);
        let by_group = fields(&by_group, self.bits, (count, outputs));
        let zeros: Vec<u8> = (0..scales).map(|at| by_group[at % count * outputs + at / count]).collect();
        Ok(Fields::new(self.bits, &zeros))
    }
}
