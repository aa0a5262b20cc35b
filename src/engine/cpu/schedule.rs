//! Lowers a plan to the steps that the CPU engine's workers run together, and says where they must wait for each other.
//!
//! How a step is split decides that. While a call has one row, whatever works row by row is done by worker 0 alone; a
//! linear is split over its output rows, and an element-wise operation behind it keeps that split, so that every worker
//! goes on with the elements it has just computed. Only where the split changes do the workers meet.

use std::fmt::Display;

use candle_core::Result;

use crate::plan::{
    ActivationSpec, AddRowsSpec, AddSpec, AppendSpec, ArgmaxSpec, AttentionSpec, BiasId, BufferId, CacheId, EmbedSpec,
    ExpertsSpec, FeaturesSpec, KeyValue, LastRowSpec, LinearPart, LinearSpec, Mask, MatrixId, NormSpec, Op,
    PatchesSpec, Plan, QkNorm, QkNormOver, RopeId, Sinks, Softcap, Window, refuse,
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
    /// Multiplies what was prepared last with one whole matrix, whose rows are those of several parts.
    Fused {
        weight: MatrixId,
        parts: Vec<LinearPart>,
    },
    Experts(ExpertsSpec),
    Activate(ActivationSpec),
    Add(AddSpec),
    Append(Append),
    Attend(Attend),
    /// `cap · tanh(logit / cap)` in place of each logit.
    CapLogits {
        logits: BufferId,
        cap: Softcap,
    },
    Argmax(ArgmaxSpec),
}

/// Turns queries and keys, and writes keys and values to the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Append {
    pub kv: KeyValue,
    pub cache: CacheId,
    pub turn: Option<Turn>,
}

/// Norms over each head and a rotation, of keys and the queries beside them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Turn {
    pub q: BufferId,
    pub norms: Option<QkNorm>,
    pub rope: Option<RopeId>,
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
    pub window: Option<Window>,
    pub softcap: Option<Softcap>,
    pub sinks: Option<Sinks>,
    /// The call's own keys and values, as they were appended.
    pub kv: Option<KeyValue>,
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
            Step::Linear { .. } | Step::Fused { .. } | Step::Experts(_) => Split::Elements,
            Step::Activate(_) | Step::Add(_) | Step::CapLogits { .. } => Split::Elements,
            Step::Append(_) | Step::Attend(_) => Split::Heads,
        }
    }
}

/// Whether a barrier stands between two steps. Elements stay with their worker from a linear to what follows it, but a
/// linear itself reads what all have prepared; heads stay from append to attention while the call has one row, and with
/// several rows attention reads what others appended.
pub fn needs_barrier(before: &Step, after: &Step, single: bool) -> bool {
    let (first, second) = (before.split(single), after.split(single));
    match (first, second) {
        (Split::Heads, Split::Heads) => !single,
        (Split::Elements, Split::Elements) => {
            matches!(after, Step::Linear { .. } | Step::Fused { .. } | Step::Experts(_))
        }
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
            Op::Linear(LinearSpec { x, parts }) => lower_linear(*x, parts.clone(), &form, &mut steps),
            Op::Append(AppendSpec { kv, cache }) => {
                steps.push(Step::Append(Append { kv: *kv, cache: *cache, turn: None }));
            }
            Op::Attention(spec) => lower_attention(spec, &mut steps)?,
            Op::Activation(spec) => steps.push(Step::Activate(*spec)),
            Op::Experts(spec) => lower_experts(spec, &form, &mut steps)?,
            Op::Add(spec) => steps.push(Step::Add(*spec)),
            Op::LastRow(spec) => steps.push(Step::LastRow(*spec)),
            Op::Argmax(spec) => {
                let ArgmaxSpec { logits, softcap } = *spec;
                steps.extend(softcap.map(|cap| Step::CapLogits { logits, cap }));
                steps.push(Step::Argmax(*spec));
            }
        }
    }
    Ok(steps)
}

fn lower_attention(spec: &AttentionSpec, steps: &mut Vec<Step>) -> Result<()> {
    let AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = *spec;
    match append {
        Some(kv) => {
            let norms = lower_qk_norm(q, kv.k, qk_norm, steps);
            let turn = (norms.is_some() || rope.is_some()).then_some(Turn { q, norms, rope });
            steps.push(Step::Append(Append { kv, cache, turn }));
        }
        None => {
            let rope = rope.map(|_| &"a rope and no keys to append" as &dyn Display);
            let norms = qk_norm.map(|_| &"norms and no keys to append" as &dyn Display);
            refuse(EXECUTOR, "an attention", &[rope, norms])?;
        }
    }
    let kv = append;
    steps.push(Step::Attend(Attend { q, cache, out, scale, mask, bias, window, softcap, sinks, kv }));
    Ok(())
}

/// Norms over all heads are steps of their own; returns those over each head.
fn lower_qk_norm(q: BufferId, k: BufferId, norm: Option<QkNorm>, steps: &mut Vec<Step>) -> Option<QkNorm> {
    let norms = norm?;
    match norms.over {
        QkNormOver::Head => Some(norms),
        QkNormOver::Projection => {
            steps.push(Step::Norm(NormSpec { norm: norms.q, x: q, out: q }));
            steps.push(Step::Norm(NormSpec { norm: norms.k, x: k, out: k }));
            None
        }
    }
}

fn lower_linear(x: BufferId, mut parts: Vec<LinearPart>, form: &impl Fn(MatrixId) -> FormatId, steps: &mut Vec<Step>) {
    while let Some(first) = parts.first() {
        let matrix = first.weight;
        let (same, rest): (Vec<_>, Vec<_>) = parts.into_iter().partition(|part| form(part.weight) == form(matrix));
        steps.push(Step::Prepare { x, matrix });
        let (mut fused, whole): (Vec<LinearPart>, Vec<_>) = same.into_iter().partition(|part| part.rows.is_some());
        if !whole.is_empty() {
            steps.push(Step::Linear { parts: whole });
        }
        while let Some(weight) = fused.first().map(|part| part.weight) {
            let (same, others) = fused.into_iter().partition(|part| part.weight == weight);
            steps.push(Step::Fused { weight, parts: same });
            fused = others;
        }
        parts = rest;
    }
}

/// All experts of a layer share what is prepared of its activations.
fn lower_experts(spec: &ExpertsSpec, form: &impl Fn(MatrixId) -> FormatId, steps: &mut Vec<Step>) -> Result<()> {
    let inputs = spec.experts.iter().flat_map(|expert| [form(expert.gate.weight), form(expert.up.weight)]);
    let first = spec.experts.first().map(|expert| form(expert.gate.weight));
    if inputs.into_iter().any(|format| Some(format) != first) {
        refuse(EXECUTOR, "a mixture of experts", &[Some(&"gates and ups in several formats")])?;
    }
    steps.push(Step::Experts(spec.clone()));
    Ok(())
}
