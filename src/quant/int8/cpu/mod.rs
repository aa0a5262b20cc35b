//! LLM.int8 on the CPU: strips of 16 rows, each lane of a register one row's next four codes; exact int32 sums.

mod activations;
mod outliers;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use bytemuck::cast_slice;

use self::outliers::StripOutliers;
use super::{CODE_UNIT, ID, Int8Stored, PRODUCT_UNIT};
use crate::kernels::cpu::pages::Pages;
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;
use crate::quant::cpu::panel::{self, PanelSource, Start};
use crate::quant::cpu::{STRIP_ROWS, checked, strips, write_strip};
use crate::quant::{Activations, CpuMatrix, FormatId, Prepared, Stored};

pub use activations::encode_row;

/// Codes of one row in a lane of 32 bits.
const QUAD: usize = 4;
/// Bytes of one quad for all rows of a strip.
const QUAD_BYTES: usize = STRIP_ROWS * QUAD;

/// Tokens and strips of an integer tile at most: 24 accumulators of AVX-512's 32 registers.
const TILE_TOKENS: usize = 6;
const TILE_STRIPS: usize = 4;

/// Integer sums of some tokens times up to four strips.
type Tile = [[[i32; STRIP_ROWS]; TILE_STRIPS]; TILE_TOKENS];

/// Codes as `[strip][quad of columns][row][4]`.
pub struct Int8Matrix {
    n: usize,
    k: usize,
    isa: Isa,
    threshold: f32,
    codes: Pages,
    /// Each row's absmax, zero for the rows that fill the last strip.
    absmax: Vec<f32>,
    /// What the sums exceed the products' by, as the kernel's activations are offset; empty where they are not.
    excess: Vec<i32>,
}

impl Int8Matrix {
    pub fn new(stored: Int8Stored, isa: Isa) -> Self {
        let isa = checked(isa);
        let Int8Stored { n, k, threshold, codes, mut absmax } = stored;
        let quads = k.div_ceil(QUAD);
        let mut bytes = Pages::required(n.div_ceil(STRIP_ROWS) * quads * QUAD_BYTES);
        for (row, codes) in codes.chunks_exact(k).enumerate() {
            let lane = (row / STRIP_ROWS * quads * STRIP_ROWS + row % STRIP_ROWS) * QUAD;
            for (quad, codes) in codes.chunks(QUAD).enumerate() {
                for (byte, code) in bytes[lane + quad * QUAD_BYTES..].iter_mut().zip(codes) {
                    *byte = code.cast_unsigned();
                }
            }
        }
        let offset = i32::from(activations::offset(isa));
        let excess = |codes: &[i8]| offset * codes.iter().map(|code| i32::from(*code)).sum::<i32>();
        let mut excess: Vec<i32> = if offset == 0 { Vec::new() } else { codes.chunks_exact(k).map(excess).collect() };
        let padded = n.next_multiple_of(STRIP_ROWS);
        absmax.resize(padded, 0.0);
        excess.resize(if offset == 0 { 0 } else { padded }, 0);
        Self { n, k, isa, threshold, codes: bytes, absmax, excess }
    }

    /// Columns as the activations are padded.
    fn padded_k(&self) -> usize {
        self.k.next_multiple_of(QUAD)
    }

    /// Codes of some strips, `[strip][quad][row][4]`.
    fn strip_codes(&self, strips: Range<usize>) -> &[u8] {
        let len = self.padded_k() * STRIP_ROWS;
        &self.codes[strips.start * len..strips.end * len]
    }

    fn code(&self, row: usize, column: usize) -> i8 {
        let strip = self.strip_codes(row / STRIP_ROWS..row / STRIP_ROWS + 1);
        strip[column / QUAD * QUAD_BYTES + row % STRIP_ROWS * QUAD + column % QUAD].cast_signed()
    }

    /// Dequantized weights of a column, one for each row of a strip.
    fn column(&self, strip: usize, column: usize) -> [f32; STRIP_ROWS] {
        let absmax = &self.absmax[strip * STRIP_ROWS..].as_chunks().0[0];
        outliers::weights(self.strip_codes(strip..strip + 1), column, absmax)
    }

    /// Products summed over the columns in fp32, from the kernel's sums.
    fn dequantize_sums(&self, strip: usize, sums: &[i32; STRIP_ROWS], token_absmax: f32) -> [f32; STRIP_ROWS] {
        let first = strip * STRIP_ROWS;
        let mut products = *sums;
        if !self.excess.is_empty() {
            // Wraps where the sum did, and leaves the exact value.
            products.iter_mut().zip(&self.excess[first..]).for_each(|(sum, excess)| *sum = sum.wrapping_sub(*excess));
        }
        let mut values = [0.0; STRIP_ROWS];
        for ((value, product), absmax) in values.iter_mut().zip(products).zip(&self.absmax[first..]) {
            *value = product as f32 * (token_absmax * absmax) * PRODUCT_UNIT;
        }
        values
    }

    /// `x` is the codes of `tokens` tokens.
    fn multiply_tile(&self, strips: Range<usize>, x: &[i8], tokens: usize, tile: &mut Tile) {
        let input = TileInput { codes: self.strip_codes(strips), x, tokens, padded_k: self.padded_k() };
        input.check();
        match self.isa {
            // SAFETY: the instruction set and the bounds are checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::multiply_tile(input, tile) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::multiply_tile(input, tile) },
            _ => portable::multiply_tile(input, tile),
        }
    }

