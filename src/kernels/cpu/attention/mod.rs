//! Attention in one pass: `softmax(scale · q · Kᵀ + bias) · V` with the softmax taken as the positions go by, so that no
//! score matrix is ever held.
//!
//! A *query* is one head of one token. Queries that share a key/value head are given together, so that keys and values are
//! read once for all of them: the `group` query heads of a token (decode), times several tokens (prefill). Positions can
//! be split over threads: each computes a part with [`attend_part`], and [`merge`] and [`finish`] put the parts together.

mod block;
mod product;
mod tile;

use super::lanes::on;
use crate::kernels::isa::Isa;
use tile::{Combine, TiledAttention};

/// Keys and values of one head and how scores are scaled.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// `[t, d]`
    pub keys: &'a [f32],
    /// `[t, d]`
    pub values: &'a [f32],
    /// Elements of a head, ≥ 1.
    pub d: usize,
    pub scale: f32,
    /// `cap · tanh(score / cap)` takes the place of each scaled score.
    pub softcap: Option<f32>,
    /// The most positions that a query sees: the last ones. `None` is all.
    pub window: Option<usize>,
    /// A score of each query head of the group, which joins the softmax and weighs no value.
    pub sinks: Option<&'a [f32]>,
}

/// The softmax of one query so far: `out` beside it is `Σ e^(score − max) · value`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Partial {
    /// Greatest score.
    pub max: f32,
    /// `Σ e^(score − max)`
    pub sum: f32,
}

