//! Lowers a plan to the steps that the CPU engine's workers run together, and says where they must wait for each other.
//!
//! How a step is split decides that. While a call has one row, whatever works row by row is done by worker 0 alone; a
//! linear is split over its output rows, and an element-wise operation behind it keeps that split, so that every worker
//! goes on with the elements it has just computed. Only where the split changes do the workers meet.

use candle_core::Result;

use crate::plan::{
    ActivationSpec, AddRowsSpec, AddSpec, AppendSpec, ArgmaxSpec, AttentionSpec, BiasId, BufferId, CacheId, EmbedSpec,
    FeaturesSpec, KeyValue, LastRowSpec, LinearPart, LinearSpec, Mask, MatrixId, NormSpec, Op, PatchesSpec, Plan,
    RopeId, feature, refuse,
};
use crate::quant::FormatId;

/// The name in errors.
pub const EXECUTOR: &str = "the CPU engine";

/// One operation of the lowered plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Embed(EmbedSpec),
    Patches(PatchesSpec),
    AddRows(AddRowsSpec),
    Features(FeaturesSpec),
    Norm(NormSpec),
    LastRow(LastRowSpec),
    /// Brings `x` into the form that the kernel of `matrix` reads.
    Prepare {
        x: BufferId,
        matrix: MatrixId,
    },
    /// Multiplies what was prepared last.
    Linear {
        parts: Vec<LinearPart>,
    },
    Activate(ActivationSpec),
    Add(AddSpec),
    Append(Append),
    Attend(Attend),
    Argmax(ArgmaxSpec),
}

/// Rotates the queries and the keys where there is a rope, and writes keys and values to the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Append {
    pub kv: KeyValue,
    pub cache: CacheId,
    /// The queries that it rotates with the keys.
    pub rotate: Option<(RopeId, BufferId)>,
}

/// Attention over one cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attend {
    pub q: BufferId,
    pub cache: CacheId,
    pub out: BufferId,
    pub scale: f32,
    pub mask: Mask,
    pub bias: Option<BiasId>,
}

/// How a step is split over the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Worker 0 alone.
    One,
    /// By rows of the call.
    Rows,
    /// By elements of a row, the same for every buffer of one width.
    Elements,
    /// By key/value heads, with all that belongs to a head on one worker.
    Heads,
}

impl Step {
    /// The split for a call with one row (`single`) or several.
    pub fn split(&self, single: bool) -> Split {
        match self {
            Step::Prepare { .. } | Step::Argmax(_) | Step::LastRow(_) => Split::One,
            Step::Patches(_) | Step::Features(_) => Split::One,
            Step::Embed(_) | Step::Norm(_) | Step::AddRows(_) if single => Split::One,
            Step::Embed(_) | Step::Norm(_) | Step::AddRows(_) => Split::Rows,
            Step::Linear { .. } | Step::Activate(_) | Step::Add(_) => Split::Elements,
            Step::Append(_) | Step::Attend(_) => Split::Heads,
        }
    }
}

/// Whether workers must meet between two steps. Elements stay with their worker from a linear to what follows it, but a
/// linear itself reads what all have prepared; heads stay from append to attention while the call has one row, and with
/// several rows attention reads what others appended.
pub fn must_meet(before: &Step, after: &Step, single: bool) -> bool {
    let (first, second) = (before.split(single), after.split(single));
    match (first, second) {
        (Split::Heads, Split::Heads) => !single,
        (Split::Elements, Split::Elements) => matches!(after, Step::Linear { .. }),
        _ => first != second,
    }
}

/// `form(matrix)` tells matrices apart that read activations in different forms: parts of one linear group that differ in
/// it are prepared one after the other.
///
/// # Errors
/// Where the plan holds an operation that no step computes, by name.
pub fn lower(plan: &Plan, form: impl Fn(MatrixId) -> FormatId) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for op in &plan.ops {
        match op {
            Op::Embed(spec) => steps.push(Step::Embed(*spec)),
            Op::Patches(spec) => steps.push(Step::Patches(*spec)),
            Op::AddRows(spec) => steps.push(Step::AddRows(*spec)),
            Op::Features(spec) => steps.push(Step::Features(*spec)),
            Op::Norm(spec) => steps.push(Step::Norm(*spec)),
            Op::Linear(LinearSpec { x, parts }) => {
                parts.iter().try_for_each(|part| refuse(EXECUTOR, "a linear", &[feature(&part.rows)]))?;
                lower_linear(*x, parts.clone(), &form, &mut steps);
            }
            Op::Append(AppendSpec { kv, cache }) => {
                steps.push(Step::Append(Append { kv: *kv, cache: *cache, rotate: None }));
            }
            Op::Attention(spec) => lower_attention(spec, &mut steps)?,
            Op::Activation(spec) => steps.push(Step::Activate(*spec)),
            Op::Experts(spec) => refuse(EXECUTOR, "an operation", &[Some(spec)])?,
            Op::Add(spec) => steps.push(Step::Add(*spec)),
            Op::LastRow(spec) => steps.push(Step::LastRow(*spec)),
            Op::Argmax(spec) => {
                refuse(EXECUTOR, "a choice of the token", &[feature(&spec.softcap)])?;
                steps.push(Step::Argmax(*spec));
            }
        }
    }
    Ok(steps)
}

fn lower_attention(spec: &AttentionSpec, steps: &mut Vec<Step>) -> Result<()> {
    let AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = spec;
    let features = [feature(window), feature(softcap), feature(qk_norm), feature(sinks)];
    refuse(EXECUTOR, "an attention", &features)?;
    let (q, cache) = (*q, *cache);
    match (append, rope) {
        (Some(kv), rope) => {
            steps.push(Step::Append(Append { kv: *kv, cache, rotate: rope.map(|rope| (rope, q)) }));
        }
        (None, Some(_)) => refuse(EXECUTOR, "an attention", &[Some(&"a rope and no keys to append")])?,
        (None, None) => {}
    }
    steps.push(Step::Attend(Attend { q, cache, out: *out, scale: *scale, mask: *mask, bias: *bias }));
    Ok(())
}

fn lower_linear(x: BufferId, mut parts: Vec<LinearPart>, form: &impl Fn(MatrixId) -> FormatId, steps: &mut Vec<Step>) {
    while let Some(first) = parts.first() {
        let matrix = first.weight;
        let (same, rest) = parts.into_iter().partition(|part| form(part.weight) == form(matrix));
        steps.push(Step::Prepare { x, matrix });
        steps.push(Step::Linear { parts: same });
        parts = rest;
    }
}
