//! NVFP4: E2M1 values with an E4M3 scale for each 16 of a row, and one fp32 factor for the matrix. Bytes hold neighbouring elements, the first
//! in the low nibble.
//!
//! compressed-tensors divides a scale by the factor (`weight_global_scale`), ModelOpt multiplies (`weight_scale_2`); the product with the
//! value rounds a second time, so that the last bits of both differ.

use anyhow::Result;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::scaled::codes::{E2M1, E2M1_VALUES, e4m3, to_e4m3};
use super::scaled::scales::{GlobalOrder, Groups, Scales};
use super::scaled::{NominalSize, ScaledStored, Scaling, scaled_formats};
use super::scheme::{Module, finite};
use super::{FormatId, HalfMatrix, Stored};

scaled_formats! {
    ID, "nvfp4", "4-bit floats (E2M1) with an FP8 scale for 16 and one for the matrix: NVFP4",
        NominalSize { code_bits: 4, group: BLOCK, scale_bits: 8 }, quantize;
}

/// Values that share a scale.
const BLOCK: usize = 16;
/// The largest values of a code and of a scale.
const MAX_CODE: f32 = 6.0;
const MAX_SCALE: f32 = 448.0;

/// Names of the tensors of a module.
#[derive(Debug, Clone, Copy)]
pub struct Nvfp4Names {
    pub codes: &'static str,
    pub global: &'static str,
    pub order: GlobalOrder,
}

pub const COMPRESSED_TENSORS: Nvfp4Names =
    Nvfp4Names { codes: "weight_packed", global: "weight_global_scale", order: GlobalOrder::Divides };
pub const MODELOPT: Nvfp4Names =
    Nvfp4Names { codes: "weight", global: "weight_scale_2", order: GlobalOrder::Multiplies };

const SCALES: &str = "weight_scale";

fn check(module: &Module, names: &Nvfp4Names) -> Result<()> {
    module.expect(names.codes, &[Dtype::U8], &[&[module.n, module.k.div_ceil(2)]])?;
    module.expect(SCALES, &[Dtype::F8_E4M3], &[&[module.n, module.k.div_ceil(BLOCK)]])?;
    module.expect(names.global, &[Dtype::F32], &[&[], &[1]])?;
    Ok(())
}

/// As [`super::scheme::Scheme::held`] gives it.
pub fn held(module: &Module, names: &Nvfp4Names) -> Result<(FormatId, u64)> {
    check(module, names)?;
    let bytes = module.n * (module.k.div_ceil(2) + module.k.div_ceil(BLOCK)) + size_of::<f32>();
    Ok((ID, bytes as u64))
}

/// As [`super::scheme::Scheme::read`] gives it.
pub fn read(module: &Module, names: &Nvfp4Names) -> Result<Box<dyn Stored>> {
    check(module, names)?;
    let scales =
        Scales::E4m3 { scales: module.bytes(SCALES)?, global: module.scalar(names.global)?, order: names.order };
    let scales = finite(module, SCALES, scales)?;
    Ok(Box::new(stored((module.n, module.k), scales, module.bytes(names.codes)?)?))
}

fn stored((n, k): (usize, usize), scales: Scales, codes: Vec<u8>) -> candle_core::Result<ScaledStored> {
    let groups = Groups::of_row(Some(BLOCK), k);
    ScaledStored::new(Scaling { format: ID, n, k, meaning: E2M1, groups, scales, zeros: None }, codes)
}

/// As compressed-tensors does it: the factor brings the largest magnitude of the matrix to that of a code and a scale, and a block's scale is
/// its largest magnitude over 6.
fn quantize(HalfMatrix { n, k, data }: HalfMatrix) -> candle_core::Result<ScaledStored> {
    let mut values = vec![0.0; data.len()];
    data.convert_to_f32_slice(&mut values);
    let largest = super::absmax(&values);
    let global = if largest > 0.0 { MAX_SCALE * MAX_CODE / largest } else { 1.0 };
    let (mut scales, mut codes) = (Vec::with_capacity(n * k.div_ceil(BLOCK)), Vec::with_capacity(n * k.div_ceil(2)));
    for row in values.chunks_exact(k) {
        let mut of_row = Vec::with_capacity(k);
        for block in row.chunks(BLOCK) {
            let scale = to_e4m3(global * (super::absmax(block) / MAX_CODE));
            scales.push(scale);
            let scale = e4m3(scale) / global;
            of_row.extend(block.iter().map(|value| if scale == 0.0 { 0 } else { nearest(value / scale) }));
        }
        codes.extend(of_row.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4));
    }
    stored((n, k), Scales::E4m3 { scales, global, order: GlobalOrder::Divides }, codes)
}

/// The code nearest to `value`, the even one of two.
pub fn nearest(value: f32) -> u8 {
    let magnitude = value.abs().min(MAX_CODE);
    let code = (0..7u8).find(|code| {
        let middle = (E2M1_VALUES[usize::from(*code)] + E2M1_VALUES[usize::from(*code) + 1]) / 2.0;
        magnitude < middle || (magnitude == middle && code % 2 == 0)
    });
    let sign = if value.is_sign_negative() { 8 } else { 0 };
    code.unwrap_or(7) | sign
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_nearest_and_of_two_the_even() {
        for code in 0..16u8 {
            assert_eq!(nearest(E2M1_VALUES[usize::from(code)]), code);
        }
        assert_eq!([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0].map(nearest), [0, 2, 2, 4, 4, 6, 6, 7]);
        assert_eq!([-0.26, -5.1].map(nearest), [9, 15]);
    }
}
