//! Codes of 4 and 8 bits: what they mean, and how they lie.

use std::ops::Range;

/// The values of codes before zero and scale.
#[derive(Debug, Clone, PartialEq)]
pub enum Meaning {
    /// Of 4 bits, by a table.
    Nibbles([f32; 16]),
    /// Unsigned bytes, less an offset.
    Bytes { offset: f32 },
    /// FP8 with 4 bits of exponent and 3 of fraction, without infinities.
    E4m3,
}

/// The values of 4-bit integers from 0 on.
pub const UNSIGNED: Meaning = Meaning::Nibbles(integers(0.0));
/// The values of 4-bit integers that are stored plus 8.
pub const CENTRED: Meaning = Meaning::Nibbles(integers(8.0));
/// The values of E2M1: a sign, two bits of exponent, one of fraction.
pub const E2M1: Meaning = Meaning::Nibbles(E2M1_VALUES);

pub const E2M1_VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

const fn integers(offset: f32) -> [f32; 16] {
    let mut values = [0.0; 16];
    let mut at = 0;
    while at < 16 {
        values[at] = at as f32 - offset;
        at += 1;
    }
    values
}

impl Meaning {
    /// Of a code.
    pub fn bits(&self) -> usize {
        match self {
            Meaning::Nibbles(_) => 4,
            Meaning::Bytes { .. } | Meaning::E4m3 => 8,
        }
    }

    /// Bytes of a row of `k` codes, which begins at a byte.
    pub fn row_bytes(&self, k: usize) -> usize {
        match self.bits() {
            4 => k.div_ceil(2),
            _ => k,
        }
    }
}

/// The value of an E4M3 code; NaN for 0x7f and 0xff.
#[inline(always)]
pub fn e4m3(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    // 2^120 brings the exponent from the bias of E4M3 to that of fp32, subnormals included.
    let value = f32::from_bits(magnitude << 20) * f32::from_bits(0x7b80_0000);
    f32::from_bits(if magnitude == 0x7f { 0x7fc0_0000 } else { value.to_bits() } | sign)
}

/// The E4M3 code nearest to `value`, the even one of two; magnitudes beyond 448, the largest, become that.
pub fn to_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return 0x7f | sign;
    }
    let magnitude = value.abs().min(448.0);
    // Of a binade from 2^-6 on, steps are 2^-3 of its start; below, 2^-9.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * f32::from_bits(((3 - exponent + 127) as u32) << 23)).round_ties_even() as u32;
    // 16 steps are the start of the next binade; below 8 lie the subnormal codes of the first.
    sign | (((exponent + 6) as u32 * 8) + steps) as u8
}

/// Writes the values `(meaning[code] − zero) · scale` of `columns` of the row `bytes`.
#[inline(always)]
pub fn decode(meaning: &Meaning, bytes: &[u8], start: usize, (scale, zero): (f32, f32), out: &mut [f32]) {
    match meaning {
        Meaning::Nibbles(table) => {
            let values: [f32; 16] = std::array::from_fn(|code| (table[code] - zero) * scale);
            nibbles(bytes, start, &values, out);
        }
        Meaning::Bytes { offset } => {
            let zero = zero + offset;
            out.iter_mut().zip(&bytes[start..]).for_each(|(out, code)| *out = (f32::from(*code) - zero) * scale);
        }
        Meaning::E4m3 => out.iter_mut().zip(&bytes[start..]).for_each(|(out, code)| *out = e4m3(*code) * scale),
    }
}

/// Values of 4-bit codes from code `start` on, low nibbles first.
#[inline(always)]
fn nibbles(bytes: &[u8], start: usize, values: &[f32; 16], out: &mut [f32]) {
    let (first, out) = out.split_at_mut((start % 2).min(out.len()));
    first.iter_mut().for_each(|out| *out = values[usize::from(bytes[start / 2] >> 4)]);
    let (pairs, last) = out.as_chunks_mut::<2>();
    let bytes = &bytes[start.div_ceil(2)..];
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [values[usize::from(byte & 15)], values[usize::from(byte >> 4)]];
    }
    last.iter_mut().for_each(|out| *out = values[usize::from(bytes[pairs.len()] & 15)]);
}

/// The value of one code before zero and scale.
#[inline(always)]
pub fn value(meaning: &Meaning, bytes: &[u8], column: usize) -> f32 {
    match meaning {
        Meaning::Nibbles(table) => table[usize::from(nibble(bytes, column))],
        Meaning::Bytes { offset } => f32::from(bytes[column]) - offset,
        Meaning::E4m3 => e4m3(bytes[column]),
    }
}

/// Nibble `at`, low ones first.
#[inline(always)]
pub fn nibble(bytes: &[u8], at: usize) -> u8 {
    bytes[at / 2] >> (at % 2 * 4) & 15
}

/// Unsigned integers of 4 or 8 bits, one behind the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Fields {
    bits: usize,
    bytes: Vec<u8>,
}

impl Fields {
    /// `values`, of which the lowest `bits`, 4 or 8, count.
    pub fn new(bits: usize, values: &[u8]) -> Self {
        let bytes = match bits {
            4 => values.chunks(2).map(|pair| pair[0] & 15 | pair.get(1).unwrap_or(&0) << 4).collect(),
            _ => values.to_vec(),
        };
        Self { bits, bytes }
    }

    #[inline(always)]
    pub fn get(&self, at: usize) -> u8 {
        if self.bits == 4 { nibble(&self.bytes, at) } else { self.bytes[at] }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes that hold the fields `range`.
    pub fn of(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range.start * self.bits / 8..(range.end * self.bits).div_ceil(8)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_its_values_and_nearest_codes() {
        assert_eq!(
            [0x00, 0x01, 0x08, 0x38, 0x7e, 0xb8].map(e4m3),
            [0.0, 2f32.powi(-9), 2f32.powi(-6), 1.0, 448.0, -1.0]
        );
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(to_e4m3(e4m3(code)), code, "{code:#x}");
            if code & 0x7f < 0x7e {
                let (low, high) = (e4m3(code), e4m3(code + 1));
                let middle = low + (high - low) / 2.0;
                let even = if code % 2 == 0 { code } else { code + 1 };
                assert_eq!(to_e4m3(middle), even, "between {low} and {high}");
                assert_eq!(to_e4m3(middle + (high - middle) * 0.01), code + 1);
                assert_eq!(to_e4m3(middle + (low - middle) * 0.01), code);
            }
        }
        assert_eq!([1e9, -1e9, f32::INFINITY].map(to_e4m3), [0x7e, 0xfe, 0x7e]);
        assert!(e4m3(to_e4m3(f32::NAN)).is_nan());
    }

    #[test]
    fn runs_of_nibbles_may_begin_and_end_anywhere() {
        let bytes: Vec<u8> = (0..8).map(|i| (2 * i) | (2 * i + 1) << 4).collect();
        let values: [f32; 16] = std::array::from_fn(|i| i as f32);
        for start in 0..16 {
            for end in start..=16 {
                let mut out = vec![f32::NAN; end - start];
                nibbles(&bytes, start, &values, &mut out);
                assert_eq!(out, (start..end).map(|i| i as f32).collect::<Vec<_>>(), "{start}..{end}");
            }
        }
        let fields = Fields::new(4, &[1, 2, 3]);
        assert_eq!((fields.bytes(), [0, 1, 2].map(|at| fields.get(at))), (&[0x21, 3][..], [1, 2, 3]));
    }
}
