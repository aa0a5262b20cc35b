//! Child processes that speak JSON lines: the parent's side, and the child's.
//!
//! An engine speaks over a Unix socket (`socket`), so that whatever it writes to its standard output breaks nothing. A suite's
//! case is this program itself and speaks over its standard input and output (`pipes`). What a child computes is its caller's.

mod deadline;
mod exit_reason;
mod failure;
mod lines;
mod pipes;
mod serve;
mod socket;
mod stderr_tail;

pub use deadline::Deadline;
pub use exit_reason::{has_sizes, out_of_memory};
pub use failure::{failure_of, into_error, status_of};
pub use pipes::{Child, OomScope};
pub use serve::{serve, serve_engine};
pub use socket::{EngineCommand, EngineProcess, Turns};
