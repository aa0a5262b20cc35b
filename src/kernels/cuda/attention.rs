//! Attention of one query: what a job of `attention.cuh` is told.

use candle_core::{Result, bail};

use super::program::{Facts, WARPS};

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
    pub d: i32,
    pub d_pad: i32,
    pub rotary: i32,
    pub reach: i32,
    pub capacity: i32,
    pub span: i32,
    pub splits: i32,
    /// For [`super::program::Jobs`] to fill in.
    pub of_job: [i32; 3],
}

/// How the positions of a head are split into units, which blocks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Positions of a unit, and units one behind the other.
    pub span: usize,
    pub splits: usize,
}

impl Split {
    /// At most a unit for each multiprocessor at `capacity` positions where there are as many, none with too little to do.
    pub fn new(capacity: usize, heads: usize, d_pad: usize, facts: Facts) -> Self {
        let least = SPAN_BYTES / (size_of::<half::f16>() * d_pad) / SPAN_STEP * SPAN_STEP;
        let most_splits = (facts.multiprocessors / heads).max(1);
        let span = capacity.div_ceil(most_splits).next_multiple_of(SPAN_STEP).max(least).max(SPAN_STEP);
        Self { span, splits: capacity.div_ceil(span) }
    }

    /// fp32 values that units leave for each other.
    pub fn partials(self, heads: usize, d: usize) -> usize {
        heads * self.splits * (2 + d)
    }
}

impl Attention {
    pub(super) fn check(&self) -> Result<()> {
        match usize::try_from(self.d) {
            Ok(1..=MAX_D) => Ok(()),
            _ => bail!("heads of {} elements, allowed are 1 to {MAX_D}", self.d),
        }
    }

    /// Blocks that have something to do where the cache is full.
    pub(super) fn units(&self) -> usize {
        (self.kv_heads * self.group * self.splits) as usize
    }

    /// Keys and values of one of them.
    pub(super) fn unit_bytes(&self) -> usize {
        2 * size_of::<half::f16>() * (self.span.min(self.capacity) * self.d_pad) as usize
    }

    /// What `attend` lays out in its `room`.
    pub(super) fn shared_bytes(&self) -> usize {
        let d_pad = self.d_pad as usize;
        let (q, states) = (d_pad, WARPS * (2 + d_pad));
        size_of::<f32>() * (q + states) + size_of::<half::f16>() * 2 * d_pad
    }
}
