//! Attention of one query: what a job of `attention.cuh` is told.

use candle_core::{Result, bail};

use super::program::{Facts, WARPS};

/// As in attention.cuh.
const MAX_HEADS: usize = 2;
/// Elements of a head whose units of 8 one warp holds.
const MAX_D: usize = 256;
/// Bytes of a unit's keys: enough to be worth the joining, few enough that a short context is split.
const SPAN_BYTES: usize = 16 << 10;
/// Spans are multiples of it.
const SPAN_STEP: usize = 32;

/// As `struct Attention` of job.cuh, which says what each is.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Attention {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub keys: u64,
    pub values: u64,
    pub out: u64,
    pub angles: u64,
    pub bias: u64,
    pub position: u64,
    pub length: u64,
    pub partials: u64,
    pub arrived: u64,
    pub scale: f32,
    pub kv_heads: i32,
    pub group: i32,
    pub heads: i32,
    pub d: i32,
    pub d_pad: i32,
    pub rotary: i32,
    pub reach: i32,
    pub capacity: i32,
    pub span: i32,
    pub splits: i32,
}

/// How queries and positions are split into units, which blocks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Query heads of a unit, and units of a key/value head side by side.
    pub heads: usize,
    pub groups: usize,
    /// Positions of a unit, and units of the same heads one behind the other.
    pub span: usize,
    pub splits: usize,
}

impl Split {
    /// At most a unit for each multiprocessor at `capacity` positions where there are as many, none with too little to do.
    pub fn new(capacity: usize, kv_heads: usize, group: usize, d_pad: usize, facts: Facts) -> Self {
        let heads = group.min(MAX_HEADS);
        let groups = group.div_ceil(heads);
        let least = SPAN_BYTES / (size_of::<half::f16>() * d_pad) / SPAN_STEP * SPAN_STEP;
        let most_splits = (facts.multiprocessors / (kv_heads * groups)).max(1);
        let span = capacity.div_ceil(most_splits).next_multiple_of(SPAN_STEP).max(least).max(SPAN_STEP);
        Self { heads, groups, span, splits: capacity.div_ceil(span) }
    }

    /// fp32 values that units leave for each other.
    pub fn partials(self, kv_heads: usize, d: usize) -> usize {
        self.counters(kv_heads) * self.splits * self.heads * (2 + d)
    }

    /// Counters of units that have ended.
    pub fn counters(self, kv_heads: usize) -> usize {
        kv_heads * self.groups
    }
}

impl Attention {
    pub(super) fn check(&self) -> Result<()> {
        match usize::try_from(self.d) {
            Ok(1..=MAX_D) => Ok(()),
            _ => bail!("heads of {} elements, allowed are 1 to {MAX_D}", self.d),
        }
    }

    /// What `attend` lays out in its `room`.
    pub(super) fn shared_bytes(&self) -> usize {
        let [heads, d_pad] = [self.heads, self.d_pad].map(|value| value as usize);
        let (q, states) = (heads * d_pad, WARPS * heads * (2 + d_pad));
        size_of::<f32>() * (q + states) + size_of::<half::f16>() * 2 * d_pad
    }
}
