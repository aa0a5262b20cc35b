//! The shape of a call: how many sequences at which positions ([`Batch`]), and how their keys and values are held
//! ([`CacheSpec`]). Sessions, plans and executors count and run by these. An executor refuses by name what it has no code for
//! ([`Supported`]).

mod batch;
mod cache;

pub use batch::{Batch, Positions};
pub use cache::{CacheScope, CacheShape, CacheSpec, KvFormat};

use std::ops::Range;

use anyhow::{Result, bail};

/// The batches and caches that an executor has code for.
#[derive(Debug, Clone, Copy)]
pub struct Supported {
    /// The name in errors.
    pub executor: &'static str,
    pub kv_formats: &'static [KvFormat],
    /// Sequences of a call at most; [`ANY`] where there is no bound.
    pub most_sequences: usize,
}

/// No bound on the sequences of a call.
pub const ANY: usize = usize::MAX;

impl Supported {
    /// Refuses what the executor cannot run, before anything is loaded.
    ///
    /// # Errors
    /// If there are more sequences than the executor runs or none, or keys and values in another format.
    pub fn check(&self, sequences: usize, format: KvFormat) -> Result<()> {
        self.check_sequences(sequences)?;
        if !self.kv_formats.contains(&format) {
            let allowed: Vec<&str> = self.kv_formats.iter().map(|format| format.name()).collect();
            bail!("{} cannot run a cache in {}; it runs {}", self.executor, format.name(), allowed.join(", "));
        }
        Ok(())
    }

    /// Checks that `batch` continues the caches of a session of `sequences` sequences, the longest of which holds `position` tokens.
    ///
    /// # Errors
    /// If it has another number of sequences, other positions, or not a token for each row.
    pub fn check_batch(&self, batch: Batch, tokens: usize, (sequences, position): (usize, usize)) -> Result<()> {
        self.check_sequences(batch.sequences)?;
        if batch.sequences != sequences {
            let holds = Batch { sequences, positions: (0..position).into() }.sequences_text();
            bail!("a call of {} does not continue the caches of {holds}", batch.sequences_text());
        }
        if batch.positions.start != position {
            bail!("a call at position {} does not continue a cache of {position} tokens", batch.positions.start);
        }
        if tokens != batch.rows() {
            bail!("{tokens} tokens were given for {batch}, which has {}", batch.rows());
        }
        Ok(())
    }

    fn check_sequences(&self, sequences: usize) -> Result<()> {
        if (1..=self.most_sequences).contains(&sequences) {
            return Ok(());
        }
        let runs = match self.most_sequences {
            1 => "1".to_owned(),
            ANY => "1 or more".to_owned(),
            most => format!("1 to {most}"),
        };
        bail!("{} cannot run a batch of {sequences} sequences; it runs {runs}", self.executor)
    }
}

/// The sequence alone, as a range.
///
/// # Errors
/// If the session has no such sequence.
pub fn check_sequence(sequence: usize, sequences: usize) -> Result<Range<usize>> {
    if sequence >= sequences {
        bail!("there is no sequence {sequence} in a batch of {sequences}");
    }
    Ok(sequence..sequence + 1)
}

/// # Errors
/// If a session of several sequences is asked for the logits of every row.
pub fn check_scored(sequences: usize) -> Result<()> {
    if sequences != 1 {
        bail!("a session of {sequences} sequences scores no text; load it for 1");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Supported = Supported { executor: "the CUDA engine", kv_formats: &[KvFormat::Fp16], most_sequences: 1 };
    const MANY: Supported =
        Supported { executor: "the CPU engine", kv_formats: &[KvFormat::Fp32], most_sequences: ANY };

    #[test]
    fn refusals_name_the_executor_and_what_it_runs() {
        let message = |result: Result<()>| result.expect_err("a refusal").to_string();
        assert!(ONE.check(1, KvFormat::Fp16).is_ok());
        assert!(MANY.check(64, KvFormat::Fp32).is_ok());
        let refused = |executor: Supported, sequences| message(executor.check(sequences, executor.kv_formats[0]));
        assert_eq!(refused(ONE, 4), "the CUDA engine cannot run a batch of 4 sequences; it runs 1");
        assert_eq!(refused(MANY, 0), "the CPU engine cannot run a batch of 0 sequences; it runs 1 or more");
        let four = Supported { most_sequences: 4, ..MANY };
        assert_eq!(refused(four, 5), "the CPU engine cannot run a batch of 5 sequences; it runs 1 to 4");
        assert_eq!(message(MANY.check(1, KvFormat::Fp8)), "the CPU engine cannot run a cache in fp8; it runs fp32");
    }

    #[test]
    fn a_call_continues_the_caches_with_a_token_for_each_row() {
        let message = |batch, tokens, held| MANY.check_batch(batch, tokens, held).unwrap_err().to_string();
        assert!(MANY.check_batch(Batch::one(5..8), 3, (1, 5)).is_ok());
        assert_eq!(message(Batch::one(5..8), 3, (1, 4)), "a call at position 5 does not continue a cache of 4 tokens");
        assert_eq!(
            message(Batch::one(5..8), 2, (1, 5)),
            "2 tokens were given for a batch of 1 sequence at positions 5 to 7, which has 3"
        );
        let two = Batch { sequences: 2, ..Batch::one(0..3) };
        assert_eq!((two.rows(), two.keys()), (6, 3));
        assert!(MANY.check_batch(two, 6, (2, 0)).is_ok());
        assert_eq!(message(two, 6, (1, 0)), "a call of 2 sequences does not continue the caches of 1 sequence");
        assert_eq!(
            ONE.check_batch(two, 6, (1, 0)).unwrap_err().to_string(),
            "the CUDA engine cannot run a batch of 2 sequences; it runs 1"
        );
    }
}
