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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::{Device, Setup};
    use crate::events::Silent;
    use crate::plan::Op;
    use crate::quant::{FormatId, FormatOptions};
    use crate::weights::policy::Formats;
    use crate::weights::random::Random;

    /// Choices of each expert in each layer, of random weights over 512 different tokens.
    fn choices() -> Vec<Vec<usize>> {
        let config = json!({
            "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
            "moe_intermediate_size": 64, "norm_topk_prob": true
        });
        let model = crate::models::build(&config).unwrap();
        let source = Random::new(0, 0, &model.matrices, &model.vectors);
        let setup = Setup {
            model: &model,
            source: &source,
            formats: &Formats::new(FormatId::named("fp16").expect("a format"), FormatOptions::default()),
            device: Device::Cpu,
            threads: 2,
            sequences: 1,
            kv_format: Device::Cpu.kv_format(),
            capacity: 512,
            encoder_capacity: 0,
            cuda_graph: false,
        };
        let finish = |_: &crate::weights::spec::MatrixSpec, stored: Box<dyn crate::quant::Stored>| {
            Ok(Box::new(crate::engine::reference::Oracle(stored)) as Box<dyn crate::engine::reference::Linear>)
        };
        let tensors = crate::engine::load::stream(&setup, &Silent, &finish).unwrap();
        let mut session =
            Reference::of(&setup, tensors.matrices, tensors.vectors, candle_core::Device::Cpu, DType::F32).unwrap();
        let tokens: Vec<u32> = (0..512).map(|i| i * 389 % 1024).collect();
        let plan = model.decoder.clone();
        let buffers = session.run(&plan, &tokens).unwrap();
        let mixtures = plan.ops.iter().filter_map(|op| if let Op::Experts(spec) = op { Some(spec) } else { None });
        let of_layer = |spec: &ExpertsSpec| {
            let mut counts = vec![0; spec.experts.len()];
            let mut routing = Routing::default();
            for scores in buffers.get(spec.scores).unwrap().to_vec2::<f32>().unwrap() {
                routing.choose(&scores, spec.top_k, spec.weighting).iter().for_each(|(expert, _)| counts[*expert] += 1);
            }
            counts
        };
        mixtures.map(of_layer).collect()
    }

    /// A load-balancing loss holds the largest load of a trained router near the mean: below four times it, with no expert idle.
    #[test]
    fn a_random_router_spreads_over_all_experts() {
        for counts in choices() {
            let mean = 512 * 4 / 32;
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            println!("choices of an expert: {least} to {most}, {mean} on average");
            assert!(*least > 0 && *most < 4 * mean, "{counts:?}");
        }
    }
}
