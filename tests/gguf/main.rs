//! GGUF files read as stored: block formats, the reader, whole models.

mod blocks;
#[path = "../coverage/mod.rs"]
mod coverage;
mod models;
mod reader;
#[path = "../skips/mod.rs"]
mod skips;
