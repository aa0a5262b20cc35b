//! The worker that writes the reference's logits, one window's file at a time.

use std::path::PathBuf;

use anyhow::Result;
use tempfile::TempDir;

use super::eval_text::EvalText;
use crate::engine::{Device, Engine};
use crate::harness::case::Case;
use crate::harness::load::DeviceAssignment;
use crate::harness::worker_process::ProcessWorker;
use crate::plan::Model;
use crate::protocol::Failure;
use crate::quality::CallPath;
use crate::quant::{self, FormatId};
use crate::weights::policy::Selection;

/// The reference's weights: the checkpoint's own values, which fp16 may not hold.
const PRECISION: FormatId = quant::EXACT;

/// The reference and all that each precision is compared by.
pub struct ReferenceWorker<'a> {
    pub text: &'a EvalText,
    pub case: &'a Case,
    pub assignment: DeviceAssignment,
    pub model: &'a Model,
    /// Removed with its files when this is dropped.
    folder: TempDir,
    worker: Option<ProcessWorker>,
    held: Option<WindowFile>,
}

/// Contents of the file.
struct WindowFile {
    window: usize,
    /// Greedy ids of the first window.
    greedy_ids: Vec<u32>,
}

impl<'a> ReferenceWorker<'a> {
    pub fn new(text: &'a EvalText, case: &'a Case, (assignment, model): (DeviceAssignment, &'a Model)) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("quantbench-").tempdir()?;
        Ok(Self { text, case, assignment, model, folder, worker: None, held: None })
    }

    /// The reference's greedy ids, once a window was scored.
    pub fn greedy_ids(&self) -> Option<&[u32]> {
        self.held.as_ref().map(|held| held.greedy_ids.as_slice())
    }

    /// The file for the logits of the precision that is compared.
    pub fn measured_file(&self) -> PathBuf {
        self.folder.path().join("measured.logits")
    }

    /// The file with the logits of a window, which is computed where the file holds another one.
    pub fn file_of(&mut self, window: usize) -> Result<PathBuf, Failure> {
        let path = self.folder.path().join("reference.logits");
        if self.held.as_ref().is_some_and(|held| held.window == window) {
            return Ok(path);
        }
        let (text, model) = (self.text, (self.case, self.model));
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => {
                let assignment = DeviceAssignment { device: Device::Cpu, ..self.assignment };
                let loaded = text.worker(model, (Engine::Quantbench, PRECISION), assignment, Selection::Usual);
                none.insert(loaded.map_err(|failure| failure.within("the fp32 reference"))?)
            }
        };
        // Gone until the new one is whole.
        let known = self.held.take().map(|held| held.greedy_ids).filter(|_| window > 0);
        let of_reference = |failure: Failure| failure.within("the fp32 reference");
        worker.score(&text.score(window, CallPath::Prefill, path.clone())).map_err(of_reference)?;
        let generated = text.greedy_run(window).map(|run| worker.generate(&run)).transpose().map_err(of_reference)?;
        self.held = Some(WindowFile { window, greedy_ids: known.or(generated).unwrap_or_default() });
        if text.windows.len() == 1 {
            self.worker = None;
        }
        Ok(path)
    }
}
