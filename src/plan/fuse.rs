//! Fusion: turns a decoder's plan for one token into the few operations that a device runs at each step, one behind the
//! other.
//!
//! A norm goes into the matrices that read it, activation and residual into those that feed them. Matrices that read the same
//! activations become one operation, two whose products meet in one residual become another. A norm behind a product is added
//! to the residual by an operation of its own. Values do not change: every matrix keeps its own blocks, scales and rounding.

use candle_core::{Result, bail};

use super::{
    ActivationKind, ActivationSpec, AddSpec, ArgmaxSpec, AttentionSpec, BufferId, EmbedSpec, ExpertsSpec, LastRowSpec,
    LinearPart, LinearSpec, MatrixId, MatrixRows, Norm, NormSpec, Op, Plan, Softcap, VectorId,
};

/// Matrices that one operation may hold.
pub const MAX_PARTS: usize = 4;

/// One operation of a step.
#[derive(Debug, Clone, PartialEq)]
pub enum FusedOp {
    /// The token's embedding. It needs no work of its own where the operation before it finds the token.
    Embed(EmbedSpec),
    Matvec(MatvecSpec),
    Attention(AttentionSpec),
    NormAdd(NormAddSpec),
    Experts(FusedExperts),
}

/// `residual += experts(input)`
#[derive(Debug, Clone, PartialEq)]
pub struct FusedExperts {
    pub input: FusedInput,
    /// Its scores are fp32, as [`Join::Floats`] writes them; its result is added to the residual alone.
    pub spec: ExpertsSpec,
    /// `None` until the plan says what the result is added to.
    pub residual: Option<BufferId>,
}

/// `x += norm(y)`: a residual whose summand is normed, which takes all of the product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormAddSpec {
    pub x: BufferId,
    /// fp32, as [`Join::Floats`] writes it.
    pub y: BufferId,
    pub norm: Norm,
}

/// Matrices that are multiplied with one row of activations.
#[derive(Debug, Clone, PartialEq)]
pub struct MatvecSpec {
    pub inputs: Vec<FusedInput>,
    pub parts: Vec<FusedPart>,
    pub join: Join,
}

/// Activations that an operation reads: `scale · norm(x)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FusedInput {
    pub x: BufferId,
    pub norm: Option<Norm>,
    pub scale: f32,
}

/// One matrix of an operation, or some of its rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FusedPart {
    pub weight: MatrixId,
    pub rows: Option<MatrixRows>,
    pub bias: Option<VectorId>,
    pub out: BufferId,
    pub activation: Option<ActivationKind>,
}

/// The step from an operation's products to its results.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Join {
    /// Each part writes its own buffer, from the only input.
    Apart,
    /// The same in fp32, for a norm.
    Floats,
    /// `out = act(part 0) · part 1`, from the only input.
    Gated { kind: ActivationKind, out: BufferId },
    /// `x += Σ part i (input i)`
    Residual { x: BufferId },
    /// The only part's largest output is the next token; `softcap` takes the place of each output first.
    Argmax { softcap: Option<Softcap> },
}

impl FusedOp {
    /// Buffers that the operation reads, a residual that it adds to included.
    pub fn reads(&self) -> Vec<BufferId> {
        match self {
            FusedOp::Embed(_) => vec![],
            FusedOp::Matvec(spec) => spec.inputs.iter().map(|input| input.x).chain(spec.residual()).collect(),
            FusedOp::Attention(spec) => Op::Attention(*spec).reads(),
            FusedOp::NormAdd(spec) => vec![spec.y, spec.x],
            FusedOp::Experts(FusedExperts { input, spec, residual }) => {
                [input.x, spec.scores].into_iter().chain(*residual).collect()
            }
        }
    }

    /// Buffers that the operation writes.
    pub fn writes(&self) -> Vec<BufferId> {
        match self {
            FusedOp::Embed(spec) => vec![spec.out],
            FusedOp::Matvec(spec) => spec.writes(),
            // The rotated queries stay inside.
            FusedOp::Attention(spec) => vec![spec.out],
            FusedOp::NormAdd(spec) => vec![spec.x],
            FusedOp::Experts(FusedExperts { residual, .. }) => residual.iter().copied().collect(),
        }
    }
}

impl MatvecSpec {
    /// Buffers that the products go to.
    pub fn writes(&self) -> Vec<BufferId> {
        match self.join {
            Join::Apart | Join::Floats => self.parts.iter().map(|part| part.out).collect(),
            Join::Gated { kind: _, out } => vec![out],
            Join::Residual { x } => vec![x],
            Join::Argmax { softcap: _ } => vec![],
        }
    }

    fn residual(&self) -> Option<BufferId> {
        match self.join {
            Join::Residual { x } => Some(x),
            Join::Apart | Join::Floats | Join::Gated { .. } | Join::Argmax { .. } => None,
        }
    }
}

