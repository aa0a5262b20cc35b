//! Prompts and texts: what was typed, or what a file holds.

use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::request::positives;
use super::words::ids;
use super::{BatchWord, PromptArgs};
use crate::error::BadInput;
use crate::harness::PromptChoice;

/// One for each length in a list of lengths, else one.
pub fn prompts(args: &PromptArgs) -> Result<Vec<PromptChoice>, BadInput> {
    if args.prompt_tokens.is_empty() {
        return Ok(vec![prompt(args)?]);
    }
    let lengths = positives("--prompt-tokens", &args.prompt_tokens)?;
    Ok(lengths.into_iter().map(PromptChoice::Synthetic).collect())
}

fn prompt(args: &PromptArgs) -> Result<PromptChoice, BadInput> {
    if let Some(text) = &args.prompt {
        return text_prompt("--prompt", text.clone());
    }
    if let Some(path) = &args.prompt_file {
        return text_prompt("--prompt-file", read_text("--prompt-file", path)?);
    }
    match &args.prompt_ids {
        None => Ok(PromptChoice::Default),
        Some(words) => ids(&words.join(" "))
            .map(PromptChoice::Ids)
            .map_err(|what| BadInput::new(format!("`--prompt-ids`: {what}"))),
    }
}

/// The prompts of a batch: one a line of a file that was named, and else what one sequence has.
pub fn prompts_of_batch(args: &PromptArgs, prompt: &PromptChoice, batch: BatchWord) -> Result<PromptChoice, BadInput> {
    let (Some(path), PromptChoice::Text(text)) = (&args.prompt_file, prompt) else { return Ok(prompt.clone()) };
    let sequences = match batch {
        BatchWord::Count(1) => return Ok(prompt.clone()),
        BatchWord::Count(sequences) => sequences,
        BatchWord::Max => {
            let message =
                format!("`--prompt-file {}`: how many prompts `--batch-size max` takes is not known", path.display());
            return Err(BadInput::new(message).hint("give a length with `--prompt-tokens N`, or a number of sequences"));
        }
    };
    let lines: Vec<String> = text.lines().filter(|line| !line.is_empty()).take(sequences).map(str::to_owned).collect();
    if lines.len() < sequences {
        let (path, n) = (path.display(), lines.len());
        return Err(BadInput::new(format!("`--prompt-file {path}` has {n} prompts for a batch of {sequences}"))
            .hint("give a line of text for each sequence, or a smaller `--batch-size`"));
    }
    Ok(PromptChoice::Texts(lines))
}

/// Bound on a text: more than any context holds, and less than the memory of a machine that measures.
const MOST_TEXT_MIB: usize = 64;

/// The text of a file or a pipe.
fn read_text(option: &str, path: &Path) -> Result<String, BadInput> {
    let bad = |why: &dyn Display| BadInput::new(format!("`{option} {}`: {why}", path.display()));
    let mut text = String::new();
    let most = MOST_TEXT_MIB << 20;
    let read = File::open(path).and_then(|file| file.take(most as u64 + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(bad(&error)),
        Ok(n) if n > most => Err(bad(&format!("more than {MOST_TEXT_MIB} MiB of text")).hint("give a part of it")),
        Ok(_) => Ok(text),
    }
}

fn text_prompt(option: &str, text: String) -> Result<PromptChoice, BadInput> {
    if text.is_empty() {
        return Err(BadInput::new(format!("`{option}` is empty: prefill needs at least one token"))
            .hint("give some text, or `--prompt-tokens N` for N synthetic ids"));
    }
    Ok(PromptChoice::Text(text))
}

/// Last component and content.
pub fn text_file(path: &Path) -> Result<(String, String), BadInput> {
    let text = read_text("--quality-text", path)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((name, text))
}
