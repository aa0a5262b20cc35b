//! Codes that lie in words of 32 bits, the first in the lowest bits, and what lies by input and is wanted by output.

use super::scaled::scales::Scales;

/// `[rows, values]` codes of `bits`, 4 or 8, of `[rows, ⌈values · bits / 32⌉]` words.
pub fn fields(words: &[u32], bits: usize, (rows, values): (usize, usize)) -> Vec<u8> {
    let per_word = 32 / bits;
    let mask = if bits == 4 { 15 } else { 255 };
    let row_words = values.div_ceil(per_word);
    let field =
        |at: usize| (words[at / values * row_words + at % values / per_word] >> (at % values % per_word * bits)) & mask;
    (0..rows * values).map(|at| field(at) as u8).collect()
}

/// Rows of `row_bytes` bytes of words `[r, c]` that hold the codes of row c from byte `4 · r` on.
pub fn transposed(words: &[u32], n: usize, row_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; n * row_bytes];
    for (r, words) in words.chunks_exact(n).enumerate() {
        let len = row_bytes.saturating_sub(4 * r).min(4);
        for (c, word) in words.iter().enumerate() {
            bytes[c * row_bytes + 4 * r..][..len].copy_from_slice(&word.to_le_bytes()[..len]);
        }
    }
    bytes
}

/// Rows of `row_bytes` bytes of rows of `row_words` words that begin with them.
pub fn rows(words: &[u32], row_words: usize, row_bytes: usize) -> Vec<u8> {
    let row = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).take(row_bytes).collect::<Vec<u8>>();
    words.chunks_exact(row_words).flat_map(row).collect()
}

/// Scales `[groups, n]` by output and group.
pub fn by_output(scales: Scales, (groups, n): (usize, usize)) -> Scales {
    fn turned<T: Copy>(values: &[T], (groups, n): (usize, usize)) -> Vec<T> {
        (0..n * groups).map(|at| values[at % groups * n + at / groups]).collect()
    }
    match scales {
        Scales::F32(values) => Scales::F32(turned(&values, (groups, n))),
        Scales::F16(values) => Scales::F16(turned(&values, (groups, n))),
        Scales::Bf16(values) => Scales::Bf16(turned(&values, (groups, n))),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_from_the_lowest_bits() {
        // Two rows of nine codes of 4 bits: the ninth lies alone in its word.
        let words = [0x8765_4321, 0x9, 0x0fed_cba9, 0x1];
        assert_eq!(fields(&words, 4, (2, 9)), [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12, 13, 14, 15, 0, 1]);
        assert_eq!(fields(&words[..2], 8, (1, 5)), [0x21, 0x43, 0x65, 0x87, 0x9]);
        assert_eq!(rows(&words, 2, 5), [0x21, 0x43, 0x65, 0x87, 9, 0xa9, 0xcb, 0xed, 0x0f, 1]);
        // Words [r, c]: outputs c of inputs 8 · r and on.
        assert_eq!(transposed(&words, 2, 5), [0x21, 0x43, 0x65, 0x87, 0xa9, 9, 0, 0, 0, 1]);
    }
}
