//! The cost of a precision in quality: its predictions over a text against those of a reference, token by token.
//!
//! A text is teacher-forced in [`windows`] through a session ([`pass`]). The reference's logits are in a file of bounded size
//! ([`rows`]), whole and in fp32, so nothing is approximated; [`cost`] compares one row, [`summary`] all of them. Nothing here
//! knows a process or a clock.

pub mod cost;
pub mod modules;
pub mod pass;
pub mod rows;
pub mod summary;
pub mod text;
pub mod windows;

use crate::quant::FormatId;

/// The calls that run a text through a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallPath {
    /// A window in one call.
    Prefill,
    /// One token a call, as generation does it.
    Decode,
}

impl CallPath {
    /// Spelling in flags and records.
    pub fn name(self) -> &'static str {
        match self {
            CallPath::Prefill => "prefill",
            CallPath::Decode => "decode",
        }
    }

    /// Default path of a precision. Where outlier columns are picked for each call, a long prefill is another computation than
    /// the decoding it stands for.
    pub fn usual(precision: FormatId) -> Self {
        if precision.finds_outliers { CallPath::Decode } else { CallPath::Prefill }
    }
}
