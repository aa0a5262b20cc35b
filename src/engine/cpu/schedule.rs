//! Lowers a plan to the steps that the CPU engine's workers run together, and says where they must wait for each other.
//!
//! The split of a step decides that. While a call has one row, whatever works row by row is done by worker 0 alone, and else by all; a
//! linear is split over its output rows, and an element-wise operation behind it keeps that split, so that every worker
//! goes on with the elements it has just computed. Only where the split changes does a barrier stand between two steps.

use std::sync::Arc;

use candle_core::Result;

use crate::call::Batch;
use crate::plan::{
    ActivationSpec, AddRowsSpec, AddSpec, AppendSpec, ArgmaxSpec, AttentionSpec, BiasId, BufferId, CacheId, EmbedSpec,
    ExpertsSpec, FeaturesSpec, KeyValue, LastRowSpec, LinearPart, LinearSpec, Mask, MatrixId, MatrixRows, Norm,
    NormSpec, Op, PatchesSpec, Plan, QkNorm, QkNormOver, RopeId, Sinks, Softcap, VectorId, Window, feature, refuse,
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
    Linear {
        input: LinearInput,
        parts: Vec<LinearPart>,
    },
    Activate(ActivationSpec),
    /// Chooses the experts of each row and prepares what they read.
    Route(Arc<ExpertsSpec>),
    /// Multiplies by the gates and ups of the chosen experts.
    ExpertsIn(Arc<ExpertsSpec>),
    /// Prepares what their downs read.
    ExpertsBetween(Arc<ExpertsSpec>),
    /// Multiplies by their downs, and adds up.
    ExpertsOut(Arc<ExpertsSpec>),
    Add(AddSpec),
    /// A norm of each row in place.
    NormInPlace {
        norm: Norm,
        x: BufferId,
    },
    /// `cap · tanh(x / cap)` in place.
    Cap {
        x: BufferId,
        cap: f32,
    },
    Append(Append),
    Attend(Attend),
    Argmax(ArgmaxSpec),
}

/// What matrices are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinearInput {
    /// A buffer as it is.
    Plain(BufferId),
    /// What was prepared last.
    Prepared,
}

/// Normalises and rotates queries and keys, where there is a norm and a rope, and writes keys and values to the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Append {
    pub kv: KeyValue,
    pub cache: CacheId,
    /// The queries that take the same way as the keys.
    pub q: Option<BufferId>,
    pub rope: Option<RopeId>,
    /// Norms of each head of queries and keys.
    pub norms: Option<[Norm; 2]>,
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
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    pub sinks: Option<VectorId>,
    /// The call's own keys and values, as they were appended.
    pub kv: Option<KeyValue>,
}

/// The split of a step over the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Worker 0 alone.
    One,
    /// Every worker all of it, for itself.
    Each,
    /// By rows of the call.
    Rows,
    /// By elements of a row, the same for every buffer of one width.
    Elements,
    /// By rows of a matrix whose products go to several buffers.
    FusedElements,
    /// By rows of the experts' gates and ups.
    ExpertElements,
    /// By chosen experts.
    Experts,
    /// By key/value heads of each sequence, with all that belongs to a head on one worker.
    Heads,
}

/// How many rows a call has, as far as splits differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowShape {
    /// One row.
    Single,
    /// One row of each of several sequences.
    Step,
    /// Several rows of a sequence.
    Prompt,
}

impl RowShape {
    pub fn of(batch: Batch) -> Self {
        match (batch.rows(), batch.rows_each()) {
            (1, _) => RowShape::Single,
            (_, 1) => RowShape::Step,
            _ => RowShape::Prompt,
        }
    }
}

