//! The shape of a call: how many sequences at which positions ([`Batch`]), and how their keys and values are held
//! ([`CacheSpec`]). Sessions, plans and executors count and run by these. Today every executor runs one sequence, with a
//! cache of one format, and refuses others by name ([`Supported`]).

mod batch;
mod cache;

pub use batch::{Batch, Positions};
pub use cache::{CacheScope, CacheShape, CacheSpec, KvFormat};

use anyhow::{Result, bail};

/// The batches and caches that an executor has code for.
#[derive(Debug, Clone, Copy)]
pub struct Supported {
    /// The name in errors.
    pub executor: &'static str,
    pub kv_formats: &'static [KvFormat],
}

impl Supported {
    /// Refuses what the executor cannot run, before anything is loaded.
    ///
    /// # Errors
    /// If there are several sequences or none, or keys and values in another format.
    pub fn check(&self, sequences: usize, format: KvFormat) -> Result<()> {
        self.check_sequences(sequences)?;
        if !self.kv_formats.contains(&format) {
            let allowed: Vec<&str> = self.kv_formats.iter().map(|format| format.name()).collect();
            bail!("{} cannot run a cache in {}; it runs {}", self.executor, format.name(), allowed.join(", "));
        }
        Ok(())
    }

    /// Checks that `batch` is one sequence of `tokens`, which continues a cache of `position` tokens.
    ///
    /// # Errors
    /// If it has several sequences or none, other positions, or not a token for each row.
    pub fn check_batch(&self, batch: Batch, tokens: usize, position: usize) -> Result<()> {
        self.check_sequences(batch.sequences)?;
        if batch.positions.start != position {
            bail!("a call at position {} does not continue a cache of {position} tokens", batch.positions.start);
        }
        if tokens != batch.rows() {
            bail!("{tokens} tokens were given for {batch}, which has {}", batch.rows());
        }
        Ok(())
    }

    fn check_sequences(&self, sequences: usize) -> Result<()> {
        if sequences != 1 {
            bail!("{} cannot run a batch of {sequences} sequences; it runs 1", self.executor);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXECUTOR: Supported = Supported { executor: "the CPU engine", kv_formats: &[KvFormat::Fp32] };

    #[test]
    fn refusals_name_the_executor_and_what_it_runs() {
        let message = |result: Result<()>| result.expect_err("a refusal").to_string();
        assert!(EXECUTOR.check(1, KvFormat::Fp32).is_ok());
        assert_eq!(
            message(EXECUTOR.check(4, KvFormat::Fp32)),
            "the CPU engine cannot run a batch of 4 sequences; it runs 1"
        );
        assert_eq!(message(EXECUTOR.check(1, KvFormat::Fp8)), "the CPU engine cannot run a cache in fp8; it runs fp32");
    }

    #[test]
    fn a_call_continues_the_cache_with_a_token_for_each_row() {
        let message = |batch, tokens, position| EXECUTOR.check_batch(batch, tokens, position).unwrap_err().to_string();
        assert!(EXECUTOR.check_batch(Batch::one(5..8), 3, 5).is_ok());
        assert_eq!(message(Batch::one(5..8), 3, 4), "a call at position 5 does not continue a cache of 4 tokens");
        assert_eq!(
            message(Batch::one(5..8), 2, 5),
            "2 tokens were given for a batch of 1 sequence at positions 5 to 7, which has 3"
        );
        let two = Batch { sequences: 2, ..Batch::one(0..3) };
        assert_eq!((two.rows(), two.keys()), (6, 3));
        assert_eq!(message(two, 6, 0), "the CPU engine cannot run a batch of 2 sequences; it runs 1");
    }
}
