//! NF4 on the CPU: strips of 16 rows, each lane of a register one row's next eight codes.

mod absmax;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use self::absmax::{NestedStrip, PackedAbsmax, PlainStrip, RowBlocks, StripAbsmax, StripLanes};
use super::codes::{encode_block, encode_short_block};
use super::{AbsmaxKind, BLOCK, CODES, Nf4Stored};
use crate::kernels::cpu::pages::{Pages, prefer_huge_pages};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;
use crate::quant::cpu::panel::{self, PANEL_COLUMNS, PanelSource, Start};
use crate::quant::cpu::{FewSums, STRIP_ROWS, StripSums, checked, grown, strips, write_few, write_strip};
use crate::quant::{Activations, CpuMatrix, FormatId, Stored};

/// Codes of one row in a lane of 32 bits. Their nibbles keep the stored order: column `j` of the eight is at bit
/// `4 · (j ^ 1)`.
const GROUP: usize = 8;
/// Bytes of one group for all rows of a strip.
const GROUP_BYTES: usize = STRIP_ROWS * GROUP / 2;
/// Groups that share an absmax, where rows are whole blocks.
const BLOCK_GROUPS: usize = BLOCK / GROUP;
const BLOCK_BYTES: usize = BLOCK_GROUPS * GROUP_BYTES;

/// Bytes behind the codes that a kernel may read.
const SLACK: usize = GROUP / 2 - 1;

/// Codes as `[strip][group of 8 columns][row]`, and [`SLACK`].
pub struct Nf4Matrix {
    n: usize,
    k: usize,
    isa: Isa,
    codes: Pages,
    absmax: PackedAbsmax,
    kind: AbsmaxKind,
}

/// Encodes the flattened weights, `packed` two to a byte and `absmax` for each 64.
pub fn encode(weights: &[f16], packed: &mut [u8], absmax: &mut [f32]) {
    prefer_huge_pages(packed);
    match Isa::detect() {
        // SAFETY: the instruction set was detected.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::encode(weights, packed, absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::encode(weights, packed, absmax) },
        _ => encode_blocks(weights, packed, absmax),
    }
}

/// What [`encode`] does, compiled for each instruction set.
#[inline(always)]
fn encode_blocks(weights: &[f16], packed: &mut [u8], absmax: &mut [f32]) {
    /// Blocks that are widened to fp32 at once, on the stack.
    const CHUNK: usize = 32;
    let mut values = [0.0f32; CHUNK * BLOCK];
    let chunks = weights.chunks(CHUNK * BLOCK).zip(packed.chunks_mut(CHUNK * BLOCK / 2)).zip(absmax.chunks_mut(CHUNK));
    for ((weights, packed), absmax) in chunks {
        let values = &mut values[..weights.len()];
        weights.convert_to_f32_slice(values);
        let (blocks, last) = values.as_chunks::<BLOCK>();
        let (packed_blocks, packed_last) = packed.split_at_mut(blocks.len() * BLOCK / 2);
        let packed_blocks = packed_blocks.as_chunks_mut::<{ BLOCK / 2 }>().0;
        for ((block, packed), absmax) in blocks.iter().zip(packed_blocks).zip(absmax.iter_mut()) {
            *absmax = encode_block(block, packed);
        }
        if !last.is_empty() {
            absmax[blocks.len()] = encode_short_block(last, packed_last);
        }
    }
}

impl Nf4Matrix {
    pub fn new(stored: Nf4Stored, isa: Isa) -> Self {
        let (n, k) = stored.shape();
        let groups = k.div_ceil(GROUP);
        let mut codes = Pages::required(n.div_ceil(STRIP_ROWS) * groups * GROUP_BYTES + SLACK);
        for row in 0..n {
            let lane = (row / STRIP_ROWS * groups * STRIP_ROWS + row % STRIP_ROWS) * 4;
            for group in 0..groups {
                let at = lane + group * GROUP_BYTES;
                codes[at..at + 4].copy_from_slice(&group_bytes(&stored, row, group));
            }
        }
        let kind = stored.absmax.kind();
        Self { n, k, isa: checked(isa), codes, absmax: PackedAbsmax::pack(stored.absmax, n, k), kind }
    }

    fn groups(&self) -> usize {
        self.k.div_ceil(GROUP)
    }

