//! Operations of a plan: each holds one struct that travels whole from a model's file to the executors, and says which
//! buffers, weights and caches it touches and how many FLOPs it takes.
//!
//! An executor's lowering takes each struct apart once, with every field, and refuses by name what it has no code for
//! ([`refuse`]).

use std::fmt::{Display, Formatter};
use std::ops::Range;

use candle_core::{Result, bail};

use super::{Batch, BiasId, BufferId, CacheId, MatrixId, Model, Plan, RopeId, VectorId};

/// One operation. Buffers that an operation reads were written before it in the same call.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    Embed(EmbedSpec),
    Patches(PatchesSpec),
    AddRows(AddRowsSpec),
    Features(FeaturesSpec),
    Norm(NormSpec),
    Linear(LinearSpec),
    Append(AppendSpec),
    Attention(AttentionSpec),
    Activation(ActivationSpec),
    Experts(ExpertsSpec),
    Add(AddSpec),
    LastRow(LastRowSpec),
    Argmax(ArgmaxSpec),
}

/// `out[t] = scale · table[token_t]`; rows whose token is `image` take the next row of the image features, unscaled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbedSpec {
    pub table: MatrixId,
    pub scale: f32,
    pub image: Option<u32>,
    pub out: BufferId,
}

/// `out` = the patches of the picture, one a row, channel by channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PatchesSpec {
    pub out: BufferId,
}

/// `x[t] += table[t]`: learned positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AddRowsSpec {
    pub x: BufferId,
    pub table: MatrixId,
}

/// The rows of `x` are the image features that [`EmbedSpec`] takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FeaturesSpec {
    pub x: BufferId,
}

/// A norm over the elements of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    pub kind: NormKind,
    pub weight: VectorId,
    pub epsilon: f32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `x / rms(x) · w`
    Rms,
    /// `(x − mean) / std · w + b`
    Layer { bias: VectorId },
}

impl Norm {
    /// Its weight and its bias.
    pub fn vectors(self) -> impl Iterator<Item = VectorId> {
        let bias = match self.kind {
            NormKind::Rms => None,
            NormKind::Layer { bias } => Some(bias),
        };
        std::iter::once(self.weight).chain(bias)
    }
}

/// `out = norm(x)`, row by row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    pub norm: Norm,
    pub x: BufferId,
    pub out: BufferId,
}

/// Computes for each part `out = x · Wᵀ + bias`: matrices that read the same activations.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    pub x: BufferId,
    pub parts: Vec<LinearPart>,
}

/// One matrix of a linear group, or some of its rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearPart {
    pub weight: MatrixId,
    /// Only these rows of the weight are multiplied; the bias and `out` have as many elements.
    pub rows: Option<MatrixRows>,
    pub bias: Option<VectorId>,
    pub out: BufferId,
}

/// Rows of a matrix that holds several linear layers (Phi-3's `qkv_proj`). The whole matrix is quantized before it is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixRows {
    pub start: usize,
    pub len: usize,
}

impl LinearPart {
    /// The rows that are multiplied.
    pub fn row_range(&self, model: &Model) -> Range<usize> {
        self.rows.map_or(0..model.matrices[self.weight.0].n, |MatrixRows { start, len }| start..start + len)
    }
}

impl Display for MatrixRows {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "rows {}..{} of a fused matrix", self.start, self.start + self.len)
    }
}

/// Appends keys and values to a cache that other plans' attention reads, as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AppendSpec {
    pub kv: KeyValue,
    pub cache: CacheId,
}

/// Keys and values of the call's rows, `[t, g · d]` each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KeyValue {
    pub k: BufferId,
    pub v: BufferId,
}

/// Attention, head by head; `h / g` query heads share a key/value head:
///
/// ```text
/// q, k = rope(norm(q)), rope(norm(k))                  where there is a qk_norm, a rope
/// cache += k, v                                        where there is an append
/// out = softmax(softcap(scale · q · Kᵀ) + bias + mask) · V
/// ```
///
/// Fields that are `None` change nothing. An executor refuses those that it has no code for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Rotated in place.
    pub q: BufferId,
    /// Appended to the cache first; `None` where another operation has filled it.
    pub append: Option<KeyValue>,
    pub cache: CacheId,
    pub out: BufferId,
    pub scale: f32,
    pub mask: Mask,
    /// Rotates the queries and the keys that are appended.
    pub rope: Option<RopeId>,
    pub bias: Option<BiasId>,
    pub window: Option<Window>,
    pub softcap: Option<Softcap>,
    pub qk_norm: Option<QkNorm>,
    pub sinks: Option<Sinks>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// A token sees itself and all before it.
    Causal,
    /// A token sees all that the cache holds once the call is appended.
    Full,
    /// The first call into an empty cache is one prefix and sees all of itself; later ones are causal.
    Prefix,
}

