//! `--engine`: whose code runs, and what other engines are asked to hold.

use super::RunArgs;
use crate::engines::{self, Asked, EngineChoice, Width};
use crate::error::BadInput;
use crate::quant::FormatId;

/// In the order asked, each once.
pub(super) fn engines(args: &RunArgs) -> Result<Vec<EngineChoice>, BadInput> {
    let mut engines: Vec<EngineChoice> = Vec::new();
    for word in &args.engine {
        let engine = EngineChoice::parse(word, args.python.as_deref())?;
        if let Some(same) = engines.iter().find(|known| known.name() == engine.name() && **known != engine) {
            return Err(BadInput::new(format!("`--engine {word}`: another engine is named `{}`", same.name())));
        }
        if !engines.contains(&engine) {
            engines.push(engine);
        }
    }
    let others = engines.iter().any(|engine| matches!(engine, EngineChoice::Other(_)));
    if others && args.keeps_matrices() {
        return Err(BadInput::new("`--keep-fp16` is for quantbench's own engine alone")
            .hint("drop `--keep-fp16`, or the other engines"));
    }
    Ok(engines)
}

impl RunArgs {
    fn keeps_matrices(&self) -> bool {
        !self.precision.keep_fp16.is_empty()
    }
}

/// What other engines are asked to hold; nothing in particular for `all`.
pub(super) fn asked(words: &[String], no_double_quant: bool) -> Vec<Asked> {
    let words = words.iter().map(|word| word.trim().to_lowercase()).filter(|word| word != "all");
    let of = |word: String| match Width::parse(&word) {
        Some(Width::Bits4) if no_double_quant => Asked::Name("nf4-nodq".to_owned()),
        Some(width) => Asked::Width(width),
        None => match FormatId::parse(&word).filter(|format| format.name != word && !engines::is_format(&word)) {
            // An alias of ours.
            Some(format) => Asked::Name(format.name.to_owned()),
            None => Asked::Name(word),
        },
    };
    words.map(of).collect()
}