    /// Codes of a strip, `[group][row]` in lanes of 4 bytes.
    fn strip(&self, strip: usize) -> &[u8] {
        let len = self.groups() * GROUP_BYTES;
        &self.codes[strip * len..][..len]
    }

    #[cfg(target_arch = "x86_64")]
    fn strip_and_slack(&self, strip: usize) -> &[u8] {
        let len = self.groups() * GROUP_BYTES;
        &self.codes[strip * len..][..len + SLACK]
    }

    /// Rows are whole blocks.
    fn rows_are_blocks(&self) -> bool {
        self.k.is_multiple_of(BLOCK)
    }

    fn code(&self, row: usize, column: usize) -> u8 {
        let byte =
            self.strip(row / STRIP_ROWS)[column / GROUP * GROUP_BYTES + row % STRIP_ROWS * 4 + column % GROUP / 2];
        if column.is_multiple_of(2) { byte >> 4 } else { byte & 0xf }
    }

    /// One token, double quantization. While a strip is multiplied, the next one's absmax codes are looked up.
    fn multiply_nested(
        &self,
        absmax @ (codes, ..): (&RowBlocks<u8>, &[f32], f32),
        x: &[f32],
        rows: Range<usize>,
        bias: Option<&[f32]>,
        y: &SharedSlice<'_, f32>,
        scratch: &mut Vec<f32>,
    ) {
        let strips = strips(&rows);
        if strips.is_empty() {
            return;
        }
        let values = grown(scratch, self.k / BLOCK * STRIP_ROWS).as_chunks_mut::<STRIP_ROWS>().0;
        NestedStrip::look_up(codes, strips.start, values);
        for strip in strips.clone() {
            let next = (strip + 1).min(strips.end - 1);
            let mut lanes = NestedStrip::new(absmax, strip, next, values);
            let sums = self.dot_strip(strip, &mut lanes, x);
            lanes.finish();
            write_strip(&sums, strip, &rows, bias, 0, y);
        }
    }

    fn dot_strip(&self, strip: usize, absmax: &mut impl StripAbsmax, x: &[f32]) -> StripSums {
        let codes = self.strip(strip);
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::dot_strip(self.strip_and_slack(strip), absmax, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::dot_strip(codes, absmax, x) },
            _ => portable::dot_strip(codes, absmax, x),
        }
    }

    /// A few tokens, where rows are whole blocks: each code is looked up once.
    fn multiply_few(
        &self,
        x: Activations,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        y: &SharedSlice<'_, f32>,
        scratch: &mut Vec<f32>,
    ) {
        let strips = strips(&rows);
        let mut sums = FewSums::default();
        let values = grown(scratch, self.k / BLOCK * STRIP_ROWS).as_chunks_mut::<STRIP_ROWS>().0;
        if let (PackedAbsmax::Nested { codes, .. }, false) = (&self.absmax, strips.is_empty()) {
            NestedStrip::look_up(codes, strips.start, values);
        }
        for strip in strips.clone() {
            match &self.absmax {
                PackedAbsmax::Plain(values) => {
                    self.dot_few(strip, &mut PlainStrip::new(values, strip), x.f32s, &mut sums);
                }
                PackedAbsmax::Nested { codes, absmax, offset } => {
                    let next = (strip + 1).min(strips.end - 1);
                    let mut lanes = NestedStrip::new((codes, absmax, *offset), strip, next, values);
                    self.dot_few(strip, &mut lanes, x.f32s, &mut sums);
                    lanes.finish();
                }
                PackedAbsmax::Crossing(_) => unreachable!("blocks cross rows"),
            }
            write_few(&sums, x.m, (strip, &rows), bias, self.n, y);
        }
    }

    fn dot_few(&self, strip: usize, absmax: &mut impl StripAbsmax, x: &[f32], sums: &mut FewSums) {
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::dot_few(self.strip_and_slack(strip), absmax, x, self.k, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::dot_few(self.strip(strip), absmax, x, self.k, sums) },
            _ => portable::dot_few(self.strip(strip), absmax, x, self.k, sums),
        }
    }

    /// Scales a panel of code values where blocks cross rows.
    fn scale_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]) {
        let panel = panel.as_chunks_mut::<STRIP_ROWS>().0;
        for lane in 0..STRIP_ROWS.min(self.n - strip * STRIP_ROWS) {
            let first = (strip * STRIP_ROWS + lane) * self.k + columns.start;
            let mut column = 0;
            while column < columns.len() {
                let block = (first + column) / BLOCK;
                let end = ((block + 1) * BLOCK - first).min(columns.len());
                let absmax = self.absmax.get(block);
                panel[column..end].iter_mut().for_each(|lanes| lanes[lane] *= absmax);
                column = end;
            }
        }
    }
}

