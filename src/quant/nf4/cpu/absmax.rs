//! Absmax values as the kernels read them: with the rows of a strip side by side where rows are whole blocks.

use std::ops::Range;

use bytemuck::cast_slice;

use super::super::nested::{NESTED_BLOCK, NestedAbsmax, VALUES};
use super::super::{Absmax, BLOCK};
use super::BLOCK_GROUPS;
use crate::quant::cpu::STRIP_ROWS;

/// One value for each row of a strip.
pub type StripLanes = [f32; STRIP_ROWS];

/// Rows of which [`StripAbsmax::decode_ahead`] decodes one block at a time.
const ROWS_AHEAD: usize = STRIP_ROWS / BLOCK_GROUPS;

/// All absmax values of a matrix.
pub enum PackedAbsmax {
    /// Rows are whole blocks; fp32 as `[strip][block of the row][row]`.
    Plain(RowBlocks<f32>),
    /// As `Plain`, double-quantized: codes in that order, the rest as stored.
    Nested { codes: RowBlocks<u8>, absmax: Vec<f32>, offset: f32 },
    /// Blocks cross rows: as stored.
    Crossing(Absmax),
}

/// One value for each block, as `[strip][block of the row][row]`; rows that fill the last strip hold zeros.
pub struct RowBlocks<T> {
    n: usize,
    /// Blocks of a row.
    blocks: usize,
    values: Vec<[T; STRIP_ROWS]>,
}

impl<T: Copy + Default> RowBlocks<T> {
    /// `stored` has `blocks` values for each row.
    fn pack(stored: &[T], n: usize) -> Self {
        let blocks = stored.len() / n;
        let mut values = vec![[T::default(); STRIP_ROWS]; n.div_ceil(STRIP_ROWS) * blocks];
        for (row, stored) in stored.chunks_exact(blocks).enumerate() {
            let strip = &mut values[row / STRIP_ROWS * blocks..][..blocks];
            strip.iter_mut().zip(stored).for_each(|(lanes, value)| lanes[row % STRIP_ROWS] = *value);
        }
        Self { n, blocks, values }
    }

    fn unpack(&self) -> Vec<T> {
        (0..self.n * self.blocks).map(|block| self.get(block)).collect()
    }

    /// The value of a block of the flattened matrix.
    fn get(&self, block: usize) -> T {
        let row = block / self.blocks;
        self.strip(row / STRIP_ROWS)[block % self.blocks][row % STRIP_ROWS]
    }

    fn strip(&self, strip: usize) -> &[[T; STRIP_ROWS]] {
        &self.values[strip * self.blocks..][..self.blocks]
    }

    /// As [`Self::strip`], of several.
    fn strips(&self, strips: Range<usize>) -> &[[T; STRIP_ROWS]] {
        &self.values[strips.start * self.blocks..strips.end * self.blocks]
    }

    fn resident_bytes(&self) -> usize {
        size_of_val(&self.values[..])
    }

    /// The flattened matrix's block that is block `block` of a row; the last row stands in for those that are missing.
    fn flat(&self, strip: usize, lane: usize, block: usize) -> usize {
        (strip * STRIP_ROWS + lane).min(self.n - 1) * self.blocks + block
    }
}

impl PackedAbsmax {
    pub fn pack(stored: Absmax, n: usize, k: usize) -> Self {
        match stored {
            stored if !k.is_multiple_of(BLOCK) => PackedAbsmax::Crossing(stored),
            Absmax::Plain(values) => PackedAbsmax::Plain(RowBlocks::pack(&values, n)),
            Absmax::Nested(NestedAbsmax { codes, absmax, offset }) => {
                PackedAbsmax::Nested { codes: RowBlocks::pack(&codes, n), absmax, offset }
            }
        }
    }

    pub fn unpack(&self) -> Absmax {
        match self {
            PackedAbsmax::Plain(values) => Absmax::Plain(values.unpack()),
            PackedAbsmax::Nested { codes, absmax, offset } => {
                Absmax::Nested(NestedAbsmax { codes: codes.unpack(), absmax: absmax.clone(), offset: *offset })
            }
            PackedAbsmax::Crossing(stored) => stored.clone(),
        }
    }

    pub fn resident_bytes(&self) -> usize {
        match self {
            PackedAbsmax::Plain(values) => values.resident_bytes(),
            PackedAbsmax::Nested { codes, absmax, offset } => {
                codes.resident_bytes() + size_of_val(&absmax[..]) + size_of_val(offset)
            }
            PackedAbsmax::Crossing(stored) => stored.stored_bytes(),
        }
    }

