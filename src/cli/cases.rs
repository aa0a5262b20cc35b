//! The cases of a command: each combination of the lengths and batches that were asked for.

use super::prompt::{prompts, prompts_of_batch};
use super::request::positives;
use super::{BatchWord, RunArgs};
use crate::error::BadInput;
use crate::harness::{self, Case, PromptChoice};

/// `case` with each combination of the lengths and batches, the prompt's outermost. Fails where their logits would go to one file.
pub fn of_each_length(case: &Case, args: &RunArgs) -> Result<Vec<Case>, BadInput> {
    let n_gens = match args.max_new_tokens.as_slice() {
        [] => vec![harness::DEFAULT_N_GEN],
        asked => positives("--max-new-tokens", asked)?,
    };
    let may_shorten = args.max_new_tokens.is_empty();
    let mut cases = Vec::new();
    for prompt in prompts(&args.prompt)? {
        // The prompt of each batch, read before the first case is made.
        let of_batch = |word: &BatchWord| Ok((*word, prompts_of_batch(&args.prompt, &prompt, *word)?));
        let batches = args.batch_size.iter().map(of_batch).collect::<Result<Vec<_>, BadInput>>()?;
        for &n_gen in &n_gens {
            for &n_depth in &args.depth {
                let of_batch = |(batch, prompt): &(BatchWord, PromptChoice)| {
                    let prompt = prompt.clone();
                    let (sequences, largest_batch) = match *batch {
                        BatchWord::Count(sequences) => (sequences, false),
                        BatchWord::Max => (1, true),
                    };
                    Case { prompt, sequences, largest_batch, n_gen, n_depth, may_shorten, ..case.clone() }
                };
                cases.extend(batches.iter().map(of_batch));
            }
        }
    }
    match &case.save_logits {
        Some(path) if cases.len() > 1 => {
            let (path, n) = (path.display(), cases.len());
            Err(BadInput::new(format!("`--save-logits {path}`: {n} cases would write the same file"))
                .hint("give one length of each kind, and one batch"))
        }
        _ => Ok(cases),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::request::tests::request;

    #[test]
    fn lists_of_lengths_make_cases() {
        let lengths = |line: &str| {
            let of = |case: &Case| match case.prompt {
                PromptChoice::Synthetic(n) => (n, case.n_gen, case.n_depth),
                _ => (0, case.n_gen, case.n_depth),
            };
            request(line).unwrap().cases.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(lengths(""), [(0, 64, 0)]);
        assert_eq!(lengths("-p 8,512 -n 64 -d 0,4096"), [(8, 64, 0), (8, 64, 4096), (512, 64, 0), (512, 64, 4096)]);
        assert_eq!(lengths("--n-prompt 8 --n-gen 2,3 --n-depth 1"), [(8, 2, 1), (8, 3, 1)]);
        assert_eq!(lengths("-n 2 -n 3 --prompt hi"), [(0, 2, 0), (0, 3, 0)]);
        for line in ["-m phi-2 -r 4 -p 8", "--model phi-2 --runs 4 -p 8", "--model-id phi-2 --repetitions 4 -p 8"] {
            let case = request(line).unwrap().cases.remove(0);
            let seen = (case.model.model_id.as_str(), case.protocol.repeats, case.prompt);
            assert_eq!(seen, ("phi-2", Some(4), PromptChoice::Synthetic(8)), "{line}");
        }
    }

    #[test]
    fn batches_make_cases_innermost() {
        let of = |line: &str| {
            let of = |case: &Case| (case.n_gen, case.n_depth, case.sequences);
            request(line).unwrap().cases.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(of(""), [(64, 0, 1)]);
        assert_eq!(of("-b 4"), [(64, 0, 4)]);
        assert_eq!(of("--batch-size 1,8 -n 2,3"), [(2, 0, 1), (2, 0, 8), (3, 0, 1), (3, 0, 8)]);
        assert_eq!(of("-b 1 -b 2 -d 0,9"), [(64, 0, 1), (64, 0, 2), (64, 9, 1), (64, 9, 2)]);
        let largest: Vec<bool> = request("-b 1,max").unwrap().cases.iter().map(|case| case.largest_batch).collect();
        assert_eq!(largest, [false, true]);
    }

    #[test]
    fn a_batch_takes_a_prompt_of_each_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, b"one\n\ntwo\nthree\n").unwrap();
        let path = file.path().display();
        let prompts: Vec<PromptChoice> = request(&format!("--prompt-file {path} -b 1,2"))
            .unwrap()
            .cases
            .into_iter()
            .map(|case| case.prompt)
            .collect();
        let texts = PromptChoice::Texts(vec!["one".to_owned(), "two".to_owned()]);
        assert_eq!(prompts, [PromptChoice::Text("one\n\ntwo\nthree\n".to_owned()), texts]);
        let error = request(&format!("--prompt-file {path} -b 4")).err().expect("too few lines");
        assert!(error.to_string().contains("3 prompts for a batch of 4"), "{error}");
    }
}