/// The stored bytes of eight codes; columns past the row are 0.
fn group_bytes(stored: &Nf4Stored, row: usize, group: usize) -> [u8; 4] {
    let first = row * stored.k + group * GROUP;
    let last = (row + 1) * stored.k;
    if stored.k.is_multiple_of(GROUP) {
        let bytes = &stored.packed[first / 2..][..4];
        return [bytes[0], bytes[1], bytes[2], bytes[3]];
    }
    let code = |element| if element < last { stored.code(element) } else { 0 };
    std::array::from_fn(|i| code(first + 2 * i) << 4 | code(first + 2 * i + 1))
}

impl PanelSource for Nf4Matrix {
    fn isa(&self) -> Isa {
        self.isa
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn decode_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]) {
        let codes = &self.strip(strip)[columns.start / GROUP * GROUP_BYTES..];
        let mut absmax: [StripLanes; PANEL_COLUMNS / BLOCK] = [[1.0; STRIP_ROWS]; _];
        if self.rows_are_blocks() {
            for (b, lanes) in absmax[..columns.len() / BLOCK].iter_mut().enumerate() {
                for (lane, absmax) in lanes.iter_mut().enumerate() {
                    let row = (strip * STRIP_ROWS + lane).min(self.n - 1);
                    *absmax = self.absmax.get((row * self.k + columns.start) / BLOCK + b);
                }
            }
        }
        match self.isa {
            // SAFETY: the instruction set is checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::decode(codes, &absmax, panel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::decode(codes, &absmax, panel) },
            _ => portable::decode(codes, &absmax, panel),
        }
        if !self.rows_are_blocks() {
            self.scale_panel(strip, columns, panel);
        }
    }
}

impl CpuMatrix for Nf4Matrix {
    fn format(&self) -> FormatId {
        self.kind.format()
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        super::stored_bytes(self.n, self.k, self.kind)
    }

    fn resident_bytes(&self) -> usize {
        self.codes.len() + self.absmax.resident_bytes()
    }

    fn unpack(&self) -> Box<dyn Stored> {
        let codes: Vec<u8> =
            (0..self.n).flat_map(|row| (0..self.k).map(move |column| self.code(row, column))).collect();
        let packed = codes.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&0)).collect();
        Box::new(Nf4Stored { n: self.n, k: self.k, packed, absmax: self.absmax.unpack() })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.k)) {
            for (column, out) in out.iter_mut().enumerate() {
                *out = CODES[usize::from(self.code(row, column))] * self.absmax.get((row * self.k + column) / BLOCK);
            }
        }
    }

    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        let (strips, strip_bytes) = (strips(&rows), self.groups() * GROUP_BYTES);
        piece(&self.codes[strips.start * strip_bytes..strips.end * strip_bytes]);
        if !rows.is_empty() {
            self.absmax.memory_of(strips, rows.start * self.k / BLOCK..(rows.end * self.k).div_ceil(BLOCK), piece);
        }
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
        let x_values = x.f32s;
        match &self.absmax {
            PackedAbsmax::Plain(values) if x.m == 1 => {
                for strip in strips(&rows) {
                    let sums = self.dot_strip(strip, &mut PlainStrip::new(values, strip), x_values);
                    write_strip(&sums, strip, &rows, bias, 0, y);
                }
            }
            PackedAbsmax::Nested { codes, absmax, offset } if x.m == 1 => {
                self.multiply_nested((codes, absmax, *offset), x_values, rows, bias, y, scratch);
            }
            PackedAbsmax::Plain(_) | PackedAbsmax::Nested { .. } if x.are_few() => {
                self.multiply_few(x, rows, bias, y, scratch);
            }
            _ => panel::multiply(self, x_values, x.m, rows, Start::Bias(bias), y, scratch),
        }
    }
}