impl Step {
    /// The split in a call.
    pub fn split(&self, shape: RowShape) -> Split {
        let single = shape == RowShape::Single;
        match self {
            Step::Prepare { .. } if single => Split::Each,
            Step::Argmax(_) if shape == RowShape::Step => Split::Rows,
            Step::Prepare { .. } | Step::Argmax(_) | Step::LastRow(_) => Split::One,
            Step::Patches(_) | Step::Features(_) | Step::Route(_) => Split::One,
            Step::Embed(_) | Step::Norm(_) | Step::NormInPlace { .. } | Step::AddRows(_) if single => Split::One,
            Step::Embed(_) | Step::Norm(_) | Step::NormInPlace { .. } | Step::AddRows(_) => Split::Rows,
            Step::Linear { input: _, parts } if parts.iter().any(|part| part.rows.is_some()) => Split::FusedElements,
            Step::Linear { .. } | Step::Activate(_) | Step::Add(_) | Step::Cap { .. } => Split::Elements,
            Step::ExpertsIn(_) => Split::ExpertElements,
            Step::ExpertsBetween(_) => Split::Experts,
            Step::ExpertsOut(_) => Split::Elements,
            Step::Append(_) | Step::Attend(_) => Split::Heads,
        }
    }
}

/// Returns whether a barrier stands between two steps. Elements stay with their worker from a linear to what follows it, but a
/// linear itself reads what all have written, or what each has prepared for itself; heads stay from append to attention while the call has one row of each
/// sequence, and with several rows attention reads what others appended.
pub fn needs_barrier(before: &Step, after: &Step, shape: RowShape) -> bool {
    let (first, second) = (before.split(shape), after.split(shape));
    match (first, second) {
        (Split::Each, _) => false,
        (Split::Heads, Split::Heads) => shape == RowShape::Prompt,
        (Split::Elements, Split::Elements) => matches!(after, Step::Linear { .. }),
        _ => first != second,
    }
}

/// `form(matrix)` distinguishes matrices that read activations in different forms, which are prepared one after the other; `None` is fp32.
///
/// # Errors
/// If the plan holds an operation that no step computes, by its name.
pub fn lower(plan: &Plan, form: impl Fn(MatrixId) -> Option<FormatId>) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for op in &plan.ops {
        match op {
            Op::Embed(spec) => steps.push(Step::Embed(*spec)),
            Op::Patches(spec) => steps.push(Step::Patches(*spec)),
            Op::AddRows(spec) => steps.push(Step::AddRows(*spec)),
            Op::Features(spec) => steps.push(Step::Features(*spec)),
            Op::Norm(spec) => steps.push(Step::Norm(*spec)),
            Op::Linear(LinearSpec { x, parts }) => lower_linear(*x, whole(parts), &form, &mut steps),
            Op::Append(AppendSpec { kv, cache }) => {
                let (q, rope, norms) = (None, None, None);
                steps.push(Step::Append(Append { kv: *kv, cache: *cache, q, rope, norms }));
            }
            Op::Attention(spec) => lower_attention(spec, &mut steps)?,
            Op::Activation(spec) => steps.push(Step::Activate(*spec)),
            Op::Experts(spec) => {
                let spec = Arc::new(spec.clone());
                steps.push(Step::Route(spec.clone()));
                steps.push(Step::ExpertsIn(spec.clone()));
                steps.push(Step::ExpertsBetween(spec.clone()));
                steps.push(Step::ExpertsOut(spec));
            }
            Op::Add(spec) => steps.push(Step::Add(*spec)),
            Op::LastRow(spec) => steps.push(Step::LastRow(*spec)),
            Op::Argmax(spec) => {
                if let Some(Softcap(cap)) = spec.softcap {
                    steps.push(Step::Cap { x: spec.logits, cap });
                }
                steps.push(Step::Argmax(*spec));
            }
        }
    }
    Ok(steps)
}

