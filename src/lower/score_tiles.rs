//! Tiles of a prompt on a GPU, which cut the attention scores of many rows so that few are held at once.

/// Bytes of attention scores that a call may hold at once.
pub const SCORE_BYTES: usize = 64 << 20;

/// Prompts of so few rows, over so few keys, hold no scores: one kernel keeps them in shared memory. cuBLAS takes several launches for each
/// key/value head, and more keys would not fit.
const FEW_ROWS: usize = 32;
const FEW_KEYS: usize = 8192;

/// Returns whether one kernel of our own attends `rows` queries over `keys` keys.
pub fn is_one_kernel(rows: usize, keys: usize) -> bool {
    rows <= FEW_ROWS && keys <= FEW_KEYS
}

/// A score as cuBLAS sums it, fp32, and the weight that the softmax makes of it, fp16.
const BYTES: usize = 4 + 2;

/// Query heads and query rows whose scores are held at once: `heads · rows · total` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreTiles {
    pub heads: usize,
    pub rows: usize,
}

/// One tile: `heads` heads from `first_head`, all of one key/value head where they share it, and `rows` rows from `first_row`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreTile {
    pub first_head: usize,
    pub heads: usize,
    pub first_row: usize,
    pub rows: usize,
}

impl ScoreTiles {
    /// The most that [`SCORE_BYTES`] hold of `rows` rows over `total` keys: some heads with all of their rows, or some rows of one head where a
    /// single head has more. A product takes heads of one key/value head, or of one each (`group` 1), out of `heads`. All at least 1. No less
    /// than one row of one head is held, which exceeds the bytes from 11 million keys on.
    pub fn new(heads: usize, group: usize, rows: usize, total: usize) -> Self {
        let row_bytes = BYTES.saturating_mul(total).max(1);
        let together = if group == 1 { heads } else { group };
        match SCORE_BYTES / row_bytes.saturating_mul(rows).max(1) {
            0 => Self { heads: 1, rows: (SCORE_BYTES / row_bytes).clamp(1, rows.max(1)) },
            fitting => Self { heads: fitting.clamp(1, together.max(1)), rows: rows.max(1) },
        }
    }

    /// Bytes of the scores of a tile over `total` keys.
    pub fn bytes(self, total: usize) -> u64 {
        [self.heads, self.rows, total, BYTES].iter().fold(1, |bytes: u64, factor| bytes.saturating_mul(*factor as u64))
    }

    /// All tiles of `rows` rows and `heads` heads, of which each `group` share a key/value head.
    pub fn tiles(self, heads: usize, group: usize, rows: usize) -> impl Iterator<Item = ScoreTile> {
        // Heads that one product may take.
        let together = if group == 1 { heads } else { group };
        let firsts = move |start: usize| {
            let end = (start + together).min(heads);
            (start..end).step_by(self.heads).map(move |first| (first, self.heads.min(end - first)))
        };
        let of_heads = (0..heads).step_by(together.max(1)).flat_map(firsts);
        of_heads.flat_map(move |(first_head, heads)| {
            (0..rows).step_by(self.rows).map(move |first_row| ScoreTile {
                first_head,
                heads,
                first_row,
                rows: self.rows.min(rows - first_row),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row of every head is in one tile, no tile crosses key/value heads or exceeds the bytes.
    fn check(heads: usize, group: usize, rows: usize, total: usize) -> usize {
        let plan = ScoreTiles::new(heads, group, rows, total);
        let mut seen = vec![0u8; heads * rows];
        let mut n = 0;
        for tile in plan.tiles(heads, group, rows) {
            let what = format!("{heads} heads in groups of {group}, {rows} rows of {total}: {tile:?} of {plan:?}");
            assert!((1..=plan.heads).contains(&tile.heads) && (1..=plan.rows).contains(&tile.rows), "{what}");
            assert!(tile.heads * tile.rows * total * BYTES <= SCORE_BYTES, "{what}");
            let last = tile.first_head + tile.heads - 1;
            assert!(group == 1 || tile.first_head / group == last / group, "{what}");
            for head in tile.first_head..=last {
                seen[head * rows + tile.first_row..][..tile.rows].iter_mut().for_each(|count| *count += 1);
            }
            n += 1;
        }
        assert!(seen.iter().all(|count| *count == 1), "{heads} {group} {rows} {total}");
        n
    }

    #[test]
    fn every_row_of_every_head_is_scored_once_within_the_bytes() {
        // llama-3.2-1b at its built-in prompt and at long ones, phi-2, a group of 8 and one of all heads, a wide model.
        for (heads, group) in [(32, 4), (32, 1), (64, 8), (8, 8), (12, 1), (9, 3), (1, 1)] {
            for (rows, total) in
                [(33, 33), (512, 512), (2048, 2048), (3345, 3345), (4096, 8192), (5000, 120_000), (40, 9000)]
            {
                check(heads, group, rows, total);
            }
        }
    }

    #[test]
    fn heads_go_together_as_far_as_they_fit() {
        let tiles = |heads, group, rows, total| {
            let ScoreTiles { heads, rows } = ScoreTiles::new(heads, group, rows, total);
            (heads, rows)
        };
        // 64 MiB / (6 · 2048²) = 2.7 heads; a group of 4 took 96 MiB.
        assert_eq!(tiles(32, 4, 2048, 2048), (2, 2048));
        assert_eq!(tiles(64, 8, 1024, 1024), (8, 1024));
        assert_eq!(tiles(64, 1, 1024, 1024), (10, 1024));
        // A head of 4096² takes 96 MiB: 2730 of its rows at once.
        assert_eq!(tiles(32, 4, 4096, 4096), (1, 2730));
        assert_eq!(tiles(32, 1, 4096, 4096), (1, 2730));
        // One that has few rows and very many keys.
        assert_eq!(tiles(32, 4, 64, 20_000_000), (1, 1));
        assert_eq!(ScoreTiles::new(3, 3, 2048, 2048).tiles(3, 3, 2048).count(), 2);
    }
}
