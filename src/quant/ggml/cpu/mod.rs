//! Block matrices on the CPU: rows as the file has them. A piece of a row is decoded to fp32 in the first-level cache, and dense kernels
//! multiply it. The decoders are plain Rust, compiled once for each instruction set. Common types have kernels for one token, which
//! multiply in registers.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::marker::PhantomData;
use std::ops::Range;

use super::super::cpu::rows::{self, DecodeRows};
use super::super::cpu::{STRIP_ROWS, checked, panel::PANEL_COLUMNS};
use super::super::{Activations, CpuMatrix, FormatId, Stored};
use super::block::{Block, BlockStored, row_bytes};
use crate::kernels::cpu::pages::Pages;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// Rows of blocks in huge pages.
pub struct BlockMatrix<B> {
    n: usize,
    k: usize,
    isa: Isa,
    blocks: Pages,
    block: PhantomData<B>,
}

impl<B: Block> BlockMatrix<B> {
    pub fn new(stored: BlockStored<B>, isa: Isa) -> Self {
        const { assert!(PANEL_COLUMNS.is_multiple_of(B::LEN)) };
        let mut blocks = Pages::required(stored.bytes.len());
        blocks.copy_from_slice(&stored.bytes);
        Self { n: stored.n, k: stored.k, isa: checked(isa), blocks, block: PhantomData }
    }

    /// The blocks of `columns`, which begin and end with one.
    fn blocks(&self, row: usize, columns: Range<usize>) -> &[u8] {
        let row = &self.blocks[row * row_bytes::<B>(self.k)..][..row_bytes::<B>(self.k)];
        &row[columns.start / B::LEN * B::BYTES..columns.end / B::LEN * B::BYTES]
    }
}

#[inline(always)]
fn decode<B: Block>(blocks: &[u8], values: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(B::BYTES).zip(values.chunks_exact_mut(B::LEN)) {
        B::decode(block, values);
    }
}

/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
unsafe fn decode_avx512<B: Block>(blocks: &[u8], values: &mut [f32]) {
    decode::<B>(blocks, values);
}

/// # Safety
/// The machine has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn decode_avx2<B: Block>(blocks: &[u8], values: &mut [f32]) {
    decode::<B>(blocks, values);
}

impl<B: Block> DecodeRows for BlockMatrix<B> {
    fn isa(&self) -> Isa {
        self.isa
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn decode(&self, row: usize, columns: Range<usize>, values: &mut [f32]) {
        let blocks = self.blocks(row, columns);
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { decode_avx512::<B>(blocks, values) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { decode_avx2::<B>(blocks, values) },
            _ => decode::<B>(blocks, values),
        }
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::dot::<B>(self.blocks(row, 0..self.k), x) },
            _ => None,
        }
        .unwrap_or_else(|| rows::decoded_dot(self, row, x))
    }
}

impl<B: Block> CpuMatrix for BlockMatrix<B> {
    fn format(&self) -> FormatId {
        B::ID
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.blocks.len()
    }

    fn resident_bytes(&self) -> usize {
        self.blocks.len()
    }

    fn unpack(&self) -> Box<dyn Stored> {
        Box::new(BlockStored::<B> { n: self.n, k: self.k, bytes: self.blocks.to_vec(), block: PhantomData })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        rows::dequantize(self, rows, out);
    }

    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        let bytes = row_bytes::<B>(self.k);
        piece(&self.blocks[rows.start * bytes..rows.end * bytes]);
    }

    fn row_granule(&self) -> usize {
        STRIP_ROWS
    }

    fn multiply(
        &self,
        x: Activations,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        y: &SharedSlice<'_, f32>,
        scratch: &mut Vec<f32>,
    ) {
        rows::multiply(self, x, rows, bias, y, scratch);
    }
}
