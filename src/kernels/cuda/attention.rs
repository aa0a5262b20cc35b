//! Attention of one query: the operands of an attention instruction of `attention.cuh`.

use candle_core::{Result, bail};

use super::step_kernel::{DeviceProperties, WARPS};

/// Elements of a head: one warp holds its units of 8.
const MAX_D: usize = 256;
/// As in attention.cuh: query heads that a unit takes together, of heads that tensor cores multiply.
const HEADS_TOGETHER: usize = 4;
const TENSOR_D: usize = 64;
/// Bytes of a unit's keys: enough to be worth the merge, few enough that a short context is split.
const SPAN_BYTES: usize = 16 << 10;
/// Spans are multiples of it.
const SPAN_STEP: usize = 32;

/// As `struct Attention` of instruction.cuh, which describes each field.
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
    /// Set by [`super::program::ProgramBuilder`].
    pub written_by: [i32; 3],
    pub features: Features,
}

/// What a featured attention has beside a plain one, as the end of `struct Attention`; all zeros for none.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct Features {
    pub sinks: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub softcap: f32,
    pub epsilon: f32,
    pub window: i32,
    pub norms_all_heads: i32,
}

/// The split of a head's positions into units, which blocks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSplit {
    /// Positions of a unit, and units of a head.
    pub span: usize,
    pub splits: usize,
}

impl KvSplit {
    /// At most a unit for each multiprocessor at `capacity` positions where there are as many, none with too little to do. `group` query heads share
    /// each of `kv_heads` key/value heads.
    pub fn new(capacity: usize, kv_heads: usize, group: usize, d_pad: usize, properties: DeviceProperties) -> Self {
        Self::of_units(capacity, kv_heads * parts(group, d_pad), d_pad, properties)
    }

    /// The split of a featured attention, whose units have one of `heads` query heads.
    pub fn featured(capacity: usize, heads: usize, d_pad: usize, properties: DeviceProperties) -> Self {
        Self::of_units(capacity, heads, d_pad, properties)
    }

    fn of_units(capacity: usize, heads: usize, d_pad: usize, properties: DeviceProperties) -> Self {
        let least = SPAN_BYTES / (size_of::<half::f16>() * d_pad) / SPAN_STEP * SPAN_STEP;
        let most_splits = (properties.multiprocessors / heads).max(1);
        let span = capacity.div_ceil(most_splits).next_multiple_of(SPAN_STEP).max(least).max(SPAN_STEP);
        Self { span, splits: capacity.div_ceil(span) }
    }

    /// fp32 values of all partial results.
    pub fn partials(self, heads: usize, d: usize) -> usize {
        heads * self.splits * (2 + d)
    }
}

/// Units that the query heads of a key/value head take.
fn parts(group: usize, d_pad: usize) -> usize {
    group.div_ceil(heads_together(group, d_pad))
}

fn heads_together(group: usize, d_pad: usize) -> usize {
    if d_pad <= TENSOR_D { group.clamp(1, HEADS_TOGETHER) } else { 1 }
}

impl Attention {
    pub(super) fn check(&self) -> Result<()> {
        match usize::try_from(self.d) {
            Ok(1..=MAX_D) => Ok(()),
            _ => bail!("heads of {} elements, allowed are 1 to {MAX_D}", self.d),
        }
    }

    /// Whether it takes an instruction of its own.
    pub(super) fn is_featured(&self) -> bool {
        self.features != Features::default()
    }

    /// Units where the cache is full: as many blocks have work.
    pub(super) fn units(&self) -> usize {
        let (group, d_pad) = (self.group as usize, self.d_pad as usize);
        let parts = if self.is_featured() { group } else { parts(group, d_pad) };
        self.kv_heads as usize * parts * self.splits as usize
    }

    /// Bytes of keys and values of a unit.
    pub(super) fn unit_bytes(&self) -> usize {
        2 * size_of::<half::f16>() * (self.span.min(self.capacity) * self.d_pad) as usize
    }

    /// Bytes of `room` in attention.cuh's `attend_together` and `attend_wide`.
    pub(super) fn shared_bytes(&self) -> usize {
        let d_pad = self.d_pad as usize;
        if d_pad <= TENSOR_D && !self.is_featured() {
            let heads = heads_together(self.group as usize, d_pad);
            let states = WARPS * (2 * HEADS_TOGETHER + heads * d_pad);
            return size_of::<f32>() * states + size_of::<half::f16>() * (heads + 2) * d_pad;
        }
        let (q, states) = (d_pad, WARPS * (2 + d_pad));
        size_of::<f32>() * (q + states) + size_of::<half::f16>() * 2 * d_pad
    }
}
