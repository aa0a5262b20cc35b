//! What loading makes of a checkpoint's rows, bit for bit what the host makes of them.

use std::ops::Range;

use candle_core::Result;
use quantbench::kernels::cuda::launch::padded_rows;
use quantbench::kernels::cuda::step_kernel::CHUNK_BYTES;
use quantbench::quant::cuda::{GRANULE, SourceDtype, SourceValues};
use quantbench::quant::{FormatId, FormatOptions, HalfMatrix, Part, dense, int8, nf4};

use super::host::{CHIPS, Host};
use super::memory::Memory;
use super::plain::{Case, DTYPES, cases};

pub fn rows_of_a_checkpoint() {
    for case in cases() {
        // All at once, and the last rows first.
        for step in [case.n, GRANULE].into_iter().filter(|step| *step <= case.n) {
            dense_rows(&case, step, 2);
            dense_rows(&case, step, 4);
            int8_rows(&case, step);
            nf4_rows(&case, step);
        }
    }
}

fn dense_rows(case: &Case, step: usize, element_bytes: usize) {
    let values: Vec<u8> = match element_bytes {
        2 => case.halves.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => case.floats.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let row_bytes = case.k * element_bytes;
    let stride = row_bytes.next_multiple_of(CHUNK_BYTES);
    let expected = padded_rows(&values, row_bytes, stride);
    let memory = Memory::default();
    let to = memory.room::<u8>(expected.len());
    let overflow = each(case, step, &memory, &|host, from, rows| {
        // SAFETY: rows of `from` and of `to`, both of `memory`.
        unsafe {
            dense::cuda::cast_rows(host, from, (rows.len(), case.k), element_bytes, to + (rows.start * stride) as u64)
        }
    });
    same(case, "dense", &memory.read(to, expected.len()), &expected);
    assert_eq!(overflow, if element_bytes == 2 { case.overflow } else { 0 }, "{}", case.what);
}

fn int8_rows(case: &Case, step: usize) {
    let [codes, scales] = parts("int8", case);
    let stride = case.k.next_multiple_of(CHUNK_BYTES);
    let expected = padded_rows(&codes, case.k, stride);
    let memory = Memory::default();
    let (to, absmax) = (memory.room::<u8>(expected.len()), memory.room::<f32>(case.n));
    let overflow = each(case, step, &memory, &|host, from, rows| {
        let (to, absmax) = (to + (rows.start * stride) as u64, absmax + 4 * rows.start as u64);
        // SAFETY: rows of these, all of `memory`.
        unsafe { int8::cuda::encode_rows(host, from, (rows.len(), case.k), to, absmax) }
    });
    same(case, "int8 absmax", &memory.read(absmax, scales.len()), &scales);
    same(case, "int8 codes", &memory.read(to, expected.len()), &expected);
    assert_eq!(overflow, case.overflow, "{}", case.what);
}

fn nf4_rows(case: &Case, step: usize) {
    let [packed, scales] = parts("nf4-nodq", case);
    let expected = nf4::cuda::chunks(case.n, case.k, &packed);
    let stride = expected.len() / case.n;
    let memory = Memory::default();
    let (to, absmax) = (memory.room::<u8>(expected.len()), memory.room::<u8>(scales.len()));
    let overflow = each(case, step, &memory, &|host, from, rows| {
        let (first_block, first_byte) = (rows.start * case.k / nf4::BLOCK, rows.start * stride);
        let (to, absmax) = (to + first_byte as u64, absmax + 4 * first_block as u64);
        // SAFETY: rows of these, all of `memory`, that begin with a block.
        unsafe { nf4::cuda::encode_rows(host, from, (rows.len(), case.k), absmax, to) }
    });
    same(case, "nf4 absmax", &memory.read(absmax, scales.len()), &scales);
    same(case, "nf4 codes", &memory.read(to, expected.len()), &expected);
    assert_eq!(overflow, case.overflow, "{}", case.what);
}

/// The weight and its scales, as the host makes them.
fn parts(format: &str, case: &Case) -> [Vec<u8>; 2] {
    let entry = FormatId::named(format).expect("a format of the table");
    let weight = HalfMatrix { n: case.n, k: case.k, data: case.halves.clone() };
    let stored = (entry.new)(FormatOptions::default()).quantize(weight).expect("quantize");
    let bytes: Vec<Vec<u8>> = stored.parts().into_iter().map(|Part { bytes, .. }| bytes).collect();
    bytes.try_into().unwrap_or_else(|parts: Vec<_>| panic!("{format} has {} parts", parts.len()))
}

/// Encodes `step` rows at a time from the end; returns how many values overflowed.
fn each(
    case: &Case,
    step: usize,
    memory: &Memory,
    encode: &dyn Fn(&Host, SourceValues, Range<usize>) -> Result<()>,
) -> u64 {
    let kinds = [SourceDtype::F16, SourceDtype::Bf16, SourceDtype::F32];
    let kind = DTYPES.into_iter().zip(kinds).find(|(dtype, _)| *dtype == case.dtype).expect("a plain dtype").1;
    let (values, overflow) = (memory.hold(&case.bytes), memory.hold(&[0u64]));
    let host = Host { chip: CHIPS[1], memory };
    for start in (0..case.n).step_by(step).collect::<Vec<_>>().into_iter().rev() {
        let rows = start..case.n.min(start + step);
        let values = values + (start * case.k * kind.bytes()) as u64;
        let encoded = encode(&host, SourceValues { values, overflow, kind }, rows.clone());
        encoded.unwrap_or_else(|error| panic!("{} rows {rows:?}: {error}", case.what));
    }
    memory.read(overflow, 1)[0]
}

fn same(case: &Case, what: &str, made: &[u8], expected: &[u8]) {
    let at = made.iter().zip(expected).position(|(made, expected)| made != expected);
    assert_eq!((at, made.len()), (None, expected.len()), "{what} of {}: first different byte", case.what);
}