/// A sliding window: a token sees itself and so many positions before it, itself counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window(pub usize);

/// `cap · tanh(score / cap)` in place of each score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Softcap(pub f32);

/// Norms of queries and keys, before the rotation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm {
    pub q: Norm,
    pub k: Norm,
    pub over: QkNormOver,
}

/// The elements that one norm of queries or keys spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNormOver {
    /// Each head by itself; the weight has `d` elements.
    Head,
    /// All heads of a token at once; the weight has `h · d` or `g · d` elements.
    Projection,
}

/// A learned score of each head that joins the softmax and weighs no value, `[h]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sinks(pub VectorId);

impl Display for Window {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "a window of {}", self.0)
    }
}

impl Display for Softcap {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "scores capped at {}", self.0)
    }
}

impl Display for QkNorm {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        f.write_str(match self.over {
            QkNormOver::Head => "norms of queries and keys",
            QkNormOver::Projection => "norms over all heads of queries and keys",
        })
    }
}

impl Display for Sinks {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        f.write_str("attention sinks")
    }
}

impl AttentionSpec {
    /// Plain attention of `q` over `cache` that sees everything: what a model changes, it names.
    pub fn over(q: BufferId, cache: CacheId, out: BufferId) -> Self {
        Self {
            q,
            append: None,
            cache,
            out,
            scale: 1.0,
            mask: Mask::Full,
            rope: None,
            bias: None,
            window: None,
            softcap: None,
            qk_norm: None,
            sinks: None,
        }
    }
}

/// `out = act(gate)`, times `up` where the block is gated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActivationSpec {
    pub kind: ActivationKind,
    pub gate: BufferId,
    pub up: Option<BufferId>,
    pub out: BufferId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationKind {
    Silu,
    /// Gaussian error linear unit by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    Relu,
}

/// Mixture of experts: each token goes through the `top_k` experts with the largest scores, the lowest index where several tie.
///
/// ```text
/// out[t] = Σ weight_e · (act(x[t] · gate_eᵀ + b, x[t] · up_eᵀ + b) · down_eᵀ + b)       e in top_k(scores[t])
/// ```
///
/// Rows that chose the same expert are one call of its matrices: LLM.int8 finds outlier columns over these rows.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    pub x: BufferId,
    /// The router's logits, one for each expert.
    pub scores: BufferId,
    pub experts: Vec<Expert>,
    pub top_k: usize,
    pub weighting: ExpertWeighting,
    pub activation: GatedActivation,
    pub out: BufferId,
}

/// The matrices of one expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expert {
    pub gate: ExpertMatrix,
    pub up: ExpertMatrix,
    pub down: ExpertMatrix,
}

/// One matrix of an expert and its bias.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertMatrix {
    pub weight: MatrixId,
    pub bias: Option<VectorId>,
}

/// Weights of the chosen experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertWeighting {
    /// Softmax over the chosen scores: their weights sum to 1.
    Chosen,
    /// Softmax over the scores of all experts.
    All,
}

/// Activation of a gate and what it gates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GatedActivation {
    /// `act(gate) · up`
    Plain(ActivationKind),
    /// gpt-oss: `(up + 1) · g · σ(1.702 g)` with `g = min(gate, limit)` and `up` clamped to `±limit`.
    ClampedSwiglu { limit: f32 },
}

/// The factor of gpt-oss inside its sigmoid.
pub const CLAMPED_SWIGLU_ALPHA: f32 = 1.702;

impl Expert {
    pub fn matrices(&self) -> [ExpertMatrix; 3] {
        [self.gate, self.up, self.down]
    }
}

impl Display for ExpertsSpec {
    fn fmt(&self, f: &mut Formatter) -> std::fmt::Result {
        write!(f, "a mixture of {} experts, {} for each token", self.experts.len(), self.top_k)
    }
}

