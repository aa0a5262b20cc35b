//! Scoring one window of a text.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::engine::OutlierColumns;
use crate::quality::CallPath;
use crate::quality::cost::TokenCost;

/// One window of a text to score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoreRequest {
    pub prefix: Vec<u32>,
    pub tokens: Vec<u32>,
    /// The first of `tokens` that is scored.
    pub first: usize,
    pub path: CallPath,
    pub logits: LogitsFile,
    pub greedy: Greedy,
}

/// File with the reference's logits of the scored tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum LogitsFile {
    Write(PathBuf),
    Compare(PathBuf),
}

/// Greedy decoding after the window's first tokens, to find where it diverges from the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Greedy {
    pub n_prompt: usize,
    /// 0: none.
    pub n_gen: usize,
}

/// The scores of one window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoreReport {
    /// Cost of each scored token; empty for the reference.
    pub costs: Vec<TokenCost>,
    pub greedy_ids: Vec<u32>,
    /// Outlier columns of all calls since the worker started.
    pub outliers: OutlierColumns,
}
