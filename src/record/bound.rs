//! The limit of decoding: memory, arithmetic, host or cache.

/// The reason that [`super::Bandwidth::bound`] names. Only what was measured is a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Reading weights and cache explains the step.
    Memory,
    /// Arithmetic on weights that lie in the cache explains it.
    Compute,
    /// Neither explains it, or both do equally well.
    Mixed,
    /// The device waits for the host.
    Host,
    /// Part of what a step reads never leaves the last-level cache: the memory's bandwidth is no limit for it.
    CacheResident,
    NotKnown,
}

impl Bound {
    pub const ALL: [Bound; 6] =
        [Bound::Memory, Bound::Compute, Bound::Mixed, Bound::Host, Bound::CacheResident, Bound::NotKnown];

    /// Spelling in records and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Bound::Memory => "memory",
            Bound::Compute => "compute",
            Bound::Mixed => "mixed",
            Bound::Host => "host",
            Bound::CacheResident => "cache-resident",
            Bound::NotKnown => "not known",
        }
    }

    /// The bound of this name. `None` for those of earlier versions, which named the largest part of a step by exclusion.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bound| bound.name() == name)
    }
}
