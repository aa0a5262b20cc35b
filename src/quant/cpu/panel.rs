//! `y = x · Wᵀ` for several tokens: weights are decoded once, block by block, into fp32 panels that stay in the cache
//! while all tokens pass over them.

use std::ops::Range;

use super::{STRIP_ROWS, grown, portable, strips};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::kernels::cpu::shared::SharedSlice;
use crate::kernels::isa::Isa;

/// Columns of a panel: 256 · 16 · 4 bytes are 16 KiB, so that two panels and the tokens' values share a 48 KiB L1.
pub const PANEL_COLUMNS: usize = 256;
/// fp32 values of a panel, `[PANEL_COLUMNS][STRIP_ROWS]`.
pub const PANEL_LEN: usize = PANEL_COLUMNS * STRIP_ROWS;
/// Strips decoded before the tokens pass: 8 panels are 128 KiB of L2, and each token's values are loaded once for 128 rows.
const STRIPS_AT_ONCE: usize = 8;

/// Tokens that a tile has at most.
pub const TILE_TOKENS: usize = 12;
/// Columns of a tile: two strips.
pub const TILE_ROWS: usize = 2 * STRIP_ROWS;

/// Sums of some tokens times up to two strips.
#[repr(align(64))]
pub struct Tile(pub [[f32; TILE_ROWS]; TILE_TOKENS]);

/// What a tile is computed from.
#[derive(Clone, Copy)]
pub struct TileInput<'a> {
    /// One or two panels, [`PANEL_LEN`] apart.
    pub panels: &'a [f32],
    /// The first token's first value; tokens are `stride` apart.
    pub x: &'a [f32],
    pub stride: usize,
    /// 1 to [`TILE_TOKENS`].
    pub tokens: usize,
    /// 1 to [`PANEL_COLUMNS`].
    pub columns: usize,
}

impl TileInput<'_> {
    pub fn strips(&self) -> usize {
        self.panels.len() / PANEL_LEN
    }

    /// The bounds that the tile kernels rely on.
    pub fn check(&self) {
        assert!((1..=TILE_TOKENS).contains(&self.tokens) && (1..=PANEL_COLUMNS).contains(&self.columns));
        assert!(self.panels.len() == PANEL_LEN || self.panels.len() == 2 * PANEL_LEN);
        assert!(self.x.len() >= (self.tokens - 1) * self.stride + self.columns);
    }
}

/// Weights that can be decoded panel by panel.
pub trait PanelSource {
    /// Checked: this machine has it.
    fn isa(&self) -> Isa;

    /// `(n, k)`.
    fn shape(&self) -> (usize, usize);

    /// Writes the values of 16 rows at `columns` as `[columns][16]`. Lanes of rows from n on are dropped: any value will do.
    fn decode_panel(&self, strip: usize, columns: Range<usize>, panel: &mut [f32]);
}

/// What the outputs hold before the multiplication.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Nothing; they become `x · Wᵀ + bias`.
    Bias(Option<&'a [f32]>),
    /// Sums to which `x · Wᵀ` is added.
    Sums,
}

/// `y[.., rows] = start + x · W[rows, ..]ᵀ` for `x` `[m, k]` and `y` `[m, n]`. Sums run over the columns in order, block by
/// block, whatever `rows` is.
pub fn multiply<S: PanelSource>(
    source: &S,
    x: &[f32],
    m: usize,
    rows: Range<usize>,
    start: Start,
    y: &SharedSlice<'_, f32>,
    scratch: &mut Vec<f32>,
) {
    let (_, k) = source.shape();
    assert_eq!(x.len(), m * k, "activations of {m} tokens");
    let panels = grown(scratch, STRIPS_AT_ONCE * PANEL_LEN);
    let strips = strips(&rows);
    for first in strips.clone().step_by(STRIPS_AT_ONCE) {
        let group = first..(first + STRIPS_AT_ONCE).min(strips.end);
        for column in (0..k).step_by(PANEL_COLUMNS) {
            let columns = column..(column + PANEL_COLUMNS).min(k);
            for (strip, panel) in group.clone().zip(panels.chunks_exact_mut(PANEL_LEN)) {
                source.decode_panel(strip, columns.clone(), &mut panel[..columns.len() * STRIP_ROWS]);
            }
            let start = if column == 0 { start } else { Start::Sums };
            let panels = &panels[..group.len() * PANEL_LEN];
            multiply_block(source, &x[column..], columns.len(), m, panels, first, rows.end, start, y);
        }
    }
}

/// All tokens over the panels of one block of columns; `first` is the strip of the first panel.
#[allow(clippy::too_many_arguments)]
fn multiply_block<S: PanelSource>(
    source: &S,
    x: &[f32],
    columns: usize,
    m: usize,
    panels: &[f32],
    first: usize,
    end_row: usize,
    start: Start,
    y: &SharedSlice<'_, f32>,
) {
    let (n, k) = source.shape();
    let mut tile = Tile([[0.0; TILE_ROWS]; TILE_TOKENS]);
    for token in (0..m).step_by(TILE_TOKENS) {
        let tokens = TILE_TOKENS.min(m - token);
        for (pair, panels) in panels.chunks(2 * PANEL_LEN).enumerate() {
            let input = TileInput { panels, x: &x[token * k..], stride: k, tokens, columns };
            multiply_tile(source.isa(), input, &mut tile);
            let row = (first + 2 * pair) * STRIP_ROWS;
            let row_end = (row + input.strips() * STRIP_ROWS).min(end_row);
            for (t, sums) in tile.0[..tokens].iter().enumerate() {
                let begin = (token + t) * n;
                // SAFETY: `CpuMatrix::multiply`'s caller gives these rows to one thread only.
                let out = unsafe { y.range_mut(begin + row..begin + row_end) };
                store(out, sums, row, start);
            }
        }
    }
}

fn store(out: &mut [f32], sums: &[f32; TILE_ROWS], row: usize, start: Start) {
    match start {
        Start::Sums => out.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
        Start::Bias(None) => out.copy_from_slice(&sums[..out.len()]),
        Start::Bias(Some(bias)) => {
            out.iter_mut().zip(sums).zip(&bias[row..]).for_each(|((y, sum), bias)| *y = sum + bias)
        }
    }
}

fn multiply_tile(isa: Isa, input: TileInput, tile: &mut Tile) {
    input.check();
    match isa {
        // SAFETY: the source's instruction set is checked, the bounds are too.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::multiply_tile(input, tile) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::multiply_tile(input, tile) },
        _ => portable::multiply_tile(input, tile),
    }
}
