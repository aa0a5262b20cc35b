//! What every block format shares: the trait that each implements, and the matrix of its blocks with the plain reference.

use std::marker::PhantomData;

use candle_core::{Result, bail};
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::super::{
    CpuMatrix, Format, FormatEntry, FormatId, FormatOptions, HalfMatrix, Part, Stored, multiply_dense, take_part,
};
use super::cpu::BlockMatrix;
use crate::kernels::isa::Isa;

/// A block of values of one row.
pub trait Block: Send + Sync + 'static {
    const ID: FormatId;
    /// Values of a block: a divisor of 256.
    const LEN: usize;
    const BYTES: usize;

    /// Decodes [`Self::BYTES`] bytes to [`Self::LEN`] fp32 values.
    fn decode(block: &[u8], values: &mut [f32]);

    /// Makes a block of values; `None` where nothing does.
    const ENCODE: Option<BlockEncoder> = None;

    /// The kernel of a decode step.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only kernels of x86-64 read it"))]
    const KERNEL: DotKernel = DotKernel::Decoded;

    /// Of [`DotKernel::Nibbles`]: d and m of `d·table[q] + m`.
    fn scales(_block: &[u8]) -> (f32, f32) {
        (0.0, 0.0)
    }

    /// Why these bytes have no meaning.
    fn fault(_block: &[u8]) -> Option<&'static str> {
        None
    }
}

/// Encodes as many values as a block has into its bytes.
pub type BlockEncoder = fn(&[f32], &mut [u8]);

/// What multiplies a row by one token without decoding it to memory first.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "kernels for x86-64 alone"))]
pub enum DotKernel {
    /// None: it is decoded.
    Decoded,
    /// Of Q8_0.
    Bytes,
    /// Of bf16, whose values stand alone.
    Bf16,
    /// Blocks of 32 codes in 16 bytes from byte `at` on; a code means a value of `table`.
    Nibbles {
        at: usize,
        table: &'static [f32; 16],
        has_min: bool,
    },
    Q4K,
    Q6K,
}

/// The row of a block format.
pub const fn entry<B: Block>(name: &'static str, doc: &'static str) -> FormatEntry {
    let is_made = B::ENCODE.is_some();
    FormatEntry { is_stored: true, is_made, runs_on_cuda: false, ..FormatEntry::plain(name, doc, new::<B>) }
}

fn new<B: Block>(_: FormatOptions) -> Box<dyn Format> {
    Box::new(BlockFormat::<B>(PhantomData))
}

struct BlockFormat<B>(PhantomData<B>);

fn check_row<B: Block>(k: usize) -> Result<()> {
    if !k.is_multiple_of(B::LEN) {
        bail!("rows of {k} values are no whole blocks of {} in {}", B::LEN, B::ID);
    }
    Ok(())
}

/// Bytes of a row.
pub fn row_bytes<B: Block>(k: usize) -> usize {
    k.div_ceil(B::LEN) * B::BYTES
}

impl<B: Block> Format for BlockFormat<B> {
    fn id(&self) -> FormatId {
        B::ID
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        n * row_bytes::<B>(k)
    }

