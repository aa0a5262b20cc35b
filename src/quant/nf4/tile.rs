//! How much of an NF4 matrix is fp16 at once where a GPU multiplies many rows of activations by it.

use half::f16;

use super::BLOCK;

/// Rows of activations up to which codes are decoded as they stream, and no weight is fp16 in memory.
const FUSED_ROWS: usize = 64;
/// Two thirds of an H100's L2 cache: of 2 to 64 MiB the best there (docs/benchmarks.md).
const TILE_BYTES: usize = 32 << 20;
/// cuBLAS' tiles begin with whole words of the result, and have as many columns.
const TILE_GRANULE: usize = 64;
/// Rows of a call whose weights are made tile by tile.
const FEW_ROWS: usize = 32;

/// Whether m rows of activations are multiplied without fp16 weights: where no block crosses rows of the weight.
pub fn is_fused(m: usize, k: usize) -> bool {
    m <= FUSED_ROWS && k.is_multiple_of(BLOCK)
}

/// Rows of an `[n, k]` weight that are fp16 at once, for m rows of activations: of few, a product is over sooner than its weights
/// have gone through memory, so that they should stay in the L2 cache.
pub fn tile_rows(m: usize, n: usize, k: usize) -> usize {
    let bytes = size_of::<f16>() * n * k;
    let step = n.div_ceil(bytes.div_ceil(TILE_BYTES)).next_multiple_of(TILE_GRANULE);
    if m > FEW_ROWS { n } else { step.min(n) }
}

/// Bytes of those rows.
pub fn tile_bytes(m: usize, (n, k): (usize, usize)) -> u64 {
    if is_fused(m, k) { 0 } else { (size_of::<f16>() * k) as u64 * tile_rows(m, n, k) as u64 }
}
