//! From what the user asked for to the exact ids that every precision gets.

use tokenizers::Tokenizer;

use super::{Case, PromptChoice};
use crate::error::BadInput;
use crate::stats::SplitMix64;

/// The prompt where none is given and there is a tokenizer.
pub const DEFAULT_TEXT: &str = "Explain quantization in simple terms.";

/// Length of the prompt where none is given and there is no tokenizer.
const DEFAULT_SYNTHETIC: usize = 8;

/// Sets the depth's ids apart from the prompt's.
const DEPTH_STREAM: u64 = 0xde97;

/// What a model allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Ids {
    pub depth: Vec<u32>,
    pub prompt: Vec<u32>,
}

/// Ids of a case's depth and prompt. Fails where the prompt is empty, needs a tokenizer that is not there, has ids beyond the
/// vocabulary, or does not fit the context together with depth and generated tokens.
pub fn ids(case: &Case, tokenizer: Option<&Tokenizer>, limits: Limits) -> anyhow::Result<Ids> {
    let seed = case.model.seed;
    let prompt = match (&case.prompt, tokenizer) {
        (PromptChoice::Default, Some(tokenizer)) => encode(tokenizer, DEFAULT_TEXT)?,
        (PromptChoice::Default, None) => synthetic(DEFAULT_SYNTHETIC, limits.vocab, seed),
        (PromptChoice::Text(text), Some(tokenizer)) => encode(tokenizer, text)?,
        (PromptChoice::Text(_), None) => return Err(no_tokenizer(case).into()),
        // Checked before they are made: a length that a user types may exceed the memory.
        (PromptChoice::Synthetic(n), _) => synthetic((*n).min(limits.context + 1), limits.vocab, seed),
        (PromptChoice::Ids(ids), _) => ids.clone(),
    };
    let n_prompt = if let PromptChoice::Synthetic(n) = case.prompt { n } else { prompt.len() };
    check(case, &prompt, n_prompt, limits)?;
    Ok(Ids { depth: synthetic(case.n_depth, limits.vocab, seed ^ DEPTH_STREAM), prompt })
}

fn check(case: &Case, prompt: &[u32], n_prompt: usize, limits: Limits) -> Result<(), BadInput> {
    if n_prompt == 0 {
        return Err(BadInput::new("the prompt is empty").hint("give at least one token, or drop the option"));
    }
    if case.n_gen == 0 {
        return Err(BadInput::new("`--max-new-tokens 0` generates nothing to measure").hint("ask for at least 1"));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= limits.vocab) {
        let message = format!("prompt id {id} is outside the vocabulary of {} tokens", limits.vocab);
        return Err(BadInput::new(message).hint(format!("ids go from 0 to {}", limits.vocab.saturating_sub(1))));
    }
    let (n_depth, n_gen) = (case.n_depth, case.n_gen);
    let n_total = n_depth.saturating_add(n_prompt).saturating_add(n_gen);
    if n_total > limits.context {
        let message = format!(
            "depth {n_depth} + prompt {n_prompt} + generated {n_gen} are {n_total} tokens; the model's context holds {}",
            limits.context
        );
        return Err(BadInput::new(message).hint("shorten the prompt, `--depth` or `--max-new-tokens`"));
    }
    Ok(())
}

fn encode(tokenizer: &Tokenizer, text: &str) -> anyhow::Result<Vec<u32>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let encoding = tokenizer.encode(text, true).map_err(|error| {
        BadInput::new(format!("the model's tokenizer cannot encode the prompt: {error}"))
            .hint("give exact ids with `--prompt-ids`, or a length with `--prompt-tokens`")
    })?;
    Ok(encoding.get_ids().to_vec())
}

fn no_tokenizer(case: &Case) -> BadInput {
    BadInput::new(format!("`{}` has no tokenizer here, so a text prompt cannot become tokens", case.model.model_id))
        .hint("give a length with `--prompt-tokens N` or exact ids with `--prompt-ids 1,2,3`")
}

/// `n` ids that depend on the seed alone. Both ends of the vocabulary are left out where it is large enough, since special
/// tokens lie there.
fn synthetic(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let margin = vocab / 16;
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| (margin + rng.below((vocab - 2 * margin).max(1))) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab: 320, context: 64 };

    fn case(prompt: PromptChoice, n_gen: usize, n_depth: usize) -> Case {
        Case { prompt, n_gen, n_depth, ..super::super::tests::case() }
    }

    #[test]
    fn synthetic_ids_are_repeatable_and_ordinary() {
        let ids = synthetic(1000, 320, 42);
        assert_eq!(ids, synthetic(1000, 320, 42));
        assert_ne!(ids, synthetic(1000, 320, 43));
        assert!(ids.iter().all(|id| (20..300).contains(id)));
        assert_eq!(synthetic(3, 1, 0), [0, 0, 0]);
    }

    #[test]
    fn without_a_tokenizer_there_are_eight_ids() {
        let found = ids(&case(PromptChoice::Default, 4, 3), None, LIMITS).unwrap();
        assert_eq!((found.prompt.len(), found.depth.len()), (8, 3));
        assert_ne!(found.prompt[..3], found.depth[..]);
    }

    #[test]
    fn bad_workloads_name_their_numbers() {
        let text = || PromptChoice::Text("hello".to_owned());
        for (prompt, n_gen, n_depth, expected) in [
            (PromptChoice::Ids(vec![]), 4, 0, "the prompt is empty"),
            (PromptChoice::Synthetic(0), 4, 0, "the prompt is empty"),
            (PromptChoice::Ids(vec![1]), 0, 0, "`--max-new-tokens 0`"),
            (PromptChoice::Ids(vec![1, 320]), 4, 0, "id 320 is outside the vocabulary of 320"),
            (PromptChoice::Synthetic(50), 10, 5, "depth 5 + prompt 50 + generated 10 are 65 tokens; the model's context holds 64"),
            (PromptChoice::Synthetic(usize::MAX), 10, 5, "the model's context holds 64"),
            (text(), 4, 0, "has no tokenizer here"),
        ] {
            let error = ids(&case(prompt, n_gen, n_depth), None, LIMITS).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(crate::error::exit_code(&error), 2);
            assert!(crate::error::hint(&error).is_some());
        }
        assert!(ids(&case(PromptChoice::Synthetic(50), 9, 5), None, LIMITS).is_ok());
    }
}