impl Partial {
    /// The state over no positions.
    pub const EMPTY: Partial = Partial { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Queries that read a tile of positions together. More are done in turns.
pub const QUERIES: usize = 64;

/// Attention of the `group` query heads of one token over all `t` positions.
///
/// `q` and `out` are `[group, d]`, `keys` and `values` `[t, d]`, `bias` `[group, t]`, added to the scaled scores. A query
/// whose every score is −∞, or that has no position, gives zeros; a NaN in any score gives NaN. `scratch` keeps its memory
/// from call to call.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    isa: Isa,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    d: usize,
    scale: f32,
    bias: Option<&[f32]>,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    attend_within(
        isa,
        q,
        &Context { keys, values, d, scale, softcap: None, window: None, sinks: None },
        bias,
        out,
        scratch,
    );
}

/// [`attend`] with everything that a context can say.
pub fn attend_within(
    isa: Isa,
    q: &[f32],
    context: &Context,
    bias: Option<&[f32]>,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let d = context.d;
    let (_, t) = context.shape(q, out);
    assert!(bias.is_none_or(|bias| bias.len() == q.len() / d * t), "bias is [group, t]");
    let turns = q.chunks(QUERIES * d).zip(out.chunks_mut(QUERIES * d)).enumerate();
    for (turn, (q, out)) in turns {
        let n = q.len() / d;
        let bias = bias.map(|bias| &bias[turn * QUERIES * t..][..n * t]);
        let mut partials = [Partial::EMPTY; QUERIES];
        attend_part(isa, q, context, bias, out, &mut partials[..n], scratch);
        add_sinks(&mut partials[..n], context.sinks, turn * QUERIES);
        finish(isa, out, &partials[..n], d);
    }
}

/// [`attend`] over a part of the positions and before the division by the sum: `out` and `partials` (one for each
/// query) are overwritten with what [`merge`] and [`finish`] take.
pub fn attend_part(
    isa: Isa,
    q: &[f32],
    context: &Context,
    bias: Option<&[f32]>,
    out: &mut [f32],
    partials: &mut [Partial],
    scratch: &mut Vec<f32>,
) {
    let (n, t) = context.shape(q, out);
    assert_eq!(n, partials.len());
    assert!(bias.is_none_or(|bias| bias.len() == n * t), "bias is [queries, t]");
    on(isa, TiledAttention { q, context: *context, first: t, group: n.max(1), bias, out, partials, scratch });
}

/// Causal attention of several tokens at once: `q` and `out` are `[rows, group, d]`, and row `r` sees the first
/// `first + r` positions of `context`, which holds at least those of the last row.
pub fn attend_rows(
    isa: Isa,
    q: &[f32],
    group: usize,
    context: &Context,
    first: usize,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let d = context.d;
    let (n, t) = context.shape(q, out);
    assert!(group >= 1 && n.is_multiple_of(group), "{n} queries in groups of {group}");
    assert!(n == 0 || first + n / group - 1 <= t, "{} rows from {first} of {t} positions", n / group);
    // Whole rows in a turn, so that a turn's first query starts a row.
    let rows = (QUERIES / group).max(1);
    let turns = q.chunks(rows * group * d).zip(out.chunks_mut(rows * group * d)).enumerate();
    for (turn, (q, out)) in turns {
        attend_turn(isa, q, group, context, first + turn * rows, out, scratch);
    }
}

/// One turn of [`attend_rows`]: whole rows, which fit the stack buffer unless one row alone is larger.
fn attend_turn(
    isa: Isa,
    q: &[f32],
    group: usize,
    context: &Context,
    first: usize,
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let d = context.d;
    let n = q.len() / d;
    if n > QUERIES {
        // One row of a very wide group.
        let seen = first * d;
        let context = Context { keys: &context.keys[..seen], values: &context.values[..seen], ..*context };
        return attend_within(isa, q, &context, None, out, scratch);
    }
    let mut partials = [Partial::EMPTY; QUERIES];
    let partials = &mut partials[..n];
    on(isa, TiledAttention { q, context: *context, first, group, bias: None, out: &mut *out, partials, scratch });
    add_sinks(partials, context.sinks, 0);
    finish(isa, out, partials, d);
}

/// Adds the part `other` of further positions to `out` and `partials`, all as [`attend_part`] left them.
pub fn merge(
    isa: Isa,
    out: &mut [f32],
    partials: &mut [Partial],
    other_out: &[f32],
    other_partials: &[Partial],
    d: usize,
) {
    assert!(out.len() == partials.len() * d && out.len() == other_out.len());
    assert_eq!(partials.len(), other_partials.len());
    let rows = out.chunks_exact_mut(d).zip(other_out.chunks_exact(d));
    for ((out, other_out), (partial, other)) in rows.zip(partials.iter_mut().zip(other_partials)) {
        let max = if other.max > partial.max { other.max } else { partial.max };
        let base = finite_base(max);
        let (own, theirs) = ((partial.max - base).exp(), (other.max - base).exp());
        on(isa, Combine { out, factor: own, other: Some((other_out, theirs)) });
        *partial = Partial { max, sum: partial.sum * own + other.sum * theirs };
    }
}

/// Adds the sinks' share to the sums. `first` is the number of the first query; the heads of a group come in turn.
pub fn add_sinks(partials: &mut [Partial], sinks: Option<&[f32]>, first: usize) {
    let Some(sinks) = sinks else { return };
    for (partial, sink) in partials.iter_mut().zip(sinks.iter().cycle().skip(first % sinks.len().max(1))) {
        // Infinite where the sink takes all.
        partial.sum += (sink - partial.max).exp();
    }
}

/// Divides by the sums, which makes `out` the attention's result.
pub fn finish(isa: Isa, out: &mut [f32], partials: &[Partial], d: usize) {
    assert_eq!(out.len(), partials.len() * d);
    for (out, partial) in out.chunks_exact_mut(d).zip(partials) {
        if partial.sum == 0.0 {
            out.fill(0.0);
        } else {
            on(isa, Combine { out, factor: 1.0 / partial.sum, other: None });
        }
    }
}

/// The value to subtract from scores: their maximum, or 0 where all are −∞, as −∞ − (−∞) is NaN.
fn finite_base(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

impl Context<'_> {
    /// Number of queries in `q` and of positions, after checking that everything fits together.
    fn shape(&self, q: &[f32], out: &[f32]) -> (usize, usize) {
        let d = self.d;
        assert!(d >= 1 && self.keys.len().is_multiple_of(d), "keys are [t, {d}], not {} values", self.keys.len());
        assert_eq!(self.keys.len(), self.values.len());
        assert!(q.len().is_multiple_of(d) && q.len() == out.len(), "q {} and out {} of d {d}", q.len(), out.len());
        (q.len() / d, self.keys.len() / d)
    }
}

#[cfg(test)]
mod tests;
