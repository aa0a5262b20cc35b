//! Reproducible random numbers.

/// Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators (2014). The same seed gives the same numbers everywhere.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`, up to a bias of n / 2⁶⁴. `n` ≥ 1.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of seed 1234567 in the authors' C code (prng.di.unimi.it/splitmix64.c).
    #[test]
    fn numbers_are_those_of_the_published_generator() {
        let mut rng = SplitMix64::new(1_234_567);
        let first = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([(); 3].map(|()| rng.next_u64()), first);
    }

    #[test]
    fn ranges_are_kept_and_reached() {
        let mut rng = SplitMix64::new(3);
        let mut seen = [false; 7];
        (0..200).for_each(|_| seen[rng.below(7)] = true);
        assert_eq!((seen, rng.below(1)), ([true; 7], 0));
        assert!((0..200).all(|_| (0.0..1.0).contains(&rng.unit())));
    }
}
