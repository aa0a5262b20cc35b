//! The harness on a fake session and a fake clock: exact numbers, nothing is timed.

mod reasons;
mod runs;
mod scene;
mod watching;
