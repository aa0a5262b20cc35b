//! The instruction set that the CPU kernels use, found at run time and recorded.

/// Instruction sets that kernels were written for. Ordered: a later one can do all that an earlier one can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, any machine.
    Portable,
    /// AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI, on top of [`Isa::Avx2`].
    Avx512,
}

impl Isa {
    /// The best that this machine has.
    pub fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Isa::Portable)
    }

    /// All that this machine can run, in rising order; never empty. Tests loop over it.
    pub fn available() -> Vec<Self> {
        [Isa::Portable].into_iter().chain(Self::of_x86()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn of_x86() -> Vec<Self> {
        use std::is_x86_feature_detected as has;
        let has_avx2 = has!("avx2") && has!("fma") && has!("f16c");
        let has_avx512 =
            has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") && has!("avx512vnni");
        let found = [(Isa::Avx2, has_avx2), (Isa::Avx512, has_avx2 && has_avx512)];
        found.into_iter().filter(|(_, has)| *has).map(|(isa, _)| isa).collect()
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_x86() -> Vec<Self> {
        Vec::new()
    }

    /// The name in records.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}
