//! The text that quality is measured on where none is given.

/// Name of [`SAMPLE`] in records.
pub const SAMPLE_NAME: &str = "sample";

/// The beginning of the introduction to Charles Darwin, On the Origin of Species (John Murray, London, 1859). The author
/// died in 1882: the text is in the public domain everywhere (Public Domain Mark 1.0). Plain prose with names and dates,
/// about 500 tokens, so that a model sees more than its most likely words.
pub const SAMPLE: &str = include_str!("sample.txt");
