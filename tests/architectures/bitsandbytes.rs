//! NF4 as bitsandbytes reads it on the CPU that the references ran on.
//!
//! Its AVX-512 code for dequantizing takes every row for blocks of its own, where `k` is a multiple of 16: value `c` of row `r` gets the absmax of block
//! `r · ⌊k / 64⌋ + ⌊c / 64⌋`. Blocks of 64 run over the flattened matrix, so where `k` is no multiple of 64, most values get another block's absmax
//! (bitsandbytes 0.50.2; its generic code and its CUDA kernels count right, and the bytes that it stores are the same). A reference with such a matrix
//! is that of other weights: here the bytes are ours and the reading is theirs, and our own reading is held against our own bytes.

use half::f16;
use quantbench::engine::Session;
use quantbench::plan::{MatrixSpec, Model};
use quantbench::quant::nf4::nested::VALUES;
use quantbench::quant::nf4::{self, CODES};
use quantbench::quant::{FormatOptions, HalfMatrix, Part, Stored};
use quantbench::weights::{Source, SourceInfo};
use std::ops::Range;

use super::{
    Executor, Golden, NF4_LOGIT_TOLERANCE, checkpoint, executors, forced, load, load_from, models, plan, worst,
};

const BLOCK: usize = 64;
const NESTED_BLOCK: usize = 256;

/// The values that a matrix stands for.
type Reading = fn(&dyn Stored, k: usize) -> Vec<f32>;

fn is_misread(spec: &MatrixSpec) -> bool {
    spec.role.is_quantized() && spec.k.is_multiple_of(16) && !spec.k.is_multiple_of(BLOCK)
}

/// Whether bitsandbytes reads a matrix of the model as other values than it stored.
pub fn misreads(plan: &Model) -> bool {
    plan.matrices.iter().any(is_misread)
}

/// The model as bitsandbytes reads it, in fp32.
pub fn load_misread(model: &str, plan: &Model, executor: Executor) -> Box<dyn Session> {
    load_read(model, plan, executor, misread)
}

fn load_read(model: &str, plan: &Model, executor: Executor, reading: Reading) -> Box<dyn Session> {
    let checkpoint = checkpoint(model);
    let source = checkpoint.source(&plan.matrices, &plan.vectors).unwrap();
    let source = Dequantized { source: source.as_ref(), matrices: &plan.matrices, reading };
    load_from(&source, &checkpoint.config, plan, "fp32", executor).unwrap()
}

fn misread(stored: &dyn Stored, k: usize) -> Vec<f32> {
    if !k.is_multiple_of(16) || k.is_multiple_of(BLOCK) {
        return stored.dequantize();
    }
    let parts = stored.parts();
    let part = |suffix: &str| parts.iter().find(|part| part.suffix == suffix).unwrap();
    let floats = |part: &Part| {
        part.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<f32>>()
    };
    let (packed, absmax) = (&part("").bytes, &part("absmax").bytes);
    let (scales, offset) = (floats(part("nested_absmax")), floats(part("nested_offset"))[0]);
    let value = |element: usize| {
        let (row, column) = (element / k, element % k);
        let code = if element.is_multiple_of(2) { packed[element / 2] >> 4 } else { packed[element / 2] & 15 };
        let block = row * (k / BLOCK) + column / BLOCK;
        CODES[usize::from(code)] * (VALUES[usize::from(absmax[block])] * scales[block / NESTED_BLOCK] + offset)
    };
    (0..stored.shape().0 * k).map(value).collect()
}

/// A checkpoint whose matrices are quantized to NF4 and read again.
struct Dequantized<'a> {
    source: &'a dyn Source,
    matrices: &'a [MatrixSpec],
    reading: Reading,
}

impl Source for Dequantized<'_> {
    fn info(&self) -> &SourceInfo {
        self.source.info()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(name)
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f16]) -> anyhow::Result<usize> {
        self.source.read_rows(name, rows, out)
    }

    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> anyhow::Result<()> {
        let Some(&MatrixSpec { n, k, .. }) = self.matrices.iter().find(|m| m.name == name && m.role.is_quantized())
        else {
            return self.source.read_rows_f32(name, rows, out);
        };
        let mut data = vec![f16::ZERO; n * k];
        self.source.read_rows(name, 0..n, &mut data)?;
        let stored = (nf4::ID.new)(FormatOptions::default()).quantize(HalfMatrix { n, k, data })?;
        out.copy_from_slice(&(self.reading)(stored.as_ref(), k)[rows.start * k..rows.end * k]);
        Ok(())
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.source.stored_bytes(name)
    }
}

/// The same values in fp32 give what NF4 gives, whatever the shapes, and another reading of them does not.
#[test]
fn nf4_reads_what_it_stores() {
    let mut told_apart = 0;
    for model in models() {
        let (plan, golden) = (plan(&model), Golden::open(&model, "golden"));
        for executor in executors() {
            let mut nf4 = load(&model, &plan, "nf4", executor).unwrap();
            let mut right = load_read(&model, &plan, executor, |stored, _| stored.dequantize());
            let mut other = misreads(&plan).then(|| load_misread(&model, &plan, executor));
            for (prompt, continuation) in golden.prompts() {
                let tokens = &continuation[..3];
                let (_, logits) = forced(nf4.as_mut(), &prompt, tokens);
                let difference = worst(&logits, &forced(right.as_mut(), &prompt, tokens).1);
                assert!(difference <= NF4_LOGIT_TOLERANCE, "{model} {executor:?}: {difference}");
                let Some(other) = &mut other else { continue };
                let difference = worst(&logits, &forced(other.as_mut(), &prompt, tokens).1);
                assert!(difference >= 10.0 * NF4_LOGIT_TOLERANCE, "{model} {executor:?} misread: {difference}");
                told_apart += 1;
            }
        }
    }
    println!("{told_apart} cases that bitsandbytes' AVX-512 code misreads");
}