    /// Hands out the values of `strips`, which are the flattened matrix's `blocks`.
    pub fn memory_of(&self, strips: Range<usize>, blocks: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        let nested = |blocks: &Range<usize>| blocks.start / NESTED_BLOCK..blocks.end.div_ceil(NESTED_BLOCK);
        match self {
            PackedAbsmax::Plain(values) => piece(cast_slice(values.strips(strips).as_flattened())),
            PackedAbsmax::Nested { codes, absmax, .. } => {
                piece(codes.strips(strips).as_flattened());
                piece(cast_slice(&absmax[nested(&blocks)]));
            }
            PackedAbsmax::Crossing(Absmax::Plain(values)) => piece(cast_slice(&values[blocks])),
            PackedAbsmax::Crossing(Absmax::Nested(NestedAbsmax { codes, absmax, .. })) => {
                piece(&codes[blocks.clone()]);
                piece(cast_slice(&absmax[nested(&blocks)]));
            }
        }
    }

    /// The absmax of a block of the flattened matrix.
    pub fn get(&self, block: usize) -> f32 {
        match self {
            PackedAbsmax::Plain(values) => values.get(block),
            PackedAbsmax::Nested { codes, absmax, offset } => {
                VALUES[usize::from(codes.get(block))] * absmax[block / NESTED_BLOCK] + offset
            }
            PackedAbsmax::Crossing(stored) => stored.get(block),
        }
    }
}

/// Absmax values of a strip whose rows are whole blocks, block after block from the first.
pub trait StripAbsmax {
    /// Those of block `block` of each row.
    fn lanes(&mut self, block: usize) -> StripLanes;

    /// Does the eighth `group` of what the next strip needs done for block `block`: scalar work in the slots that the
    /// vector work leaves free.
    fn decode_ahead(&mut self, block: usize, group: usize);
}

/// fp32 values, ready as they are.
pub struct PlainStrip<'a>(pub &'a [StripLanes]);

impl<'a> PlainStrip<'a> {
    pub fn new(values: &'a RowBlocks<f32>, strip: usize) -> Self {
        Self(values.strip(strip))
    }
}

impl StripAbsmax for PlainStrip<'_> {
    #[inline(always)]
    fn lanes(&mut self, block: usize) -> StripLanes {
        self.0[block]
    }

    #[inline(always)]
    fn decode_ahead(&mut self, _block: usize, _group: usize) {}
}

/// Double-quantized values: their codes were looked up while the strip before was multiplied.
pub struct NestedStrip<'a> {
    /// Looked up, not scaled: this strip's from the block in work on, the next one's before it. One buffer, since two
    /// and a long `x` would not fit L1.
    values: &'a mut [StripLanes],
    next_codes: &'a [[u8; STRIP_ROWS]],
    table: &'a [f32; 256],
    absmax: &'a [f32],
    offset: f32,
    /// Each row's block 0.
    first: [usize; STRIP_ROWS],
    /// Nested absmax of each row, good until block `change`.
    scales: StripLanes,
    change: usize,
}

impl<'a> NestedStrip<'a> {
    /// `values` hold this strip's looked-up codes and will hold strip `next`'s.
    pub fn new(
        (codes, absmax, offset): (&'a RowBlocks<u8>, &'a [f32], f32),
        strip: usize,
        next: usize,
        values: &'a mut [StripLanes],
    ) -> Self {
        let first = std::array::from_fn(|lane| codes.flat(strip, lane, 0));
        let next_codes = codes.strip(next);
        Self { values, next_codes, table: &VALUES, absmax, offset, first, scales: [0.0; _], change: 0 }
    }

    /// What `decode_ahead` does for strip `strip`, all at once.
    pub fn look_up(codes: &RowBlocks<u8>, strip: usize, values: &mut [StripLanes]) {
        let table: &[f32; 256] = &VALUES;
        for (values, codes) in values.iter_mut().zip(codes.strip(strip)) {
            *values = codes.map(|code| table[usize::from(code)]);
        }
    }

    /// Ends the strip: what `decode_ahead` has left to do.
    pub fn finish(self) {
        let last = self.values.len() - 1;
        self.values[last] = self.next_codes[last].map(|code| self.table[usize::from(code)]);
    }

    /// The nested absmax values for `block`, and the first block at which one of them changes.
    #[cold]
    fn update(&mut self, block: usize) {
        self.change = usize::MAX;
        for (scale, first) in self.scales.iter_mut().zip(self.first) {
            let flat = first + block;
            *scale = self.absmax[flat / NESTED_BLOCK];
            self.change = self.change.min(block + NESTED_BLOCK - flat % NESTED_BLOCK);
        }
    }
}

impl StripAbsmax for NestedStrip<'_> {
    #[inline(always)]
    fn lanes(&mut self, block: usize) -> StripLanes {
        if block == self.change {
            self.update(block);
        }
        let mut lanes = self.values[block];
        lanes.iter_mut().zip(self.scales).for_each(|(lane, scale)| *lane = *lane * scale + self.offset);
        lanes
    }

    #[inline(always)]
    fn decode_ahead(&mut self, block: usize, group: usize) {
        // The block before is done with.
        let Some(block) = block.checked_sub(1) else { return };
        let (codes, values) = (&self.next_codes[block], &mut self.values[block]);
        for lane in ROWS_AHEAD * group..ROWS_AHEAD * (group + 1) {
            values[lane] = self.table[usize::from(codes[lane])];
        }
    }
}
