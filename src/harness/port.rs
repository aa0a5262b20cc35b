//! A loaded engine as the harness asks it, in a process of its own or, in tests, in this one.

use crate::protocol::{Failure, Finish, Finished, Logits, MemoryReport, RowsReply, RunReport, RunRequest, Score};

/// A loaded engine.
pub trait EnginePort {
    /// Whether the engine said that it can do this.
    fn can(&self, _capability: &str) -> bool {
        true
    }
    fn run(&mut self, run: &RunRequest) -> Result<RunReport, Failure>;
    /// Use of the device's pool; nothing where there is none.
    fn memory(&mut self) -> Result<MemoryReport, Failure>;
    fn finish(&mut self, finish: &Finish) -> Result<Finished, Failure>;
    fn logits(&mut self, logits: &Logits) -> Result<RowsReply, Failure>;
    fn score(&mut self, score: &Score) -> Result<RowsReply, Failure>;
}
