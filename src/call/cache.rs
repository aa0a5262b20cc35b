//! Key/value caches: their shape, which a model sets, and the format of their values, which a session chooses.

use serde::{Deserialize, Serialize};

/// The format of a key or a value in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    Fp32,
    Fp16,
    Bf16,
    /// E4M3.
    Fp8,
}

impl KvFormat {
    /// The name in messages and records.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::Fp32 => "fp32",
            KvFormat::Fp16 => "fp16",
            KvFormat::Bf16 => "bf16",
            KvFormat::Fp8 => "fp8",
        }
    }

    /// Bytes of one key or value.
    pub fn bytes(self) -> usize {
        match self {
            KvFormat::Fp32 => 4,
            KvFormat::Fp16 | KvFormat::Bf16 => 2,
            KvFormat::Fp8 => 1,
        }
    }
}

/// The plan whose positions a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheScope {
    /// The decoder's: it grows with every call.
    Decoder,
    /// The encoder's: written by one encoder call, kept for all decoder calls behind it.
    Encoder,
}

/// Keys and values of one layer: `[g, positions, d]` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scope: CacheScope,
    /// The most positions that an attention over it sees; `None` where it sees all.
    pub window: Option<usize>,
}

impl CacheShape {
    /// The same cache, held in `format`.
    pub fn held_in(self, format: KvFormat) -> CacheSpec {
        let Self { kv_heads, head_dim, scope, window } = self;
        CacheSpec { format, window, kv_heads, head_dim, scope }
    }
}

/// A cache as a session holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    pub format: KvFormat,
    /// The most positions that an attention over it sees; `None` where it sees all.
    pub window: Option<usize>,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scope: CacheScope,
}

impl CacheSpec {
    /// Bytes of the keys and values of one position.
    pub fn bytes_per_position(self) -> usize {
        2 * self.kv_heads * self.head_dim * self.format.bytes()
    }

    /// Bytes that a decode step reads where a sequence holds `positions`, its own included.
    pub fn bytes_read(self, positions: usize) -> usize {
        self.bytes_per_position() * self.window.map_or(positions, |window| window.min(positions))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_bounds_the_bytes_that_a_step_reads() {
        let shape = CacheShape { kv_heads: 3, head_dim: 20, scope: CacheScope::Decoder, window: None };
        let (whole, windowed) = (shape.held_in(KvFormat::Fp16), CacheShape { window: Some(8), ..shape });
        assert_eq!(whole.bytes_per_position(), 2 * 3 * 20 * 2);
        assert_eq!(whole.bytes_read(9), 9 * 240);
        let windowed = windowed.held_in(KvFormat::Fp32);
        assert_eq!([7, 8, 9].map(|positions| windowed.bytes_read(positions)), [7 * 480, 8 * 480, 8 * 480]);
    }
}
