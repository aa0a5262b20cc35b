//! Matrices where kernels read them, laid out by the code that uploads them to a device.

use half::f16;
use quantbench::kernels::cuda::launch::padded_rows;
use quantbench::kernels::cuda::matvec::MatrixDesc;
use quantbench::kernels::cuda::step_kernel::CHUNK_BYTES;
use quantbench::quant::nf4::cuda::AbsmaxAt;
use quantbench::quant::{self, FORMATS, FormatId, FormatOptions, HalfMatrix, INTERNAL_FORMATS, Stored};

use super::memory::Memory;

pub fn formats() -> impl Iterator<Item = FormatId> + Clone {
    FORMATS.iter().chain(INTERNAL_FORMATS).copied()
}

pub fn quantize(entry: FormatId, weight: HalfMatrix) -> Box<dyn Stored> {
    (entry.new)(FormatOptions::default()).quantize(weight).expect("quantize")
}

/// `stored` of format `name`; `threshold` is LLM.int8's.
pub fn place(memory: &Memory, name: &str, stored: &dyn Stored, threshold: f32) -> MatrixDesc {
    let (n, k) = stored.shape();
    let parts = stored.parts();
    let part = |suffix: &str| parts.iter().find(|part| part.suffix == suffix).map(|part| &part.bytes[..]);
    let part = |suffix: &str| part(suffix).unwrap_or_else(|| panic!("{name} without `{suffix}`"));
    let weight = part("");
    let rows =
        |row_bytes: usize| memory.hold::<u8>(&padded_rows(weight, row_bytes, row_bytes.next_multiple_of(CHUNK_BYTES)));
    if name == "int8" {
        return quant::int8::cuda::desc((n, k), rows(k), memory.hold(part("SCB")), threshold);
    }
    if !name.starts_with("nf4") {
        let element_bytes = weight.len() / (n * k);
        return quant::dense::cuda::desc((n, k), element_bytes, rows(k * element_bytes));
    }
    let absmax = part("absmax");
    let absmax = match parts.iter().find(|part| part.suffix == "nested_offset") {
        None => AbsmaxAt::Plain(memory.hold(absmax)),
        Some(offset) => AbsmaxAt::Nested {
            codes: memory.hold::<u8>(&padded_rows(absmax, absmax.len(), absmax.len().next_multiple_of(4))),
            nested: memory.hold(part("nested_absmax")),
            offset: f32::from_le_bytes(offset.bytes[..].try_into().expect("an fp32 offset")),
        },
    };
    let chunks = quant::nf4::cuda::chunks(n, k, weight);
    quant::nf4::cuda::desc((n, k), memory.hold(&chunks), absmax, memory.hold(&quant::nf4::cuda::values()))
}

pub fn widened(values: &[f16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Of tagged fp32.
pub fn values(words: &[u64]) -> Vec<f32> {
    words.iter().map(|word| f32::from_bits(*word as u32)).collect()
}
