//! Attention of many rows: launches of `attend.cu`.

use candle_core::{Result, bail};

use super::arena::Arena;
use super::launch::{Fatbin, Grid, Launcher, dimension};
use super::place::RowPlaces;
use crate::{fatbin, parameters};

pub static KERNELS: Fatbin = fatbin!("attend");

/// As in attend.cu.
const THREADS: u32 = 128;
const TILE_QUERIES: usize = 64;
/// Keys of a split at least, and splits at most.
const SPLIT_KEYS: usize = 512;
const MAX_SPLITS: usize = 64;

/// Which query heads read which cache.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub d: usize,
    pub d_pad: usize,
    pub capacity: usize,
}

/// A relative bias laid out by distance: fp32 `[h, 2 · reach + 1]`; 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bias {
    pub address: u64,
    pub reach: usize,
}

/// `out = softmax(scale · q · Kᵀ + bias) · V` of rows at `places`, with fp32 sums.
#[derive(Debug, Clone, Copy)]
pub struct RowsAttention {
    pub places: RowPlaces,
    pub heads: Heads,
    /// fp16 `[sequences, rows, h, d]`, rotated; so is `out`.
    pub q: u64,
    pub out: u64,
    /// fp16 `[sequences, g, capacity, d_pad]`; so are `values`.
    pub keys: u64,
    pub values: u64,
    /// Positions of the cache that the last row sees, the most where there are `places`.
    pub total: usize,
    /// The cache is the encoder's, in which rows have no position.
    pub over_encoder: bool,
    pub scale: f32,
    /// A row sees no key behind its own position.
    pub is_causal: bool,
    pub bias: Bias,
    pub features: RowsFeatures,
}

/// What featured kernels compute beside plain attention; all zeros for none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct RowsFeatures {
    /// fp32 `[h]`: scores that join the softmax and weigh no value; 0 for none.
    pub sinks: u64,
    /// `softcap · tanh(score / softcap)` in place of each score; 0 for none.
    pub softcap: f32,
    /// Keys that a row sees, its own the last; 0 for all. Calls with one are causal.
    pub window: i32,
}

/// As `struct RowsAttention` of attend.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Operands {
    q: u64,
    keys: u64,
    values: u64,
    out: u64,
    bias: u64,
    scale: f32,
    rows: i32,
    heads: i32,
    group: i32,
    d: i32,
    d_pad: i32,
    capacity: i32,
    total: i32,
    position: i32,
    is_causal: i32,
    reach: i32,
    splits: i32,
    partials: u64,
    places: u64,
    sequences: i32,
    over_encoder: i32,
    features: RowsFeatures,
}

/// A kernel for heads of up to `d` elements, in tiles of `keys` keys; `parts` blocks share a head's output.
struct Kernel {
    name: &'static str,
    featured: &'static str,
    d: usize,
    keys: usize,
    parts: usize,
}

const ATTEND: [Kernel; 4] = [
    Kernel { name: "attend_64", featured: "attend_64_featured", d: 64, keys: 64, parts: 1 },
    Kernel { name: "attend_80", featured: "attend_80_featured", d: 80, keys: 64, parts: 1 },
    Kernel { name: "attend_128", featured: "attend_128_featured", d: 128, keys: 32, parts: 1 },
    Kernel { name: "attend_256", featured: "attend_256_featured", d: 256, keys: 16, parts: 2 },
];

impl Kernel {
    /// Two tiles of keys and values; rows of an odd number of 16-byte words.
    fn shared_bytes(&self) -> usize {
        4 * self.keys * ((self.d / 8) | 1) * 16
    }
}

impl RowsAttention {
    /// Tiles of rows of all sequences.
    fn row_blocks(&self) -> usize {
        self.places.sequences * self.places.rows.div_ceil(TILE_QUERIES)
    }

    /// Blocks that share the keys of the same rows: where rows and heads alone give a multiprocessor less than a block, each with enough keys.
    fn splits(&self, kernel: &Kernel, multiprocessors: usize) -> usize {
        let blocks = self.row_blocks() * self.heads.heads * kernel.parts;
        (2 * multiprocessors / blocks).min(self.total / SPLIT_KEYS).clamp(1, MAX_SPLITS)
    }

    /// # Errors
    /// If no kernel has heads so wide, or the launch fails.
    ///
    /// # Safety
    /// Everything that it names is as large as it says where `on` runs, and good until its stream has come past this call.
    pub unsafe fn run(&self, on: &dyn Launcher, arena: &Arena, multiprocessors: usize) -> Result<()> {
        let Self { places, heads, q, out, keys, values, total, over_encoder, scale, is_causal, bias, features } = *self;
        let all_rows = places.all_rows();
        let Some(kernel) = ATTEND.iter().find(|kernel| heads.d <= kernel.d) else {
            bail!("heads of {} elements, allowed are up to {}", heads.d, ATTEND[ATTEND.len() - 1].d)
        };
        let splits = self.splits(kernel, multiprocessors);
        let partials = match splits {
            1 => None,
            _ => Some(arena.take::<f32>(splits * all_rows * heads.heads * (2 + heads.d))?),
        };
        let operands = Operands {
            q,
            keys,
            values,
            out,
            bias: bias.address,
            scale,
            rows: dimension(places.rows)?,
            heads: dimension(heads.heads)?,
            group: dimension(heads.heads / heads.kv_heads)?,
            d: dimension(heads.d)?,
            d_pad: dimension(heads.d_pad)?,
            capacity: dimension(heads.capacity)?,
            total: dimension(total)?,
            position: dimension(if over_encoder { 0 } else { places.position })?,
            is_causal: i32::from(is_causal),
            reach: dimension(bias.reach)?,
            splits: dimension(splits)?,
            partials: partials.as_ref().map_or(0, |partials| partials.address),
            places: places.places,
            sequences: dimension(places.sequences)?,
            over_encoder: i32::from(over_encoder),
            features,
        };
        let name = if features == RowsFeatures::default() { kernel.name } else { kernel.featured };
        let blocks = (self.row_blocks(), heads.heads * kernel.parts * splits);
        let grid = Grid { shared_bytes: kernel.shared_bytes(), ..Grid::new(blocks, THREADS).overlapping() };
        // SAFETY: the kernels take one struct, which `Operands` mirrors; the caller's promise for what it names. Each block of the first writes its
        // partials, if there are any.
        unsafe {
            on.launch(&KERNELS, name, grid, parameters![operands])?;
            if splits > 1 {
                let merge = Grid::new((all_rows, heads.heads), THREADS).overlapping();
                on.launch(&KERNELS, "attend_merge", merge, parameters![operands])?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory that every chip gives a block without being asked for more.
    #[test]
    fn tiles_fit_the_shared_memory_of_every_chip() {
        for kernel in &ATTEND {
            assert!(kernel.shared_bytes() <= 48 << 10, "{}: {}", kernel.name, kernel.shared_bytes());
        }
    }
}