    /// One token: the strip's outlier columns are read while the strip is in the cache.
    fn multiply_token(&self, x: Activations, rows: Range<usize>, bias: Option<&[f32]>, y: &SharedSlice<'_, f32>) {
        let mut tile = Tile::default();
        let outliers = &x.f32s[self.k..];
        for strip in strips(&rows) {
            self.multiply_tile(strip..strip + 1, x.i8s, 1, &mut tile);
            let mut sums = self.dequantize_sums(strip, &tile[0][0], x.scales[0]);
            let absmax = &self.absmax[strip * STRIP_ROWS..].as_chunks().0[0];
            let codes = self.strip_codes(strip..strip + 1);
            StripOutliers { codes, absmax, columns: x.outlier_columns, values: outliers }.add_to(&mut sums, self.isa);
            write_strip(&sums, strip, &rows, bias, 0, y);
        }
    }

    /// The int8 part for several tokens.
    fn multiply_tokens(&self, x: Activations, rows: Range<usize>, bias: Option<&[f32]>, y: &SharedSlice<'_, f32>) {
        let mut tile = Tile::default();
        let strips = strips(&rows);
        for first in strips.clone().step_by(TILE_STRIPS) {
            let group = first..(first + TILE_STRIPS).min(strips.end);
            for token in (0..x.m).step_by(TILE_TOKENS) {
                let tokens = TILE_TOKENS.min(x.m - token);
                let codes = &x.i8s[token * self.padded_k()..][..tokens * self.padded_k()];
                self.multiply_tile(group.clone(), codes, tokens, &mut tile);
                for (t, sums) in tile[..tokens].iter().enumerate() {
                    let first = (token + t) * self.n;
                    for (strip, sums) in group.clone().zip(sums) {
                        let sums = self.dequantize_sums(strip, sums, x.scales[token + t]);
                        write_strip(&sums, strip, &rows, bias, first, y);
                    }
                }
            }
        }
    }
}

/// What an integer tile is computed from.
#[derive(Clone, Copy)]
struct TileInput<'a> {
    /// Up to [`TILE_STRIPS`] strips.
    codes: &'a [u8],
    /// `[tokens][padded_k]`, offset where the instruction set wants it.
    x: &'a [i8],
    /// 1 to [`TILE_TOKENS`].
    tokens: usize,
    padded_k: usize,
}

impl TileInput<'_> {
    fn strips(&self) -> usize {
        self.codes.len() / (self.padded_k * STRIP_ROWS)
    }

    /// The bounds that the tile kernels rely on.
    fn check(&self) {
        assert!((1..=TILE_TOKENS).contains(&self.tokens) && (1..=TILE_STRIPS).contains(&self.strips()));
        assert!(self.padded_k.is_multiple_of(QUAD) && self.x.len() >= self.tokens * self.padded_k);
        assert_eq!(self.codes.len(), self.strips() * self.padded_k * STRIP_ROWS);
    }
}

/// The outlier columns of a matrix as a matrix of their own, dequantized.
struct OutlierColumns<'a> {
    matrix: &'a Int8Matrix,
    columns: &'a [u32],
}

impl PanelSource for OutlierColumns<'_> {
    fn isa(&self) -> Isa {
        self.matrix.isa
    }

    fn shape(&self) -> (usize, usize) {
        (self.matrix.n, self.columns.len())
    }

    fn decode_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]) {
        for (lanes, column) in panel.as_chunks_mut::<STRIP_ROWS>().0.iter_mut().zip(&self.columns[columns]) {
            *lanes = self.matrix.column(strip, *column as usize);
        }
    }
}

impl CpuMatrix for Int8Matrix {
    fn format(&self) -> FormatId {
        ID
    }

    fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    fn stored_bytes(&self) -> usize {
        self.n * self.k + self.n * size_of::<f32>()
    }

    fn resident_bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.absmax[..]) + size_of_val(&self.excess[..])
    }

    fn unpack(&self) -> Box<dyn Stored> {
        let codes = (0..self.n).flat_map(|row| (0..self.k).map(move |column| self.code(row, column))).collect();
        let absmax = self.absmax[..self.n].to_vec();
        Box::new(Int8Stored { n: self.n, k: self.k, threshold: self.threshold, codes, absmax })
    }

    fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.k)) {
            for (column, out) in out.iter_mut().enumerate() {
                *out = f32::from(self.code(row, column)) * self.absmax[row] * CODE_UNIT;
            }
        }
    }

    /// `f32s` hold the activations after the cast to fp16, `[m, k]`, then those of the outlier columns as they were,
    /// `[m, outlier_columns]`; `i8s` the codes, `[m, padded_k]`.
    fn prepare<'a>(&self, x: &'a [f32], m: usize, room: &'a mut Prepared) -> Activations<'a> {
        assert_eq!(x.len(), m * self.k, "activations of {m} tokens");
        (room.m, room.k) = (m, self.k);
        activations::prepare(x, self.padded_k(), self.threshold, self.isa, room);
        room.view()
    }

    fn quantizes_activations(&self) -> bool {
        true
    }

    fn memory_of(&self, rows: Range<usize>, piece: &mut dyn FnMut(&[u8])) {
        piece(self.strip_codes(strips(&rows)));
        piece(cast_slice(&self.absmax[rows.clone()]));
        if !self.excess.is_empty() {
            piece(cast_slice(&self.excess[rows]));
        }
    }

    fn finds_outliers(&self) -> bool {
        self.threshold > 0.0
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
        if x.m == 1 {
            return self.multiply_token(x, rows, bias, y);
        }
        self.multiply_tokens(x, rows.clone(), bias, y);
        if !x.outlier_columns.is_empty() {
            let outliers = OutlierColumns { matrix: self, columns: x.outlier_columns };
            panel::multiply(&outliers, &x.f32s[x.m * self.k..], x.m, rows, Start::Sums, y, scratch);
        }
    }
}
