//! Fusion: a decoder's plan for one token, as the few launches that a device replays at each step.
//!
//! A norm goes into the matrices that read it, activation and residual into those that feed them, rotation and cache write
//! into the attention behind them. Matrices that read the same activations become one launch, two whose products meet in
//! one residual become another. Values do not change: every matrix keeps its own blocks, scales and rounding.

use candle_core::{Result, bail};

use super::{ActivationKind, BiasId, BufferId, CacheId, LinearPart, MatrixId, NormKind, Op, Plan, Rotate, VectorId};

/// Matrices that one launch may hold.
pub const MAX_PARTS: usize = 4;

/// What a launch reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Input {
    pub x: BufferId,
    pub norm: Option<InputNorm>,
    /// Of the normed activations.
    pub scale: f32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputNorm {
    pub kind: NormKind,
    pub weight: VectorId,
    pub epsilon: f32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    pub weight: MatrixId,
    pub bias: Option<VectorId>,
    pub out: BufferId,
    pub activation: Option<ActivationKind>,
}

/// What becomes of the products of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Join {
    /// Each part writes its own buffer, from the only input.
    Apart,
    /// `out = act(part 0) · part 1`, from the only input.
    Gated { kind: ActivationKind, out: BufferId },
    /// `x += Σ part i (input i)`
    Residual { x: BufferId },
    /// The only part's largest output is the next token.
    Argmax,
}

/// One launch.
#[derive(Debug, Clone, PartialEq)]
pub enum Launch {
    /// `out` = the token's embedding. Not a launch of its own where the one before it knows the token.
    Embed {
        table: MatrixId,
        scale: f32,
        out: BufferId,
    },
    Matvec {
        inputs: Vec<Input>,
        parts: Vec<Part>,
        join: Join,
    },
    Attention {
        q: BufferId,
        append: Option<Append>,
        cache: CacheId,
        out: BufferId,
        scale: f32,
        bias: Option<BiasId>,
    },
}

/// What an attention puts into its cache first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Append {
    pub k: BufferId,
    pub v: BufferId,
    pub rotate: Option<Rotate>,
}

/// The launches of one decode step. `format_of` names what holds a matrix: only matrices of one format share a launch.
/// Fails where the plan holds an operation that a decoder does not have, or uses one in a way that no launch can.
pub fn fuse(plan: &Plan, format_of: &dyn Fn(MatrixId) -> &'static str) -> Result<Vec<Launch>> {
    let mut fusion = Fusion { launches: Vec::new(), views: vec![None; plan.buffers.len()], append: None, format_of };
    for op in &plan.ops {
        fusion.take(op)?;
    }
    let mut launches = fusion.launches;
    join_residuals(&mut launches, format_of);
    split_formats(&mut launches, format_of);
    Ok(launches)
}

struct Fusion<'a> {
    launches: Vec<Launch>,
    /// Buffers that no launch writes: what reads them reads these inputs.
    views: Vec<Option<Input>>,
    append: Option<(CacheId, Append)>,
    format_of: &'a dyn Fn(MatrixId) -> &'static str,
}

impl Fusion<'_> {
    fn take(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Embed { table, scale, out, .. } => {
                self.launches.push(Launch::Embed { table: *table, scale: *scale, out: *out });
            }
            Op::Norm { kind, weight, epsilon, x, out } => {
                let norm = Some(InputNorm { kind: *kind, weight: *weight, epsilon: *epsilon });
                self.views[out.0] = Some(Input { x: *x, norm, scale: 1.0 });
            }
            Op::LastRow { x, out, scale } => {
                let input = self.input(*x);
                self.views[out.0] = Some(Input { scale: input.scale * scale, ..input });
            }
            Op::Linear { x, parts } => {
                let part =
                    |part: &LinearPart| Part { weight: part.weight, bias: part.bias, out: part.out, activation: None };
                let (inputs, parts) = (vec![self.input(*x)], parts.iter().map(part).collect());
                self.launches.push(Launch::Matvec { inputs, parts, join: Join::Apart });
            }
            Op::Append { k, v, cache, rotate } => {
                self.append = Some((*cache, Append { k: *k, v: *v, rotate: *rotate }));
            }
            Op::Attention { q, cache, out, scale, bias, .. } => {
                let append = self.append.take_if(|(of, _)| of == cache).map(|(_, append)| append);
                let (q, cache, out, scale, bias) = (*q, *cache, *out, *scale, *bias);
                self.launches.push(Launch::Attention { q, append, cache, out, scale, bias });
            }
            Op::Activate { kind, gate, up, out } => self.activate(*kind, *gate, *up, *out)?,
            Op::Add { a, b, out } if a == out => self.add(*a, *b)?,
            Op::Argmax { logits } => match self.producer(*logits) {
                Some((_, join @ Join::Apart)) => *join = Join::Argmax,
                _ => bail!("the logits come from no matrix"),
            },
            Op::Add { .. } | Op::Patches { .. } | Op::AddRows { .. } | Op::Features { .. } => {
                bail!("a decode step cannot hold {op:?}")
            }
        }
        Ok(())
    }

    fn input(&self, x: BufferId) -> Input {
        self.views[x.0].unwrap_or(Input { x, norm: None, scale: 1.0 })
    }

    /// The launch that writes `buffer` as one of its parts.
    fn producer(&mut self, buffer: BufferId) -> Option<(&mut Vec<Part>, &mut Join)> {
        self.launches.iter_mut().rev().find_map(|launch| match launch {
            Launch::Matvec { parts, join, .. } if parts.iter().any(|part| part.out == buffer) => Some((parts, join)),
            _ => None,
        })
    }

    fn activate(&mut self, kind: ActivationKind, gate: BufferId, up: Option<BufferId>, out: BufferId) -> Result<()> {
        let Some((parts, join @ Join::Apart)) = self.producer(gate) else { bail!("an activation reads no matrix") };
        match (up, &mut parts[..]) {
            (Some(up), [first, second]) if first.out == gate && second.out == up => *join = Join::Gated { kind, out },
            (None, parts) => {
                let part = parts.iter_mut().find(|part| part.out == gate);
                part.into_iter().for_each(|part| (part.activation, part.out) = (Some(kind), out));
            }
            _ => bail!("a gate and what it gates come from different launches"),
        }
        Ok(())
    }

    /// The summand's launch moves to the end, behind all that still reads `x` as it was.
    fn add(&mut self, x: BufferId, summand: BufferId) -> Result<()> {
        share_inputs(&mut self.launches, self.format_of);
        let feeds = |launch: &Launch| matches!(launch, Launch::Matvec { parts, join: Join::Apart, .. } if parts.len() == 1 && parts[0].out == summand);
        let Some(at) = self.launches.iter().rposition(feeds) else { bail!("a residual is fed by no single matrix") };
        let mut launch = self.launches.remove(at);
        if let Launch::Matvec { join, .. } = &mut launch {
            *join = Join::Residual { x };
        }
        self.launches.push(launch);
        Ok(())
    }
}