/// `out = a + b`; `out` may be `a`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AddSpec {
    pub a: BufferId,
    pub b: BufferId,
    pub out: BufferId,
}

/// `out = scale · x[last row]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LastRowSpec {
    pub x: BufferId,
    pub out: BufferId,
    pub scale: f32,
}

/// The next token: index of the largest logit of the last row, the lowest index where several tie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArgmaxSpec {
    pub logits: BufferId,
    /// `cap · tanh(logit / cap)` takes the place of each logit first, also of those that a session gives back.
    pub softcap: Option<Softcap>,
}

/// Weights that an operation reads once, however many rows the call has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightRead {
    Matrix(MatrixId),
    /// One row of the matrix for each row of the call.
    Rows(MatrixId),
    Vector(VectorId),
    /// One token reads `chosen` of `of` matrices like this one.
    OneOf {
        matrix: MatrixId,
        chosen: usize,
        of: usize,
    },
    /// [`Self::OneOf`] of biases.
    OneVectorOf {
        vector: VectorId,
        chosen: usize,
        of: usize,
    },
}

impl Op {
    /// Buffers that the operation reads.
    pub fn reads(&self) -> Vec<BufferId> {
        match self {
            Op::Embed(_) | Op::Patches(_) => vec![],
            Op::AddRows(spec) => vec![spec.x],
            Op::Features(spec) => vec![spec.x],
            Op::Norm(spec) => vec![spec.x],
            Op::Linear(spec) => vec![spec.x],
            Op::Append(spec) => vec![spec.kv.k, spec.kv.v],
            Op::Attention(spec) => {
                spec.append.iter().flat_map(|kv| [kv.k, kv.v]).chain(std::iter::once(spec.q)).collect()
            }
            Op::Activation(spec) => std::iter::once(spec.gate).chain(spec.up).collect(),
            Op::Experts(spec) => vec![spec.x, spec.scores],
            Op::Add(spec) => vec![spec.a, spec.b],
            Op::LastRow(spec) => vec![spec.x],
            Op::Argmax(spec) => vec![spec.logits],
        }
    }

    /// Buffers that the operation has read for the last time before it writes the first one: `out` may take their memory.
    pub fn reads_before_writing(&self) -> Vec<BufferId> {
        match self {
            // With a window, rows of a call may read its own keys and values where they are, as the cache holds no more.
            Op::Attention(spec) if spec.window.is_some() => vec![],
            Op::Attention(spec) => spec.append.iter().flat_map(|kv| [kv.k, kv.v]).collect(),
            Op::Embed(_) | Op::Patches(_) | Op::AddRows(_) | Op::Features(_) | Op::Norm(_) | Op::Linear(_) => vec![],
            Op::Append(_) | Op::Activation(_) | Op::Experts(_) | Op::Add(_) | Op::LastRow(_) | Op::Argmax(_) => vec![],
        }
    }

    /// Buffers that the operation writes; those that it changes in place stand in [`Self::reads`] too.
    pub fn writes(&self) -> Vec<BufferId> {
        match self {
            Op::Embed(spec) => vec![spec.out],
            Op::Patches(spec) => vec![spec.out],
            Op::AddRows(spec) => vec![spec.x],
            Op::Norm(spec) => vec![spec.out],
            Op::Linear(spec) => spec.parts.iter().map(|part| part.out).collect(),
            Op::Attention(spec) => {
                let changes_q = spec.rope.is_some() || spec.qk_norm.is_some();
                changes_q.then_some(spec.q).into_iter().chain(std::iter::once(spec.out)).collect()
            }
            Op::Activation(spec) => vec![spec.out],
            Op::Experts(spec) => vec![spec.out],
            Op::Add(spec) => vec![spec.out],
            Op::LastRow(spec) => vec![spec.out],
            Op::Features(_) | Op::Append(_) | Op::Argmax(_) => vec![],
        }
    }

