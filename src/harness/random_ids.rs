//! Ids that stand for a text where none is given: the same from run to run, other ones for each sequence.

use crate::rng::SplitMix64;

/// Distance between the seeds of a batch's sequences.
const SEQUENCE_STREAM: u64 = 0x5e90_e9ce_0000_0001;

/// The seed of a sequence's random ids: the first one's is the user's.
pub fn seed_of(seed: u64, sequence: usize) -> u64 {
    seed ^ SEQUENCE_STREAM.wrapping_mul(sequence as u64)
}

/// `n` ids that depend on the seed alone. Both ends of the vocabulary are left out where it is large enough, since special
/// tokens lie there.
pub fn synthetic(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let margin = vocab / 16;
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| (margin + rng.below((vocab - 2 * margin).max(1))) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synthetic_ids_are_repeatable_and_ordinary() {
        let ids = synthetic(1000, 320, 42);
        assert_eq!(ids, synthetic(1000, 320, 42));
        assert_ne!(ids, synthetic(1000, 320, 43));
        assert!(ids.iter().all(|id| (20..300).contains(id)));
        assert_eq!(synthetic(3, 1, 0), [0, 0, 0]);
    }
}