/// Brings a launch forward into an earlier one that reads the same activations, where nothing changed these in between.
fn share_inputs(launches: &mut Vec<Launch>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let mut at = 1;
    while at < launches.len() {
        let earlier = (0..at).rev().find(|&earlier| {
            let between = &launches[earlier..at];
            let (
                Launch::Matvec { inputs: a, parts: own, join: Join::Apart },
                Launch::Matvec { inputs: b, parts: new, join: Join::Apart },
            ) = (&launches[earlier], &launches[at])
            else {
                return false;
            };
            let same_format = own.iter().chain(new).all(|part| format_of(part.weight) == format_of(own[0].weight));
            let unchanged = between.iter().all(|launch| !writes(launch, b[0].x));
            a == b && own.len() + new.len() <= MAX_PARTS && same_format && unchanged
        });
        match earlier {
            Some(earlier) => {
                let Launch::Matvec { parts: new, .. } = launches.remove(at) else {
                    unreachable!("only matrices match")
                };
                if let Launch::Matvec { parts, .. } = &mut launches[earlier] {
                    parts.extend(new);
                }
            }
            None => at += 1,
        }
    }
}

fn writes(launch: &Launch, buffer: BufferId) -> bool {
    match launch {
        Launch::Embed { out, .. } | Launch::Attention { out, .. } => *out == buffer,
        Launch::Matvec { parts, join, .. } => match join {
            Join::Apart => parts.iter().any(|part| part.out == buffer),
            Join::Gated { out, .. } => *out == buffer,
            Join::Residual { x } => *x == buffer,
            Join::Argmax => false,
        },
    }
}

/// Two launches in a row that add to the same residual become one.
fn join_residuals(launches: &mut Vec<Launch>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let mut at = 1;
    while at < launches.len() {
        let joinable = match (&launches[at - 1], &launches[at]) {
            (
                Launch::Matvec { inputs: a, parts: first, join: Join::Residual { x } },
                Launch::Matvec { inputs: b, parts: second, join: Join::Residual { x: same } },
            ) => {
                let same_format = format_of(first[0].weight) == format_of(second[0].weight);
                x == same && first.len() == 1 && same_format && a[0].x != *x && b[0].x != *x
            }
            _ => false,
        };
        if !joinable {
            at += 1;
            continue;
        }
        let Launch::Matvec { inputs: more, parts: new, .. } = launches.remove(at) else {
            unreachable!("only matrices match")
        };
        if let Launch::Matvec { inputs, parts, .. } = &mut launches[at - 1] {
            inputs.extend(more);
            parts.extend(new);
        }
    }
}

/// Parts of different formats leave for launches of their own. A gate keeps its partner: where they differ, the caller
/// finds both in one launch and refuses.
fn split_formats(launches: &mut Vec<Launch>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let split = |launch: Launch| -> Vec<Launch> {
        let Launch::Matvec { inputs, parts, join: Join::Apart } = launch else { return vec![launch] };
        let mut by_format: Vec<Vec<Part>> = Vec::new();
        for part in parts {
            match by_format.iter_mut().find(|group| format_of(group[0].weight) == format_of(part.weight)) {
                Some(group) => group.push(part),
                None => by_format.push(vec![part]),
            }
        }
        let launch = |parts| Launch::Matvec { inputs: inputs.clone(), parts, join: Join::Apart };
        by_format.into_iter().map(launch).collect()
    };
    *launches = std::mem::take(launches).into_iter().flat_map(split).collect();
}
