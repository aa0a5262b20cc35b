//! Fusion: a decoder's plan for one token, as the few jobs that a device runs at each step, one behind the other.
//!
//! A norm goes into the matrices that read it, activation and residual into those that feed them, rotation and cache write
//! into the attention behind them. Matrices that read the same activations become one job, two whose products meet in
//! one residual become another. Values do not change: every matrix keeps its own blocks, scales and rounding.

use candle_core::{Result, bail};

use super::{ActivationKind, BiasId, BufferId, CacheId, LinearPart, MatrixId, NormKind, Op, Plan, Rotate, VectorId};

/// Matrices that one job may hold.
pub const MAX_PARTS: usize = 4;

/// What a job reads.
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

/// What becomes of the products of a job.
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

/// One job.
#[derive(Debug, Clone, PartialEq)]
pub enum Job {
    /// `out` = the token's embedding. Not a job of its own where the one before it knows the token.
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

/// The jobs of one decode step. `format_of` names what holds a matrix: only matrices of one format share a job.
/// Fails where the plan holds an operation that a decoder does not have, or uses one in a way that no job can.
pub fn fuse(plan: &Plan, format_of: &dyn Fn(MatrixId) -> &'static str) -> Result<Vec<Job>> {
    let mut fusion = Fusion { jobs: Vec::new(), views: vec![None; plan.buffers.len()], append: None, format_of };
    for op in &plan.ops {
        fusion.take(op)?;
    }
    let mut jobs = fusion.jobs;
    join_residuals(&mut jobs, format_of);
    split_formats(&mut jobs, format_of);
    Ok(jobs)
}

struct Fusion<'a> {
    jobs: Vec<Job>,
    /// Buffers that no job writes: what reads them reads these inputs.
    views: Vec<Option<Input>>,
    append: Option<(CacheId, Append)>,
    format_of: &'a dyn Fn(MatrixId) -> &'static str,
}

impl Fusion<'_> {
    fn take(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Embed { table, scale, out, .. } => {
                self.jobs.push(Job::Embed { table: *table, scale: *scale, out: *out });
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
                self.jobs.push(Job::Matvec { inputs, parts, join: Join::Apart });
            }
            Op::Append { k, v, cache, rotate } => {
                self.append = Some((*cache, Append { k: *k, v: *v, rotate: *rotate }));
            }
            Op::Attention { q, cache, out, scale, bias, .. } => {
                let append = self.append.take_if(|(of, _)| of == cache).map(|(_, append)| append);
                let (q, cache, out, scale, bias) = (*q, *cache, *out, *scale, *bias);
                self.jobs.push(Job::Attention { q, append, cache, out, scale, bias });
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

    /// The job that writes `buffer` as one of its parts.
    fn producer(&mut self, buffer: BufferId) -> Option<(&mut Vec<Part>, &mut Join)> {
        self.jobs.iter_mut().rev().find_map(|job| match job {
            Job::Matvec { parts, join, .. } if parts.iter().any(|part| part.out == buffer) => Some((parts, join)),
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
            _ => bail!("a gate and what it gates come from different jobs"),
        }
        Ok(())
    }

    /// The summand's job moves to the end, behind all that still reads `x` as it was.
    fn add(&mut self, x: BufferId, summand: BufferId) -> Result<()> {
        share_inputs(&mut self.jobs, self.format_of);
        let feeds = |job: &Job| matches!(job, Job::Matvec { parts, join: Join::Apart, .. } if parts.len() == 1 && parts[0].out == summand);
        let Some(at) = self.jobs.iter().rposition(feeds) else { bail!("a residual is fed by no single matrix") };
        let mut job = self.jobs.remove(at);
        if let Job::Matvec { join, .. } = &mut job {
            *join = Join::Residual { x };
        }
        self.jobs.push(job);
        Ok(())
    }
}

/// Brings a job forward into an earlier one that reads the same activations, where nothing changed these in between.
fn share_inputs(jobs: &mut Vec<Job>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let mut at = 1;
    while at < jobs.len() {
        let earlier = (0..at).rev().find(|&earlier| {
            let between = &jobs[earlier..at];
            let (
                Job::Matvec { inputs: a, parts: own, join: Join::Apart },
                Job::Matvec { inputs: b, parts: new, join: Join::Apart },
            ) = (&jobs[earlier], &jobs[at])
            else {
                return false;
            };
            let same_format = own.iter().chain(new).all(|part| format_of(part.weight) == format_of(own[0].weight));
            let unchanged = between.iter().all(|job| !writes(job, b[0].x));
            a == b && own.len() + new.len() <= MAX_PARTS && same_format && unchanged
        });
        match earlier {
            Some(earlier) => {
                let Job::Matvec { parts: new, .. } = jobs.remove(at) else { unreachable!("only matrices match") };
                if let Job::Matvec { parts, .. } = &mut jobs[earlier] {
                    parts.extend(new);
                }
            }
            None => at += 1,
        }
    }
}

fn writes(job: &Job, buffer: BufferId) -> bool {
    match job {
        Job::Embed { out, .. } | Job::Attention { out, .. } => *out == buffer,
        Job::Matvec { parts, join, .. } => match join {
            Join::Apart => parts.iter().any(|part| part.out == buffer),
            Join::Gated { out, .. } => *out == buffer,
            Join::Residual { x } => *x == buffer,
            Join::Argmax => false,
        },
    }
}

/// Two jobs in a row that add to the same residual become one.
fn join_residuals(jobs: &mut Vec<Job>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let mut at = 1;
    while at < jobs.len() {
        let joinable = match (&jobs[at - 1], &jobs[at]) {
            (
                Job::Matvec { inputs: a, parts: first, join: Join::Residual { x } },
                Job::Matvec { inputs: b, parts: second, join: Join::Residual { x: same } },
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
        let Job::Matvec { inputs: more, parts: new, .. } = jobs.remove(at) else { unreachable!("only matrices match") };
        if let Job::Matvec { inputs, parts, .. } = &mut jobs[at - 1] {
            inputs.extend(more);
            parts.extend(new);
        }
    }
}

/// Parts of different formats leave for jobs of their own. A gate keeps its partner: where they differ, the caller
/// finds both in one job and refuses.
fn split_formats(jobs: &mut Vec<Job>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let split = |job: Job| -> Vec<Job> {
        let Job::Matvec { inputs, parts, join: Join::Apart } = job else { return vec![job] };
        let mut by_format: Vec<Vec<Part>> = Vec::new();
        for part in parts {
            match by_format.iter_mut().find(|group| format_of(group[0].weight) == format_of(part.weight)) {
                Some(group) => group.push(part),
                None => by_format.push(vec![part]),
            }
        }
        let job = |parts| Job::Matvec { inputs: inputs.clone(), parts, join: Join::Apart };
        by_format.into_iter().map(job).collect()
    };
    *jobs = std::mem::take(jobs).into_iter().flat_map(split).collect();
}