fn lower_attention(spec: &AttentionSpec, steps: &mut Vec<Step>) -> Result<()> {
    let AttentionSpec { q, append, cache, out, scale, mask, rope, bias, window, softcap, qk_norm, sinks } = spec;
    let (q, cache) = (*q, *cache);
    match (append, rope, qk_norm) {
        (Some(kv), rope, norm) => {
            let mut norms = None;
            match norm {
                Some(QkNorm { q: of_q, k: of_k, over: QkNormOver::Head }) => norms = Some([*of_q, *of_k]),
                Some(QkNorm { q: of_q, k: of_k, over: QkNormOver::Projection }) => {
                    steps.push(Step::NormInPlace { norm: *of_q, x: q });
                    steps.push(Step::NormInPlace { norm: *of_k, x: kv.k });
                }
                None => {}
            }
            steps.push(Step::Append(Append { kv: *kv, cache, q: Some(q), rope: *rope, norms }));
        }
        (None, Some(_), _) => refuse(EXECUTOR, "an attention", &[Some(&"a rope and no keys to append")])?,
        (None, None, norm) => refuse(EXECUTOR, "an attention without keys to append", &[feature(norm)])?,
    }
    steps.push(Step::Attend(Attend {
        q,
        cache,
        out: *out,
        scale: *scale,
        mask: *mask,
        bias: *bias,
        window: window.map(|Window(window)| window),
        softcap: softcap.map(|Softcap(cap)| cap),
        sinks: sinks.map(|Sinks(vector)| vector),
        kv: *append,
    }));
    Ok(())
}

/// Parts of fused matrices as one product each, whose rows go to the slot that all of their buffers lie in.
fn whole(parts: &[LinearPart]) -> Vec<LinearPart> {
    let mut products: Vec<LinearPart> = Vec::new();
    for part in parts {
        let Some(MatrixRows { start, len }) = part.rows else {
            products.push(*part);
            continue;
        };
        match products.iter_mut().find(|product| product.rows.is_some() && product.weight == part.weight) {
            Some(LinearPart { rows: Some(rows), .. }) => rows.len = rows.len.max(start + len),
            Some(_) | None => {
                products.push(LinearPart { rows: Some(MatrixRows { start: 0, len: start + len }), ..*part });
            }
        }
    }
    products
}

/// Rows that a product of the lowered plan has.
pub fn product_rows(part: &LinearPart, plan: &Plan) -> usize {
    part.rows.map_or(plan.buffers[part.out.0].width, |rows| rows.len)
}

fn lower_linear(
    x: BufferId,
    mut parts: Vec<LinearPart>,
    form: &impl Fn(MatrixId) -> Option<FormatId>,
    steps: &mut Vec<Step>,
) {
    while let Some(first) = parts.first() {
        let matrix = first.weight;
        let (same, rest) = parts.into_iter().partition(|part| form(part.weight) == form(matrix));
        let input = if form(matrix).is_some() { LinearInput::Prepared } else { LinearInput::Plain(x) };
        if input == LinearInput::Prepared {
            steps.push(Step::Prepare { x, matrix });
        }
        steps.push(Step::Linear { input, parts: same });
        parts = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::builtin_models;

    #[test]
    fn nothing_takes_the_place_of_what_slower_threads_still_multiply() {
        let mut products = 0;
        for shape in builtin_models() {
            let model = crate::models::build(&shape.config()).expect("a model");
            for plan in model.plans() {
                let storage = plan.storage();
                for (index, op) in plan.ops.iter().enumerate() {
                    let Op::Linear(spec) = op else { continue };
                    let behind =
                        plan.ops[index + 1..].iter().take_while(|op| matches!(op, Op::Activation(_) | Op::Add(_)));
                    for out in std::iter::once(op).chain(behind).flat_map(Op::writes) {
                        products += 1;
                        assert_ne!(
                            storage.slot_of[out.0], storage.slot_of[spec.x.0],
                            "{} operation {index}",
                            shape.name
                        );
                    }
                }
            }
        }
        assert!(products > 0);
    }

    #[test]
    fn an_attention_takes_no_place_of_what_slower_threads_still_append() {
        let mut attentions = 0;
        for shape in builtin_models() {
            let model = crate::models::build(&shape.config()).expect("a model");
            for plan in model.plans() {
                let storage = plan.storage();
                for op in &plan.ops {
                    let Op::Attention(spec) = op else { continue };
                    let Some(kv) = spec.append else { continue };
                    attentions += 1;
                    let slot = |buffer: BufferId| storage.slot_of[buffer.0];
                    let is_apart = [kv.k, kv.v].into_iter().all(|read| slot(read) != slot(spec.out));
                    assert!(is_apart, "{}: {op:?}", shape.name);
                }
            }
        }
        assert!(attentions > 0);
    }
}
