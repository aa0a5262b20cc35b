//! Mixtures of experts on candle tensors, expert by expert over the rows that chose it.

use candle_core::{DType, Result, Tensor};

use super::{Reference, activate};
use crate::engine::routing::Routing;
use crate::plan::{CLAMPED_SWIGLU_ALPHA, Expert, ExpertMatrix, ExpertsSpec, GatedActivation};

impl Reference {
    /// `x` `[t, hidden]` through the experts that `scores` `[t, experts]` choose, `[t, hidden]`.
    pub(super) fn experts(&self, spec: &ExpertsSpec, x: &Tensor, scores: &Tensor) -> Result<Tensor> {
        let scores = scores.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let mut routing = Routing::default();
        let choices = scores.iter().map(|scores| routing.choose(scores, spec.top_k, spec.weighting).to_vec());
        let chosen: Vec<Vec<(usize, f32)>> = choices.collect();
        let mut out = Tensor::zeros((x.dim(0)?, self.width_of(spec)), DType::F32, &self.device)?;
        for (index, expert) in spec.experts.iter().enumerate() {
            let found = |(row, chosen): (usize, &Vec<(usize, f32)>)| {
                chosen.iter().find(|(expert, _)| *expert == index).map(|(_, weight)| (row as u32, *weight))
            };
            let (rows, weights): (Vec<u32>, Vec<f32>) = chosen.iter().enumerate().filter_map(found).unzip();
            if rows.is_empty() {
                continue;
            }
            let (count, rows) = (rows.len(), Tensor::new(rows, &self.device)?);
            let y = self.expert(expert, spec.activation, &x.index_select(&rows, 0)?)?.to_dtype(DType::F32)?;
            let weights = Tensor::from_vec(weights, (count, 1), &self.device)?;
            out = out.index_add(&rows, &y.broadcast_mul(&weights)?, 0)?;
        }
        out.to_dtype(self.compute)
    }

    fn width_of(&self, spec: &ExpertsSpec) -> usize {
        spec.experts.first().map_or(0, |expert| self.model.matrices[expert.down.weight.0].n)
    }

    fn expert(&self, expert: &Expert, activation: GatedActivation, x: &Tensor) -> Result<Tensor> {
        let multiply = |ExpertMatrix { weight, bias }: ExpertMatrix, x: &Tensor| {
            self.biased(self.matrices[weight.0].forward(&x.contiguous()?)?, bias)
        };
        let (gate, up) = (multiply(expert.gate, x)?, multiply(expert.up, x)?);
        let h = match activation {
            GatedActivation::Plain(kind) => (activate(kind, &gate)? * up)?,
            GatedActivation::ClampedSwiglu { limit } => clamped_swiglu(&gate, &up, limit)?,
        };
        multiply(expert.down, &h)
    }
}

/// `(up + 1) · g · σ(1.702 g)`, `g` being the gate clamped from above, and `up` clamped on both sides.
fn clamped_swiglu(gate: &Tensor, up: &Tensor, limit: f32) -> Result<Tensor> {
    let gate = gate.minimum(limit)?;
    let up = up.clamp(-limit, limit)?;
    // g · σ(α g) = silu(α g) / α
    let glu = ((&gate * CLAMPED_SWIGLU_ALPHA as f64)?.silu()? / CLAMPED_SWIGLU_ALPHA as f64)?;
    (up + 1.0)? * glu
}
