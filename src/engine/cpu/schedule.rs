//! Lowers a plan to the steps that the CPU engine's workers run together, and says where they must wait for each other.
//!
//! How a step is split decides that. While a call has one row, whatever works row by row is done by worker 0 alone; a
//! linear is split over its output rows, and an element-wise operation behind it keeps that split, so that every worker
//! goes on with the elements it has just computed. Only where the split changes do the workers meet.

use crate::plan::{
    ActivationKind, BiasId, BufferId, CacheId, LinearPart, Mask, MatrixId, NormKind, Op, Plan, Rotate, VectorId,
};

/// One operation of the lowered plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Embed {
        table: MatrixId,
        scale: f32,
        image: Option<u32>,
        out: BufferId,
    },
    Patches {
        out: BufferId,
    },
    AddRows {
        x: BufferId,
        table: MatrixId,
    },
    Features {
        x: BufferId,
    },
    Norm {
        kind: NormKind,
        weight: VectorId,
        epsilon: f32,
        x: BufferId,
        out: BufferId,
    },
    LastRow {
        x: BufferId,
        out: BufferId,
        scale: f32,
    },
    /// Brings `x` into the form that the kernel of `matrix` reads.
    Prepare {
        x: BufferId,
        matrix: MatrixId,
    },
    /// Multiplies what was prepared last.
    Linear {
        parts: Vec<LinearPart>,
    },
    Activate {
        kind: ActivationKind,
        gate: BufferId,
        up: Option<BufferId>,
        out: BufferId,
    },
    Add {
        a: BufferId,
        b: BufferId,
        out: BufferId,
    },
    Append {
        k: BufferId,
        v: BufferId,
        cache: CacheId,
        rotate: Option<Rotate>,
    },
    Attend(Attend),
    Argmax {
        logits: BufferId,
    },
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
            Step::Prepare { .. } | Step::Argmax { .. } | Step::LastRow { .. } => Split::One,
            Step::Patches { .. } | Step::Features { .. } => Split::One,
            Step::Embed { .. } | Step::Norm { .. } | Step::AddRows { .. } if single => Split::One,
            Step::Embed { .. } | Step::Norm { .. } | Step::AddRows { .. } => Split::Rows,
            Step::Linear { .. } | Step::Activate { .. } | Step::Add { .. } => Split::Elements,
            Step::Append { .. } | Step::Attend(_) => Split::Heads,
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
pub fn lower(plan: &Plan, form: impl Fn(MatrixId) -> &'static str) -> Vec<Step> {
    let mut steps = Vec::new();
    for op in &plan.ops {
        match op.clone() {
            Op::Embed { table, scale, image, out } => steps.push(Step::Embed { table, scale, image, out }),
            Op::Patches { out } => steps.push(Step::Patches { out }),
            Op::AddRows { x, table } => steps.push(Step::AddRows { x, table }),
            Op::Features { x } => steps.push(Step::Features { x }),
            Op::Norm { kind, weight, epsilon, x, out } => steps.push(Step::Norm { kind, weight, epsilon, x, out }),
            Op::Linear { x, parts } => lower_linear(x, parts, &form, &mut steps),
            Op::Append { k, v, cache, rotate } => steps.push(Step::Append { k, v, cache, rotate }),
            Op::Attention { q, cache, out, scale, mask, bias } => {
                steps.push(Step::Attend(Attend { q, cache, out, scale, mask, bias }));
            }
            Op::Activate { kind, gate, up, out } => steps.push(Step::Activate { kind, gate, up, out }),
            Op::Add { a, b, out } => steps.push(Step::Add { a, b, out }),
            Op::LastRow { x, out, scale } => steps.push(Step::LastRow { x, out, scale }),
            Op::Argmax { logits } => steps.push(Step::Argmax { logits }),
        }
    }
    steps
}

fn lower_linear(
    x: BufferId,
    mut parts: Vec<LinearPart>,
    form: &impl Fn(MatrixId) -> &'static str,
    steps: &mut Vec<Step>,
) {
    while let Some(first) = parts.first() {
        let matrix = first.weight;
        let (same, rest) = parts.into_iter().partition(|part| form(part.weight) == form(matrix));
        steps.push(Step::Prepare { x, matrix });
        steps.push(Step::Linear { parts: same });
        parts = rest;
    }
}
