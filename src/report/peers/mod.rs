//! Output in the shapes of other tools, so that scripts made for those go on working. No more is in them than such a script reads;
//! `json` has everything.

pub mod github_action;
pub mod llama_bench;
pub mod summary;