/// The operations of one decode step. `format_of` names what holds a matrix: only matrices of one format share an operation.
///
/// # Errors
/// If the plan holds an operation that a decoder does not have, or uses one in a way that cannot be fused.
pub fn fuse(plan: &Plan, format_of: &dyn Fn(MatrixId) -> &'static str) -> Result<Vec<FusedOp>> {
    let mut fusion = Fusion { fused: Vec::new(), views: vec![None; plan.buffers.len()], format_of };
    for op in &plan.ops {
        fusion.take(op)?;
    }
    let mut fused = fusion.fused;
    join_residuals(&mut fused, format_of);
    split_formats(&mut fused, format_of);
    Ok(fused)
}

struct Fusion<'a> {
    fused: Vec<FusedOp>,
    /// Buffers that no operation writes: their readers read these inputs.
    views: Vec<Option<FusedInput>>,
    format_of: &'a dyn Fn(MatrixId) -> &'static str,
}

impl Fusion<'_> {
    fn take(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Embed(spec) => self.fused.push(FusedOp::Embed(*spec)),
            Op::Norm(NormSpec { norm, x, out }) => {
                self.views[out.0] = Some(FusedInput { x: *x, norm: Some(*norm), scale: 1.0 });
            }
            Op::LastRow(LastRowSpec { x, out, scale }) => {
                let input = self.input(*x);
                self.views[out.0] = Some(FusedInput { scale: input.scale * scale, ..input });
            }
            Op::Linear(LinearSpec { x, parts }) => {
                let part = |&LinearPart { weight, rows, bias, out }: &LinearPart| FusedPart {
                    weight,
                    rows,
                    bias,
                    out,
                    activation: None,
                };
                let (inputs, parts) = (vec![self.input(*x)], parts.iter().map(part).collect());
                self.fused.push(FusedOp::Matvec(MatvecSpec { inputs, parts, join: Join::Apart }));
            }
            Op::Attention(spec) => self.fused.push(FusedOp::Attention(*spec)),
            Op::Activation(spec) => self.activate(*spec)?,
            Op::Add(AddSpec { a, b, out }) if a == out => self.add(*a, *b)?,
            Op::Argmax(ArgmaxSpec { logits, softcap }) => match self.producer(*logits) {
                Some(spec) if is_plain_product(spec) => spec.join = Join::Argmax { softcap: *softcap },
                Some(_) | None => bail!("the logits come from no single matrix"),
            },
            Op::Experts(spec) => self.experts(spec)?,
            Op::Add(_) | Op::Append(_) | Op::Patches(_) | Op::AddRows(_) | Op::Features(_) => {
                bail!("a decode step cannot hold {op:?}")
            }
        }
        Ok(())
    }

    fn input(&self, x: BufferId) -> FusedInput {
        self.views[x.0].unwrap_or(FusedInput { x, norm: None, scale: 1.0 })
    }

    /// The matrices of which one writes `buffer`.
    fn producer(&mut self, buffer: BufferId) -> Option<&mut MatvecSpec> {
        let matvecs = self.fused.iter_mut().rev().filter_map(matvec_mut);
        matvecs.into_iter().find(|spec| spec.parts.iter().any(|part| part.out == buffer))
    }

    fn activate(&mut self, ActivationSpec { kind, gate, up, out }: ActivationSpec) -> Result<()> {
        let Some(MatvecSpec { inputs: _, parts, join: join @ Join::Apart }) = self.producer(gate) else {
            bail!("an activation reads no matrix")
        };
        match (up, &mut parts[..]) {
            (Some(up), [first, second]) if first.out == gate && second.out == up => *join = Join::Gated { kind, out },
            (None, parts) => {
                let part = parts.iter_mut().find(|part| part.out == gate);
                part.into_iter().for_each(|part| (part.activation, part.out) = (Some(kind), out));
            }
            _ => bail!("a gate and what it gates come from different operations"),
        }
        Ok(())
    }

    /// The summand's operation moves to the end, behind all that still read `x` as it was.
    fn add(&mut self, x: BufferId, summand: BufferId) -> Result<()> {
        share_inputs(&mut self.fused, self.format_of);
        if let Some(FusedInput { x: y, norm: Some(norm), scale: _ }) = self.views[summand.0] {
            return self.add_norm(NormAddSpec { x, y, norm });
        }
        if let Some(FusedOp::Experts(experts)) = self.fused.last_mut()
            && experts.spec.out == summand
        {
            experts.residual = Some(x);
            return Ok(());
        }
        let feeds = |spec: &MatvecSpec| is_plain_product(spec) && spec.parts[0].out == summand;
        let feeds = |op: &FusedOp| matvec(op).is_some_and(feeds);
        let Some(at) = self.fused.iter().rposition(feeds) else { bail!("a residual is fed by no single matrix") };
        let mut op = self.fused.remove(at);
        if let Some(spec) = matvec_mut(&mut op) {
            spec.join = Join::Residual { x };
        }
        self.fused.push(op);
        Ok(())
    }

    fn experts(&mut self, spec: &ExpertsSpec) -> Result<()> {
        match self.producer(spec.scores) {
            Some(product) if is_plain_product(product) => product.join = Join::Floats,
            Some(_) | None => bail!("scores of experts come from no single matrix"),
        }
        let input = self.input(spec.x);
        self.fused.push(FusedOp::Experts(FusedExperts { input, spec: spec.clone(), residual: None }));
        Ok(())
    }

    fn add_norm(&mut self, spec: NormAddSpec) -> Result<()> {
        match self.producer(spec.y) {
            Some(product) if is_plain_product(product) => product.join = Join::Floats,
            Some(_) | None => bail!("a residual is fed by the norm of no single matrix"),
        }
        self.fused.push(FusedOp::NormAdd(spec));
        Ok(())
    }
}

