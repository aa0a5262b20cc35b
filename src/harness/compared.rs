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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::engine::fake::{FakeRun, FakeSession, FakeTime};
    use crate::harness::served::ServedSession;
    use crate::quality::rows::RowReader;

    /// The ids that a pass of variant 1 went by, and the rows that it wrote.
    fn passed(ids: &WrittenIds, max_rows: usize, folder: &Path) -> (Option<ComparedIds>, usize) {
        let time = FakeTime::default();
        let run = FakeRun { logits: vec![0.0, 0.5], ..FakeRun::default() };
        let mut engine = ServedSession::new(Box::new(FakeSession::new(time.clone(), [run])), time, Vec::new(), 1);
        let path = folder.join("rows");
        let compared = ComparedLogits { path: path.clone(), max_rows, variant: 1, reference: 0, ids: ids.clone() };
        let run = RunRequest { depth: vec![1], prompt: vec![0, 1], n_gen: 5, ..RunRequest::default() };
        let by = compared.write(&mut engine, run);
        (by, RowReader::open(&path).unwrap().rows_left())
    }

    #[test]
    fn a_pass_goes_by_the_references_ids_once_they_are_known() {
        let (folder, ids) = (tempfile::tempdir().unwrap(), WrittenIds::default());
        assert_eq!(passed(&ids, 9, folder.path()), (Some(ComparedIds::Own), 5));
        assert_eq!(passed(&ids, 2, folder.path()), (Some(ComparedIds::Own), 2));
        ids.keep(1, &[0, 0, 0]);
        assert_eq!(passed(&ids, 9, folder.path()).0, Some(ComparedIds::Own), "its own are not the reference's");
        ids.keep(0, &[1, 0, 1, 1]);
        ids.keep(0, &[0]);
        assert_eq!(passed(&ids, 9, folder.path()), (Some(ComparedIds::Reference), 4));
        assert_eq!(passed(&ids, 3, folder.path()), (Some(ComparedIds::Reference), 3));
    }
}