    /// Weights that the operation reads. Tables of a bias by distance are laid out anew when a model is loaded and count as
    /// activations.
    pub fn weights(&self) -> Vec<WeightRead> {
        match self {
            Op::Embed(spec) => vec![WeightRead::Rows(spec.table)],
            Op::AddRows(spec) => vec![WeightRead::Rows(spec.table)],
            Op::Norm(spec) => spec.norm.vectors().map(WeightRead::Vector).collect(),
            Op::Linear(spec) => {
                let biases = spec.parts.iter().filter_map(|part| part.bias).map(WeightRead::Vector);
                biases.chain(spec.parts.iter().map(|part| WeightRead::Matrix(part.weight))).collect()
            }
            Op::Attention(spec) => {
                let norms = spec.qk_norm.iter().flat_map(|norm| norm.q.vectors().chain(norm.k.vectors()));
                norms.chain(spec.sinks.map(|Sinks(vector)| vector)).map(WeightRead::Vector).collect()
            }
            Op::Experts(spec) => spec.weights(),
            Op::Patches(_) | Op::Features(_) | Op::Append(_) | Op::Activation(_) => vec![],
            Op::Add(_) | Op::LastRow(_) | Op::Argmax(_) => vec![],
        }
    }

    /// The cache whose keys and values the operation reads.
    pub fn reads_cache(&self) -> Option<CacheId> {
        match self {
            Op::Attention(spec) => Some(spec.cache),
            Op::Embed(_) | Op::Patches(_) | Op::AddRows(_) | Op::Features(_) | Op::Norm(_) | Op::Linear(_) => None,
            Op::Append(_) | Op::Activation(_) | Op::Experts(_) | Op::Add(_) => None,
            Op::LastRow(_) | Op::Argmax(_) => None,
        }
    }

    /// Floating-point operations of matrix products, a product and a sum being two, in a call of `batch` whose rows all see
    /// what the last one sees. Element-wise work, which reads more than it computes, counts as none.
    pub fn flops(&self, model: &Model, plan: &Plan, batch: Batch) -> usize {
        match self {
            Op::Linear(spec) => {
                let elements = |part: &LinearPart| part.row_range(model).len() * model.matrices[part.weight.0].k;
                2 * plan.rows(spec.x, batch) * spec.parts.iter().map(elements).sum::<usize>()
            }
            Op::Experts(spec) => 2 * plan.rows(spec.x, batch) * spec.active_elements(model),
            // Scores and the sum of values.
            Op::Attention(spec) => {
                4 * plan.rows(spec.q, batch) * plan.buffers[spec.q.0].width * spec.keys(batch.keys())
            }
            Op::Embed(_) | Op::Patches(_) | Op::AddRows(_) | Op::Features(_) | Op::Norm(_) | Op::Append(_) => 0,
            Op::Activation(_) | Op::Add(_) | Op::LastRow(_) | Op::Argmax(_) => 0,
        }
    }
}

impl ExpertsSpec {
    /// Each matrix and bias of the experts, of which a token reads `top_k / experts`.
    fn weights(&self) -> Vec<WeightRead> {
        let (chosen, of) = (self.top_k, self.experts.len());
        let matrices = self.experts.iter().flat_map(Expert::matrices);
        let reads = matrices.flat_map(|ExpertMatrix { weight: matrix, bias }| {
            let bias = bias.map(|vector| WeightRead::OneVectorOf { vector, chosen, of });
            bias.into_iter().chain([WeightRead::OneOf { matrix, chosen, of }])
        });
        reads.collect()
    }

    /// Elements of the matrices that one token is multiplied with.
    fn active_elements(&self, model: &Model) -> usize {
        let matrices = self.experts.iter().flat_map(Expert::matrices).map(|part| &model.matrices[part.weight.0]);
        matrices.map(|matrix| matrix.n * matrix.k).sum::<usize>() * self.top_k / self.experts.len().max(1)
    }
}

impl AttentionSpec {
    /// Positions that a token sees where the cache holds `keys`.
    fn keys(&self, keys: usize) -> usize {
        self.window.map_or(keys, |Window(window)| window.min(keys))
    }
}

/// Refuses the first of `features` that is there, since `executor` has no code for it: "the CUDA step cannot run an attention
/// with a window of 128".
///
/// # Errors
/// If there is one.
pub fn refuse(executor: &str, operation: &str, features: &[Option<&dyn Display>]) -> Result<()> {
    match features.iter().flatten().next() {
        Some(feature) => bail!("{executor} cannot run {operation} with {feature}"),
        None => Ok(()),
    }
}

/// A feature for [`refuse`].
pub fn feature<T: Display>(feature: &Option<T>) -> Option<&dyn Display> {
    feature.as_ref().map(|feature| feature as &dyn Display)
}