/// One matrix whose product nothing has been made of yet.
fn is_plain_product(spec: &MatvecSpec) -> bool {
    spec.join == Join::Apart && matches!(&spec.parts[..], [part] if part.activation.is_none())
}

fn matvec(op: &FusedOp) -> Option<&MatvecSpec> {
    if let FusedOp::Matvec(spec) = op { Some(spec) } else { None }
}

fn matvec_mut(op: &mut FusedOp) -> Option<&mut MatvecSpec> {
    if let FusedOp::Matvec(spec) = op { Some(spec) } else { None }
}

/// Brings matrices forward into an earlier operation that reads the same activations, where nothing changed these in between.
fn share_inputs(fused: &mut Vec<FusedOp>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let mut at = 1;
    while at < fused.len() {
        let earlier = (0..at).rev().find(|&earlier| {
            let between = &fused[earlier..at];
            let (Some(own), Some(new)) = (matvec(&fused[earlier]), matvec(&fused[at])) else { return false };
            let format = format_of(own.parts[0].weight);
            let same_format = own.parts.iter().chain(&new.parts).all(|part| format_of(part.weight) == format);
            let unchanged = between.iter().all(|op| !op.writes().contains(&new.inputs[0].x));
            let are_apart = own.join == Join::Apart && new.join == Join::Apart;
            let fits = own.parts.len() + new.parts.len() <= MAX_PARTS;
            are_apart && own.inputs == new.inputs && fits && same_format && unchanged
        });
        match earlier {
            Some(earlier) => merge(fused, earlier, at),
            None => at += 1,
        }
    }
}

/// Moves the parts of the matrices at `from` to those at `to`.
fn merge(fused: &mut Vec<FusedOp>, to: usize, from: usize) {
    let removed = fused.remove(from);
    if let (Some(spec), FusedOp::Matvec(new)) = (matvec_mut(&mut fused[to]), removed) {
        if matches!(new.join, Join::Residual { .. }) {
            spec.inputs.extend(new.inputs);
        }
        spec.parts.extend(new.parts);
    }
}

/// Two operations in a row that add to the same residual become one.
fn join_residuals(fused: &mut Vec<FusedOp>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let mut at = 1;
    while at < fused.len() {
        let joinable = match (matvec(&fused[at - 1]), matvec(&fused[at])) {
            (Some(first), Some(second)) => {
                let same_format = format_of(first.parts[0].weight) == format_of(second.parts[0].weight);
                let reads_another = |x| first.inputs[0].x != x && second.inputs[0].x != x;
                let same_residual = first.join == second.join && first.residual().is_some_and(reads_another);
                same_residual && first.parts.len() == 1 && same_format
            }
            _ => false,
        };
        match joinable {
            true => merge(fused, at - 1, at),
            false => at += 1,
        }
    }
}

/// Parts of different formats leave for operations of their own. A gate keeps its partner: where they differ, the lowering
/// finds both in one operation and refuses.
fn split_formats(fused: &mut Vec<FusedOp>, format_of: &dyn Fn(MatrixId) -> &'static str) {
    let split = |op: FusedOp| -> Vec<FusedOp> {
        let MatvecSpec { inputs, parts, join } = match op {
            FusedOp::Matvec(spec) if spec.join == Join::Apart => spec,
            FusedOp::Embed(_) | FusedOp::Matvec(_) | FusedOp::Attention(_) => return vec![op],
            FusedOp::NormAdd(_) | FusedOp::Experts(_) => return vec![op],
        };
        let mut by_format: Vec<Vec<FusedPart>> = Vec::new();
        for part in parts {
            match by_format.iter_mut().find(|group| format_of(group[0].weight) == format_of(part.weight)) {
                Some(group) => group.push(part),
                None => by_format.push(vec![part]),
            }
        }
        let op = |parts| FusedOp::Matvec(MatvecSpec { inputs: inputs.clone(), parts, join });
        by_format.into_iter().map(op).collect()
    };
    *fused = std::mem::take(fused).into_iter().flat_map(split).collect();
}
