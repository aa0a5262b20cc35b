//! Mixtures of experts as checkpoints hold them: a matrix for each expert, or all of them in 3-D tensors, as transformers 5 has them.

use candle_core::{Result, bail};

use super::config::check_sizes;
use crate::plan::{
    BufferId, Builder, Elsewhere, Expert, ExpertMatrix, ExpertWeighting, GatedActivation, MatrixSpec, Mixture, Path,
    Role, TensorSlice, VectorKind, VectorSpec,
};

/// A router and the experts that it chooses among.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsBlock {
    pub experts: usize,
    pub top_k: usize,
    pub intermediate: usize,
    pub weighting: ExpertWeighting,
    pub activation: GatedActivation,
    /// Biases of the router and of every matrix.
    pub bias: bool,
    /// Part of a layer's names: `mlp`.
    pub module: &'static str,
    /// The router's name in the module.
    pub router: &'static str,
    /// Names of gate, up and down.
    pub matrices: [&'static str; 3],
    /// How 3-D tensors hold the matrices.
    pub packing: Packing,
}

/// How `mlp.experts.gate_up_proj` and `mlp.experts.down_proj` hold the matrices of all experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// `[experts, out, in]`, the rows of gate before those of up.
    RowsInTurn,
    /// `[experts, in, out]`, the columns of gate and up in turn (gpt-oss).
    InterleavedColumns,
}

impl ExpertsBlock {
    /// # Errors
    /// If there are no experts, too many in `layers`, or a token needs more than there are.
    pub fn check(&self, layers: usize) -> Result<()> {
        check_sizes(&[
            ("number of experts", self.experts),
            ("num_experts_per_tok", self.top_k),
            ("intermediate size of an expert", self.intermediate),
        ])?;
        if self.top_k > self.experts {
            bail!("config.json says `num_experts_per_tok` {} of {} experts", self.top_k, self.experts);
        }
        if self.experts.saturating_mul(layers) > MOST_EXPERTS {
            bail!("config.json says {} experts in {layers} layers; it must be at most {MOST_EXPERTS}", self.experts);
        }
        Ok(())
    }

    /// The mixture of the layer `block` over `x`, whose rows have `hidden` elements.
    pub(super) fn build(&self, b: &mut Builder, block: &Path, x: BufferId, hidden: usize) -> BufferId {
        let path = block.at(self.module);
        let router = b.linear_as(Role::Router, x, path.at(self.router), self.experts, self.bias);
        // transformers 5 calls every module of experts `mlp`.
        b.also_named(router, &block.at("mlp").at(self.router));
        let n = self.intermediate;
        let part = |b: &mut Builder, expert, which, (n, k)| self.matrix(b, block, (expert, which), (n, k));
        let experts = (0..self.experts).map(|expert| Expert {
            gate: part(b, expert, 0, (n, hidden)),
            up: part(b, expert, 1, (n, hidden)),
            down: part(b, expert, 2, (hidden, n)),
        });
        let experts = experts.collect();
        let Self { top_k, weighting, activation, .. } = *self;
        b.experts(x, router, Mixture { experts, top_k, weighting, activation })
    }

    /// Gate (0), up (1) or down (2) of one expert.
    fn matrix(
        &self,
        b: &mut Builder,
        block: &Path,
        (expert, which): (usize, usize),
        (n, k): (usize, usize),
    ) -> ExpertMatrix {
        let path = block.at(self.module).at("experts").at(expert).at(self.matrices[which]);
        let packed = block.at("mlp").at("experts").name(if which == 2 { "down_proj" } else { "gate_up_proj" });
        let (start, step, rows) = match (which, self.packing) {
            (2, _) => (0, 1, n),
            (_, Packing::RowsInTurn) => (which * n, 1, 2 * n),
            (_, Packing::InterleavedColumns) => (which, 2, 2 * n),
        };
        let slice =
            |transposed| Some(TensorSlice { index: expert, count: self.experts, start, step, rows, transposed });
        let bias = self.bias.then(|| {
            let others = vec![Elsewhere { tensor: format!("{packed}_bias"), slice: slice(false) }];
            b.packed_vector(VectorSpec { name: path.name("bias"), len: n, kind: VectorKind::Bias, others })
        });
        let others = vec![Elsewhere { tensor: packed, slice: slice(self.packing == Packing::InterleavedColumns) }];
        let spec = MatrixSpec { name: path.name("weight"), n, k, role: Role::Expert, others, held: None };
        ExpertMatrix { weight: b.packed_matrix(spec), bias }
    }
}

/// Bound on the experts of all layers, above any model's.
const MOST_EXPERTS: usize = 1 << 17;
