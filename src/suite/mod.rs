//! A suite file to rows: a matrix of cases, each in a process of its own under limits, one JSON line a record. Also the parts
//! that let many machines share a suite: shards, and the merge of what they wrote. Never prints.

mod case_process;
mod eta;
mod file;
mod keys;
mod merge;
mod plan;
mod results;
mod row;
mod run;
mod shard;
mod unmeasured;

pub use case_process::{SUBCOMMAND, case_main};
pub use keys::{SuiteKey, ValueKind};
pub use merge::{Merged, merge};
pub use plan::{Limits, Planned, read};
pub use results::{Results, Resume};
pub use row::{CaseInfo, ResultLine, ResultLines, read_lines, read_rows};
pub use run::{CaseEnd, OnFailure, SuiteCase, Watcher, run};
pub use shard::Shard;