    fn quantize(&self, weight: HalfMatrix) -> Result<Box<dyn Stored>> {
        let Some(encode) = B::ENCODE else {
            bail!("matrices in {} are read from files; nothing makes them here", B::ID)
        };
        weight.check()?;
        let HalfMatrix { n, k, data } = weight;
        check_row::<B>(k)?;
        let (mut bytes, mut values) = (vec![0; n * row_bytes::<B>(k)], vec![0.0; B::LEN]);
        for (block, halves) in bytes.chunks_exact_mut(B::BYTES).zip(data.chunks_exact(B::LEN)) {
            halves.convert_to_f32_slice(&mut values);
            encode(&values, block);
        }
        Ok(Box::new(BlockStored::<B> { n, k, bytes, block: PhantomData }))
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::super::cuda::DeviceBytes {
        super::super::cuda::DeviceBytes { resident: self.stored_bytes(n, k), transient: 0 }
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, _: usize, _: usize, _: &candle_core::Device) -> Result<Box<dyn super::super::cuda::CudaEncoder>> {
        bail!("matrices in {} do not run on CUDA yet", B::ID)
    }

    fn restore(&self, n: usize, k: usize, mut parts: Vec<Part>) -> Result<Box<dyn Stored>> {
        if n == 0 || k == 0 {
            bail!("a matrix of [{n}, {k}] in {}", B::ID);
        }
        check_row::<B>(k)?;
        let bytes = take_part(&mut parts, "", Dtype::U8, n.saturating_mul(row_bytes::<B>(k)))?;
        let fault = |(at, block): (usize, &[u8])| B::fault(block).map(|fault| (at, fault));
        if let Some((at, fault)) = bytes.chunks_exact(B::BYTES).enumerate().find_map(fault) {
            bail!("block {at} of a matrix in {}: {fault}", B::ID);
        }
        Ok(Box::new(BlockStored::<B> { n, k, bytes, block: PhantomData }))
    }
}

/// A matrix as its file has it: `n` rows of `k / LEN` blocks.
pub struct BlockStored<B> {
    pub n: usize,
    pub k: usize,
    pub bytes: Vec<u8>,
    pub block: PhantomData<B>,
}

impl<B: Block> Stored for BlockStored<B> {
    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn parts(&self) -> Vec<Part> {
        let shape = vec![self.n, row_bytes::<B>(self.k)];
        vec![Part { suffix: "", dtype: Dtype::U8, shape, bytes: self.bytes.clone() }]
    }

    fn dequantize(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.n * self.k];
        for (block, values) in self.bytes.chunks_exact(B::BYTES).zip(values.chunks_exact_mut(B::LEN)) {
            B::decode(block, values);
        }
        values
    }

    /// Sums in fp64 over decoded fp32 weights, rounded once.
    fn multiply(&self, x: &[f32], m: usize) -> Vec<f32> {
        multiply_dense(&self.dequantize(), self.shape(), x, m)
    }

    fn pack(self: Box<Self>, isa: Isa) -> Box<dyn CpuMatrix> {
        Box::new(BlockMatrix::new(*self, isa))
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, _: &candle_core::Device) -> Result<Box<dyn super::super::CudaMatrix>> {
        bail!("matrices in {} do not run on CUDA yet", B::ID)
    }
}

/// A format whose name stands for a mixture of types: a file's. No matrix is in it; sizes are those of its commonest type.
pub struct MixedFormat {
    pub id: FormatId,
    pub commonest: FormatId,
}

/// The row of a mixture.
pub const fn mixture(name: &'static str, doc: &'static str, new: fn(FormatOptions) -> Box<dyn Format>) -> FormatEntry {
    FormatEntry { is_stored: true, is_made: false, runs_on_cuda: false, ..FormatEntry::plain(name, doc, new) }
}

impl Format for MixedFormat {
    fn id(&self) -> FormatId {
        self.id
    }

    fn stored_bytes(&self, n: usize, k: usize) -> usize {
        (self.commonest.new)(FormatOptions::default()).stored_bytes(n, k)
    }

    fn quantize(&self, _: HalfMatrix) -> Result<Box<dyn Stored>> {
        bail!("`{}` is a mixture of files; nothing makes it here", self.id)
    }

    #[cfg(feature = "cuda")]
    fn device_bytes(&self, n: usize, k: usize) -> super::super::cuda::DeviceBytes {
        super::super::cuda::DeviceBytes { resident: self.stored_bytes(n, k), transient: 0 }
    }

    #[cfg(feature = "cuda")]
    fn encoder(&self, _: usize, _: usize, _: &candle_core::Device) -> Result<Box<dyn super::super::cuda::CudaEncoder>> {
        bail!("`{}` is a mixture of files; nothing makes it here", self.id)
    }

    fn restore(&self, _: usize, _: usize, _: Vec<Part>) -> Result<Box<dyn Stored>> {
        bail!("`{}` is a mixture: each matrix of its file has a type of its own", self.id)
    }
}
