//! A long text in overlapping windows, so that every token but the first ones is predicted after enough others.

use serde::{Deserialize, Serialize};

/// Longest window: what a text needs of memory stays small, and the scores of longer ones hardly differ.
pub const MAX_LENGTH: usize = 1024;

/// Tokens `start..end` of a text, of which `first..end` are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextWindow {
    pub start: usize,
    pub first: usize,
    pub end: usize,
}

impl TextWindow {
    /// Tokens that are scored.
    pub fn n_scored(&self) -> usize {
        self.end - self.first
    }
}

/// Windows of at most `length` tokens over a text of `n_tokens`. Each scores what the one before it did not reach and sees
/// `length / 2` tokens before that (Hugging Face's and llama.cpp's strided perplexity). The text's first token is scored
/// only where something stands before it, `has_prefix`. `length` is at least 2.
pub fn windows(n_tokens: usize, length: usize, has_prefix: bool) -> Vec<TextWindow> {
    let stride = stride(length);
    let mut found = Vec::new();
    let mut first = usize::from(!has_prefix);
    while first < n_tokens {
        let start = if found.is_empty() { 0 } else { first + stride - length };
        let end = (start + length).min(n_tokens);
        found.push(TextWindow { start, first, end });
        first = end;
    }
    found
}

/// Tokens that a window scores after those that it only reads.
pub fn stride(length: usize) -> usize {
    length - length / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_scored_once() {
        for (n_tokens, length, has_prefix) in [
            (2, 2, false),
            (10, 4, false),
            (311, 1024, false),
            (1000, 7, true),
            (1, 4, true),
            (64, 64, false),
            (65, 64, false),
        ] {
            let windows = windows(n_tokens, length, has_prefix);
            let mut next = usize::from(!has_prefix);
            for window in &windows {
                assert_eq!(window.first, next, "{n_tokens} by {length}");
                assert!(window.end - window.start <= length && window.n_scored() > 0);
                let behind = window.first - window.start;
                assert!(window.start == 0 || behind >= length / 2, "{window:?} of {length}");
                next = window.end;
            }
            assert_eq!(next, n_tokens);
        }
    }

    #[test]
    fn a_text_without_a_token_to_score_has_no_window() {
        assert!(windows(1, 8, false).is_empty());
        assert!(windows(0, 8, true).is_empty());
    }
}
