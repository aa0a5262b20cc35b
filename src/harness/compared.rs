//! Logits by which the rows of a run are compared. Engines part where one chooses another id, so each predicts the ids that one of
//! quantbench's rows wrote; then every step has the same ids before it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::port::EnginePort;
use crate::protocol::{Logits, RunRequest, Score, capability};

/// Ids that each variant generated in its first repeat, by its index.
#[derive(Debug, Clone, Default)]
pub struct WrittenIds(Arc<Mutex<HashMap<usize, Vec<u32>>>>);

impl WrittenIds {
    /// Keeps the first that a variant gives.
    fn keep(&self, variant: usize, ids: &[u32]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(variant).or_insert_with(|| ids.to_vec());
    }

    fn of(&self, variant: usize) -> Option<Vec<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&variant).cloned()
    }
}

/// A pass of one variant after its last repeat.
#[derive(Debug, Clone)]
pub struct ComparedLogits {
    /// The file for the logits.
    pub path: PathBuf,
    /// Most rows of the file.
    pub max_rows: usize,
    pub variant: usize,
    /// The variant whose ids are predicted.
    pub reference: usize,
    pub ids: WrittenIds,
}

/// The ids that compared logits stand behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComparedIds {
    /// Those of the reference.
    Reference,
    /// The engine's own, which are the reference's up to where the two part.
    Own,
}

impl ComparedLogits {
    /// Keeps what the variant wrote.
    pub fn keep(&self, ids: &[u32]) {
        self.ids.keep(self.variant, ids);
    }

    /// Writes the file; `None` where the engine gives no logits. The reference may not have run yet where the variants do not take turns:
    /// then the engine goes by its own ids.
    pub fn write(&self, engine: &mut dyn EnginePort, run: RunRequest) -> Option<ComparedIds> {
        if let Some(mut tokens) = self.ids.of(self.reference).filter(|_| engine.can(capability::SCORE)) {
            tokens.truncate(self.max_rows);
            let (encode, prefix) = (run.encode.clone(), [run.depth.as_slice(), &run.prompt].concat());
            let score = Score { encode, prefix, tokens, first: 0, by_token: true, file: self.path.clone() };
            if engine.score(&score).is_ok() {
                return Some(ComparedIds::Reference);
            }
        }
        let run = RunRequest { n_gen: run.n_gen.min(self.max_rows), ..run };
        let written = engine.can(capability::LOGITS) && engine.logits(&Logits { run, file: self.path.clone() }).is_ok();
        written.then_some(ComparedIds::Own)
    }
}
